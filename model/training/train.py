"""Trains a U-Net (Ho et al. 2020, algorithm 1).

A run is a folder with its state and a checkpoint of the averaged weights (EMA). All random numbers of step k are seeded
by (seed, k), so stopping and resuming a run does not change its result.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tminus.model.catalogue import SAMPLER_FACTS, TABLE_SAMPLERS, Recommended, usual_settings
from tminus.model.checkpoint import Checkpoint, Labels, TminusJson, load_checkpoint, save_checkpoint
from tminus.model.denoiser import Denoiser
from tminus.model.latent.autoencoder import Autoencoder, check_place, hash_autoencoder
from tminus.model.loss import draw_timesteps, l_simple, lognormal_timesteps, velocity_weights
from tminus.model.noise import NoiseConfig
from tminus.model.parametrization import as_ours
from tminus.model.training.config import TrainConfig
from tminus.model.training.data import Examples, ImageSet
from tminus.model.training.held_out import HeldOutLoss, unlike
from tminus.model.training.muon import Muon
from tminus.model.training.run import Run, TrainError, averaged, example_pass, step_seed
from tminus.model.training.targets import (
    Batch,
    GuidedTarget,
    PlainTarget,
    StableTarget,
    Target,
    check_teacher,
    product_of,
    teacher_of,
)
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig
from tminus.model.weights import misfit

GUIDANCE = 1.5  # first recommendation for a network that has learned a null class


def train(
    folder: Path,
    data: ImageSet,
    unet: UNetConfig,
    noise: NoiseConfig,
    config: TrainConfig,
    *,
    device: torch.device,
    init_from: Path | None = None,
    autoencoder: Autoencoder | None = None,
    held_out: ImageSet | None = None,
    on_sheet: Callable[[Denoiser, int], None] | None = None,
) -> bool:
    """Train a U-Net in `folder`, or resume the run there. Returns whether all steps are done.

    `init_from` is a checkpoint whose weights a new run starts from, with a fresh optimiser. When resuming, it may be
    left out; if given, it must be the same checkpoint. With config.guidance, x_t comes from the data as usual, but the
    target is what these initial weights predict with classifier-free guidance (Meng et al. 2023, sec. 3.1). With
    `autoencoder`, the run trains a latent model: x_0 are latents of the images (Rombach et al. 2022).

    Every `sheet_every` steps and at the end, the averaged network is measured on `held_out`, whose image shape and
    classes must be those of the data. `on_sheet` receives the averaged network at the same steps, and after some early
    steps.

    On SIGTERM or SIGINT, finishes the current step and saves. After SIGINT, also raises KeyboardInterrupt if steps are
    left. Raises TrainError and CheckpointError.
    """
    run = Run(folder, "train", str(init_from) if init_from is not None else None)
    _check(run, data, unet, noise, config, autoencoder, held_out)

    # The state of the run: weights, their average, the optimiser's moments, and the step.
    torch.manual_seed(step_seed(config.seed, -1))
    net = UNet2D(unet).to(device)
    origin = None
    if init_from is not None and not run.begun:
        origin = _origin(init_from, net)
        net.load_state_dict(origin.net.state_dict())
        if config.guidance != 1:
            check_teacher(init_from, origin, unet, noise, data.class_names, autoencoder)
    teacher = teacher_of(net) if config.guidance != 1 else None  # When resuming, run.begin() loads its weights.
    rate = config.learning_rate
    optimizer = Muon(net, rate) if config.optimizer == "muon" else torch.optim.Adam(net.parameters(), rate, fused=True)
    identity: dict[str, Any] = {f"unet {key}": value for key, value in unet.to_dict().items()}
    identity |= {f"noise {key}": value for key, value in noise.to_dict().items()}
    # Use the data's class names, because users may edit those in tminus.json.
    identity |= {"data": f"{data.name}, {len(data)} images", "class_names": data.class_names}
    if autoencoder is not None:
        identity |= {"autoencoder": hash_autoencoder(autoencoder)}
    assert unet.size_px is not None
    forwards = example_pass(net, (config.batch_size, unet.in_channels, *unet.size_px), device)
    config = run.begin(net, optimizer, config, identity, device, forwards, remembered=teacher)
    if init_from is not None and (run.origin is None or Path(run.origin).resolve() != init_from.resolve()):
        was = f"init_from={run.origin!r}, got {str(init_from)!r}"
        raise TrainError(f"{folder}: this run was begun with {was}; leave --init-from out to go on")
    null_class = unet.num_class_embeds - 1 if unet.num_class_embeds is not None else None
    labels, recommended, folded_guidance = _for_tminus_json(run, config, unet, noise, data.class_names, origin)

    # The data, and the network's forward pass.
    schedule = noise.schedule().to(device)
    examples = Examples.of(data, autoencoder, device)
    # Compile for fixed shapes. Otherwise, the second of two networks would be compiled for any batch size.
    forward = as_ours(torch.compile(net, dynamic=False) if config.compile else net, noise, schedule)

    # What the settings choose: sampling of t, weights of timesteps, the target, and measurement on held-out images.
    share = lognormal_timesteps(noise.schedule()).to(device) if config.timestep_sampling == "lognormal" else None
    weights = None
    if config.weighting == "velocity":
        weights = velocity_weights(noise, noise.schedule()).to(device, torch.float32)
    target_of: Target = PlainTarget(noise, schedule)
    if config.stable_target:
        target_of = StableTarget(examples, noise, schedule)
    if teacher is not None:
        guide = as_ours(torch.compile(teacher, dynamic=False) if config.compile else teacher, noise, schedule)
        target_of = GuidedTarget(guide, null_class, config.guidance, run.autocast)
    measured = None
    if held_out is not None and run.step < config.steps:
        measured = HeldOutLoss(examples, held_out, autoencoder, noise, schedule, weights)

    def draw(step: int) -> Batch:
        """Draw the batch of a step: permuted images, t uniform or weighted by `share`, and normal eps."""
        of_batch = batch_indices(len(data), config.batch_size, config.seed, step)
        picked = of_batch.to(device)
        x_0 = examples.rows(picked).to(memory_format=torch.channels_last)
        if config.flip:
            x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5, x_0.flip(3), x_0)
        if share is None:
            t = torch.randint(schedule.num_timesteps, (len(x_0),), device=device)
        else:
            t = draw_timesteps(share, len(x_0))
        eps = torch.randn_like(x_0)
        class_labels = None
        if examples.class_labels is not None and null_class is not None:
            dropped = torch.rand(len(x_0), device=device) < config.class_dropout
            class_labels = torch.where(dropped, null_class, examples.class_labels[picked])
        return Batch(x_0, t, eps, schedule.q_sample(x_0, t, eps), class_labels, of_batch)

    def loss_of(step: int) -> Tensor:
        """Return the loss of a step (Ho et al. 2020, algorithm 1)."""
        batch = draw(step)
        target = target_of(batch)
        with run.autocast:
            out = forward(batch.x_t, batch.t, batch.class_labels)
        return l_simple(out, target, weights[batch.t] if weights is not None else None)

    def save() -> None:
        provenance = run.provenance(config, data=data.name, init_from=run.origin)
        save_checkpoint(
            folder,
            run.ema.shadow,
            unet,
            noise,
            labels,
            provenance,
            recommended,
            autoencoder=autoencoder,
            folded_guidance=folded_guidance,
        )

    def look() -> None:
        average: Denoiser = averaged(lambda: UNet2D(unet), run.ema)
        if measured is not None and (run.step % config.sheet_every == 0 or run.step == config.steps):
            measured.note(folder, run.step, average, config.batch_size)
        if on_sheet is not None:
            on_sheet(average, run.step)

    return run.descend(config, loss_of, save, look)


def _check(
    run: Run,
    data: ImageSet,
    unet: UNetConfig,
    noise: NoiseConfig,
    config: TrainConfig,
    autoencoder: Autoencoder | None,
    held_out: ImageSet | None,
) -> None:
    """Raise TrainError or CheckpointError if these parts and settings cannot be trained together."""
    if noise.variance_type == "learned_range":
        raise TrainError("a learned variance is served but not trained; choose fixed_small or fixed_large")
    if autoencoder is not None and config.flip:
        raise TrainError("flip mirrors pixels, and a latent model is trained on latents")
    if config.stable_target and config.flip:
        raise TrainError("stable_target takes the images as they are, and flip mirrors half of them")
    if config.guidance != 1:
        if unet.num_class_embeds is None:
            raise TrainError(f"guidance must be 1 (off) for data without classes, got {config.guidance:g}")
        if not run.begun and run.origin is None:
            raise TrainError(f"guidance must be 1 (off) without --init-from, got {config.guidance:g}")
        if config.class_dropout == 0:
            raise TrainError("class_dropout must be above 0 with guidance, or the null class is not learned; got 0")
        if config.stable_target:
            raise TrainError("stable_target is for targets from the data, and with guidance they are another network's")
    if held_out is not None and (wrong := unlike(held_out, data)):
        raise TrainError(wrong)
    check_place(run.folder, autoencoder)  # Fail now, not at the first save.


def _origin(folder: Path, net: UNet2D) -> Checkpoint:
    """Load the checkpoint that a new run starts from. Raises TrainError if it does not fit the network."""
    origin = load_checkpoint(folder)
    if origin.student is not None:
        raise TrainError(f"{folder}: is a student, made for few steps; begin from its teacher")
    if not isinstance(origin.net, UNet2D):
        raise TrainError(f"{folder}: of class {origin.net.config.class_name}; only a UNet2DModel is trained")
    if wrong := misfit(origin.net.state_dict(), net, "this run"):
        raise TrainError(f"{folder}: {wrong}")
    return origin


def _for_tminus_json(
    run: Run,
    config: TrainConfig,
    unet: UNetConfig,
    noise: NoiseConfig,
    class_names: tuple[str, ...],
    origin: Checkpoint | None,
) -> tuple[Labels, Recommended, float | None]:
    """Return values for tminus.json: classes, recommended settings, and the guidance in the weights.

    A resumed run keeps the values that it has. A new run takes `class_names` and the settings of `origin`. Settings
    with a table are not taken, because a table fits only its own weights. In that case, and without any settings, the
    usual ones are recommended. They include guidance if the network learns a null class and its weights contain no
    guidance.
    """
    labels = Labels(class_names, unet.num_class_embeds - 1 if unet.num_class_embeds is not None else None)
    recommended, folded_guidance = None, config.guidance if config.guidance != 1 else None
    if run.begun:
        tminus_json = TminusJson.read(run.folder)
        if labels.null_class is not None and tminus_json.values.get("class_names") is not None:
            labels = tminus_json.labels(unet)
        recommended = tminus_json.recommended(noise, labels)
        if "folded_guidance" in tminus_json.values:
            folded_guidance = tminus_json.folded_guidance()
    elif origin is not None:
        own, T = origin.recommended, noise.num_train_timesteps
        if own is not None and own.steps <= SAMPLER_FACTS[own.sampler].max_steps(T):
            recommended = own
        if config.guidance != 1:
            folded_guidance = product_of(config.guidance, origin)
            recommended = dataclasses.replace(recommended, guidance=1.0) if recommended is not None else None
    if recommended is None or recommended.sampler in TABLE_SAMPLERS:
        guided = labels.null_class is not None and config.class_dropout > 0 and folded_guidance in (None, 1.0)
        usual = usual_settings(noise.num_train_timesteps)
        recommended = dataclasses.replace(usual, guidance=GUIDANCE if guided else 1.0)
    return labels, recommended, folded_guidance


def batch_indices(num_images: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Return the images of a step, int64 [batch_size]. Epochs have different orders, and follow without a gap."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_images
    picked = []
    for epoch in sorted(set(epochs.tolist())):
        order = _epoch_order(num_images, seed, epoch)
        picked.append(order[positions[epochs == epoch] % num_images])
    return torch.cat(picked)


@lru_cache(maxsize=2)  # All steps of an epoch use the same permutation.
def _epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(step_seed(seed, -2 - epoch)))
