import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.service.byte_budget import ByteBudget
from tminus.service.errors import TooManyBytes


def test_the_limit_itself_is_accepted_and_one_byte_more_is_not() -> None:
    budget = ByteBudget(10)
    with budget.hold() as one:
        one.add(10)
        with budget.hold() as other:
            other.add(0)
            with pytest.raises(TooManyBytes) as caught:
                other.add(1)
    error = caught.value
    assert (error.status, error.code, error.field, error.value) == (429, "too_many_bytes", "body", 11)
    assert error.bound == "at most 10 bytes"
    assert error.headers["Retry-After"] == "1"


def test_a_hold_is_released_once_however_its_block_ends() -> None:
    budget = ByteBudget(10)
    kept = budget.hold()
    kept.add(1)
    with budget.hold() as hold:
        hold.add(9)
        hold.release()
    assert budget.held_bytes == 1

    def fail() -> None:
        with budget.hold() as hold:
            hold.add(9)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert budget.held_bytes == 1


def test_bytes_that_several_hold_count_once_until_the_last_of_them_releases() -> None:
    budget, kept = ByteBudget(10), bytes(6)
    one, other, late = budget.hold(), budget.hold(), budget.hold()
    one.add_shared(kept)
    other.add_shared(kept)
    assert budget.held_bytes == 6
    one.release()
    assert budget.held_bytes == 6
    with pytest.raises(TooManyBytes):
        late.add_shared(b"as long")
    late.release()
    other.release()
    assert (budget.held_bytes, budget.holders) == (0, {})


def test_a_caller_may_hold_three_quarters_of_what_the_others_leave() -> None:
    budget = ByteBudget(100)
    ann, also_ann, ben, nobodys = (budget.hold(owner=owner) for owner in ("ann", "ann", "ben", None))
    ann.add(50)
    also_ann.add(25)
    ben.add(10)
    with pytest.raises(TooManyBytes) as caught:
        also_ann.add(1)
    assert caught.value.detail == "one caller's bodies held at once must be at most 67 bytes, got 76"
    also_ann.release()
    ben.add(26)  # three quarters of 50 are 37
    with pytest.raises(TooManyBytes):
        ben.add(2)
    nobodys.add(10)
    for hold in (ann, ben, nobodys):
        hold.release()
    assert not budget.held_bytes
    assert not any(budget.owned_bytes.values())


@given(
    limit=st.integers(0, 50),
    exempt=st.integers(0, 10),
    acts=st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 20))), max_size=40),
)
def test_the_budget_is_the_sum_of_its_holds(limit: int, exempt: int, acts: list[tuple[int, int | None]]) -> None:
    budget = ByteBudget(limit)
    holds = [budget.hold(exempt) for _ in range(4)]
    sizes = [0] * 4
    for which, size in acts:
        if size is None:
            holds[which].release()
            sizes[which] = 0
        else:
            sizes[which] += size
            refused = sizes[which] > exempt and sum(sizes) > limit
            try:
                holds[which].add(size)
                assert not refused
            except TooManyBytes:
                assert refused
        assert budget.held_bytes == sum(sizes)
