"""The settings of training runs. Must not import torch, because command-line options are made from it."""

import math
from dataclasses import dataclass
from typing import Annotated

from tminus.model.catalogue import MAX_GUIDANCE, TEACHERS
from tminus.model.config import Bound, Checked, Count

USUAL_BATCH = 64
LARGE_SET, LARGE_STEPS = 60_000, 15_000  # the size of Fashion-MNIST, and the number of steps it needs
FEWEST_STEPS = 500  # enough for a few dozen images
MAX_STUDENT_STEPS = 4
FIRST_LOOK = 50  # step of the first sheet; further early sheets follow at 2, 4, 8, … times this step

NOT_NEGATIVE = Bound("0 or more", lambda value: 0 <= value < math.inf)
Share = Annotated[float, Bound("in 0..1", lambda share: 0 <= share <= 1)]
Guidance = Annotated[float, Bound(f"in 0..{MAX_GUIDANCE:g}", lambda scale: 0 <= scale <= MAX_GUIDANCE)]
# Settings whose defaults differ between commands.
BatchSize = Annotated[Count, "Images in an optimiser step"]
LearningRate = Annotated[float, NOT_NEGATIVE, "Highest learning rate"]
WarmupSteps = Annotated[int, NOT_NEGATIVE, "Steps over which the learning rate rises from zero"]
DecayFraction = Annotated[Share, "Share of the run, at its end, over which the learning rate falls to zero"]


