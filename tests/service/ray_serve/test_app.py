"""What Serve is told, without a cluster. tests/e2e/test_ray.py has one."""

import pytest

from tminus.service.ray_serve.app import cores_each, options, placed
from tminus.service.ray_serve.settings import RaySettings

STORE = "postgresql://tminus@host/jobs"
CPUS, WITH_GPUS = [{"CPU": 16.0}, {"CPU": 16.0}], [{"CPU": 16.0}, {"CPU": 8.0, "GPU": 4.0}]


def test_a_replica_has_a_gpu_where_there_are_some() -> None:
    settings = placed(RaySettings(max_replicas=4, job_store=STORE), WITH_GPUS)
    assert (settings.replica_gpus, settings.replica_cpus) == (1.0, 1.0)
    assert (settings.device, settings.threads) == ("auto", None)
    assert options(settings)["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 1.0}


@pytest.mark.parametrize("nodes", [CPUS, WITH_GPUS])
def test_else_it_has_a_share_of_the_cores_and_a_thread_for_each(nodes: list[dict[str, float]]) -> None:
    settings = placed(RaySettings(max_replicas=3, job_store=STORE, device="cpu"), nodes)
    assert (settings.replica_gpus, settings.replica_cpus) == (0.0, 8.0)
    assert (settings.device, settings.threads) == ("cpu", 8)


def test_a_replica_without_a_gpu_does_not_take_one_that_ray_gave_to_others() -> None:
    settings = placed(RaySettings(replica_gpus=0, replica_cpus=0.5), WITH_GPUS)
    assert (settings.device, settings.threads, settings.replica_cpus) == ("cpu", 1, 0.5)
    assert placed(RaySettings(replica_gpus=0, threads=3), CPUS).threads == 3


def test_a_replica_that_needs_a_gpu_waits_for_one() -> None:
    settings = placed(RaySettings(device="cuda"), CPUS)
    assert (settings.replica_gpus, settings.device) == (1.0, "cuda")
    assert options(settings)["ray_actor_options"]["num_gpus"] == 1.0


def test_replicas_are_added_and_drained_within_their_bounds() -> None:
    settings = RaySettings(min_replicas=2, max_replicas=5, job_store=STORE, upscale_delay_s=3, target_backlog_s=7)
    scaling = options(settings)["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.upscale_delay_s) == (2, 5, 3)
    assert scaling.policy.get_policy()(**scaling.policy.policy_kwargs)._target_s == 7
    assert "num_replicas" not in options(settings)
    assert options(RaySettings())["num_replicas"] == 1


def test_serve_waits_for_longer_than_the_grace_period_before_it_kills_a_replica() -> None:
    told = options(RaySettings(grace_s=100))
    assert told["graceful_shutdown_timeout_s"] > 110
    assert told["max_ongoing_requests"] == RaySettings().max_connections


@pytest.mark.parametrize(
    ("nodes", "replicas", "cores"),
    [
        ([2], 1, 2),
        ([2], 2, 1),
        ([16, 16], 3, 8),
        ([16, 4], 5, 4),
        ([4], 9, 1),
        ([0.5], 1, 1),
        ([], 1, 1),
        ([0, 8], 1, 8),
    ],
)
def test_a_replica_has_the_most_cores_with_which_all_fit(nodes: list[float], replicas: int, cores: int) -> None:
    assert cores_each(nodes, replicas) == cores
