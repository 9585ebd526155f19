"""Traces of a real server, as a collector gets them: what is a part of what, and a collector that hangs or refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from tests.documents import ROOT
from tests.e2e.conftest import RunningServer, serving, stop_server
from tests.service.collector import SERVER, Collector, Received, collector
from tests.service.keys import key_line

Start = Callable[..., RunningServer]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SPEC = {"n": 2, "steps": 5, "sampler": "ddim", "seed": 3}
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}  # ms until a batch is sent


@pytest.fixture(scope="module")
def spans() -> Iterator[Collector]:
    with collector() as listening:
        yield listening


@pytest.fixture(scope="module")
def traced_server(small: Path, spans: Collector) -> Iterator[RunningServer]:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": spans.endpoint, "OTEL_SERVICE_NAME": "studio", **SOON}
    with serving(small, "--result-cache-mb", "0", "--log-format", "json", **variables) as running:
        yield running


def within(inner: Received, outer: Received, spare_s: float = 0.05) -> bool:
    """Whether a span lies in another; a job's times are of another clock, and what admits it comes before."""
    spare_ns = spare_s * 1e9
    return inner.began_ns >= outer.began_ns - spare_ns and inner.ended_ns <= outer.ended_ns + spare_ns


def test_a_sample_is_a_trace_from_the_request_to_its_parts(traced_server: RunningServer, spans: Collector) -> None:
    response = traced_server.post(json=SPEC, headers={"X-Request-ID": "of-the-test"})
    assert response.status_code == 200
    request = spans.one("POST /sample", request_id="of-the-test")
    assert (request.kind, request.parent, request.failed) == (SERVER, "", False)
    assert request.attributes == request.attributes | {
        "http.request.method": "POST",
        "http.route": "/sample",
        "http.response.status_code": 200,
        "url.path": "/sample",
        "url.scheme": "http",
    }
    assert request.resource["service.name"] == "studio"
    encode, job = spans.parts(request, "encode", "job")
    assert job.attributes == {
        "tminus.job.id": response.headers["X-Job-ID"],
        "tminus.job.durable": False,
        "tminus.job.resumed": False,
        "tminus.request.id": "of-the-test",
        "tminus.model": "small",
        "tminus.images": 2,
        "tminus.passes": 5,
        "tminus.sampler": "ddim",
        "tminus.guidance": 1.0,
        "tminus.outcome": "done",
    }
    assert encode.attributes == {"tminus.media_type": "image/png", "tminus.images": 2}
    denoise, queue = spans.parts(job, "denoise", "queue")
    assert (queue.began_ns, queue.ended_ns, denoise.ended_ns) == (job.began_ns, denoise.began_ns, job.ended_ns)
    assert denoise.attributes["tminus.ticks"] >= 5
    assert denoise.attributes["tminus.places_per_tick"] >= 1
    assert 0 < denoise.attributes["tminus.ticks_s"] <= denoise.seconds + 1e-3
    assert denoise.began_ns < denoise.events["first step"] < denoise.ended_ns
    assert all(within(each, request) for each in (job, encode, queue, denoise))
    assert {each.trace_id for each in (job, encode, queue, denoise)} == {request.trace_id}


def test_a_clients_trace_goes_on_unless_it_is_broken_or_not_wanted(
    traced_server: RunningServer, spans: Collector
) -> None:
    sent = {
        "silent": f"00-{TRACE}-{PARENT}-00",
        "nonsense": "nonsense",
        "of-zeros": f"00-{'0' * 32}-{PARENT}-01",
        "told": TRACEPARENT,
    }
    for request_id, traceparent in sent.items():
        headers = {"traceparent": traceparent, "X-Request-ID": request_id}
        assert traced_server.post(json=SPEC, headers=headers).status_code == 200
    request = spans.one("POST /sample", request_id="told")
    assert (request.trace_id, request.parent) == (TRACE, PARENT)
    assert [part.trace_id for part in spans.parts(request, "encode", "job")] == [TRACE, TRACE]
    assert not spans.named("POST /sample", request_id="silent")
    assert not spans.named("job", request_id="silent")
    for request_id in ("nonsense", "of-zeros"):
        request = spans.one("POST /sample", request_id=request_id)
        assert request.parent == ""
        assert request.trace_id not in (TRACE, "0" * 32)


def test_a_websocket_is_a_span_with_a_job_for_each_message(traced_server: RunningServer, spans: Collector) -> None:
    address = traced_server.url.replace("http", "ws") + "/sample/stream"
    with connect(address, additional_headers={"traceparent": TRACEPARENT, "X-Request-ID": "of-a-stream"}) as ws:
        for keep_open in (True, False):
            ws.send(json.dumps({**SPEC, "every": 2, "keep_open": keep_open}))
            while True:
                message = ws.recv(timeout=60)
                if isinstance(message, str) and json.loads(message)["type"] == "done":
                    break
            ws.recv(timeout=60)
    request = spans.one("GET /sample/stream", request_id="of-a-stream")
    assert (request.trace_id, request.parent, request.kind) == (TRACE, PARENT, SERVER)
    assert request.attributes["http.response.status_code"] == 101
    for job in spans.parts(request, "encode", "encode", "job", "job")[2:]:
        spans.parts(job, "denoise", "queue")