@dataclass(frozen=True, slots=True)
class RunConfig(Checked):
    """The settings that all runs have. When a run is resumed, only those in run.FREE_TO_CHANGE may change."""

    steps: Annotated[Count, "Optimiser steps in all"] = 10_000
    batch_size: BatchSize = USUAL_BATCH
    learning_rate: LearningRate = 1e-3
    warmup_steps: WarmupSteps = 100
    decay_fraction: DecayFraction = 0.2
    ema_decay: Annotated[Share, "Decay of the moving average of the weights, which the checkpoint gets"] = 0.999
    grad_clip: Annotated[float, Bound("above 0", lambda norm: norm > 0), "Largest L2 norm of the gradient"] = 1.0
    seed: Annotated[int, "Seed of all that is random in the run"] = 0
    precision: str = "auto"
    compile: Annotated[bool, "Compile the networks with torch.compile"] = False
    threads: Annotated[int, NOT_NEGATIVE] = 0
    save_every: Annotated[Count, "Steps between saves"] = 200
    sheet_every: Annotated[Count, "Steps between sheets, which show what the network makes"] = 1000

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        self.require_among("precision", "auto", "fp32", "bf16")

    def looks_at(self, step: int) -> bool:
        """Return whether a sheet follows this step: every `sheet_every` steps, and after some early steps."""
        early, rest = divmod(step, FIRST_LOOK)
        return step % self.sheet_every == 0 or (step < self.sheet_every and rest == 0 and early.bit_count() == 1)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate: first a linear warm-up, then constant, then a linear decay to zero."""
        warm = (step + 1) / max(1, self.warmup_steps)
        left = (self.steps - step) / max(1.0, self.steps * self.decay_fraction)
        return self.learning_rate * min(warm, left, 1.0)


@dataclass(frozen=True, slots=True)
class TrainConfig(RunConfig):
    """The settings of `train`."""

    steps: Annotated[
        Count,
        "Optimiser steps in all  [default: those of the run, or "
        f"{FEWEST_STEPS} to {LARGE_STEPS} by the number of images]",
    ]
    batch_size: Annotated[
        Count,
        f"Images in an optimiser step  [default: those of the run, or {USUAL_BATCH}, or half of the images if they "
        f"are fewer than {2 * USUAL_BATCH}]",
    ]
    optimizer: Annotated[str, "Optimiser: adam, or muon, which learns more in a step"] = "adam"
    class_dropout: Annotated[Share, "Share of labels replaced by the null class, which guidance needs"] = 0.1
    weighting: Annotated[
        str,
        "Weighting of the loss over t: simple, or velocity, where errors near t = T count more (with --prediction "
        "epsilon)",
    ] = "simple"
    stable_target: Annotated[
        bool,
        "Learn the mean of x_0 over all training images that x_t may come from, a target that varies less",
    ] = False
    timestep_sampling: Annotated[str, "How t is drawn: uniform, or lognormal, which draws low noise more often"] = (
        "uniform"
    )
    guidance: Annotated[Guidance, "Scale of guidance to fold into the weights of --init-from; 1 is off"] = 1.0
    flip: Annotated[bool, "Mirror half of the images"] = False
    sheet_every: Annotated[Count, "Steps between sample sheets, and between measurements of the held-out images"] = 1000

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        self.require_among("weighting", "simple", "velocity")
        self.require_among("timestep_sampling", "uniform", "lognormal")
        self.require_among("optimizer", "adam", "muon")


@dataclass(frozen=True, slots=True)
class AutoencoderTrainConfig(RunConfig):
    """The settings of `train-autoencoder`."""

    batch_size: BatchSize = 32
    warmup_steps: WarmupSteps = 200
    decay_fraction: DecayFraction = 0.5
    kl_weight: Annotated[
        float, NOT_NEGATIVE, "Weight of the divergence of an AutoencoderKL's latents from N(0, I), in nats a value"
    ] = 1e-3


@dataclass(frozen=True, slots=True)
class DistillConfig(RunConfig):
    """The settings of `distill`."""

    learning_rate: LearningRate = 3e-4
    decay_fraction: DecayFraction = 0.5
    class_dropout: Annotated[Share, "Share of labels replaced by the null class, which is not guided"] = 0.1
    guidance: Annotated[Guidance, "Scale of guidance of the teacher, which the student learns; 1 is off"] = 1.0
    student_steps: Annotated[
        tuple[int, ...], "Numbers of sampling steps that the student learns, separated by commas"
    ] = (1, 2, 3, 4)
    teacher_sampler: Annotated[str, f"Sampler of the teacher: {', '.join(TEACHERS)}"] = "dpmpp_2m"
    teacher_steps: Annotated[Count, "Steps of the teacher's sampler"] = 20
    trajectories: Annotated[Count, "Trajectories that the teacher computes at a time"] = 512
    uses: Annotated[Count, "How often each trajectory is used, on average"] = 16
    first_share: Annotated[Share, "Share of a batch that starts from pure noise"] = 0.6
    frechet_weight: Annotated[
        float, NOT_NEGATIVE, "Weight of the distance between the distributions of images; 0 is off"
    ] = 3.0

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        steps = self.student_steps
        differ = 0 < len(set(steps)) == len(steps) and all(1 <= n <= MAX_STUDENT_STEPS for n in steps)
        self.require(differ, "student_steps", f"different numbers in 1..{MAX_STUDENT_STEPS}")
        self.require(max(steps) <= self.teacher_steps, "teacher_steps", f"{max(steps)} or more, the student's steps")
        self.require(self.num_first >= 1, "first_share", f"at least 1/{self.batch_size}, one of a batch")

    @property
    def num_first(self) -> int:
        """Number of rows in a batch that start from pure noise: all rows if the student only takes one step."""
        return round(self.first_share * self.batch_size) if max(self.student_steps) > 1 else self.batch_size

    @property
    def round_steps(self) -> int:
        """Number of optimiser steps for which a set of trajectories is used."""
        return max(1, self.uses * self.trajectories // self.num_first)


def usual_batch(num_images: int) -> int:
    """Return USUAL_BATCH, or half the number of images if that is less. Larger batches teach little more."""
    return max(1, min(USUAL_BATCH, num_images // 2))


def usual_steps(num_images: int) -> int:
    """Return the usual number of steps, in proportion to the square root of the number of images.

    The minimum is FEWEST_STEPS. The maximum is LARGE_STEPS, reached at LARGE_SET images.
    """
    steps = LARGE_STEPS * math.sqrt(num_images / LARGE_SET)
    return max(FEWEST_STEPS, min(LARGE_STEPS, 100 * round(steps / 100)))
