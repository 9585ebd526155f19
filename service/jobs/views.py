"""What clients are told of jobs, durable or not: how the store's record and the worker's status make one view."""

import asyncio
from dataclasses import dataclass, field

from service.jobs.store import OUTCOMES, JobRecord, now_us
from service.preview import Watch
from service.work import JobStatus
from service.worker.mailbox import Mailbox

STATES = ("waiting", "running", *OUTCOMES)


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as clients are told of it. One that is not durable is forgotten when it ends."""

    record: JobRecord
    state: str  # one of STATES
    durable: bool
    step: int | None  # how many its rows have taken, on average, where that is known
    position: int | None = None  # jobs that go before it, where that is known
    eta_s: float | None = None


@dataclass(slots=True)
class Live:
    """A durable job that has not ended."""

    record: JobRecord
    submitted: bool = False  # the worker has it
    ending: JobRecord | None = None  # how it ended, while that is being kept
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    viewers: list[tuple[Watch, Mailbox]] = field(default_factory=list)


def ended_view(record: JobRecord) -> JobView:
    """How a job is told of that has ended."""
    # One that the store has as unfinished and nobody else knows has just been accepted.
    step = record.spec.num_steps if record.outcome == "done" else None if record.outcome else 0
    return JobView(record, record.outcome or "waiting", True, step)


def live_view(live: Live, status: JobStatus | None) -> JobView:
    """A durable job that has not ended; status: what the worker says of it."""
    if live.record.outcome is not None:  # since that was asked
        return ended_view(live.record)
    if status is not None:
        return JobView(live.record, status.state, True, status.step, status.position, status.eta_s)
    if live.submitted:  # it has just ended, and that is being kept
        return JobView(live.record, "running", True, live.record.spec.num_steps, 0, 0.0)
    return JobView(live.record, "waiting", True, 0)


def passing_view(status: JobStatus) -> JobView:
    """A job that nobody but the worker knows."""
    record = JobRecord(status.id, status.spec, now_us() - round(status.age_s * 1e6))
    return JobView(record, status.state, status.durable, status.step, status.position, status.eta_s)
