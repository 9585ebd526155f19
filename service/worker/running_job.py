"""A job in the worker's hands, and what those get to see of it who look on. Only the worker's thread changes one."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from service.engine.protocol import RowEngine
from service.preview import Frame, Show, Watch
from service.scheduling.admission import Entry
from service.scheduling.forecast import Outlook
from service.spec import Inputs, SampleSpec, Snapshot
from service.work import Batch, JobResult, JobStatus, Work
from service.worker.recording import Recording

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class RunningJob:
    """From the moment it is accepted to its end."""

    id: str
    spec: SampleSpec
    work: Work
    future: "Future[JobResult]"
    submitted_s: float
    deadline_s: float | None  # after it was submitted
    entry: Entry | None = None  # what was foreseen when it was accepted
    durable: bool = False  # snapshots are kept of it
    inputs: Inputs | None = None  # until the engine has them
    snapshot: Snapshot | None = None  # where it goes on from, until the engine has it
    recording: Recording | None = None
    watches: list[Watch] = field(default_factory=list)  # who looks on
    rows: tuple[int, ...] = ()
    started_s: float | None = None
    first_step_s: float = 0.0
    steps_taken: int = 0  # of all its rows, those before spec.start among them
    steps_kept: int = 0  # of all its rows, when the last snapshot was taken

    @property
    def step(self) -> int:
        """How many steps its rows have taken; the scheduler keeps them level, but for a few where guidance begins."""
        return self.steps_taken // self.spec.n - self.spec.start

    def status(self, outlook: Outlook, now_s: float) -> JobStatus:
        """What is told of it."""
        return self._status(outlook.position, outlook.eta_s, now_s)

    def _status(self, position: int, eta_s: float, now_s: float) -> JobStatus:
        return JobStatus(
            id=self.id,
            state="waiting" if self.started_s is None else "running",
            position=position,
            eta_s=eta_s,
            step=self.step,
            spec=self.spec,
            durable=self.durable,
            age_s=now_s - self.submitted_s,
        )

    def quick_status(self, forecast: Mapping[str, JobStatus], now_s: float) -> JobStatus:
        """As `status`, with what an earlier forecast says of it, else what was foreseen when it was accepted."""
        known = forecast.get(self.id)
        if known is not None:
            return self._status(known.position, max(0.0, known.eta_s - (now_s - self.submitted_s - known.age_s)), now_s)
        assert self.entry is not None
        return self._status(self.entry.position, max(0.0, self.entry.eta_s - (now_s - self.submitted_s)), now_s)

    def show(self, engine: RowEngine, now_s: float) -> None:
        """Give those who look on a frame, where one is due; who sees the same shares it."""
        frames: dict[tuple[Show, ...], Frame] = {}
        for watch in self.watches:
            if not watch.due(self.step, now_s):
                continue
            try:
                if watch.show not in frames:
                    frames[watch.show] = Frame(self.step, engine.preview(self.rows, watch.show))
                watch.put(frames[watch.show])
            except Exception:  # it is not worth the job
                log.exception("job %s could not be shown", self.id)

    def record(self, engine: RowEngine, batch: Batch) -> None:
        """Keep those of its rows that have just come to a step which its recording wants."""
        if self.recording is None:
            return
        index = {row: k for k, row in enumerate(self.rows)}
        taken = [
            (index[row], step + 1 - self.spec.start)
            for row, step in zip(batch.rows, batch.steps, strict=True)
            if row in index and self.recording.due(step + 1 - self.spec.start)
        ]
        if taken:
            rows = [self.rows[k] for k, _ in taken]
            self.recording.put(taken, engine.preview(rows, (self.recording.show,)))

    def unwatch(self, watch: Watch) -> None:
        """Show it no more to somebody who was."""
        if watch in self.watches:
            self.watches.remove(watch)
