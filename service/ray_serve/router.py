"""Ray's choice of a replica for each request, by predicted work. Runs in Ray's proxies."""

import time
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from tminus.service.ray_serve.balance import Balance, Standing


class BacklogRouter(RequestRouter):
    """Owns what was sent from here. The replicas' own figures come by Serve's controller."""

    def initialize_state(self, **kwargs: Any) -> None:
        """told_after_s: see Balance."""
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
        """The replicas by predicted work; Serve takes the first that has room for a request."""
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
