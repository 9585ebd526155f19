"""Trains an autoencoder (Rombach et al. 2022, sec. 3.1, without the adversarial loss).

diffusers can load the folder of the run. As in train.py, all random numbers of step k are seeded by (seed, k).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tminus.model.checkpoint import TMINUS_FILE
from tminus.model.files import write_json
from tminus.model.latent.autoencoder import Autoencoder, AutoencoderConfig, latents_of, save_autoencoder
from tminus.model.pixels import to_model_range
from tminus.model.training.config import AutoencoderTrainConfig
from tminus.model.training.data import ImageSet, evenly
from tminus.model.training.run import Run, TrainError, averaged, step_seed
from tminus.model.training.train import batch_indices

COMMITMENT = 0.25  # weight of the commitment loss (van den Oord et al. 2017, eq. 3)
SCALE_IMAGES = 512  # number of training images that determine the latents' scaling factor


def train_autoencoder(
    folder: Path,
    data: ImageSet,
    model: AutoencoderConfig,
    config: AutoencoderTrainConfig,
    *,
    device: torch.device,
    on_sheet: Callable[[Autoencoder, int], None] | None = None,
) -> bool:
    """Train an autoencoder in `folder`, or resume the run there. Returns whether all steps are done.

    On SIGTERM or SIGINT, finishes the current step and saves. After SIGINT, also raises KeyboardInterrupt if steps are
    left. Raises TrainError if the run cannot start or continue.
    """
    run = Run(folder, "train-autoencoder", None)
    torch.manual_seed(step_seed(config.seed, -1))
    net = Autoencoder(model).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
    identity: dict[str, Any] = {f"autoencoder {key}": value for key, value in model.to_dict().items()}
    identity |= {"data": f"{data.name}, {len(data)} images"}
    images = data.images.to(device)
    few = to_model_range(images[: config.batch_size])
    config = run.begin(net, optimizer, config, identity, device, lambda: net.decode_codes(net.moments(few)[0]))
    compiled: Callable[..., Tensor] = torch.compile(reconstruction_loss) if config.compile else reconstruction_loss

    def loss_of(step: int) -> Tensor:
        picked = batch_indices(len(data), config.batch_size, config.seed, step).to(device)
        x = to_model_range(images[picked]).to(memory_format=torch.channels_last)
        if step == 0 and net.quantize is not None:
            _begin_codes(net, x)
        with run.autocast:
            return compiled(net, x, config.kl_weight)

    def save() -> None:
        average = averaged(lambda: Autoencoder(model), run.ema)
        some = images[evenly(len(images), min(len(images), SCALE_IMAGES))]  # The data may be sorted by class.
        spread = float(latents_of(average, some, device).std()) / model.scaling_factor
        if not spread > 0:
            raise TrainError(f"step {run.step}: all latents are alike; the last save is intact")
        scale = 1 / spread
        save_autoencoder(folder, dataclasses.replace(model, scaling_factor=scale), run.ema.shadow)
        provenance = run.provenance(config, data=data.name)
        write_json(folder / TMINUS_FILE, {"name": folder.resolve().name, "provenance": provenance})

    def look() -> None:
        if on_sheet is not None:
            on_sheet(averaged(lambda: Autoencoder(model), run.ema), run.step)

    return run.descend(config, loss_of, save, look)


def reconstruction_loss(net: Autoencoder, x: Tensor, kl_weight: float) -> Tensor:
    """Return the mean absolute error of reconstructing x [B, C, H, W], plus a regulariser of the latents.

    For an AutoencoderKL, the regulariser is kl_weight times the divergence of q(z|x) from N(0, I) (Kingma & Welling
    2014, appendix B). For a VQModel, it is the distance between latents and codes, with a straight-through gradient
    (van den Oord et al. 2017).
    """
    mean, logvar = net.moments(x)
    if net.quantize is not None:
        codes, _ = net.quantize(mean)
        held = F.mse_loss(codes, mean.detach()) + COMMITMENT * F.mse_loss(mean, codes.detach())
        z = mean + (codes - mean).detach()
    else:
        assert logvar is not None
        held = kl_weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    return F.l1_loss(net.decode_codes(z).float(), x) + held


@torch.no_grad()
def _begin_codes(net: Autoencoder, x: Tensor) -> None:
    """Replace the initial codes, which are near zero and would mostly remain unused, with latents of images.

    Raises TrainError if the batch has fewer latents than there are codes.
    """
    assert net.quantize is not None
    z = net.moments(x)[0].movedim(1, -1).flatten(0, -2)
    count = len(net.quantize.codes)
    if len(z) < count:
        raise TrainError(f"a batch has {len(z)} latents for {count} codes; take a larger batch or fewer codes")
    net.quantize.codes.copy_(z[torch.randperm(len(z), device=z.device)[:count]])
