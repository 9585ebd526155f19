"""Ways of sampling, by which a checkpoint is measured."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from tminus.model.checkpoint import Checkpoint
from tminus.model.evaluation.figures import LeftOut

ALL = "all"


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
