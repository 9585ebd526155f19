"""The training loop (Ho et al. 2020, algorithm 1). A run is a folder: a checkpoint of the EMA weights, and its state.

All that is random in step k is seeded by (seed, k), so a run that is stopped and resumed ends as if it never stopped.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tminus.model.catalogue import MAX_GUIDANCE, TABLE_SAMPLERS
from tminus.model.checkpoint import Checkpoint, Labels, load_checkpoint, save_checkpoint
from tminus.model.denoiser import Denoiser
from tminus.model.guidance import Forward, guided
from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.latent.folder import check_place, hash_autoencoder
from tminus.model.latent.latents import latents_of
from tminus.model.loss import (
    draw_timesteps,
    l_simple,
    l_weighted,
    lognormal_timesteps,
    training_target,
    velocity_weights,
)
from tminus.model.noise import NoiseConfig, NoiseSchedule
from tminus.model.pixels import to_model_range
from tminus.model.tminus_file import read_folded_guidance, read_recommended
from tminus.model.training.data import ImageSet
from tminus.model.training.folding import check_teacher, product_of, teacher_of
from tminus.model.training.held_out import BATCH, MEASURED, Examples, examples_of, mean_loss, note_losses, unlike
from tminus.model.training.muon import Muon
from tminus.model.training.posterior_mean import PosteriorMean
from tminus.model.training.run import (
    Ema,
    Progress,
    RunConfig,
    RunState,
    TrainError,
    averaged,
    begun_in,
    faster_precision,
    interruptible,
    step_seed,
    take_threads,
)
from tminus.model.unet import UNet2D, UNetConfig
from tminus.model.weights import misfit

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainConfig(RunConfig):
    """The settings of a run of `train`."""

    class_dropout: float = 0.1  # how often the null class replaces a label (Ho & Salimans 2022, algorithm 1)
    flip: bool = False
    weighting: str = "simple"  # L_simple, or velocity: errors count as those of v do, see loss.velocity_weights
    stable_target: bool = False  # the mean of x_0 given x_t in place of x_0, see posterior_mean
    timestep_sampling: str = "uniform"  # as Ho et al., or lognormal: see loss.lognormal_timesteps
    optimizer: str = "adam"  # or muon, which learns more in a step
    guidance: float = 1.0  # to be folded into the weights: they learn what those of init_from predict with it

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        self.require_share("class_dropout")
        self.require(self.weighting in ("simple", "velocity"), "weighting", "simple or velocity")
        self.require(self.timestep_sampling in ("uniform", "lognormal"), "timestep_sampling", "uniform or lognormal")
        self.require(self.optimizer in ("adam", "muon"), "optimizer", "adam or muon")
        self.require(0 <= self.guidance <= MAX_GUIDANCE, "guidance", f"in 0..{MAX_GUIDANCE:g}")


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
    """Train in `folder`, resuming from its state if there is one. True when all steps are done, False if interrupted.

    `init_from` starts a new run from another checkpoint's weights, with fresh optimiser state; a run that is resumed
    needs it no more, and takes no other. With a guidance, x_t is made of the data as ever, and the target is what those
    weights predict of it with classifier-free guidance (Meng et al. 2023, sec. 3.1). `autoencoder` makes the run one of
    a latent model (Rombach et al. 2022): x_0 are the latents of the images. Each `sheet_every` steps and at the end the
    averaged network is measured on `held_out`, of the same shape and classes as the data, and handed to `on_sheet`.
    SIGTERM finishes the step, saves and returns False. SIGINT does the same, and then raises KeyboardInterrupt.
    Raises TrainError, CheckpointError.
    """
    if noise.variance_type == "learned_range":
        raise TrainError("a learned variance is served but not trained; choose fixed_small or fixed_large")
    if autoencoder is not None and config.flip:
        raise TrainError("flip mirrors pixels, and a latent model is trained on latents")
    if config.stable_target and config.flip:
        raise TrainError("stable_target takes the images as they are, and flip mirrors half of them")
    begun = begun_in(folder)
    if config.guidance != 1:
        _check_guidance(config, unet, has_origin=begun or init_from is not None)
    if held_out is not None and (wrong := unlike(held_out, data)):
        raise TrainError(wrong)
    check_place(folder, autoencoder)  # now, and not at the first save

    # The state: weights, their average, the optimiser's moments, the step.
    torch.manual_seed(step_seed(config.seed, -1))
    net = UNet2D(unet).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    recommended, folded_guidance = None, config.guidance if config.guidance != 1 else None
    if init_from is not None and not begun:
        origin = _origin(init_from, net)
        net.load_state_dict(origin.net.state_dict())
        if (own := origin.recommended) is not None and own.steps <= noise.num_train_timesteps:
            recommended = own
        if config.guidance != 1:
            check_teacher(init_from, origin, unet, noise, data.class_names, autoencoder)
            folded_guidance = product_of(config.guidance, origin)
            recommended = dataclasses.replace(recommended, guidance=1.0) if recommended is not None else None
    rate = config.learning_rate
    optimizer = Muon(net, rate) if config.optimizer == "muon" else torch.optim.Adam(net.parameters(), rate, fused=True)
    run = RunState(net, Ema(net, config.ema_decay), optimizer, str(init_from) if init_from is not None else None)
    identity: dict[str, Any] = {f"unet {key}": value for key, value in unet.to_dict().items()}
    identity |= {f"noise {key}": value for key, value in noise.to_dict().items()}
    identity |= {"data": f"{data.name}, {len(data)} images"}
    if autoencoder is not None:
        identity |= {"autoencoder": hash_autoencoder(autoencoder)}
    teacher = None
    if config.guidance != 1:
        teacher = run.remembered = teacher_of(net)  # a run that is resumed has it in its state
    if begun:
        config = run.resume(folder, "train", config, identity)
        if init_from is not None and (run.origin is None or Path(run.origin).resolve() != init_from.resolve()):
            was = f"init_from={run.origin!r}, got {str(init_from)!r}"
            raise TrainError(f"{folder}: this run was begun with {was}; leave --init-from out to go on")
    config = take_threads(config, device)
    net = net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    weights = None
    if config.weighting == "velocity":
        weights = velocity_weights(noise.schedule(), noise.prediction_type).to(device, torch.float32)
    share = lognormal_timesteps(noise.schedule()).to(device) if config.timestep_sampling == "lognormal" else None

    # The data, x_0 as uint8 pixels or as latents, and the null class that replaces dropped labels.
    schedule = NoiseSchedule(noise.schedule().betas.to(device))  # on the device, so that no step waits for the host
    origins = data.images.to(device) if autoencoder is None else latents_of(autoencoder, data.images, device)
    labels = data.labels.to(device) if data.labels is not None else None
    null_class = unet.num_class_embeds - 1 if unet.num_class_embeds is not None else None
    labels_meta = Labels(data.class_names, null_class)
    posterior_mean = PosteriorMean(origins, labels, schedule) if config.stable_target else None
    measured: tuple[Examples, ...] = ()
    if held_out is not None and run.step < config.steps:
        of_held_out = f"{held_out.name} ({len(held_out)})"
        num_measured = min(len(data), len(held_out), MEASURED)  # as many of both, at the same timesteps then
        measured = Examples(origins, labels), examples_of(held_out, num_measured, autoencoder, device)
    if begun:
        recommended = read_recommended(folder, noise, labels_meta)
        if (so_far := read_folded_guidance(folder)) is not None:
            folded_guidance = so_far
    if recommended is not None and recommended.sampler in TABLE_SAMPLERS:
        recommended = None  # tables fit only the weights that they were made for
    batch_shape = (config.batch_size, *origins.shape[1:])
    if config.precision == "auto":  # chosen once: a resumed run must continue in the same one
        config = config.with_precision(faster_precision(net, batch_shape, device))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    # Not dynamic, or what is compiled second would be made for batches of any size, as the first has another.
    forward: Forward = torch.compile(net, dynamic=False) if config.compile else net
    teacher_forward: Forward | None = teacher
    if teacher is not None and config.compile:
        teacher_forward = torch.compile(teacher, dynamic=False)
    log.info("%s: step %d of %d, %s, %s", folder, run.step, config.steps, device, config.precision)

    def save() -> None:
        provenance = {
            "trained_by": "tminus train",
            "data": data.name,
            "init_from": run.origin,
            "step": run.step,
            "images_seen": run.step * config.batch_size,
            "config": dataclasses.asdict(config),
        }
        save_checkpoint(
            folder,
            run.ema.shadow,
            unet,
            noise,
            labels_meta,
            provenance,
            recommended,
            autoencoder=autoencoder,
            folded_guidance=folded_guidance,
        )
        run.save(folder, "train", config, identity)

    def look() -> None:
        average = averaged(unet, run.ema)
        if measured:
            size = min(config.batch_size, BATCH)  # it fits the memory that a training step fits
            ours, theirs = (
                mean_loss(average, each, num_measured, schedule, noise.prediction_type, weights, batch_size=size)
                for each in measured
            )
            note_losses(folder, run.step, ours, theirs, of_held_out)
            log.info("step %d: loss of the average %.5f on training images, %.5f held out", run.step, ours, theirs)
        if on_sheet is not None:
            on_sheet(average, run.step)

    began_at = run.step
    with Progress(config, run.step) as progress, interruptible(config, run) as interrupted:
        while run.step < config.steps and not interrupted():
            started = time.perf_counter()

            # Algorithm 1: x_0 from the data, t uniform or by its share, eps normal, all a function of (seed, step).
            torch.manual_seed(step_seed(config.seed, run.step))
            of_batch = batch_indices(len(data), config.batch_size, config.seed, run.step)
            picked = of_batch.to(device)
            x_0 = origins[picked] if autoencoder is not None else to_model_range(origins[picked])
            x_0 = x_0.to(memory_format=torch.channels_last)
            if config.flip:
                x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5, x_0.flip(3), x_0)
            if share is None:
                t = torch.randint(schedule.num_timesteps, (len(x_0),), device=device)
            else:
                t = draw_timesteps(share, len(x_0))
            eps = torch.randn_like(x_0)
            classes = None
            if labels is not None and null_class is not None:
                dropped = torch.rand(len(x_0), device=device) < config.class_dropout
                classes = torch.where(dropped, null_class, labels[picked])

            # What the network is to predict: what made x_t, or what the teacher predicts with guidance.
            x_t = schedule.q_sample(x_0, t, eps)
            if teacher_forward is not None:
                with torch.no_grad(), autocast:
                    target = guided(teacher_forward, x_t, t, classes, null_class, config.guidance).to(torch.float32)
            else:
                if posterior_mean is not None:
                    x_0, eps = posterior_mean.explain(x_t, t, of_batch, x_0, eps)
                target = training_target(schedule, noise.prediction_type, x_0, t, eps)

            # One descent step on L_simple.
            with autocast:
                out = forward(x_t, t, classes)
            loss = l_simple(out, target) if weights is None else l_weighted(out, target, weights[t])
            grad_norm = run.descend(loss, config)

            # Progress, saves, losses and sheets.
            progress.show(run.step, loss, grad_norm, time.perf_counter() - started, last=interrupted())
            if run.step % config.save_every == 0 and run.step < config.steps:
                save()
            if run.step % config.sheet_every == 0 and run.step < config.steps:
                look()
        save()
        if began_at < run.step == config.steps:  # after the save: what fails here costs no steps
            look()
    return run.step >= config.steps


def _check_guidance(config: TrainConfig, unet: UNetConfig, *, has_origin: bool) -> None:
    """Raise TrainError where there is nothing to guide, or where the data's own targets are asked for too."""
    if unet.num_class_embeds is None:
        raise TrainError(f"guidance must be 1 (off) for data without classes, got {config.guidance:g}")
    if not has_origin:
        raise TrainError(f"guidance must be 1 (off) without --init-from, got {config.guidance:g}")
    if config.class_dropout == 0:
        raise TrainError("class_dropout must be above 0 with guidance, or the null class is not learned; got 0")
    if config.stable_target:
        raise TrainError("stable_target is for targets from the data, and with guidance they are another network's")


def _origin(folder: Path, net: UNet2D) -> Checkpoint:
    """The checkpoint whose weights a network begins from. Raises TrainError for one that does not fit."""
    origin = load_checkpoint(folder)
    if origin.student is not None:
        raise TrainError(f"{folder}: is a student, made for few steps; begin from its teacher")
    if not isinstance(origin.net, UNet2D):
        raise TrainError(f"{folder}: of class {origin.net.config.class_name}; only a UNet2DModel is trained")
    if wrong := misfit(origin.net.state_dict(), net, "this run"):
        raise TrainError(f"{folder}: {wrong}")
    return origin


def batch_indices(num_images: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The images of step `step` [batch_size], taken in turn from a fresh permutation per epoch, across epochs."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_images
    picked = []
    for epoch in sorted(set(epochs.tolist())):
        order = _epoch_order(num_images, seed, epoch)
        picked.append(order[positions[epochs == epoch] % num_images])
    return torch.cat(picked)


@lru_cache(maxsize=2)  # every step of an epoch asks for its permutation
def _epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(step_seed(seed, -2 - epoch)))
