"""How many replicas there should be, as Ray asks, and how many cores each has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.service.ray_serve.scaling import BACKLOG_S, WAITING_S, BacklogPolicy, cores_each


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
    replicas, state = BacklogPolicy(target_s)(context)
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
        assert BacklogPolicy(10.0)(FakeContext(told)) == (3, {})


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
