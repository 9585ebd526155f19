import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.service.ray_serve.scaling import cores_each, wanted_replicas


@pytest.mark.parametrize(
    ("backlogs_s", "waiting_s", "wanted"),
    [
        ([], 0.0, 1),
        ([0.0, 0.0, 0.0], 0.0, 1),
        ([10.0], 0.0, 1),
        ([10.1], 0.0, 2),
        ([10.0, 10.0], 0.0, 2),
        ([4.0, 4.0], 0.0, 1),
        ([8.0, 8.0], 100.0, 12),
        ([0.0], 1000.0, 20),
        ([0.1, 0.2], 9.7, 1),
    ],
)
def test_as_many_as_bring_the_work_of_each_to_the_target(
    backlogs_s: list[float], waiting_s: float, wanted: int
) -> None:
    assert wanted_replicas(backlogs_s, waiting_s, 10.0, 1, 20) == wanted


@given(
    st.lists(st.floats(0, 1e6), max_size=20),
    st.floats(0, 1e6),
    st.floats(0.1, 1e3),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_there_are_never_fewer_or_more_than_allowed_and_more_work_never_wants_fewer(
    backlogs_s: list[float], waiting_s: float, target_s: float, least: int, more: int
) -> None:
    wanted = wanted_replicas(backlogs_s, waiting_s, target_s, least, least + more)
    assert least <= wanted <= least + more
    assert wanted_replicas([*backlogs_s, target_s], waiting_s, target_s, least, least + more) >= wanted


@pytest.mark.parametrize(
    ("nodes", "replicas", "cores"),
    [
        ([2], 1, 2),
        ([2], 2, 1),
        ([16], 3, 5),
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
