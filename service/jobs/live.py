"""A durable job between its acceptance and its end, with the clients who follow it. In the event loop's thread only."""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from tminus.service.jobs.store.contract import JobRecord
from tminus.service.preview import Watch


class Viewer(Protocol):
    """Who follows a job, as a Mailbox does."""

    def close(self) -> None:
        """No more frames will come."""


@dataclass(slots=True, eq=False)
class Live:
    """A durable job that has not ended, and that is held here. Only Lifecycle changes its record and its state."""

    record: JobRecord
    model: int  # the number of its model, on whose weights it ends
    model_name: str
    submitted: bool = False  # the worker has it
    parked: bool = False  # this process has no room for it; another start may have
    ending: JobRecord | None = None  # how it ended, while that is being kept
    lost: bool = False  # another replica has it now, or it was cancelled or deleted at another one
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    viewers: list[tuple[Watch, Viewer]] = field(default_factory=list)

    def release_viewers(self) -> None:
        """Tell all viewers that no more frames will come."""
        for _, viewer in self.viewers:
            viewer.close()
