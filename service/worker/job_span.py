"""The span of a job: how long it waited, was denoised and decoded, and in how many ticks. Nothing while traces are off.

Its parts are added when it ends, since only then are their ends known: a tick adds up three numbers, and no more.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tminus.service.tracing import TRACER, Attributes, Span, why
from tminus.service.work import JobResult

if TYPE_CHECKING:
    from tminus.service.worker.running_job import RunningJob

FIRST_STEP = "first step"


@dataclass(slots=True)
class Ticks:
    """The ticks that had rows of a job."""

    count: int = 0
    seconds: float = 0.0  # of all of them
    places: int = 0  # of all of them, those of other jobs too

    def add(self, seconds: float, places: int) -> None:
        """Count one."""
        self.count += 1
        self.seconds += seconds
        self.places += places

    @property
    def attributes(self) -> Attributes:
        """What a span has of them."""
        if not self.count:
            return {}
        return {
            "tminus.ticks": self.count,
            "tminus.ticks_s": round(self.seconds, 6),
            "tminus.places_per_tick": round(self.places / self.count, 3),
        }


def begin_span(job: "RunningJob") -> Span | None:
    """Begin the span of a job, as a part of what asked for it; None while traces are off."""
    tracer = TRACER.get()
    if tracer is None:
        return None
    spec = job.spec
    attributes: dict[str, str | bool | int | float] = {
        "tminus.job.id": job.id,
        "tminus.job.durable": job.durable,
        "tminus.job.resumed": job.snapshot is not None,
        "tminus.request.id": job.request_id,
        "tminus.model": job.model.info.name,
        "tminus.images": spec.n,
        "tminus.passes": spec.num_passes,
        "tminus.sampler": spec.sampler,
        "tminus.guidance": spec.guidance,
    }
    if job.owner:
        attributes["tminus.key"] = job.owner
    return tracer.begin("job", job.created_us * 1000, attributes)


def begin_coding(job: "RunningJob", kind: str) -> None:
    """Note that its picture is going to be encoded, or its images decoded."""
    if job.span is None:
        return
    job.span.add_event(f"{kind} begins")
    if kind == "decode":
        job.denoised_ns = time.time_ns()


def end_done(job: "RunningJob", result: JobResult) -> None:
    """End the span of a job that has its images."""
    if (span := job.span) is None:
        return
    started_ns = _at(job, result.queue_s)
    denoised_ns = started_ns + _ns(result.denoise_s)
    ended_ns = denoised_ns
    span.add_child("queue", _at(job, 0.0), started_ns, {}, {})
    span.add_child("denoise", started_ns, denoised_ns, job.ticks.attributes, {FIRST_STEP: _at(job, job.first_step_s)})
    if job.model.info.latent is not None:
        ended_ns += _ns(result.decode_s)
        span.add_child("decode", denoised_ns, ended_ns, {"tminus.images": job.spec.n}, {})
    span.set({"tminus.outcome": "done"})
    span.end(ended_ns)


def end_failed(job: "RunningJob", error: BaseException) -> None:
    """End the span of a job that has no images, now."""
    if (span := job.span) is None:
        return
    if job.started_s is None:
        span.add_child("queue", _at(job, 0.0), None, {}, {})
    else:
        started_ns = _at(job, job.started_s - job.submitted_s)
        first = {FIRST_STEP: _at(job, job.first_step_s)}
        span.add_child("queue", _at(job, 0.0), started_ns, {}, {})
        span.add_child("denoise", started_ns, job.denoised_ns, job.ticks.attributes, first)
    if job.denoised_ns is not None:
        span.add_child("decode", job.denoised_ns, None, {"tminus.images": job.spec.n}, {})
    code, by_server = why(error)
    span.set({"tminus.outcome": code})
    span.fail(code, by_server=by_server)
    span.end()


def _at(job: "RunningJob", seconds: float) -> int:
    """Unix time, so many seconds after a job was accepted."""
    return job.created_us * 1000 + _ns(seconds)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
