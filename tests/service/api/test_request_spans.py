"""The span of each request, with spans that stay in memory. A real server's: tests/e2e/test_traces.py."""

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.trace import SpanKind
from starlette.types import Receive, Scope, Send

from tests.service.api.asgi import call, scope_of
from tests.service.api.pictures import CAT
from tests.service.collector import Kept
from tests.service.conftest import MakeSite
from tests.service.fakes import wait_until
from tminus.service.api.edge.middleware import RequestSpans
from tminus.service.tracing import TRACER

QUICK = {"steps": 2, "seed": 5, "class_label": "cat"}


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.traces.close()


def attributes(kept: Kept, name: str) -> dict[str, Any]:
    (span,) = [span for span in kept.all() if span.name == name]
    return dict(span.attributes or {})


@pytest.mark.parametrize(
    ("method", "path", "name", "status"),
    [
        ("GET", "/models/fake/model", "GET /models/{model}/model", 200),
        ("GET", "/jobs/some-job", "GET /jobs/{job_id}", 404),
        ("BREW", "/model", "HTTP /model", 405),
    ],
)
def test_a_span_has_the_name_of_the_route_and_the_status(
    make_site: MakeSite, kept: Kept, method: str, path: str, name: str, status: int
) -> None:
    site = make_site(app={"traces": kept.traces})
    response = site.client.request(method, path, headers={"X-Request-ID": "mine"})
    assert response.status_code == status
    assert TRACER.get() is None
    span = kept.by_name()[name]
    assert span.kind is SpanKind.SERVER
    assert span.status.is_unset, "only the server's own failures are errors"
    assert dict(span.attributes or {}) == dict(span.attributes or {}) | {
        "http.request.method": method if method == "GET" else "_OTHER",
        "http.route": name.partition(" ")[2],
        "http.response.status_code": status,
        "url.path": path,
        "tminus.request.id": "mine",
    }


def test_a_query_is_not_kept_and_a_secret_in_a_path_is_masked(make_site: MakeSite, kept: Kept) -> None:
    site = make_site(app={"traces": kept.traces})
    site.client.get("/jobs/tm_some-secret", params={"key": "another-secret"}, headers={"Cookie": "tminus_key=third"})
    (span,) = kept.all()
    assert "secret" not in span.to_json()
    assert "third" not in span.to_json()


def test_uploads_animations_and_noise_are_parts_of_their_requests(make_site: MakeSite, kept: Kept) -> None:
    site = make_site(app={"traces": kept.traces})
    accept = {"Accept": "image/webp"}
    assert site.client.post("/sample?every=1", json=QUICK, headers=accept).status_code == 200
    assert site.client.post("/noise?t=5&seed=1", content=CAT, headers={"Content-Type": "image/png"}).status_code == 200
    spans = kept.all()
    names = {span.context.span_id: span.name for span in spans if span.context is not None}
    parts = {(names[span.parent.span_id], span.name) for span in spans if span.parent is not None}
    of_job = {("job", "queue"), ("job", "denoise")}
    of_noise = {("POST /noise", "read upload"), ("POST /noise", "encode")}
    assert parts == {("POST /sample", "job"), ("POST /sample", "encode"), *of_job, *of_noise}
    (read,) = [span for span in spans if span.name == "read upload"]
    assert (read.attributes or {})["tminus.bytes"] == len(CAT)


def test_an_answer_that_breaks_off_is_an_error(kept: Kept) -> None:
    async def breaks(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("a text")

    with pytest.raises(RuntimeError):
        call(RequestSpans(breaks, kept.traces.tracer), iter([]))  # type: ignore[arg-type]
    (span,) = kept.all()
    assert (span.attributes or {})["error.type"] == "RuntimeError"
    assert not span.status.is_unset
    assert "a text" not in span.to_json()


def test_the_servers_failures_are_errors_and_refusals_have_their_code(make_site: MakeSite, kept: Kept) -> None:
    site = make_site(app={"traces": kept.traces})

    def fail(_batch: object) -> None:
        raise RuntimeError("a text")

    site.engine.on_step = fail
    assert site.post(json=QUICK).status_code == 500
    span = next(span for span in kept.all() if span.name == "POST /sample")
    assert not span.status.is_ok
    assert not span.status.is_unset
    found = dict(span.attributes or {})
    assert (found["error.type"], found["tminus.problem"]) == ("500", "engine_failed")
    assert "a text" not in span.to_json()


def test_a_client_that_goes_away_has_the_status_that_the_metrics_have(make_site: MakeSite, kept: Kept) -> None:
    site = make_site(app={"traces": kept.traces})
    site.engine.gate.shut()
    body = b'{"steps": 2, "class_label": "cat"}'
    message = {"type": "http.request", "body": body, "more_body": False}
    scope = scope_of(headers=[(b"host", b"localhost"), (b"content-type", b"application/json")])
    call(site.app, iter([message]), scope, before_last=site.engine.next_begun)
    site.engine.gate.open()
    wait_until(lambda: not site.engine.jobs)
    found = attributes(kept, "POST /sample")
    assert (found["http.response.status_code"], found["tminus.problem"]) == (499, "cancelled")
    assert "error.type" not in found


def test_probes_and_the_lifespan_have_no_span(make_site: MakeSite, kept: Kept) -> None:
    site = make_site(app={"traces": kept.traces})
    for path in ("/healthz", "/readyz", "/health", "/metrics"):
        assert site.client.get(path).status_code == 200
    assert kept.all() == []
