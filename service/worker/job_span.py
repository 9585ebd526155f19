"""The span of a job: how long it waited, was denoised and decoded, and in how many ticks. Nothing while traces are off.

Its parts are added when it ends, since only then are their ends known: a tick adds up three numbers, and no more.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Span, Tracer

from tminus.service.tracing import TRACER, Attributes, fail, why
from tminus.service.work import JobResult

if TYPE_CHECKING:
    from tminus.service.worker.running_job import RunningJob

FIRST_STEP = "first step"


@dataclass(slots=True)
class JobSpan:
    """The span of a job, and what its parts are made of when it ends. Times are Unix time in nanoseconds."""

    span: Span
    _tracer: Tracer
    denoised_ns: int | None = None  # of a latent model: when its decoding began
    ticks: int = 0  # those that had rows of the job
    _ticks_s: float = 0.0  # of all of them
    _places: int = 0  # of all of them, those of other jobs too

    def add_tick(self, seconds: float, places: int) -> None:
        """Count a tick that had rows of the job."""
        self.ticks += 1
        self._ticks_s += seconds
        self._places += places

    def begin_part(self, name: str, began_ns: int, attributes: Attributes | None = None) -> Span:
        """Begin a part, whose end is known too."""
        within = trace.set_span_in_context(self.span)
        return self._tracer.start_span(name, within, attributes=attributes, start_time=began_ns)

    def add_denoising(self, began_ns: int, ended_ns: int | None, first_step_ns: int) -> None:
        """Add the part of the ticks. None as an end is now."""
        part = self.begin_part("denoise", began_ns)
        if self.ticks:
            part.set_attributes(
                {
                    "tminus.ticks": self.ticks,
                    "tminus.ticks_s": round(self._ticks_s, 6),
                    "tminus.places_per_tick": round(self._places / self.ticks, 3),
                }
            )
        part.add_event(FIRST_STEP, timestamp=first_step_ns)
        part.end(ended_ns)


def begin_span(job: "RunningJob") -> JobSpan | None:
    """Begin the span of a job, as a part of what asked for it; None while traces are off."""
    tracer = TRACER.get()
    if tracer is None:
        return None
    spec = job.spec
    attributes: dict[str, str | bool | int | float] = {
        "tminus.job.id": job.id,
        "tminus.job.durable": job.new.durable,
        "tminus.job.resumed": job.new.snapshot is not None,
        "tminus.request.id": job.request_id,
        "tminus.model": job.model.info.name,
        "tminus.images": spec.n,
        "tminus.passes": spec.num_passes,
        "tminus.sampler": spec.sampler,
        "tminus.guidance": spec.guidance,
    }
    if job.new.owner:
        attributes["tminus.key"] = job.new.owner
    return JobSpan(tracer.start_span("job", attributes=attributes, start_time=job.created_us * 1000), tracer)


def begin_coding(job: "RunningJob", kind: str) -> None:
    """Note that its picture is going to be encoded, or its images decoded."""
    if job.span is None:
        return
    job.span.span.add_event(f"{kind} begins")
    if kind == "decode":
        job.span.denoised_ns = time.time_ns()


def end_done(job: "RunningJob", result: JobResult) -> None:
    """End the span of a job that has its images."""
    if (of_job := job.span) is None:
        return
    started_ns = _at(job, result.queue_s)
    denoised_ns = started_ns + _ns(result.denoise_s)
    ended_ns = denoised_ns
    of_job.begin_part("queue", _at(job, 0.0)).end(started_ns)
    of_job.add_denoising(started_ns, denoised_ns, _at(job, job.first_step_s))
    if job.model.info.latent is not None:
        ended_ns += _ns(result.decode_s)
        of_job.begin_part("decode", denoised_ns, {"tminus.images": job.spec.n}).end(ended_ns)
    of_job.span.set_attribute("tminus.outcome", "done")
    of_job.span.end(ended_ns)


def end_failed(job: "RunningJob", error: BaseException) -> None:
    """End the span of a job that has no images, now."""
    if (of_job := job.span) is None:
        return
    if job.started_s is None:
        of_job.begin_part("queue", _at(job, 0.0)).end()
    else:
        started_ns = _at(job, job.started_s - job.submitted_s)
        of_job.begin_part("queue", _at(job, 0.0)).end(started_ns)
        of_job.add_denoising(started_ns, of_job.denoised_ns, _at(job, job.first_step_s))
    if of_job.denoised_ns is not None:
        of_job.begin_part("decode", of_job.denoised_ns, {"tminus.images": job.spec.n}).end()
    code, by_server = why(error)
    of_job.span.set_attribute("tminus.outcome", code)
    fail(of_job.span, code, by_server=by_server)
    of_job.span.end()


def _at(job: "RunningJob", seconds: float) -> int:
    """Return the time that was so many seconds after a job was accepted."""
    return job.created_us * 1000 + _ns(seconds)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
