"""Routing of requests and the number of replicas, both based on predicted work.

`BacklogRouter` runs in Ray's proxies, and `BacklogPolicy` in Serve's controller.
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

BACKLOG_S, WAITING_S = "backlog_s", "waiting_s"  # keys in a replica's report to BacklogPolicy
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Standing:
    """A replica's work, as last reported."""

    backlog_s: float = 0.0  # predicted seconds of work in all jobs
    jobs: int = 0
    ready: bool = True  # the replica accepts more jobs

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> "Standing":
        """Parse the report of a replica. A replica without a report is ready and idle."""
        return cls(float(report.get("backlog_s", 0.0)), int(report.get("jobs", 0)), bool(report.get("ready", True)))

    def report(self) -> dict[str, float]:
        return {"backlog_s": self.backlog_s, "jobs": self.jobs, "ready": self.ready}


@dataclass(slots=True)
class _Sent:
    at_s: float
    request: str | None = None  # request id, set when the replica has accepted the request


class Balance:
    """Owns the recent requests to each replica.

    A replica's last report may not include these requests. Each unanswered request that is younger than `report_age_s`
    therefore counts as a job of average size, so that a burst is spread over the replicas.
    """

    def __init__(self, report_age_s: float) -> None:
        self._report_age_s = report_age_s
        self._sent: defaultdict[str, list[_Sent]] = defaultdict(list)
        self._last_s: defaultdict[str, float] = defaultdict(lambda: -math.inf)

    def sent(self, replica: str, now_s: float) -> None:
        self._sent[replica].append(_Sent(now_s))
        self._last_s[replica] = now_s

    def accepted(self, replica: str, request: str) -> None:
        """Give this id to the oldest request to this replica that has no id yet."""
        for each in self._sent[replica]:
            if each.request is None:
                each.request = request
                return

    def answered(self, replica: str, request: str) -> None:
        self._sent[replica] = [each for each in self._sent[replica] if each.request != request]

    def order(self, replicas: Mapping[str, Standing], now_s: float) -> list[str]:
        """Return the replicas, best first: by least predicted work, then by longest time without a request.

        Replicas that would refuse a job come last.
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
        lately = [each for each in self._sent[replica] if each.at_s > now_s - self._report_age_s]
        self._sent[replica] = lately
        return len(lately)


class BacklogRouter(RequestRouter):
    """Routes requests by predicted work, and owns the requests that this proxy has sent.

    The reports of the replicas arrive through Serve's controller.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """report_age_s: maximum age of a report."""
        self._balance = Balance(kwargs["report_age_s"])

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._balance.sent(replica_id.unique_id, time.monotonic())

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        super().on_request_routed(pending_request, replica_id, result)
        self._balance.accepted(replica_id.unique_id, pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self._balance.answered(replica_id.unique_id, internal_request_id)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,  # noqa: ARG002
    ) -> list[list[RunningReplica]]:
        """Return the replicas, least predicted work first. Serve takes the first replica with room for the request."""
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        standings = {name: Standing.of(each.routing_stats) for name, each in replicas.items()}
        return [[replicas[name]] for name in self._balance.order(standings, time.monotonic())]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Route requests to these replicas. In a replica's own process, pass the list to the replica.

        Serve itself does not tell a replica that it was removed.
        """
        super().update_replicas(replicas)
        try:
            served = serve.get_replica_context().servable_object
        except RayServeException:  # this process is a proxy
            return
        if (tell := getattr(served, "replicas_changed", None)) is not None:
            tell({each.replica_id.unique_id for each in replicas})


class BacklogPolicy:
    """Chooses how many replicas are needed to keep the work of each replica at or below the target.

    Serve calls the policy several times a second, and applies the result after the delays in its settings.
    """

    def __init__(self, target_backlog_s: float) -> None:
        self._target_s = target_backlog_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas and an empty state. Without reports, the number stays the same."""
        reports = context.aggregated_metrics or {}
        if not (backlogs_s := reports.get(BACKLOG_S)):
            return context.target_num_replicas, {}
        # Work of durable jobs that no replica holds. Every replica reports the same jobs, so take the maximum.
        waiting_s = max(reports.get(WAITING_S, {}).values(), default=0.0)
        needed = math.ceil((sum(backlogs_s.values()) + waiting_s) / self._target_s - ROUNDING)
        return min(context.capacity_adjusted_max_replicas, max(context.capacity_adjusted_min_replicas, needed)), {}