def test_a_durable_job_is_a_part_of_the_request_that_posted_it(traced_server: RunningServer, spans: Collector) -> None:
    headers = {"traceparent": TRACEPARENT, "X-Request-ID": "of-a-job"}
    posted = httpx.post(f"{traced_server.url}/jobs", json=SPEC, headers=headers)
    assert posted.status_code == 202
    job_id = posted.json()["id"]
    finished = spans.one("store finish", job_id=job_id)
    request = spans.one("POST /jobs", request_id="of-a-job")
    assert (request.trace_id, request.parent, request.attributes["http.response.status_code"]) == (TRACE, PARENT, 202)
    job, _, _ = spans.parts(request, "job", "store add", "store finish")
    assert (job.attributes["tminus.job.durable"], job.attributes["tminus.outcome"]) == (True, "done")
    spans.parts(job, "denoise", "queue")
    assert finished.attributes["tminus.outcome"] == "done"
    assert finished.began_ns >= job.ended_ns - 50e6
    image = httpx.get(f"{traced_server.url}/jobs/{job_id}/image", headers={"X-Request-ID": "of-its-image"})
    assert image.status_code == 200
    read = spans.one("GET /jobs/{job_id}/image", request_id="of-its-image")
    spans.parts(read, "encode", "store images")


def test_nothing_secret_and_no_pixel_leaves_in_a_span(own_server: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(key_line("studio", "tm_the-secret-of-studio") + "\n")
    with collector() as spans:
        server = own_server("--keys-file", str(keys), OTEL_EXPORTER_OTLP_ENDPOINT=spans.endpoint, **SOON)
        headers = {"Authorization": "Bearer tm_the-secret-of-studio", "Cookie": "tminus_key=tm_the-secret-of-studio"}
        with server.client(headers=headers) as client:
            assert client.post("/sample", json=SPEC, params={"note": "tm_the-secret-of-studio"}).status_code == 422
            assert client.post("/sample", json=SPEC).status_code == 200
            assert client.get("/jobs/tm_the-secret-of-studio").status_code == 404
        assert spans.one("job").attributes["tminus.key"] == "studio"
        spans.one("GET /jobs/{job_id}")
        assert stop_server(server) == 0, server.log
        everything = b"".join(spans.bodies)
    assert b"the-secret-of-studio" not in everything
    assert len(everything) < 20_000


def test_a_job_that_goes_on_after_a_restart_has_a_trace_of_its_own(own_server: Start, tmp_path: Path) -> None:
    with collector() as spans:
        variables = {"TMINUS_STATE_DIR": str(tmp_path), "OTEL_EXPORTER_OTLP_ENDPOINT": spans.endpoint, **SOON}
        first = own_server(**variables)
        first.slow_down()
        posted = httpx.post(f"{first.url}/jobs", json={"n": 4, "steps": 400, "seed": 1})
        job_id = posted.json()["id"]
        first.wait_until(lambda: httpx.get(f"{first.url}/jobs/{job_id}").json()["state"] == "running")
        assert stop_server(first) == 0, first.log
        suspended = spans.one("job", job_id=job_id)  # the last spans are sent before the process ends
        assert suspended.attributes["tminus.outcome"] == "draining"
        second = own_server(**variables)
        resume = spans.one("resume", job_id=job_id)
        second.wait_until(lambda: bool(spans.named("store finish", job_id=job_id)))
        job, _ = spans.parts(resume, "job", "store finish")
    assert (job.attributes["tminus.job.resumed"], job.attributes["tminus.outcome"]) == (True, "done")
    assert resume.parent == ""
    assert resume.trace_id != suspended.trace_id


@pytest.mark.alone
def test_a_collector_that_hangs_slows_neither_requests_nor_the_end(own_server: Start) -> None:
    with collector() as spans:
        spans.open.clear()
        spans.status = 503
        # A queue of eight spans is full after two requests.
        small_queue = {"OTEL_BSP_MAX_QUEUE_SIZE": "8", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}
        server = own_server(OTEL_EXPORTER_OTLP_ENDPOINT=spans.endpoint, **SOON, **small_queue)
        with server.client() as client:
            for _ in range(2):
                client.post("/sample", json=SPEC)
            server.wait_until(lambda: spans.asked > 0)
            slowest_s = 0.0
            for _ in range(20):
                began_s = time.monotonic()
                assert client.post("/sample", json=SPEC).status_code == 200
                slowest_s = max(slowest_s, time.monotonic() - began_s)
        assert slowest_s < 5.0, "an exporter waits for ten"
        began_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.log
        assert time.monotonic() - began_s < 15.0, "the SDK waits for thirty"
    assert "Traceback" not in server.log, server.log
    assert server.log.count("spans cannot be sent") <= 1, server.log
    assert len([line for line in server.lines if "opentelemetry" in line]) < 10, server.log


# --- not installed ---


def test_where_the_extra_is_missing_one_line_names_it(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry" / "sdk").mkdir(parents=True)
    for package in ("", "sdk"):  # it hides what is installed, but for the API
        init = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n" if not package else ""
        (tmp_path / "opentelemetry" / package / "__init__.py").write_text(init)
    command = [sys.executable, "-m", "tminus", "serve", "--port", "0"]
    env = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("tminus: OTEL_EXPORTER_OTLP_ENDPOINT asks for traces")
    assert "pip install '.[otel]' in a checkout" in line
    assert "OTEL_TRACES_EXPORTER=none" in line
