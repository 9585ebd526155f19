"""Acts on the loop's events: updates admission and metrics, and gives clients their answers."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tminus.service.errors import Draining, ServiceError
from tminus.service.metrics import Metrics
from tminus.service.scheduling.admission import Admission
from tminus.service.spec import Pixels
from tminus.service.work import JobResult
from tminus.service.worker.loop import LOST, SUSPENDED, Ended, Event, ImageDecoded, Ticked
from tminus.service.worker.running_job import AcceptedJobs, RunningJob

log = logging.getLogger(__name__)


class Outcomes:
    """Acts on events, in the worker's thread."""

    def __init__(
        self, jobs: AcceptedJobs, admission: Admission, metrics: Metrics, on_device_lost: Callable[[str], None]
    ) -> None:
        """on_device_lost: called in any thread with a job's id, if its images cannot be read for a lost device."""
        self._jobs, self._admission, self._metrics, self._on_device_lost = jobs, admission, metrics, on_device_lost

    def act_on(self, events: deque[Event]) -> None:
        """Take all events from a queue, and act on each."""
        while events:
            match event := events.popleft():
                case Ticked():
                    self._count(event)
                case ImageDecoded(job):
                    self._admission.decoded(job.id)
                case Ended(job):
                    self._jobs.remove(job.id)
                    self._admission.leave(job.id)
                    if event.error is not None:
                        self._fail(job, event.error, event.reason)
                    elif event.result is not None:
                        self._finish(job, event.result)

    def _count(self, ticked: Ticked) -> None:
        """Take a tick's work off the ledger of admission, and count its steps."""
        end, tick, row_steps = ticked.end, ticked.end.tick, dict[str, int]()
        for job, picked in zip(tick.jobs, tick.batch.jobs, strict=True):
            row_steps[job.spec.sampler] = row_steps.get(job.spec.sampler, 0) + len(picked.steps)
        places = tick.batch.places
        self._admission.stepped(
            tick.model.number,
            tick.batch.jobs,
            places if end.is_measurement else 0,
            end.seconds,
            overlaps=tick.overlaps,
        )
        self._metrics.ticked(tick.model.engine.info.name, end.seconds, places, row_steps)
        for job in ticked.started:
            assert job.started_s is not None
            queue_s = job.started_s - job.submitted_s
            self._metrics.job_started(queue_s=queue_s, first_step_s=job.first_step_s, exemplar=job.exemplar)

    def _fail(self, job: RunningJob, error: ServiceError, reason: str | None) -> None:
        if reason in (SUSPENDED, LOST):
            log.info("job %s of request %s is %s", job.id, job.request_id, reason, extra=job.log_fields)
        elif reason is not None:
            saved = job.spec.n * job.spec.end - job.steps_taken
            self._metrics.job_given_up(reason, saved)
            what = "job %s of request %s given up (%s), %d row-steps saved"
            log.info(what, job.id, job.request_id, reason, saved, extra=job.log_fields)
        job.fail(error)

    def _finish(self, job: RunningJob, result: JobResult) -> None:
        self._metrics.job_done(job.model.info.name, job.spec.n if job.work.steps == job.spec.end else 0)
        what = "job %s of request %s done: queued %.3f s, denoised %.3f s"
        log.info(what, job.id, job.request_id, result.queue_s, result.denoise_s, extra=job.log_fields)
        job.finish(replace(result, read=partial(self._read, result.read, job)))

    def _read(self, read: Callable[[], Pixels], job: RunningJob) -> Pixels:
        """Read a job's images in another thread, and end the worker if the device is lost.

        A GPU reports an error only when it is waited for, which may first happen here. The job is then unfinished, as
        if the server had ended before.
        """
        try:
            return read()
        except ServiceError:
            raise
        except Exception as error:
            if not job.model.engine.is_lost():
                raise
            log.exception("the images of job %s could not be read", job.id)
            self._on_device_lost(job.id)
            raise Draining from error
