"""Durable jobs that this process holds: their states, state transitions and tasks.

job_runner.py moves the jobs from state to state. Used only in the event loop's thread.
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
    """State of a job from its acceptance or claim until its end."""

    WAITING = auto()  # the worker has no room for the job yet, or the model is not loaded
    IN_WORKER = auto()  # the worker has the job, or its images are being read
    LEFT = auto()  # this process cannot finish the job, but another replica or a later start can
    ENDING = auto()  # the job has ended, but its outcome is not stored yet
    ENDED = auto()  # the outcome is stored
    LOST = auto()  # another replica holds the job, or has cancelled or deleted it


TRANSITIONS: dict[HeldState, frozenset[HeldState]] = {
    HeldState.WAITING: frozenset({HeldState.IN_WORKER, HeldState.LEFT, HeldState.ENDING, HeldState.LOST}),
    HeldState.IN_WORKER: frozenset({HeldState.LEFT, HeldState.ENDING, HeldState.LOST}),
    HeldState.LEFT: frozenset({HeldState.ENDING, HeldState.LOST}),  # a client may still cancel the job
    HeldState.ENDING: frozenset({HeldState.ENDED, HeldState.LOST}),
    HeldState.ENDED: frozenset(),
    HeldState.LOST: frozenset(),
}
LAST_STATES = {state for state, following in TRANSITIONS.items() if not following}


@dataclass(slots=True)
class ModelOfJobs:
    """The model that jobs belong to. `info` and `limits` change only while no job runs."""

    number: int
    info: ModelInfo
    limits: Limits
    retired: bool = False  # the model is no longer served

    @property
    def name(self) -> str:
        return self.info.name


@dataclass(slots=True, eq=False)
class HeldJob:
    """A durable job that this process holds."""

    record: JobRecord
    model: ModelOfJobs
    state: HeldState = HeldState.WAITING
    ending: JobRecord | None = None  # record with the outcome, set when the state becomes ENDING
    over: asyncio.Event = field(default_factory=asyncio.Event)  # set when the state becomes ENDED or LOST
    viewers: dict[Watch, Mailbox] = field(default_factory=dict)

    def may_become(self, state: HeldState) -> bool:
        return state in TRANSITIONS[self.state]

    def become(self, state: HeldState) -> None:
        """Enter the next state. Close the viewers' mailboxes if the job will take no more steps in this process."""
        assert self.may_become(state), f"{self.state} -> {state}"
        self.state = state
        if state in LAST_STATES:
            self.over.set()
        if state in LAST_STATES or state is HeldState.LEFT:
            for mailbox in self.viewers.values():
                mailbox.close()


class HeldJobs:
    """Owns the durable jobs of one model that this process holds, and the viewers of these jobs."""

    def __init__(self, worker: Worker, model: ModelOfJobs) -> None:
        self._worker, self._model = worker, model
        self._jobs: dict[str, HeldJob] = {}
        self.idle = asyncio.Event()  # set while no job is held or every held job is LEFT
        self.idle.set()

    def __iter__(self) -> Iterator[HeldJob]:
        return iter(self._jobs.values())

    def __len__(self) -> int:
        return len(self._jobs)

    def ids(self) -> list[str]:
        return list(self._jobs)

    def find(self, job_id: str) -> HeldJob | None:
        return self._jobs.get(job_id)

    def hold(self, record: JobRecord) -> HeldJob:
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
        """Add a viewer to a job. Its mailbox closes once the job will take no more steps in this process."""
        job.viewers[watch] = mailbox
        if job.state is HeldState.IN_WORKER:
            self._worker.watch(job.record.id, watch)

    def unwatch(self, job: HeldJob, watch: Watch) -> None:
        job.viewers.pop(watch, None)
        self._worker.unwatch(job.record.id, watch)


class Tasks:
    """Owns the asyncio tasks that work on one model's jobs."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio keeps only weak references to tasks
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
        """Sleep, but raise Draining as soon as `close` is called."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return
        raise Draining

    async def close(self) -> None:
        """End all pauses, cancel the tasks of `spawn_until_closed`, and wait until all tasks have ended."""
        self._closing.set()
        for task in self._given_up:  # these tasks may wait for an object store or a receiver that never answers
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
