"""Durable jobs that this process holds: their states, the transitions between states, and the tasks that run jobs.

job_runner.py takes a job from one state to the next. Used in the event loop's thread only.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from tminus.service.errors import Draining
from tminus.service.jobs.store.records import JobRecord
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.preview import Mailbox, Watch
from tminus.service.worker.worker import Worker


class HeldState(Enum):
    """State of a job between its acceptance or claim and its end."""

    WAITING = auto()  # the worker has no room for the job yet
    IN_WORKER = auto()  # the worker has the job, or its images are being read
    LEFT = auto()  # left for another start: this process has no room for it, or its worker ends or has crashed
    ENDING = auto()  # the job has ended, and its outcome is not stored yet
    ENDED = auto()  # its outcome is stored
    LOST = auto()  # another replica holds the job, or has cancelled or deleted it


TRANSITIONS: dict[HeldState, frozenset[HeldState]] = {
    HeldState.WAITING: frozenset({HeldState.IN_WORKER, HeldState.LEFT, HeldState.ENDING, HeldState.LOST}),
    HeldState.IN_WORKER: frozenset({HeldState.LEFT, HeldState.ENDING, HeldState.LOST}),
    HeldState.LEFT: frozenset({HeldState.ENDING, HeldState.LOST}),  # a client may still cancel it
    HeldState.ENDING: frozenset({HeldState.ENDED, HeldState.LOST}),
    HeldState.ENDED: frozenset(),
    HeldState.LOST: frozenset(),
}
LAST_STATES = {state for state, following in TRANSITIONS.items() if not following}


@dataclass(slots=True)
class ModelOfJobs:
    """The model that a job belongs to. It may change while no job runs."""

    number: int
    info: ModelInfo
    limits: Limits
    retired: bool = False  # whether the model is no longer served

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.info.name


@dataclass(slots=True, eq=False)
class HeldJob:
    """A durable job that this process holds."""

    record: JobRecord
    model: ModelOfJobs
    state: HeldState = HeldState.WAITING
    ending: JobRecord | None = None  # the record with the outcome, from ENDING on
    over: asyncio.Event = field(default_factory=asyncio.Event)  # set in ENDED and LOST
    viewers: dict[Watch, Mailbox] = field(default_factory=dict)

    def may_become(self, state: HeldState) -> bool:
        """Return whether `state` may follow the current state."""
        return state in TRANSITIONS[self.state]

    def become(self, state: HeldState) -> None:
        """Enter the next state. The viewers' mailboxes close when the job takes no more steps in this process."""
        assert self.may_become(state), f"{self.state} -> {state}"
        self.state = state
        if state in LAST_STATES:
            self.over.set()
        if state in LAST_STATES or state is HeldState.LEFT:
            for mailbox in self.viewers.values():
                mailbox.close()


class HeldJobs:
    """Owns the durable jobs of one model that this process holds, and their viewers."""

    def __init__(self, worker: Worker, model: ModelOfJobs) -> None:
        self._worker, self._model = worker, model
        self._jobs: dict[str, HeldJob] = {}
        self.idle = asyncio.Event()  # set while every held job is LEFT, or there is none
        self.idle.set()

    def __iter__(self) -> Iterator[HeldJob]:
        return iter(self._jobs.values())

    def __len__(self) -> int:
        return len(self._jobs)

    def ids(self) -> list[str]:
        """Return the ids of the jobs."""
        return list(self._jobs)

    def find(self, job_id: str) -> HeldJob | None:
        """Look up one job; None if it is not held here."""
        return self._jobs.get(job_id)

    def hold(self, record: JobRecord) -> HeldJob:
        """Hold one more job."""
        job = self._jobs[record.id] = HeldJob(record, self._model)
        self.idle.clear()
        return job

    def move(self, job: HeldJob, state: HeldState) -> None:
        """Move a job to its next state. A job in ENDED or LOST is no longer held."""
        job.become(state)
        if state is HeldState.IN_WORKER:
            for watch in job.viewers:
                self._worker.watch(job.record.id, watch)
        if state in LAST_STATES:
            self._jobs.pop(job.record.id, None)
        if all(each.state is HeldState.LEFT for each in self):
            self.idle.set()

    def watch(self, job: HeldJob, watch: Watch, mailbox: Mailbox) -> None:
        """Add a viewer to a job. Its mailbox closes when the job takes no more steps in this process."""
        job.viewers[watch] = mailbox
        if job.state is HeldState.IN_WORKER:
            self._worker.watch(job.record.id, watch)

    def unwatch(self, job: HeldJob, watch: Watch) -> None:
        """Remove a viewer from a job."""
        job.viewers.pop(watch, None)
        self._worker.unwatch(job.record.id, watch)


class Tasks:
    """Owns the tasks that work on one model's jobs. Ends them when the process ends."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio holds tasks weakly
        self._given_up: set[asyncio.Task[None]] = set()  # tasks that `close` cancels
        self._closing = asyncio.Event()

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start a task that `close` waits for."""
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)
        return task

    def spawn_until_closed(self, work: Coroutine[None, None, None]) -> None:
        """Start a task that `close` cancels."""
        self._given_up.add(task := self.spawn(work))
        task.add_done_callback(self._given_up.discard)

    async def pause(self, seconds: float) -> None:
        """Sleep. Raises Draining once `close` is called."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return
        raise Draining

    async def close(self) -> None:
        """End every pause, and wait until all tasks have ended."""
        self._closing.set()
        for task in self._given_up:  # each may wait for an object store or a webhook receiver that does not answer
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
