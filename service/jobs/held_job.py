"""The durable jobs that this process holds: their states, which state may follow which, and the tasks that run them.

job_runner.py takes a job from one state to the next. In the event loop's thread only.
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
    """Where a job is between its acceptance, or its claim, and its end."""

    WAITING = auto()  # until the worker has room for it
    IN_WORKER = auto()  # the worker has the job, or its images are being read
    LEFT = auto()  # for another start: this process has no room for it, or its worker ends or has crashed
    ENDING = auto()  # it has ended, and the store does not have the end yet
    ENDED = auto()  # the store has the end
    LOST = auto()  # another replica has the job, or it was cancelled or deleted at another


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
    """The model whose jobs these are. It may change while no job runs."""

    number: int
    info: ModelInfo
    limits: Limits
    retired: bool = False  # whether the model is served no more

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.info.name


@dataclass(slots=True, eq=False)
class HeldJob:
    """A durable job that is held here."""

    record: JobRecord
    model: ModelOfJobs
    state: HeldState = HeldState.WAITING
    ending: JobRecord | None = None  # how it ended, from ENDING on
    over: asyncio.Event = field(default_factory=asyncio.Event)  # set in the last states
    viewers: dict[Watch, Mailbox] = field(default_factory=dict)

    def may_become(self, state: HeldState) -> bool:
        """Whether a state may follow the current one."""
        return state in TRANSITIONS[self.state]

    def become(self, state: HeldState) -> None:
        """Enter the next state. Mailboxes of a job that takes no more steps here are closed."""
        assert self.may_become(state), f"{self.state} -> {state}"
        self.state = state
        if state in LAST_STATES:
            self.over.set()
        if state in LAST_STATES or state is HeldState.LEFT:
            for mailbox in self.viewers.values():
                mailbox.close()


class HeldJobs:
    """Owns the durable jobs of one model that are held here, and who watches them."""

    def __init__(self, worker: Worker, model: ModelOfJobs) -> None:
        self._worker, self._model = worker, model
        self._jobs: dict[str, HeldJob] = {}
        self.idle = asyncio.Event()  # set while no job is held that this process ends
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
        """Move a job to its next state. In a last state it is held no more."""
        job.become(state)
        if state is HeldState.IN_WORKER:
            for watch in job.viewers:
                self._worker.watch(job.record.id, watch)
        if state in LAST_STATES:
            self._jobs.pop(job.record.id, None)
        if all(each.state is HeldState.LEFT for each in self):
            self.idle.set()

    def watch(self, job: HeldJob, watch: Watch, mailbox: Mailbox) -> None:
        """Show a job to a viewer. The mailbox is closed when the job takes no more steps here."""
        job.viewers[watch] = mailbox
        if job.state is HeldState.IN_WORKER:
            self._worker.watch(job.record.id, watch)

    def unwatch(self, job: HeldJob, watch: Watch) -> None:
        """Show a job to a viewer no more."""
        job.viewers.pop(watch, None)
        self._worker.unwatch(job.record.id, watch)


class Tasks:
    """Owns the tasks that work on one model's jobs, and ends them with the process."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio holds tasks weakly
        self._given_up: set[asyncio.Task[None]] = set()  # those of them that `close` cancels
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
        """Sleep. Raises Draining when the process ends."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return
        raise Draining

    async def close(self) -> None:
        """End every pause, and wait until all tasks have ended."""
        self._closing.set()
        for task in self._given_up:  # each may wait for an object store or a receiver that does not answer
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
