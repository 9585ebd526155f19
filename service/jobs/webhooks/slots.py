"""Which deliveries may be attempted at the same time, so that receivers that do not answer hold up no others. Pure.

An owner may have as many attempts as there are slots free: one alone gets half of them, two a third each, and there is
always room for one more (dynamic thresholds, Choudhury & Hahne 1998). Receivers whose last attempt failed share half of
the slots in the same way, and the rest is for those that answer.
"""

from collections import Counter
from dataclasses import dataclass

from tminus.service.jobs.webhooks.webhook import Delivery

AT_ONCE, AT_ONCE_EACH = 256, 4  # attempts of one model's jobs, and those of one owner to one receiver
FAILING_AT_ONCE = AT_ONCE // 2
BEGUN_AT_ONCE = 32  # so that the event loop has other turns between their beginnings
MOST_FAILING = 256  # receivers that are known to fail

Whose = tuple[str, str]  # an owner and a receiver of its jobs


@dataclass(frozen=True, slots=True)
class Room:
    """What may be claimed."""

    most: int  # in all
    most_failing: int  # of receivers that failed last
    each: int = AT_ONCE_EACH  # of one owner to one receiver
    busy: frozenset[Whose] = frozenset()  # of which nothing
    failing: frozenset[Whose] = frozenset()  # which failed last, beside those of deliveries that did
    full: frozenset[str] = frozenset()  # owners of which nothing
    full_of_failing: frozenset[str] = frozenset()  # and those of which nothing to receivers that failed last


class Slots:
    """Owns what is attempted now, and which receivers failed last."""

    def __init__(self) -> None:
        self._busy: Counter[Whose] = Counter()
        self._all: Counter[str] = Counter()  # attempts by owner
        self._of_failing: Counter[str] = Counter()  # those of them to receivers that failed last
        self._taken: dict[str, bool] = {}  # by delivery: whether it was to one of these
        self._failing: dict[Whose, None] = {}  # the newest last

    def room(self) -> Room | None:
        """What may begin now; None where nothing may."""
        free = AT_ONCE - len(self._taken)
        if free <= 0:
            return None
        free_of_failing = FAILING_AT_ONCE - self._of_failing.total()
        return Room(
            min(free, BEGUN_AT_ONCE),
            min(free, BEGUN_AT_ONCE, free_of_failing),
            busy=frozenset(self._busy),
            failing=frozenset(self._failing),
            full=frozenset(owner for owner, count in self._all.items() if count >= free),
            full_of_failing=frozenset(owner for owner, count in self._of_failing.items() if count >= free_of_failing),
        )

    def take(self, delivery: Delivery) -> None:
        """An attempt begins."""
        whose = delivery.whose
        is_failing = delivery.error is not None or whose in self._failing
        self._taken[delivery.id] = is_failing
        self._busy[whose] += 1
        self._all[delivery.owner] += 1
        if is_failing:
            self._of_failing[delivery.owner] += 1

    def give_back(self, delivery: Delivery) -> None:
        """It has ended."""
        self._busy[delivery.whose] -= 1
        self._all[delivery.owner] -= 1
        if self._taken.pop(delivery.id):
            self._of_failing[delivery.owner] -= 1
        self._busy += Counter()  # forgets those that are at 0
        self._all += Counter()
        self._of_failing += Counter()

    def sharer(self, delivery: Delivery) -> str:
        """Whose share of look-ups an attempt takes: an owner's receivers that failed last have one of their own."""
        return f"{delivery.owner}\x1ffailing" if self._taken[delivery.id] else delivery.owner

    def answered(self, delivery: Delivery) -> None:
        """Its receiver answers."""
        self._failing.pop(delivery.whose, None)

    def failed(self, delivery: Delivery) -> None:
        """Its receiver does not, or not well."""
        self._failing.pop(delivery.whose, None)
        self._failing[delivery.whose] = None
        if len(self._failing) > MOST_FAILING:
            del self._failing[next(iter(self._failing))]
