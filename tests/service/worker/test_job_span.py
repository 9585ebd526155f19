"""The span of a job, by a loop whose ticks take a second and the SDK of OpenTelemetry with an exporter in memory."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan

from tests.service.collector import Kept
from tests.service.fakes import make_spec
from tests.service.worker.bench import LATENT, MakeBench
from tests.service.worker.test_loop import picture
from tminus.service.errors import Draining
from tminus.service.tracing import TRACER


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    token = TRACER.set(made.traces.tracer)
    yield made
    TRACER.reset(token)
    made.traces.close()


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def test_waiting_and_denoising_are_its_parts_with_the_ticks_that_had_its_rows(
    make_bench: MakeBench,
    kept: Kept,
) -> None:
    bench = make_bench()
    other = bench.accept("other", n=8, steps=2)
    bench.tick()
    bench.now_s += 5
    job = bench.accept("a", n=2, steps=3, seed=7)
    bench.finish()
    assert job.done()
    assert other.done()
    spans = kept.all()
    (of_a,) = [span for span in spans if attributes(span).get("tminus.job.id") == "a"]
    assert of_a.context is not None
    parts = {each.name: each for each in spans if each.parent and each.parent.span_id == of_a.context.span_id}
    assert parts.keys() == {"queue", "denoise"}
    assert seconds(of_a) == pytest.approx(seconds(parts["queue"]) + seconds(parts["denoise"]))
    assert parts["queue"].start_time == of_a.start_time
    denoise = attributes(parts["denoise"])
    assert denoise["tminus.ticks"] == denoise["tminus.ticks_s"] == 3
    assert denoise["tminus.places_per_tick"] >= 2  # type: ignore[operator]
    (first,) = parts["denoise"].events
    assert first.name == "first step"
    assert parts["denoise"].start_time is not None
    assert (first.timestamp - parts["denoise"].start_time) / 1e9 == pytest.approx(1)


def test_a_job_that_is_given_up_while_it_waits_has_no_denoising(make_bench: MakeBench, kept: Kept) -> None:
    bench = make_bench()
    bench.accept("a", n=1, steps=3)
    bench.cancel("a")
    spans = kept.by_name()
    assert spans.keys() == {"job", "queue"}
    assert attributes(spans["job"])["tminus.outcome"] == "cancelled"
    assert spans["job"].status.is_unset, "nobody has to look at the server for that"


def test_a_job_whose_step_fails_says_so_without_the_text_of_the_error(make_bench: MakeBench, kept: Kept) -> None:
    bench = make_bench()
    bench.accept("a", n=1, steps=3)
    bench.tick()

    def fail(_batch: object) -> None:
        raise RuntimeError("a text that may quote a request")

    bench.engine.on_step = fail
    bench.tick()
    spans = kept.by_name()
    assert spans.keys() == {"job", "queue", "denoise"}
    assert attributes(spans["job"])["error.type"] == "engine_failed"
    assert not spans["job"].status.is_ok
    assert not spans["job"].status.is_unset
    assert attributes(spans["denoise"])["tminus.ticks"] == 1
    assert "quote" not in spans["job"].to_json()


def test_a_latent_job_is_decoded_after_that(make_bench: MakeBench, kept: Kept) -> None:
    bench = make_bench(info=LATENT)
    job = bench.accept("a", n=2, steps=2)
    bench.tick(2)
    bench.next_command()  # of the first image
    bench.now_s += 4
    bench.next_command()
    assert job.result(timeout=0).read().dtype == np.uint8
    spans = kept.by_name()
    assert spans.keys() == {"job", "queue", "denoise", "decode"}
    assert seconds(spans["denoise"]) == pytest.approx(2)
    assert seconds(spans["decode"]) == pytest.approx(4)
    assert [event.name for event in spans["job"].events] == ["decode begins"]


def test_a_latent_job_that_fails_in_decoding_was_denoised_before(make_bench: MakeBench, kept: Kept) -> None:
    bench = make_bench(info=LATENT)

    def fail(_spec: object) -> None:
        raise RuntimeError("no memory")

    bench.engine.on_decode = fail
    bench.accept("a", n=1, steps=2)
    bench.tick(2)
    bench.next_command()
    spans = kept.by_name()
    assert spans.keys() == {"job", "queue", "denoise", "decode"}
    assert attributes(spans["job"])["tminus.outcome"] == "engine_failed"
    assert spans["denoise"].end_time == spans["decode"].start_time
    assert spans["decode"].end_time <= spans["job"].end_time  # type: ignore[operator]


def test_a_picture_that_is_encoded_is_an_event_and_lines_of_the_log_have_the_ids_of_the_span(
    make_bench: MakeBench, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench, inputs = make_bench(info=LATENT), picture()
    bench.accept_spec("a", make_spec(steps=2, image_sha256=inputs.image_sha256), inputs=inputs)
    bench.next_command()
    bench.tick(2)
    bench.next_command()
    span = kept.by_name()["job"]
    assert [event.name for event in span.events] == ["encode begins", "decode begins"]
    assert span.context is not None
    ids = {record.__dict__["span_id"] for record in caplog.records if record.__dict__.get("job_id") == "a"}
    assert ids == {f"{span.context.span_id:016x}"}


def test_a_job_that_was_answered_while_the_worker_hung_ends_its_span_once(
    make_bench: MakeBench, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench()
    bench.accept("a")
    bench.tick()
    bench.worker.jobs.fail_all(Draining())
    bench.finish()
    assert attributes(kept.by_name()["job"])["tminus.outcome"] == "draining"
    assert "ended span" not in caplog.text
