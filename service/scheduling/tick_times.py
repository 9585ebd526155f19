"""How long a tick takes by its number of places, and how large a batch should be. Pure: no torch, no clock."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter

Points = tuple[tuple[int, float], ...]

LEARNING_RATE = 0.02  # a slow average: one tick says little
OUTLIER = 4.0  # a tick counts as at most so many times slower than predicted, or faster
MAX_CORRECTION = 100.0


@dataclass(frozen=True, slots=True)
class TickTimes:
    """Measured points with straight lines between them, and a factor that follows the machine's speed.

    Without points every tick is predicted to take no time.
    """

    points: Points = ()  # (places, seconds), places ascending
    correction: float = 1.0

    def __post_init__(self) -> None:
        assert _are_measured(self.points), f"these are no measurement: {self.points}"

    def seconds(self, places: int) -> float:
        """Predict the duration of a tick.

        The last segment is extrapolated; below the first point the time is constant.
        """
        return self.correction * _seconds(self.points, places)

    def seconds_per_place(self, max_batch: int) -> float:
        """How long a place takes in a full tick."""
        return self.seconds(max_batch) / max_batch

    def observe(self, places: int, seconds: float) -> "TickTimes":
        """Learn from a tick."""
        predicted = self.seconds(places)
        if predicted <= 0 or not seconds >= 0:
            return self
        ratio = min(max(seconds / predicted, 1 / OUTLIER), OUTLIER)
        correction = self.correction * (1 + LEARNING_RATE * (ratio - 1))
        return replace(self, correction=min(max(correction, 1 / MAX_CORRECTION), MAX_CORRECTION))


@lru_cache(maxsize=64)
def _are_measured(points: Points) -> bool:
    """Whether places ascend from 1 on, and no tick takes less than nothing."""
    return all(a < b for a, b in pairwise([0, *(places for places, _ in points)])) and all(
        0 <= seconds < math.inf for _, seconds in points
    )


@lru_cache(maxsize=4096)
def _seconds(points: Points, places: int) -> float:
    if not points:
        return 0.0
    if len(points) == 1:
        return points[0][1] * max(1.0, places / points[0][0])
    if places <= points[0][0]:
        return points[0][1]
    right = min(bisect_right(points, places, key=itemgetter(0)), len(points) - 1)
    (b0, t0), (b1, t1) = points[right - 1 : right + 1]
    slope = (t1 - t0) / (b1 - b0)
    if places > b1:
        slope = max(0.0, slope)  # by noise the last point may be the faster one, which must not be extrapolated
        return t1 + slope * (places - b1)
    return t0 + slope * (places - b0)


def smallest_batch_at(points: Sequence[tuple[int, float]], share: float = 0.95) -> int:
    """Find the smallest measured batch whose throughput is at least this share of the best one."""
    assert points
    assert 0 < share <= 1
    best = max(places / seconds for places, seconds in points)
    return min(places for places, seconds in points if places / seconds >= share * best)
