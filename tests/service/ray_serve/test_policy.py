from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tminus.service.ray_serve.policy import BACKLOG_S, WAITING_S, BacklogPolicy


@dataclass
class FakeContext:
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None = field(default_factory=dict)
    target_num_replicas: int = 3
    capacity_adjusted_min_replicas: int = 1
    capacity_adjusted_max_replicas: int = 8


def test_the_work_of_all_replicas_and_the_jobs_that_none_holds_are_counted_once() -> None:
    told = {BACKLOG_S: {"a": 8.0, "b": 6.0}, WAITING_S: {"a": 30.0, "b": 29.0}}
    assert BacklogPolicy(10.0)(FakeContext(told)) == (5, {})


def test_the_bounds_are_those_of_the_cluster_now() -> None:
    told = {BACKLOG_S: {"a": 1000.0}}
    assert BacklogPolicy(10.0)(FakeContext(told, capacity_adjusted_max_replicas=2))[0] == 2
    assert BacklogPolicy(10.0)(FakeContext({BACKLOG_S: {"a": 0.0}}, capacity_adjusted_min_replicas=4))[0] == 4


def test_nothing_changes_while_no_replica_has_told_anything() -> None:
    for told in (None, {}, {BACKLOG_S: {}}):
        assert BacklogPolicy(10.0)(FakeContext(told)) == (3, {})
