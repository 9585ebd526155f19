"""How an evaluation is made: its options, the ways of sampling that it compares, and its error."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from tminus.model.checkpoint import Checkpoint
from tminus.model.evaluation.figures import LeftOut
from tminus.model.timesteps import SPACINGS

ALL = "all"


class EvaluateError(Exception):
    """Checkpoint, data and classifier do not fit together, or samples are not finite; the message says why."""


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """How samples are made and how much is measured. Sample i is asked to be of class i % K."""

    num_samples: int = 1000
    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    guidance: float = 1.0
    seed: int = 0
    batch_size: int = 100
    precision: str = "float32"  # float32, tf32 or bfloat16; the update is always float32
    bound_images: int = 200
    bound_timesteps: int = 100  # drawn for each image; the first ones, where most of the bound lies, are all drawn
    spacing: str | None = None  # of the timesteps; None is the checkpoint's own for this sampler
    guidance_interval: tuple[int, int] | None = None  # the timesteps lo <= t <= hi that are guided; None is all
    guidance_rescale: float = 0.0  # how far guidance is brought back to the spread of the conditional output
    executor: str = "eager"  # the name of the executor that made the samples

    def __post_init__(self) -> None:
        for field, least in (("num_samples", 2), ("batch_size", 1), ("bound_images", 1), ("bound_timesteps", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be {least} or more, got {getattr(self, field)}")
        if self.precision not in ("float32", "tf32", "bfloat16"):
            raise ValueError(f"precision must be float32, tf32 or bfloat16, got {self.precision!r}")
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise ValueError(f"spacing must be among {', '.join(SPACINGS)} or None, got {self.spacing!r}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in 0..1, got {self.guidance_rescale:g}")
        low, high = self.guidance_interval or (0, 0)
        if not 0 <= low <= high:
            raise ValueError(f"guidance_interval must be lo, hi with 0 <= lo <= hi, got {self.guidance_interval}")


@dataclass(frozen=True, slots=True)
class Point:
    """One way of sampling."""

    sampler: str
    steps: int
    guidance: float = 1.0

    def __str__(self) -> str:
        guided = f", guidance {self.guidance:g}" if self.guidance != 1.0 else ""
        return f"{self.sampler}, {self.steps} steps{guided}"


def make_points(
    checkpoint: Checkpoint, samplers: Sequence[str], steps: Sequence[int], guidances: Sequence[float]
) -> tuple[Point, ...]:
    """Every combination, once; `all` stands for every sampler. Raises ValueError for a sampler that is none."""
    known = checkpoint.samplers
    for name in samplers:
        if name not in (*known, ALL):
            raise ValueError(f"sampler must be {ALL} or among {', '.join(known)}, got {name!r}")
    names = [each for name in samplers for each in (known if name == ALL else (name,))]
    points = [Point(name, count, guidance) for name in names for guidance in guidances for count in steps]
    return tuple(dict.fromkeys(points))


def without_guidance(points: Sequence[Point]) -> tuple[tuple[Point, ...], tuple[LeftOut, ...]]:
    """The points of a checkpoint that has no null class, and the guidance scales that are left out."""
    scales = sorted({point.guidance for point in points} - {1.0})
    plain = dict.fromkeys(dataclasses.replace(point, guidance=1.0) for point in points)
    why = "the checkpoint has no null class to guide from"
    return tuple(plain), tuple(LeftOut(f"guidance {scale:g}", why) for scale in scales)
