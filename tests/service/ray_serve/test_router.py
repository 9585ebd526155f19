"""Which replica gets the next request, how many there are, and what service/ray_serve/ relies on in Ray.

Ray calls these interfaces alpha, or does not document them.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray import serve
from ray.serve import context
from ray.serve._private import constants, replica
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.common import RequestMetadata
from ray.serve.config import AutoscalingContext
from ray.serve.request_router import RequestRouter, RunningReplica

from tminus.service.ray_serve.app import options
from tminus.service.ray_serve.replica import Replica
from tminus.service.ray_serve.router import BACKLOG_S, WAITING_S, BacklogPolicy, BacklogRouter, Balance, Standing
from tminus.service.ray_serve.settings import RaySettings

CHANGED = f"Ray {ray.__version__} has changed what service/ray_serve/ is made of: "
EXTENDED = sorted(name for name, member in vars(BacklogRouter).items() if inspect.isfunction(member) and name[0] != "_")


def chosen(balance: Balance, told: dict[str, Standing], requests: int) -> str:
    """The replicas that so many requests go to, one after another within a moment."""
    names = ""
    for k in range(requests):
        names += balance.order(told, k / 100)[0]
        balance.sent(names[-1], k / 100)
    return names


def test_the_replica_with_the_least_predicted_work_is_first_and_one_that_takes_none_last() -> None:
    told = {"a": Standing(8.0, 1), "b": Standing(0.5, 20), "c": Standing(3.0, 2), "d": Standing(0.0, 0, ready=False)}
    assert Balance(0.75).order(told, now_s=0.0) == ["b", "c", "a", "d"]


def test_idle_replicas_take_turns() -> None:
    assert chosen(Balance(0.75), {"a": Standing(), "b": Standing(), "c": Standing()}, 6) == "abcabc"


def test_a_burst_between_two_tellings_is_shared() -> None:
    """Two replicas with jobs of 2 s each: what is sent counts as such a job, until the replica has told of it."""
    names = chosen(Balance(0.75), {"a": Standing(4.0, 2), "b": Standing(8.0, 4)}, 8)
    assert (names.count("a"), names.count("b")) == (5, 3)


def test_what_was_sent_counts_until_it_is_told_or_answered() -> None:
    balance, told = Balance(0.75), {"a": Standing(1.0, 1), "b": Standing(2.5, 1)}
    for _ in range(3):
        balance.sent("a", 10.0)
    assert balance.order(told, 10.7) == ["b", "a"]
    assert balance.order(told, 10.8) == ["a", "b"]
    # Small requests beside a large job: that each were as large would send the next one to the busy replica.
    balance, told = Balance(0.75), {"busy": Standing(8.0, 1), "idle": Standing()}
    for k in range(5):
        assert balance.order(told, k / 100)[0] == "idle"
        balance.sent("idle", k / 100)
        balance.accepted("idle", f"request {k}")
        balance.answered("idle", f"request {k}")
    for _ in range(2):
        balance.sent("idle", 0.1)
    balance.accepted("idle", "later")
    balance.answered("idle", "of before")
    assert balance.order(told, 0.1)[0] == "busy"


def test_replicas_that_are_gone_are_forgotten() -> None:
    balance = Balance(0.75)
    balance.sent("a", 1.0)
    assert balance.order({"b": Standing()}, 1.1) == ["b"]
    assert not (balance._sent.keys() | balance._last_s.keys()) - {"b"}


def test_a_standing_is_read_as_it_was_told_and_one_that_has_told_nothing_is_idle() -> None:
    for standing in (Standing(2.5, 3), Standing(2.5, 3, ready=False)):
        assert Standing.of(standing.report()) == standing
    assert Standing.of({}) == Standing()


# --- how many ---


@dataclass
class FakeContext:
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None = field(default_factory=dict)
    target_num_replicas: int = 3
    capacity_adjusted_min_replicas: int = 1
    capacity_adjusted_max_replicas: int = 20


def wanted(
    backlogs_s: list[float], waiting_s: float = 0.0, target_s: float = 10.0, least: int = 1, most: int = 20
) -> int:
    """The answer where each replica tells of its own work, and all of the same jobs that none of them holds."""
    told = {BACKLOG_S: dict(enumerate(backlogs_s)), WAITING_S: dict.fromkeys(range(len(backlogs_s)), waiting_s)}
    context = FakeContext(told, capacity_adjusted_min_replicas=least, capacity_adjusted_max_replicas=most)
    replicas, state = BacklogPolicy(target_s)(context)  # type: ignore[arg-type]
    assert state == {}
    return replicas


@pytest.mark.parametrize(
    ("backlogs_s", "waiting_s", "replicas"),
    [
        ([0.0, 0.0, 0.0], 0.0, 1),
        ([10.0], 0.0, 1),
        ([10.1], 0.0, 2),
        ([4.0, 4.0], 0.0, 1),
        ([8.0, 8.0], 100.0, 12),
        ([0.0], 1000.0, 20),
        ([0.1, 0.2], 9.7, 1),  # a rounding error over 10
    ],
)
def test_as_many_as_bring_the_work_of_each_to_the_target(
    backlogs_s: list[float], waiting_s: float, replicas: int
) -> None:
    assert wanted(backlogs_s, waiting_s) == replicas


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=20),
    st.floats(0, 1e6),
    st.floats(0.1, 1e3),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_there_are_never_fewer_or_more_than_allowed_and_more_work_never_wants_fewer(
    backlogs_s: list[float], waiting_s: float, target_s: float, least: int, more: int
) -> None:
    replicas = wanted(backlogs_s, waiting_s, target_s, least, least + more)
    assert least <= replicas <= least + more
    assert wanted([*backlogs_s, target_s], waiting_s, target_s, least, least + more) >= replicas


def test_nothing_changes_while_no_replica_has_told_anything() -> None:
    for told in (None, {}, {BACKLOG_S: {}}):
        assert BacklogPolicy(10.0)(FakeContext(told)) == (3, {})  # type: ignore[arg-type]


# --- what is relied on in Ray ---


@pytest.mark.parametrize("name", EXTENDED)
def test_what_the_router_extends_is_called_by_ray_with_the_same_parameters(name: str) -> None:
    theirs = getattr(RequestRouter, name, None)
    assert theirs is not None, f"{CHANGED}there is no RequestRouter.{name}"
    assert [*inspect.signature(theirs).parameters] == [*inspect.signature(getattr(BacklogRouter, name)).parameters], (
        f"{CHANGED}RequestRouter.{name}"
    )


def test_router_and_policy_are_told_what_they_read() -> None:
    assert isinstance(inspect.getattr_static(RunningReplica, "routing_stats"), property), (
        f"{CHANGED}RunningReplica.routing_stats"
    )
    assert "internal_request_id" in inspect.signature(RequestMetadata).parameters, f"{CHANGED}RequestMetadata"
    there = {*inspect.signature(AutoscalingContext).parameters, *dir(AutoscalingContext)}
    read = {field for field in vars(FakeContext()) if not field.startswith("_")}
    assert read <= there, f"{CHANGED}AutoscalingContext has no {read - there}"


def test_ray_calls_a_replica_by_these_names() -> None:
    called = {
        replica.SERVE_BUILD_ASGI_APP_METHOD,
        constants.HEALTH_CHECK_METHOD,
        constants.REQUEST_ROUTING_STATS_METHOD,
    }
    for name in called:
        assert name in vars(Replica), f"{CHANGED}it calls {name}"
    assert "record_autoscaling_stats" in inspect.getsource(replica), f"{CHANGED}record_autoscaling_stats is not called"


def test_serve_takes_what_it_is_told_of_the_deployment_and_tells_where_it_listens() -> None:
    missing = options(RaySettings()).keys() - inspect.signature(serve.deployment).parameters.keys()
    assert not missing, f"{CHANGED}serve.deployment has no {missing}"
    assert "_blocking" in inspect.signature(serve.delete).parameters, f"{CHANGED}serve.delete"
    assert callable(context._get_global_client), f"{CHANGED}serve.context"
    assert isinstance(inspect.getattr_static(ServeControllerClient, "root_url"), property), (
        f"{CHANGED}ServeControllerClient.root_url"
    )
