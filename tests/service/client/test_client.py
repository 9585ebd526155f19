"""The client, sync and async, against the app on a fake engine over real sockets; connections are broken on purpose."""

import asyncio
import base64
import inspect
import io
import json
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from service.api import events as routes_events
from service.api.websocket_protocol import stream_protocol
from service.client import (
    Accepted,
    AsyncClient,
    AsyncJob,
    AsyncWatching,
    Cancelled,
    Client,
    Done,
    Ended,
    Frame,
    Job,
    Problem,
    Progress,
    UnexpectedAnswer,
    Unreachable,
    Waiting,
    Watching,
    calls,
)
from service.client.effects import Answer, Ask, Call, Pause, Returned, advance
from service.client.errors import ClientError
from service.client.parameters import body_of
from service.client.patience import RESTART_S, Patience
from service.client.results import Sampled
from service.server import bind
from tests.service.conftest import INSTANT, Site, pixels
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, fake_pixels, make_spec, wait_until


class Served(Site):
    """A site behind a real socket."""

    url = ""

    @contextmanager
    def running(self) -> Iterator["Served"]:
        listener = bind("127.0.0.1", 0)
        listener.listen()
        config = uvicorn.Config(self.app, log_config=None, access_log=False, ws=stream_protocol())
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            self.wait_until_ready()
            yield self
        finally:
            self.engine.gate.open()
            self.worker.close()
            server.should_exit = True
            thread.join(PATIENCE_S)
            listener.close()
        assert self.engine.jobs == {}


MakeServed = Callable[..., Served]


@pytest.fixture
def make_served() -> Iterator[MakeServed]:
    with ExitStack() as stack:

        def make(**limits: object) -> Served:
            limits.setdefault("max_streams", 8)
            limits.setdefault("max_streams_per_address", 8)
            site = Served(INFO, replace(LIMITS, **limits), INSTANT)  # type: ignore[arg-type]
            return stack.enter_context(site.running())

        yield make


@pytest.fixture
def served(make_served: MakeServed) -> Served:
    return make_served()


