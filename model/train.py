"""The training loop (Ho et al. 2020, algorithm 1). A run is a folder: a checkpoint of the EMA weights, and its state.

All that is random in step k is seeded by (seed, k), so a run that is stopped and resumed ends as if it never stopped.
"""

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tminus.model.checkpoint import Labels, load_checkpoint, read_recommended, save_checkpoint
from tminus.model.data import ImageSet
from tminus.model.ema import Ema
from tminus.model.files import write_atomically
from tminus.model.loss import l_simple, training_target
from tminus.model.noise import NoiseConfig, NoiseSchedule
from tminus.model.pixels import to_model_range
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig

log = logging.getLogger(__name__)

STATE_FILE = "training-state.pt"
LOSS_SMOOTHING = 0.99
FIRST_LINE, LINE_EVERY = 10, 100  # steps after which the log has a line, where there is no terminal for a bar
TIMED_PASSES = 3  # of each precision; the fastest counts


class TrainError(Exception):
    """A run cannot start or continue; the message says why."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The settings of a run. When it is resumed only those in FREE_TO_CHANGE may differ."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    decay_fraction: float = 0.2  # the last part of the run, over which the rate falls linearly to zero
    ema_decay: float = 0.999
    class_dropout: float = 0.1  # how often the null class replaces a label (Ho & Salimans 2022, algorithm 1)
    flip: bool = False
    grad_clip: float = 1.0
    seed: int = 0
    precision: str = "auto"  # fp32, bf16 (autocast), or auto: whichever measures faster
    compile: bool = False
    save_every: int = 500
    sheet_every: int = 1000

    def __post_init__(self) -> None:
        def require(ok: bool, field: str, bound: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {bound}, got {getattr(self, field)!r}")

        for field in ("steps", "batch_size", "save_every", "sheet_every"):
            require(getattr(self, field) >= 1, field, "1 or more")
        require(0 <= self.learning_rate < math.inf, "learning_rate", "0 or more")
        require(self.grad_clip > 0, "grad_clip", "above 0")
        for field in ("class_dropout", "decay_fraction", "ema_decay"):
            require(0 <= getattr(self, field) <= 1, field, "in 0..1")
        require(self.warmup_steps >= 0, "warmup_steps", "0 or more")
        require(self.precision in ("auto", "fp32", "bf16"), "precision", "auto, fp32 or bf16")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, then linear decay to zero."""
        warm = (step + 1) / max(1, self.warmup_steps)
        left = (self.steps - step) / max(1.0, self.steps * self.decay_fraction)
        return self.learning_rate * min(warm, left, 1.0)


FREE_TO_CHANGE = ("steps", "save_every", "sheet_every", "compile", "learning_rate", "decay_fraction")


