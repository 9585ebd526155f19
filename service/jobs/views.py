"""What clients are told of jobs, durable or not: the store's record and the worker's status as one view."""

from dataclasses import dataclass

from tminus.service.jobs.live import Live
from tminus.service.jobs.store.contract import OUTCOMES, JobRecord
from tminus.service.jobs.webhooks.webhook import Delivery
from tminus.service.work import JobStatus

STATES = ("waiting", "running", *OUTCOMES)


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as clients are told of it. One that is not durable has none after its end."""

    record: JobRecord
    model: int  # the number of its model
    model_name: str
    state: str  # one of STATES
    durable: bool
    step: int | None  # how many steps its rows have taken on average, where that is known
    position: int | None = None  # jobs that go before it, where that is known
    eta_s: float | None = None
    deliveries: tuple[Delivery, ...] = ()  # to its webhook, if it has one and they are known


def kept_view(record: JobRecord, model: int, model_name: str) -> JobView:
    """View a durable job of a model by its record alone."""
    # A job without an outcome that is not live here is another replica's, waits for one, or is being accepted now.
    step = record.spec.num_passes if record.outcome == "done" else None if record.outcome or record.held else 0
    state = record.outcome or ("running" if record.held else "waiting")
    return JobView(record, model, model_name, state, True, step)


def live_view(live: Live, status: JobStatus | None) -> JobView:
    """View a durable job that was live when the worker was asked for its status."""
    record, model = live.record, (live.model, live.model_name)
    if record.outcome is not None:  # it has ended since
        return kept_view(record, *model)
    if status is not None:
        return JobView(record, *model, status.state, True, status.step, status.position, status.eta_s)
    if live.submitted:  # it has ended in the worker, and that is being kept
        return JobView(record, *model, "running", True, record.spec.num_passes, 0, 0.0)
    return JobView(record, *model, "waiting", True, 0)


def passing_view(status: JobStatus) -> JobView:
    """View a job that only the worker knows."""
    record = JobRecord(status.id, status.spec, status.created_us, owner=status.owner)
    return JobView(
        record,
        status.model,
        status.model_name,
        status.state,
        status.durable,
        status.step,
        status.position,
        status.eta_s,
    )
