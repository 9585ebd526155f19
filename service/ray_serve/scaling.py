"""How many replicas there should be, and how many cores each has. Needs no Ray, whose controller imports this."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

BACKLOG_S, WAITING_S = "backlog_s", "waiting_s"  # what replicas tell for this
ROUNDING = 1e-9


class Context(Protocol):
    """What is read of ray.serve.config.AutoscalingContext."""

    target_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """What each replica told, by name and replica, as the mean of the last seconds."""


class BacklogPolicy:
    """Answers Ray's question how many replicas there should be: as many as bring the work of each to the target.

    Serve calls it several times a second, and waits before it does what is answered.
    """

    def __init__(self, target_backlog_s: float) -> None:
        """target_backlog_s: of predicted work for each replica."""
        self._target_s = target_backlog_s

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """Return how many, and no state. While no replica has told anything, as many as there should have been."""
        told = context.aggregated_metrics or {}
        if not (backlogs_s := told.get(BACKLOG_S)):
            return context.target_num_replicas, {}
        # Durable jobs that no replica holds: each replica tells of the same table of them.
        waiting_s = max(told.get(WAITING_S, {}).values(), default=0.0)
        wanted = math.ceil((sum(backlogs_s.values()) + waiting_s) / self._target_s - ROUNDING)
        return min(context.capacity_adjusted_max_replicas, max(context.capacity_adjusted_min_replicas, wanted)), {}


def cores_each(nodes: Sequence[float], replicas: int) -> int:
    """Return the most whole cores that so many replicas can each have on nodes of these cores; 1 if they do not fit."""
    for cores in range(int(max(nodes, default=1)), 1, -1):
        if sum(node // cores for node in nodes) >= replicas:
            return cores
    return 1