class InLoop:
    """The async client, or what it gives, called as if it were the sync one."""

    def __init__(self, runner: asyncio.Runner, thing: Any) -> None:
        self.runner, self.thing = runner, thing

    def _of(self, thing: Any) -> Any:
        async_kinds = (AsyncClient, AsyncJob, AsyncWatching, AsyncIterator)
        return InLoop(self.runner, thing) if isinstance(thing, async_kinds) else thing

    def _wait(self, awaitable: Any) -> Any:
        async def wait() -> Any:
            return await awaitable

        return self.runner.run(wait())

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.thing, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self._of(self._wait(result) if inspect.iscoroutine(result) else result)

        return call

    def __iter__(self) -> Iterator[Any]:
        iterator = aiter(self.thing)
        try:
            while True:
                try:
                    value = self._wait(anext(iterator))
                except StopAsyncIteration:
                    return
                yield value
        finally:
            self._wait(iterator.aclose())

    def __next__(self) -> Any:
        return self._wait(anext(self.thing))

    def __enter__(self) -> "InLoop":
        self._wait(self.thing.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._wait(self.thing.__aexit__(*error))


Connect = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients, each test once of either kind."""
    with ExitStack() as stack:
        if request.param == "sync":
            yield lambda url, **options: stack.enter_context(Client(url, **options))
        else:
            runner = stack.enter_context(asyncio.Runner())
            yield lambda url, **options: stack.enter_context(InLoop(runner, AsyncClient(url, **options)))


SPEC: dict[str, Any] = {"n": 2, "steps": 4, "seed": 5}


class Breaking(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """httpx's transport, whose answers are lost or break off. cut: what is to happen to the k-th answer."""

    def __init__(self, *cuts: int | None) -> None:
        self.cuts, self.requests = list(cuts), list[httpx.Request]()
        self.sync, self.asynchronous = httpx.HTTPTransport(), httpx.AsyncHTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        response = self.sync.handle_request(request)
        cut = self.cuts.pop(0) if self.cuts else None
        if cut == 0:
            response.read()
            response.close()
            raise httpx.ReadError("cut", request=request)
        return response if cut is None else httpx.Response(response.status_code, headers=response.headers,
                                                           stream=BrokenOff(response.stream, cut))  # fmt: skip

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        response = await self.asynchronous.handle_async_request(request)
        cut = self.cuts.pop(0) if self.cuts else None
        if cut == 0:
            await response.aread()
            await response.aclose()
            raise httpx.ReadError("cut", request=request)
        return response if cut is None else httpx.Response(response.status_code, headers=response.headers,
                                                           stream=BrokenOff(response.stream, cut))  # fmt: skip

    def close(self) -> None:
        self.sync.close()

    async def aclose(self) -> None:
        await self.asynchronous.aclose()


class BrokenOff(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that breaks off after some pieces."""

    def __init__(self, body: Any, pieces: int) -> None:
        self.body, self.pieces = body, pieces

    def __iter__(self) -> Iterator[bytes]:
        for _, piece in zip(range(self.pieces), self.body, strict=False):
            yield piece
        raise httpx.ReadError("cut")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self.pieces
        async for piece in self.body:
            yield piece
            left -= 1
            if left == 0:
                raise httpx.ReadError("cut")

    def close(self) -> None:
        self.body.close()

    async def aclose(self) -> None:
        await self.body.aclose()


# --- one answer ---


def test_a_sheet_a_zip_and_a_document_hold_the_same_images(served: Served, connect: Connect) -> None:
    tminus = connect(served.url)
    sheet, archive, document = (
        tminus.sample(accept=accept, **SPEC) for accept in ("image/png", "application/zip", "application/json")
    )
    images = fake_pixels(make_spec(**SPEC), 4)[..., 0]
    assert (pixels(sheet.data) == images.reshape(1, 2, 4, 6).swapaxes(1, 2).reshape(4, 12)).all()
    assert sheet.pngs == [sheet.data]
    assert list(archive.files) == ["00000.png", "00001.png"]
    for made in (archive, document):
        assert [(pixels(png) == image).all() for png, image in zip(made.pngs, images, strict=True)] == [True, True]
    assert document.document["images"][1]["index"] == 1
    for made in (sheet, archive, document):
        assert (made.seed, made.fingerprint, len(made.job_id)) == (5, INFO.fingerprint, 32)
        assert made.timings_s.keys() == {"queue", "first_step", "denoise", "encode"}
        assert 0 <= made.timings_s["denoise"] < PATIENCE_S


def test_what_the_server_had_kept_has_no_job(make_served: MakeServed, connect: Connect) -> None:
    tminus = connect(make_served(result_cache_bytes=10_000).url)
    first, again = tminus.sample(**SPEC), tminus.sample(**SPEC)
    assert first.data == again.data
    assert (again.job_id, again.timings_s) == (None, {})


def test_a_refusal_has_field_value_and_bound(served: Served, connect: Connect) -> None:
    with pytest.raises(Problem) as caught:
        connect(served.url).sample(steps=0)
    problem = caught.value
    assert (problem.status, problem.code, problem.field, problem.value) == (422, "invalid_field", "steps", 0)
    assert problem.bound == "an integer in 1..1000"
    assert str(problem) == "422 steps must be an integer in 1..1000, got 0"
    assert problem.retry_after_s is None


def test_an_image_goes_forward(served: Served, connect: Connect, tmp_path: Path) -> None:
    tminus = connect(served.url)
    png = tminus.sample(steps=1, seed=0).data
    noised = tminus.noise(png, t=3, seed=4)
    assert (pixels(noised.data) == pixels(png) + 7).all()
    assert (noised.seed, noised.alpha_bar, noised.fingerprint) == (4, INFO.alpha_bar(3), INFO.fingerprint)
    (tmp_path / "x.png").write_bytes(png)
    assert tminus.noise(tmp_path / "x.png", 3, 4) == noised
    assert tminus.noise(png, t=0).seed >= 0
    with pytest.raises(Problem, match="t must be"):
        tminus.noise(png, t=1000)


def test_the_model_is_told(served: Served, connect: Connect) -> None:
    assert connect(served.url).model()["class_names"] == ["cat", "dog", "3d-print"]


def test_pictures_among_the_parameters_go_as_base64(tmp_path: Path) -> None:
    file = tmp_path / "mask.png"
    file.write_bytes(b"\x00mask")
    body = body_of({"n": 1, "image": b"\xffimage", "mask": file, "strength": 0.5})
    assert body == {"n": 1, "image": "/2ltYWdl", "mask": "AG1hc2s=", "strength": 0.5}
    assert body_of({"image": body["image"]}) == {"image": body["image"]}, "what is base64 already stays"


def test_headers_of_ones_own_are_sent_with_everything(served: Served, connect: Connect) -> None:
    transport = Breaking()
    tminus = connect(served.url, headers={"Authorization": "Bearer x"}, transport=transport)
    tminus.model()
    assert transport.requests[0].headers["authorization"] == "Bearer x"
    foreign = connect(served.url, headers={"Origin": "https://evil.example"})  # seen by what the server makes of it
    with pytest.raises(Problem) as caught:
        list(foreign.watch(**SPEC))
    assert (caught.value.status, caught.value.code) == (403, "foreign_origin")


# --- frames ---


def test_a_job_is_watched_to_its_end(served: Served, connect: Connect) -> None:
    tminus = connect(served.url)
    accepted, *frames, done = tminus.watch(every=1, show=["x_t", "x_0"], layout="images", **SPEC)
    assert isinstance(accepted, Accepted)
    assert (accepted.seed, accepted.position, len(accepted.id)) == (5, 0, 32)
    assert all(isinstance(frame, Frame) for frame in frames)
    for frame in frames:
        assert (frame.steps, frame.t) == (4, 1000 - 250 * (frame.step + 1))
        colour = fake_pixels(make_spec(**SPEC), frame.step)[frame.image][0, 0, 0]
        assert pixels(frame.data)[0, 0] == (colour if frame.show == "x_t" else 255 - colour)
    assert isinstance(done, Done)
    assert list(done.images) == tminus.sample(accept="application/zip", **SPEC).pngs
    assert done.frames_dropped + len({frame.step for frame in frames}) == 3


def test_a_loop_that_is_left_cancels_the_job(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    served.engine.gate.let(2)
    for message in connect(served.url).watch(every=1, n=1, steps=1000):
        if isinstance(message, Frame):
            break
    served.engine.gate.open()
    wait_until(lambda: served.engine.jobs == {})
    assert len(served.engine.batches) < 1000


def test_with_ends_what_was_left_open(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    with connect(served.url).watch(every=1, n=1, steps=1000) as messages:
        kept = iter(messages)
        assert isinstance(next(kept), Accepted)
    served.engine.gate.open()
    wait_until(lambda: served.engine.jobs == {})
    kept.close()


def test_a_job_is_cancelled_and_says_so(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    busy = connect(served.url).submit(n=1, steps=1)  # so that the worker is within a tick, and commands wait
    served.engine.next_begun()
    watching = connect(served.url).watch(every=1, n=1, steps=1000)
    watching.cancel()  # nothing is there yet
    got = []
    for message in watching:
        got.append(message)
        if isinstance(message, Accepted):
            watching.cancel()
            wait_until(lambda: served.worker._commands.qsize() > 1)  # the job, and that it is cancelled
            served.engine.gate.open()
    assert isinstance(got[-1], Cancelled)
    assert got[-1].id == got[0].id
    watching.cancel()
    assert list(watching) == []
    busy.wait(PATIENCE_S)


def test_what_a_stream_is_refused_for_is_a_problem_too(make_served: MakeServed, connect: Connect) -> None:
    served = make_served(max_streams_per_address=1)
    tminus = connect(served.url)
    with pytest.raises(Problem, match="steps must be an integer") as caught:
        list(tminus.watch(steps=0))
    assert caught.value.field == "steps"
    served.engine.gate.shut()
    with tminus.watch(steps=2) as messages:
        kept = iter(messages)
        next(kept)
        with pytest.raises(Problem) as caught:  # before the connection is open
            list(tminus.watch(steps=2))
        kept.close()
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (429, "too_many_streams", 1)
    served.engine.gate.open()


def test_a_server_that_stops_under_a_job_is_unreachable(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    messages = iter(connect(served.url, patience_s=60).watch(steps=2))
    assert isinstance(next(messages), Accepted)
    threading.Timer(0.2, served.engine.gate.open).start()
    served.worker.close()
    with pytest.raises(ClientError) as caught:
        list(messages)
    assert isinstance(caught.value, Problem | Unreachable), "and it is not tried again: the job is another one"


# --- durable jobs ---


def test_a_job_is_submitted_awaited_and_fetched(served: Served, connect: Connect) -> None:
    tminus = connect(served.url)
    job = tminus.submit(**SPEC)
    assert (job.latest.seed, job.latest.steps, job.latest.durable) == (5, 4, True)
    state = job.wait(PATIENCE_S)
    assert (state.state, state.ended, state.step) == ("done", True, 4)
    assert job.latest == state
    image = job.image()
    assert image.data == tminus.sample(**SPEC).data
    assert (image.job_id, image.seed, image.timings_s) == (job.id, 5, {})
    assert len(tminus.job(job.id).image("application/zip").pngs) == 2
    assert tminus.job(job.id).state().parameters["n"] == 2


def test_waiting_has_an_end_and_the_job_has_not(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    job = connect(served.url).submit(**SPEC)
    with pytest.raises(TimeoutError, match=r"is (running|waiting) after 0.1 s"):
        job.wait(0.1)
    with pytest.raises(Problem) as caught:
        job.image()
    assert (caught.value.code, caught.value.status) == ("job_not_done", 409)
    assert caught.value.retry_after_s is not None
    served.engine.gate.open()
    assert job.wait(PATIENCE_S).state == "done"


def test_what_failed_says_why(served: Served, connect: Connect) -> None:
    served.engine.on_images = lambda rows: served.engine.nan.update(rows)
    job = connect(served.url).submit(**SPEC)
    state = job.wait(PATIENCE_S)
    assert (state.state, state.problem["code"]) == ("failed", "not_finite")
    with pytest.raises(Problem) as caught:
        job.image()
    assert caught.value.document["cause"]["code"] == "not_finite"


def test_cancel_forgets_nothing_and_delete_all(served: Served, connect: Connect) -> None:
    tminus = connect(served.url)
    served.engine.gate.shut()
    job, other = tminus.submit(steps=1000), tminus.submit(steps=1000)
    threading.Timer(0.2, served.engine.gate.open).start()  # a cancel takes effect between two ticks
    job.cancel()
    other.delete()
    assert job.wait(PATIENCE_S).state == "cancelled"
    job.cancel()
    assert [state.id for state in tminus.jobs()] == [job.id], "the other one is not even listed"
    job.delete()
    job.delete()
    assert list(tminus.jobs()) == []
    with pytest.raises(Problem) as caught:
        job.state()
    assert caught.value.code == "job_not_found"


def test_all_pages_of_the_jobs_are_read(served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PAGE", 2)
    tminus = connect(served.url)
    ids = [tminus.submit(steps=1).id for _ in range(5)]
    for job_id in ids:
        tminus.job(job_id).wait(PATIENCE_S)
    assert [state.id for state in tminus.jobs()] == ids[::-1]
    assert [state.id for state in tminus.jobs(state=["done", "failed"])] == ids[::-1]
    assert list(tminus.jobs(state="failed")) == []
    with pytest.raises(Problem, match="state must be"):
        list(tminus.jobs(state="asleep"))


def test_an_answer_that_is_lost_makes_no_second_job(served: Served, connect: Connect) -> None:
    transport = Breaking(0, 0)
    tminus = connect(served.url, transport=transport)
    job = tminus.submit(steps=1)
    assert [request.url.path for request in transport.requests] == ["/jobs"] * 3
    assert len({request.headers["idempotency-key"] for request in transport.requests}) == 1
    assert [state.id for state in tminus.jobs()] == [job.id]
    assert tminus.submit(steps=1).id != job.id, "each call has a key of its own"
    assert tminus.submit(steps=1, idempotency_key="mine").id == tminus.submit(steps=1, idempotency_key="mine").id
    with pytest.raises(Problem) as caught:
        tminus.submit(steps=2, idempotency_key="mine")
    assert caught.value.code == "idempotency_key_reused"


def test_a_cancel_whose_answer_is_lost_is_said_again(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    tminus = connect(served.url, transport=Breaking(None, 0), patience_s=60)
    job = tminus.submit(steps=1000)
    threading.Timer(0.2, served.engine.gate.open).start()
    assert job.cancel().state == "cancelled"
    assert job.state().state == "cancelled"


# --- events ---


def test_the_events_of_a_job_end_with_its_end(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    job = connect(served.url).submit(**SPEC)
    events = []
    for event in job.events(every=1):
        events.append(event)
        served.engine.gate.open()
    *on_the_way, ended = events
    assert isinstance(ended, Ended)
    assert (ended.job.id, ended.job.state) == (job.id, "done")
    assert all(isinstance(event, Waiting | Progress) for event in on_the_way)
    again = list(job.events())
    assert [event.job.state for event in again] == ["done"]
    assert list(job.events(last_id="end")) == [], "who knows the end is told nothing"


def slowly(served: Served) -> None:
    """Let a tick take as long as a real one, so that there is somebody to look on."""
    served.engine.on_step = lambda batch: time.sleep(0.002)


def test_frames_come_as_events_too(served: Served, connect: Connect) -> None:
    slowly(served)
    job = connect(served.url).submit(n=2, steps=200, seed=5)
    frames = [event for event in job.events(every=1, show=["x_t", "x_0"], layout="images") if isinstance(event, Frame)]
    assert {frame.show for frame in frames} == {"x_t", "x_0"}
    assert {frame.image for frame in frames} == {0, 1}
    assert frames[0].data.startswith(b"\x89PNG")


def test_a_stream_that_breaks_goes_on_where_it_was(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes_events, "RECONNECT_MS", 20)
    slowly(served)
    transport = Breaking(None, 4, 1, 3)
    job = connect(served.url, transport=transport).submit(n=1, steps=1000)
    *events, ended = job.events(every=1)
    assert isinstance(ended, Ended)
    steps = [event.step for event in events if isinstance(event, Progress)]
    assert steps == sorted(set(steps)), "nothing comes twice"
    requests = [request for request in transport.requests if request.url.path.endswith("/events")]
    assert len(requests) == 4
    assert "last-event-id" not in requests[0].headers
    assert int(requests[1].headers["last-event-id"]) <= int(requests[3].headers["last-event-id"]) < steps[-1]


def test_events_that_are_left_are_let_go_of(make_served: MakeServed, connect: Connect) -> None:
    served = make_served(max_streams_per_address=1)
    served.engine.gate.shut()
    job = connect(served.url, patience_s=PATIENCE_S).submit(steps=2)
    for _ in range(3):
        for _ in job.events():
            break
    served.engine.gate.open()
    assert job.wait(PATIENCE_S).state == "done"


def test_a_job_that_is_not_there_has_no_events(served: Served, connect: Connect) -> None:
    for job_id in ("nothing", "../../model", "a b"):
        with pytest.raises(Problem) as caught:
            list(connect(served.url, patience_s=60).job(job_id).events())
        assert caught.value.status == 404


# --- patience ---


def test_who_is_refused_may_wait(make_served: MakeServed, connect: Connect) -> None:
    served = make_served(max_jobs=1)
    served.engine.gate.shut()
    hasty = connect(served.url)
    kept = hasty.submit(steps=1)
    with pytest.raises(Problem) as caught:
        hasty.sample(steps=1)
    assert (caught.value.status, caught.value.code) == (429, "overloaded")
    assert caught.value.retry_after_s >= 1
    with pytest.raises(Problem) as caught:
        list(hasty.watch(steps=1))
    assert (caught.value.status, caught.value.retry_after_s) == (429, caught.value.document["retry_after_s"])
    opener = threading.Timer(0.5, served.engine.gate.open)
    opener.start()
    patient = connect(served.url, patience_s=PATIENCE_S)
    assert patient.sample(**SPEC).seed == 5
    assert kept.wait(PATIENCE_S).state == "done"
    served.engine.gate.shut()
    kept = hasty.submit(steps=1)
    opener.join()
    threading.Timer(0.5, served.engine.gate.open).start()
    assert isinstance(list(patient.watch(**SPEC))[-1], Done)


def test_where_nobody_is_the_call_ends(connect: Connect) -> None:
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    tminus = connect(url)
    listed: list[Callable[[], object]] = [
        tminus.model,
        lambda: tminus.submit(steps=1),
        lambda: list(tminus.watch(steps=1)),
        lambda: list(tminus.jobs()),
        connect(url, patience_s=0.6).model,
    ]
    for call in listed:
        with pytest.raises(Unreachable) as caught:
            call()
        assert not caught.value.reached
    listener.close()


@pytest.mark.parametrize("url", ["localhost:8000", "", "ws://x", "http://", "http://x:y", "file:///tmp"])
def test_an_address_that_is_none_is_refused_at_once(url: str, connect: Connect) -> None:
    with pytest.raises(ValueError, match="url must be http:// or https:// and a host, got"):
        connect(url)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"status_code": 200, "text": "hello"}, "200, and not from a tminus server"),
        ({"status_code": 404, "text": "<html>"}, "404, and not from a tminus server"),
        ({"status_code": 301, "headers": {"Location": "http://elsewhere"}}, "301"),
        ({"status_code": 400, "headers": {"Content-Type": "application/problem+json"}, "text": "{"}, "400"),
        ({"status_code": 400, "headers": {"Content-Type": "application/problem+json"}, "text": "[]"}, "400"),
    ],
)
def test_what_is_not_from_a_tminus_server_is_said_to_be(answer: dict[str, Any], says: str, connect: Connect) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(**answer))
    tminus = connect("http://server", transport=transport, patience_s=60)
    listed: list[Callable[[], object]] = [
        tminus.sample,
        tminus.model,
        tminus.submit,
        tminus.job("x").state,
        tminus.job("x").image,
        lambda: tminus.noise(b"", 1),
    ]
    for call in listed:
        with pytest.raises(UnexpectedAnswer, match=says):
            call()


def test_a_proxy_without_a_server_is_waited_for(connect: Connect) -> None:
    answers = [httpx.Response(502, text="<html>"), httpx.Response(503), httpx.Response(200, json={})]
    tminus = connect("http://server", transport=httpx.MockTransport(lambda request: answers.pop(0)), patience_s=60)
    assert tminus.model() == {}


def iterate(call: Callable[[], None]) -> None:
    """Call it until it raises."""
    while True:
        call()


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


REFUSED = Problem({"status": 429, "code": "overloaded", "detail": "too much"}, retry_after_s=7)
CUT, NOBODY = Unreachable("cut", reached=True), Unreachable("nobody", reached=False)


def test_a_refusal_is_waited_for_as_long_as_it_says_while_patience_lasts() -> None:
    clock = Clock()
    patience = Patience(20, clock=clock)
    for _ in range(2):
        assert patience.pause_s(REFUSED) == 7
        clock.now_s += 7.1
    with pytest.raises(Problem):
        patience.pause_s(REFUSED)


@pytest.mark.parametrize("error", [Problem({"status": 422}), Problem({"status": 429}), UnexpectedAnswer(200)])
def test_other_errors_are_not_waited_for(error: ClientError) -> None:
    with pytest.raises(type(error)):
        Patience(1000).pause_s(error)


def test_tries_to_connect_become_rarer() -> None:
    clock = Clock()
    patience = Patience(30, clock=clock)
    pauses = list[float]()

    def wait() -> None:
        pauses.append(patience.pause_s(NOBODY))
        clock.now_s += pauses[-1]

    with pytest.raises(Unreachable):
        iterate(wait)
    assert 0.18 < pauses[0] <= 0.25
    assert 3 <= pauses[-1] <= 4
    assert 25 < sum(pauses) <= 30


def test_a_server_that_was_there_may_be_starting_again() -> None:
    with pytest.raises(Unreachable):
        Patience(0).pause_s(CUT)
    with pytest.raises(Unreachable):
        Patience(0, durable=True).pause_s(NOBODY)
    clock = Clock()
    patience = Patience(0, durable=True, clock=clock)
    assert patience.pause_s(CUT) > 0
    clock.now_s += RESTART_S / 2
    assert patience.pause_s(NOBODY) > 0, "it is known now that there is one"
    clock.now_s += RESTART_S / 2
    with pytest.raises(Unreachable):
        patience.pause_s(NOBODY)
    patience.renew()
    assert patience.pause_s(NOBODY) > 0


# --- the calls, without a server ---


def drive(call: Call[Any], *answers: Answer | Unreachable) -> tuple[list[Any], Any]:
    """Run a call on answers written before; what it asked for, and its result."""
    left, effects = list(answers), []
    effect = advance(call)
    while not isinstance(effect, Returned):
        effects.append(effect)
        came = left.pop(0) if isinstance(effect, Ask) else None
        effect = advance(call, None, came) if isinstance(came, Unreachable) else advance(call, came)
    return effects, effect.value


def test_a_wait_looks_again_when_the_job_should_be_done() -> None:
    members = dict.fromkeys(("problem", "fingerprint", "finished", "position", "created", "sampler"))
    members |= {"id": "x", "durable": True, "step": 0, "steps": 1, "n": 1, "seed": 0, "age_s": 0, "parameters": {}}

    def answer(state: str, eta_s: float | None) -> Answer:
        return Answer(200, {}, json.dumps(members | {"state": state, "eta_s": eta_s, "newer": 1}).encode())

    told = [answer("waiting", 100), answer("running", 0.7), answer("running", 0.0), CUT, answer("done", None)]
    effects, job = drive(calls.wait("x", None, 0), *told)
    pauses = [effect.seconds for effect in effects if isinstance(effect, Pause)]
    assert pauses[:3] == [2.0, 0.7, 0.05]
    assert len(pauses) == 4
    assert job.state == "done"


def test_a_sheet_is_not_a_zip() -> None:
    headers = {"content-type": "image/png", "x-seed": "1", "x-fingerprint": "f"}
    sampled = Sampled.of(Answer(200, headers, b"\x89PNG"))
    with pytest.raises(zipfile.BadZipFile):
        _ = sampled.files
    with pytest.raises(ValueError, match="decode"):
        _ = sampled.document


def test_the_names_in_a_zip_lead_nowhere() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../00000.png", b"x")
    headers = {"content-type": "application/zip", "x-seed": "1", "x-fingerprint": "f"}
    assert Sampled.of(Answer(200, headers, out.getvalue())).files == {"00000.png": b"x"}


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Job, AsyncJob), (Watching, AsyncWatching)])
def test_the_two_clients_have_the_same_calls(one: type, other: type) -> None:
    def signatures(kind: type) -> dict[str, Any]:
        public = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
        return {name: list(inspect.signature(value).parameters.values()) for name, value in public.items()}

    def shape(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {name: [(p.name, p.kind, p.default) for p in each] for name, each in signatures(kind).items()}

    assert shape(one) == shape(other)
    assert len(shape(one)) >= 1


def test_a_frame_of_an_event_is_decoded() -> None:
    from service.client.messages import event
    from service.client.sse import ServerSentEvent

    members = {"step": 1, "steps": 2, "t": 3, "eta_s": 0.5, "show": "x_t", "media_type": "image/png"}
    sent = ServerSentEvent("frame", json.dumps(members | {"data": base64.b64encode(b"p").decode()}), "1")
    assert event(sent) == Frame(step=1, steps=2, t=3, show="x_t", eta_s=0.5, image=None, data=b"p")
    assert event(ServerSentEvent("news", "{}", "")) is None, "a newer server may have more to say"
    for bad in ("[]", "{}", "no JSON", json.dumps(members | {"data": "no base64"})):
        with pytest.raises(UnexpectedAnswer, match="the event 'frame' cannot be read"):
            event(ServerSentEvent("frame", bad, ""))
