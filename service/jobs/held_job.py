"""A durable job that this process holds: its states, and which of them may follow which.

The life of one is in lifecycle.py. In the event loop's thread only.
"""

import asyncio
from dataclasses import dataclass, field
from enum import Enum, auto

from tminus.service.jobs.store.records import JobRecord
from tminus.service.preview import Mailbox, Watch


class HeldState(Enum):
    """Where a job is between its acceptance, or its claim, and its end."""

    WAITING = auto()  # for the worker to have room for it
    IN_WORKER = auto()  # the worker has it, or what it has made is being read
    LEFT = auto()  # for another start: this process has no room for it, or its worker ends or has crashed
    ENDING = auto()  # it has ended, and that is being kept
    ENDED = auto()  # that is kept
    LOST = auto()  # it is not held any more: another replica has it, or it was cancelled or deleted at one


TRANSITIONS: dict[HeldState, frozenset[HeldState]] = {
    HeldState.WAITING: frozenset({HeldState.IN_WORKER, HeldState.LEFT, HeldState.ENDING, HeldState.LOST}),
    HeldState.IN_WORKER: frozenset({HeldState.LEFT, HeldState.ENDING, HeldState.LOST}),
    HeldState.LEFT: frozenset({HeldState.ENDING, HeldState.LOST}),  # a client may still cancel it
    HeldState.ENDING: frozenset({HeldState.ENDED, HeldState.LOST}),
    HeldState.ENDED: frozenset(),
    HeldState.LOST: frozenset(),
}
LAST_STATES = {state for state, following in TRANSITIONS.items() if not following}


@dataclass(slots=True, eq=False)
class HeldJob:
    """A durable job that is held here. Only Lifecycle changes it."""

    record: JobRecord
    model: int  # the number of its model, on whose weights it ends
    model_name: str
    state: HeldState = HeldState.WAITING
    ending: JobRecord | None = None  # how it ended, from ENDING on
    over: asyncio.Event = field(default_factory=asyncio.Event)  # set in the last states: nothing is made of it here
    viewers: dict[Watch, Mailbox] = field(default_factory=dict)

    def may_become(self, state: HeldState) -> bool:
        """Whether a state may follow the one that it is in."""
        return state in TRANSITIONS[self.state]

    def become(self, state: HeldState) -> None:
        """Enter the next state. Viewers of a job that will make no more steps here are told so."""
        assert self.may_become(state), f"{self.state} -> {state}"
        self.state = state
        if state in LAST_STATES:
            self.over.set()
        if state in LAST_STATES or state is HeldState.LEFT:
            for mailbox in self.viewers.values():
                mailbox.close()