def train(
    folder: Path,
    data: ImageSet,
    unet: UNetConfig,
    noise: NoiseConfig,
    config: TrainConfig,
    *,
    device: torch.device,
    init_from: Path | None = None,
    on_sheet: Callable[[UNet2D, int], None] | None = None,
) -> bool:
    """Train in `folder`, resuming from its state if there is one. True when all steps are done, False if interrupted.

    `init_from` starts a new run from another checkpoint's weights, with fresh optimiser state. SIGINT or SIGTERM
    finishes the step, saves and returns. Raises TrainError, CheckpointError.
    """
    if noise.variance_type == "learned_range":
        raise TrainError("a learned variance is served but not trained; choose fixed_small or fixed_large")

    # The state: weights, their average, the optimiser's moments, the step.
    torch.manual_seed(step_seed(config.seed, -1))
    net = UNet2D(unet).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    begun = (folder / STATE_FILE).is_file()
    recommended = None  # settings for sampling: the run keeps its own, or those of its origin
    if init_from is not None and not begun:
        begin_with = load_checkpoint(init_from)
        net.load_state_dict(begin_with.net.state_dict())
        if begin_with.recommended is not None and begin_with.recommended.steps <= noise.num_train_timesteps:
            recommended = begin_with.recommended
    ema = Ema(net, config.ema_decay)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
    step, origin = 0, str(init_from) if init_from is not None else None
    identity: dict[str, Any] = {f"unet {key}": value for key, value in unet.to_dict().items()}
    identity |= {f"noise {key}": value for key, value in noise.to_dict().items()}
    identity |= {"data": f"{data.name}, {len(data)} images"}
    if begun:
        step, origin, config = _resume(folder, net, ema, optimizer, config, identity)
    net = net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    # The data, and the null class that replaces dropped labels.
    schedule = NoiseSchedule(noise.schedule().betas.to(device))  # on the device, so that no step waits for the host
    images, labels = data.images.to(device), data.labels.to(device) if data.labels is not None else None
    null_class = unet.num_class_embeds - 1 if unet.num_class_embeds is not None else None
    labels_meta = Labels(data.class_names, null_class)
    if begun:
        recommended = read_recommended(folder, noise, labels_meta)
    batch_shape = (config.batch_size, *images.shape[1:])
    if config.precision == "auto":  # chosen once: a resumed run must continue in the same one
        config = dataclasses.replace(config, precision=faster_precision(net, batch_shape, device))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    forward: Callable[..., Tensor] = torch.compile(net) if config.compile else net
    log.info("%s: step %d of %d, %s, %s", folder, step, config.steps, device, config.precision)

    def save() -> None:
        provenance = {
            "trained_by": "tminus train",
            "data": data.name,
            "init_from": origin,
            "step": step,
            "images_seen": step * config.batch_size,
            "config": dataclasses.asdict(config),
        }
        save_checkpoint(folder, ema.shadow, unet, noise, labels_meta, provenance, recommended)
        state = {
            "step": step,
            "init_from": origin,
            "identity": identity,
            "net": net.state_dict(),
            "ema": ema.shadow,
            "optimizer": optimizer.state_dict(),
            "config": dataclasses.asdict(config),
        }
        write_atomically(folder / STATE_FILE, lambda path: torch.save(state, path))

    progress = tqdm(total=config.steps, initial=step, unit="step", smoothing=0.05, dynamic_ncols=True, disable=None)
    loss_mean: Tensor | None = None
    with progress, _interruptible() as interrupted:
        while step < config.steps and not interrupted():
            started = time.perf_counter()

            # Algorithm 1: x_0 from the data, t uniform, eps normal, all a function of (seed, step).
            torch.manual_seed(step_seed(config.seed, step))
            picked = batch_indices(len(data), config.batch_size, config.seed, step).to(device)
            x_0 = to_model_range(images[picked]).to(memory_format=torch.channels_last)
            if config.flip:
                x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5, x_0.flip(3), x_0)
            t = torch.randint(schedule.num_timesteps, (len(x_0),), device=device)
            eps = torch.randn_like(x_0)
            classes = None
            if labels is not None and null_class is not None:
                dropped = torch.rand(len(x_0), device=device) < config.class_dropout
                classes = torch.where(dropped, null_class, labels[picked])

            # One descent step on L_simple.
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            with autocast:
                out = forward(schedule.q_sample(x_0, t, eps), t, classes)
            loss = l_simple(out, training_target(schedule, noise.prediction_type, x_0, t, eps))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
            optimizer.step()
            ema.update(net, step)
            step += 1

            # Progress, for people to watch.
            loss = loss.detach()
            loss_mean = loss if loss_mean is None else loss_mean.lerp(loss, 1 - LOSS_SMOOTHING)
            progress.update()
            if step % 10 == 0 or step % config.save_every == 0 or step == config.steps or interrupted():
                if not bool(torch.isfinite(loss_mean + grad_norm)):
                    raise TrainError(f"step {step}: the loss or its gradient is not finite; the last save is intact")
                rate = config.batch_size / (time.perf_counter() - started)
                figures = {"loss": f"{float(loss_mean):.4f}", "images_s": f"{rate:.0f}"}
                progress.set_postfix(figures, refresh=False)
                if progress.disable and (step % LINE_EVERY == 0 or step in (FIRST_LINE, config.steps)):
                    log.info("step %d of %d, %s", step, config.steps, ", ".join(map("=".join, figures.items())))
            if step % config.save_every == 0 and step < config.steps:
                save()
            if on_sheet is not None and (step % config.sheet_every == 0 or step == config.steps):
                on_sheet(_averaged(unet, ema), step)
        save()
    return step >= config.steps


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


def step_seed(seed: int, step: int) -> int:
    """Mix (seed, step) into 63 bits by splitmix64's finaliser, so that neighbouring steps share no randomness."""
    z = (seed * 0x9E3779B97F4A7C15 + step) & 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1


def faster_precision(net: UNet2D, batch_shape: tuple[int, ...], device: torch.device) -> str:
    """Time forward and backward in fp32 and in bf16 autocast, and name the faster. Leaves the weights as they were."""
    x, t = torch.randn(batch_shape, device=device), torch.zeros(batch_shape[0], dtype=torch.long, device=device)
    x = x.to(memory_format=torch.channels_last)
    classes = t if net.class_embedding is not None else None
    seconds = {}
    for precision in ("fp32", "bf16"):
        timings = []
        for _ in range(TIMED_PASSES):
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                out = net(x, t, classes)
            out.float().square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            timings.append(time.perf_counter() - started)
            net.zero_grad(set_to_none=True)
        seconds[precision] = min(timings)
    return min(seconds, key=lambda name: seconds[name])


def _resume(
    folder: Path,
    net: UNet2D,
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    identity: Mapping[str, Any],
) -> tuple[int, str | None, TrainConfig]:
    """Load the saved state into the objects given; returns the next step, the run's origin and its config."""
    file = folder / STATE_FILE
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        step, origin, was = int(state["step"]), state["init_from"], {**state["config"], **state["identity"]}
        if config.precision == "auto":
            config = dataclasses.replace(config, precision=was["precision"])
        now = {**dataclasses.asdict(config), **identity}
        for field in sorted(now.keys() - FREE_TO_CHANGE):
            if was.get(field) != now[field]:
                raise TrainError(f"{folder}: this run was begun with {field}={was.get(field)!r}, got {now[field]!r}")
        net.load_state_dict(state["net"])
        ema.load(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
    except TrainError:
        raise
    except Exception as error:
        raise TrainError(f"{file}: cannot resume from it ({error}); remove it or choose another folder") from error
    return step, origin, config


def _averaged(unet: UNetConfig, ema: Ema) -> UNet2D:
    with torch.device("meta"):
        net = UNet2D(unet)
    net.load_state_dict(ema.shadow, assign=True)
    return net.requires_grad_(False).eval()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within the context SIGINT and SIGTERM stop nothing; the yielded function says whether one has come."""
    received: list[int] = []

    def note(signum: int, _frame: object) -> None:
        received.append(signum)

    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
