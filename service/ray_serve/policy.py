"""Ray's question how many replicas there should be, answered by the seconds of work that the replicas tell."""

from collections.abc import Mapping
from typing import Any, Protocol

from tminus.service.ray_serve.scaling import wanted_replicas

BACKLOG_S, WAITING_S = "backlog_s", "waiting_s"  # what replicas tell for this


class Context(Protocol):
    """What is read of ray.serve.config.AutoscalingContext."""

    target_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """What each replica told, by name and replica, as the mean of the last seconds."""


class BacklogPolicy:
    """Serve calls it several times a second, and waits before it does what is answered."""

    def __init__(self, target_backlog_s: float) -> None:
        """target_backlog_s: of work for each replica."""
        self._target_s = target_backlog_s

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """How many, and no state. While no replica has told anything, as many as there should have been."""
        told = context.aggregated_metrics or {}
        if not (backlogs_s := told.get(BACKLOG_S)):
            return context.target_num_replicas, {}
        # Each tells of the same table of jobs.
        waiting_s = max(told.get(WAITING_S, {}).values(), default=0.0)
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return wanted_replicas(backlogs_s.values(), waiting_s, self._target_s, least, most), {}
