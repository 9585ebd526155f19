"""Which replica gets the next request, and how many there should be, both by predicted work.

`BacklogRouter` runs in Ray's proxies, `BacklogPolicy` in Serve's controller.
"""

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingContext
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

BACKLOG_S, WAITING_S = "backlog_s", "waiting_s"  # what replicas tell for the policy
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Standing:
    """How much a replica has to do, as it told last."""

    backlog_s: float = 0.0  # predicted, of all its jobs
    jobs: int = 0
    ready: bool = True  # takes more of them

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Standing":
        """Read what came from a replica; one that has told nothing yet is ready, and has nothing to do."""
        return cls(float(told.get("backlog_s", 0.0)), int(told.get("jobs", 0)), bool(told.get("ready", True)))

    def told(self) -> dict[str, float]:
        """Return what `of` reads."""
        return {"backlog_s": self.backlog_s, "jobs": self.jobs, "ready": self.ready}


@dataclass(slots=True)
class _Sent:
    """A request on its way, or a moment after."""

    at_s: float
    request: str | None = None  # its id, once the replica has accepted it


class Balance:
    """Owns what was sent to which replica lately.

    A replica tells how much it has to do a moment after that was so. What was sent within that moment, and is not
    answered yet, counts as so many jobs of the mean size of those that there are, so that a burst does not go to one
    replica as a whole.
    """

    def __init__(self, told_after_s: float) -> None:
        """told_after_s: how old what a replica told may be."""
        self._told_after_s = told_after_s
        self._sent: defaultdict[str, list[_Sent]] = defaultdict(list)
        self._last_s: defaultdict[str, float] = defaultdict(lambda: -math.inf)

    def sent(self, replica: str, now_s: float) -> None:
        """Note that a request went there."""
        self._sent[replica].append(_Sent(now_s))
        self._last_s[replica] = now_s

    def accepted(self, replica: str, request: str) -> None:
        """Note the id of the first that was sent there and has none."""
        for each in self._sent[replica]:
            if each.request is None:
                each.request = request
                return

    def answered(self, replica: str, request: str) -> None:
        """Note that a request has ended."""
        self._sent[replica] = [each for each in self._sent[replica] if each.request != request]

    def order(self, replicas: Mapping[str, Standing], now_s: float) -> list[str]:
        """Return the replicas, the best one first; of equal ones that which was sent something longest ago.

        Those that would refuse a job come last.
        """
        for gone in (self._sent.keys() | self._last_s.keys()) - replicas.keys():
            self._sent.pop(gone, None)
            self._last_s.pop(gone, None)
        jobs = sum(each.jobs for each in replicas.values())
        mean_s = sum(each.backlog_s for each in replicas.values()) / jobs if jobs else 0.0
        expected_s = {
            replica: each.backlog_s + mean_s * self._open(replica, now_s) for replica, each in replicas.items()
        }
        return sorted(
            replicas,
            key=lambda replica: (not replicas[replica].ready, expected_s[replica], self._last_s[replica], replica),
        )

    def _open(self, replica: str, now_s: float) -> int:
        lately = [each for each in self._sent[replica] if each.at_s > now_s - self._told_after_s]
        self._sent[replica] = lately
        return len(lately)


class BacklogRouter(RequestRouter):
    """Owns what was sent from here. The replicas' own figures come by Serve's controller."""

    def initialize_state(self, **kwargs: Any) -> None:
        """told_after_s: how old what a replica told may be."""
        self._balance = Balance(kwargs["told_after_s"])

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Count a request."""
        super().on_send_request(replica_id)
        self._balance.sent(replica_id.unique_id, time.monotonic())

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Know which request it was."""
        super().on_request_routed(pending_request, replica_id, result)
        self._balance.accepted(replica_id.unique_id, pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count it no longer."""
        super().on_request_completed(replica_id, internal_request_id)
        self._balance.answered(replica_id.unique_id, internal_request_id)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,  # noqa: ARG002
    ) -> list[list[RunningReplica]]:
        """Return the replicas by predicted work; Serve takes the first that has room for a request."""
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        told = {name: Standing.of(each.routing_stats) for name, each in replicas.items()}
        return [[replicas[name]] for name in self._balance.order(told, time.monotonic())]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Route to these from now on. In a replica's own process also tell it.

        Serve does not notify a replica that it is being removed.
        """
        super().update_replicas(replicas)
        try:
            served = serve.get_replica_context().servable_object
        except RayServeException:  # this is a proxy
            return
        if (tell := getattr(served, "replicas_changed", None)) is not None:
            tell({each.replica_id.unique_id for each in replicas})


class BacklogPolicy:
    """Answers Ray's question how many replicas there should be: as many as bring the work of each to the target.

    Serve calls it several times a second, and waits before it does what is answered.
    """

    def __init__(self, target_backlog_s: float) -> None:
        """target_backlog_s: of predicted work for each replica."""
        self._target_s = target_backlog_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return how many, and no state. While no replica has told anything, as many as there should have been."""
        told = context.aggregated_metrics or {}
        if not (backlogs_s := told.get(BACKLOG_S)):
            return context.target_num_replicas, {}
        # Durable jobs that no replica holds: each replica tells of the same table of them.
        waiting_s = max(told.get(WAITING_S, {}).values(), default=0.0)
        wanted = math.ceil((sum(backlogs_s.values()) + waiting_s) / self._target_s - ROUNDING)
        return min(context.capacity_adjusted_max_replicas, max(context.capacity_adjusted_min_replicas, wanted)), {}
