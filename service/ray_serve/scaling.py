"""How many replicas there should be, and how many cores each has. Pure: no Ray, no clock."""

import math
from collections.abc import Iterable, Sequence

ROUNDING = 1e-9


def wanted_replicas(backlogs_s: Iterable[float], waiting_s: float, target_s: float, least: int, most: int) -> int:
    """As many as bring the work of each to the target, between `least` and `most`.

    backlogs_s: predicted seconds of each replica's work. waiting_s: of durable jobs that no replica holds, on one.
    """
    total_s = sum(backlogs_s) + waiting_s
    return min(most, max(least, math.ceil(total_s / target_s - ROUNDING)))


def cores_each(nodes: Sequence[float], replicas: int) -> int:
    """The most whole cores that so many replicas can each have on nodes of these cores; 1 where they do not fit."""
    for cores in range(int(max(nodes, default=1)), 1, -1):
        if sum(node // cores for node in nodes) >= replicas:
            return cores
    return 1
