"""Application for Ray Serve, used by `tminus ray serve` and by Serve config files.

Its import path is `tminus.service.ray_serve.app:app`.
"""

from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.deployment import Application

from tminus.service.ray_serve.replica import LEAVE_S, Replica, ending_s
from tminus.service.ray_serve.router import BacklogPolicy, BacklogRouter
from tminus.service.ray_serve.settings import RaySettings

NAME = "tminus"
TOLD_EVERY_S = 0.5  # seconds between reports of a replica
ON_ITS_WAY_S = 0.25  # seconds that a report takes to reach the proxies through Serve's controller
TRIES = 3  # attempts to start a replica


def app(args: RaySettings) -> Application:
    """Return the application, with replicas sized for the cluster that this process is connected to."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    settings = placed(args, [node["Resources"] for node in nodes if node["Alive"]])
    deployment: Any = serve.deployment(serve.ingress()(Replica), name=NAME, **options(settings))
    bound: Application = deployment.bind(settings)
    return bound


def placed(settings: RaySettings, nodes: list[dict[str, float]]) -> RaySettings:
    """Return settings that include a replica's GPUs, cores, device and threads on these nodes.

    A replica without a GPU runs on the CPU, with one thread per core.
    """
    gpus = settings.replica_gpus
    if gpus is None:
        # With cuda, a replica gets a GPU even if no node has one yet, because Ray waits for such a node.
        there = settings.device.startswith("cuda") or any(node.get("GPU", 0) for node in nodes)
        gpus = 1.0 if settings.device != "cpu" and there else 0.0
    cpus = settings.replica_cpus
    if cpus is None:
        cpus = 1.0 if gpus else float(cores_each([node.get("CPU", 0) for node in nodes], settings.most_replicas))
    resources: dict[str, Any] = {"replica_gpus": gpus, "replica_cpus": cpus}
    if not gpus:
        resources |= {"device": "cpu", "threads": settings.threads or max(1, int(cpus))}
    return settings.model_copy(update=resources)


def cores_each(nodes: Sequence[float], replicas: int) -> int:
    """Return the most cores per replica, but at least 1, with which all replicas fit on the nodes."""
    for cores in range(int(max(nodes, default=1)), 1, -1):
        if sum(node // cores for node in nodes) >= replicas:
            return cores
    return 1


def options(settings: RaySettings) -> dict[str, Any]:
    """Return the options of the Serve deployment."""
    least, most = settings.min_replicas, settings.most_replicas
    policy: dict[str, Any] = {
        "policy_function": BacklogPolicy,
        "policy_kwargs": {"target_backlog_s": settings.target_backlog_s},
    }
    routing: dict[str, Any] = {
        "request_router_class": BacklogRouter,
        "request_router_kwargs": {"report_age_s": TOLD_EVERY_S + ON_ITS_WAY_S},
        "request_routing_stats_period_s": TOLD_EVERY_S,
    }
    autoscaling = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        policy=AutoscalingPolicy(**policy),  # type: ignore[no-untyped-call]
    )
    return {
        **({"num_replicas": least} if least == most else {"autoscaling_config": autoscaling}),
        "ray_actor_options": {"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        "max_ongoing_requests": settings.max_connections,
        "request_router_config": RequestRouterConfig(**routing),
        "graceful_shutdown_wait_loop_s": LEAVE_S,
        "graceful_shutdown_timeout_s": ending_s(settings.grace_s),
        "max_constructor_retry_count": TRIES,
    }
