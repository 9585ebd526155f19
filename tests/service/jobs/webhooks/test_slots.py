"""Who may be attempted at the same time."""

from tminus.service.jobs.webhooks.slots import AT_ONCE, FAILING_AT_ONCE, MOST_FAILING, Slots
from tminus.service.jobs.webhooks.webhook import Delivery


def one(name: str, owner: str, error: str | None = None) -> Delivery:
    return Delivery(name, name, "completed", f"https://{name}.example", "pending", 1, 0, error, owner)


def fill(slots: Slots, owner: str, error: str | None = None) -> list[Delivery]:
    """Attempts of an owner, until it may have no more."""
    made: list[Delivery] = []
    while True:
        room = slots.room()
        assert room is not None
        if owner in room.full or (error is not None and (owner in room.full_of_failing or not room.most_failing)):
            return made
        made.append(one(f"{owner}{error}{len(made)}", owner, error))
        slots.take(made[-1])


def test_one_owner_has_half_of_the_slots_and_others_always_find_some() -> None:
    slots = Slots()
    assert [len(fill(slots, owner)) for owner in "abcd"] == [AT_ONCE // 2, AT_ONCE // 4, AT_ONCE // 8, AT_ONCE // 16]


def test_what_ends_is_free_again() -> None:
    slots = Slots()
    empty = slots.room()
    for each in [*fill(slots, "a"), *fill(slots, "b", "it failed")]:
        slots.give_back(each)
    assert slots.room() == empty


def test_receivers_that_failed_last_have_half_of_the_slots_of_all_and_of_their_owner() -> None:
    slots = Slots()
    failing = fill(slots, "a", "it failed")
    assert len(failing) == FAILING_AT_ONCE // 2
    assert len(fill(slots, "b", "it failed")) == FAILING_AT_ONCE // 4
    answering = fill(slots, "a")
    assert answering, "those that answer"
    assert slots.sharer(answering[0]) != slots.sharer(failing[0]), "nor do they share look-ups"


def test_a_receiver_that_failed_is_known_until_it_answers_and_not_too_many_are() -> None:
    slots = Slots()
    failed = [one(f"r{k}", "a") for k in range(MOST_FAILING + 1)]
    for each in failed:
        slots.failed(each)
    slots.answered(failed[5])
    room = slots.room()
    assert room is not None
    assert room.failing == {each.whose for each in failed[1:] if each is not failed[5]}
