"""POST /noise, through the app."""

import asyncio
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from tests.service.api.asgi import call, scope_of
from tests.service.api.pictures import CAT, PICTURE, encode, noise
from tests.service.conftest import MakeSite, Site, create_app, pixels, prepare, problem
from tests.service.fakes import INFO, LIMITS, wait_until
from tests.service.keys import access_of, bearer, key_line
from tminus.model.checkpoint import Checkpoint
from tminus.model.rng import image_noise
from tminus.service import byte_budget
from tminus.service.api.edge import middleware
from tminus.service.api.request import reading
from tminus.service.api.request.multipart import (
    FORM,
    FORM_BYTES,
    MAX_FIELD_BYTES,
    MAX_HEAD_BYTES,
    MAX_PARTS,
    Form,
    parse_form,
)
from tminus.service.byte_budget import Hold
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor
from tminus.service.errors import MalformedForm
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.model_info import Limits

pytestmark = pytest.mark.slow

RAW = {"Content-Type": "image/png"}


def post(site: Site, content: bytes = CAT, *, headers: dict[str, str] = RAW, **params: Any) -> Any:
    return site.client.post("/noise", content=content, headers=headers, params=params)


def post_form(site: Site, files: Any, data: dict[str, Any] | None = None, **params: Any) -> Any:
    return site.client.post("/noise", files=files, data=data, params=params)


def text_of(png: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        found: dict[str, Any] = json.loads(image.text["tminus"])  # type: ignore[attr-defined]
    return found


# --- the image ---


def test_an_image_comes_back_with_noise_and_the_headers_of_the_contract(site: Site) -> None:
    response = post(site, t=500, seed=7)
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-seed"] == "7"
    assert response.headers["x-fingerprint"] == INFO.fingerprint
    alpha_bar = site.client.get("/model/schedule").json()["alpha_bar"][500]
    assert float(response.headers["x-alpha-bar"]) == alpha_bar
    assert response.headers["cache-control"] == "no-cache"
    np.testing.assert_array_equal(pixels(response.content), PICTURE + np.uint8(507 % 256))
    assert text_of(response.content) == {
        "noise": {"t": 500, "seed": 7, "alpha_bar": alpha_bar},
        "fingerprint": INFO.fingerprint,
    }


def test_a_form_gets_the_same_answer_as_a_raw_body_with_fields_in_form_or_query(site: Site) -> None:
    wanted = post(site, t=5, seed=7)
    answers = [
        post_form(site, {"image": ("cat.png", CAT)}, t=5, seed=7),
        post_form(site, {"image": ("cat.svg", CAT, "image/svg+xml")}, {"t": "5", "seed": "7"}),
        post_form(site, {"image": ("", CAT)}, {"t": "5"}, seed=7),
        post_form(site, {"image": ("cat.png", CAT)}, {"t": "5", "seed": "7"}, t="5.0", seed=7),
    ]
    for answer in answers[:2] + answers[3:]:
        assert answer.status_code == 200, answer.text
        assert answer.content == wanted.content
        assert answer.headers["etag"] == wanted.headers["etag"]


def test_a_seed_that_is_not_given_is_drawn_and_told(site: Site) -> None:
    one, two = post(site, t=5), post(site, t=5)
    assert one.headers["x-seed"] != two.headers["x-seed"]
    assert 0 <= int(one.headers["x-seed"]) < 2**53
    assert one.headers["cache-control"] == "no-store"
    assert "etag" not in one.headers
    assert post(site, t=5, seed=one.headers["x-seed"]).content == one.content


@pytest.fixture(scope="module")
def real(tiny: Checkpoint) -> Iterator[TestClient]:
    engine = Engine(tiny, EagerExecutor(tiny.net, torch.device("cpu")), torch.device("cpu"), max_rows=8, max_jobs=4)
    limits = replace(LIMITS, max_rows=8)
    made = create_app([prepare(engine, limits, ((1, 1e-6), (8, 1e-6)))], lambda _: SqliteStore(None))
    with TestClient(made.app, base_url="http://localhost") as client:
        wait_until(lambda: made.served.worker.state.ready)
        yield client


@settings(max_examples=40, deadline=None)
@given(t=st.integers(0, 49), seed=st.integers(0, 2**64 - 1), picture=st.integers(0, 2**32))
def test_the_real_engine_gives_equation_4(real: TestClient, tiny: Checkpoint, t: int, seed: int, picture: int) -> None:
    image = noise(8, 8, seed=picture)
    response = real.post("/noise", params={"t": t, "seed": seed}, content=encode(image), headers=RAW)
    assert response.status_code == 200
    eps = image_noise(seed, [0], 0, (1, 8, 8), torch.device("cpu"))[0, 0].double().numpy()
    alpha_bar = float(tiny.noise.schedule().alpha_bar[t])
    assert float(response.headers["x-alpha-bar"]) == pytest.approx(alpha_bar, rel=1e-12)
    x_t = np.sqrt(alpha_bar) * (image / 127.5 - 1) + np.sqrt(1 - alpha_bar) * eps
    exact = (np.clip(x_t, -1, 1) + 1) * 127.5
    assert np.abs(pixels(response.content) - exact).max() <= 0.5 + 1e-3, "rounded to nearest"


# --- the answer's ETag ---


def test_the_etag_depends_on_the_pixels_and_the_parameters_and_whoever_has_it_gets_412(site: Site) -> None:
    same = [post(site, t=5, seed=7), post(site, encode(PICTURE, compress_level=0), t=5, seed=7)]
    other = [post(site, t=6, seed=7), post(site, t=5, seed=8), post(site, encode(noise(4, 6, seed=9)), t=5, seed=7)]
    assert len({answer.headers["etag"] for answer in same}) == 1
    assert len({answer.headers["etag"] for answer in same + other}) == 4
    tag = same[0].headers["etag"]
    site.engine.on_noised = lambda: pytest.fail("no work")
    again = post(site, t=5, seed=7, headers=RAW | {"If-None-Match": f'"x", W/{tag}'})
    assert problem(again, 412, "precondition_failed")["value"] == tag
    assert site.metrics()['tminus_answered_without_work_total{"how": "not_modified"}'] == 1


# --- what is refused ---


def test_a_body_that_is_no_picture_and_no_form_is_a_problem(one_site: Site) -> None:
    for kind in ("application/json", "multipart/mixed; boundary=x"):
        document = problem(post(one_site, headers={"Content-Type": kind}, t=5), 415, "unsupported_media_type")
        assert document["field"] == "Content-Type"
        assert "multipart/form-data" in document["bound"]


HALF_A_FORM = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nhalf'


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200), lead=st.sampled_from([b"", b"--x\r\n", b"--x\r\nContent-Disposition: form-data"])
)
def test_any_bytes_as_a_form_are_at_most_a_problem(site: Site, content: bytes, lead: bytes) -> None:
    response = post(site, lead + content, headers={"Content-Type": "multipart/form-data; boundary=x"}, t=5)
    assert response.status_code in (400, 422), response.text


def test_boundaries_headers_parts_and_fields_of_a_form_are_bounded(one_site: Site) -> None:
    long_head = HALF_A_FORM.replace(b"image", b"i" * MAX_HEAD_BYTES) + b"\r\n--x--"
    answers = [
        (post_form(one_site, [("image", CAT)] * (MAX_PARTS + 1), t=5), f"{MAX_PARTS}"),
        (post_form(one_site, {"image": CAT}, {f"f{k}": "1" for k in range(MAX_PARTS + 1)}, t=5), f"{MAX_PARTS}"),
        (post_form(one_site, {"image": CAT}, {"t": "5" * (MAX_FIELD_BYTES + 1)}), f"{MAX_FIELD_BYTES} bytes"),
        (post(one_site, long_head, headers={"Content-Type": f"{FORM}; boundary=x"}, t=5), f"{MAX_HEAD_BYTES} bytes"),
    ]
    for boundary in ("", "boundary=", "boundary=" + "x" * 71):
        answer = post(one_site, HALF_A_FORM, headers={"Content-Type": f"{FORM}; {boundary}"}, t=5)
        answers.append((answer, "1 to 70 characters"))
    for answer, says in answers:
        assert says in problem(answer, 400, "malformed_form")["detail"]


def calls_while(act: Callable[[], object]) -> int:
    """How many functions are called meanwhile, of Python and C."""
    count = 0

    def called(_frame: object, event: str, _function: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("lead", [b"", HALF_A_FORM], ids=["from the start", "in a part"])
@pytest.mark.parametrize("filling", [b"\r\n--xX", b"\r\n--", b"\r\n--x ", b" ", b"-", b"\r\n--x" + b" " * 10**6])
def test_a_form_of_what_nearly_are_boundaries_takes_no_work_for_each(lead: bytes, filling: bytes) -> None:
    body = lead + (filling * (2**20 // len(filling) + 1))

    def parse() -> None:
        with pytest.raises(MalformedForm):
            parse_form(body, f"{FORM}; boundary=x", 2**21, ("image",))

    assert calls_while(parse) < 2000


def test_a_boundary_may_have_spaces_after_it_and_text_before_and_after_the_form(site: Site) -> None:
    part = b'\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    content = b"before\r\n--x \t" + part + CAT + b"\r\n--x--\r\nafter"
    answer = post(site, content, headers={"Content-Type": f"{FORM}; boundary=x"}, t=5, seed=7)
    assert answer.content == post(site, t=5, seed=7).content


def test_while_a_large_form_is_parsed_others_are_answered_and_its_copies_are_counted(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, answered, bodies = make_site(max_image_bytes=200_000), threading.Event(), list[Hold]()
    content = CAT.ljust(100_000, b"\0")

    def slow(body: bytes, *more: Any) -> Form:
        assert site.client.get("/healthz").status_code == 200
        held_bytes.append(bodies[0].budget.held_bytes)
        answered.set()
        return parse_form(body, *more)

    held_bytes = list[int]()
    monkeypatch.setattr(reading, "body_of", lambda scope: bodies.append(middleware.body_of(scope)) or bodies[-1])
    monkeypatch.setattr(reading, "parse_form", slow)
    answer = post_form(site, {"image": content}, t=5)
    assert answer.status_code == 200, answer.text
    assert answered.is_set()
    assert held_bytes[0] >= 2 * 100_000
    assert bodies[0].budget.held_bytes == 0


@pytest.mark.parametrize("charset", ["undefined", "no-such"])
def test_a_charset_that_the_form_names_is_ignored(site: Site, charset: str) -> None:
    content = b'--x\r\nContent-Disposition: form-data; name="t"\r\n\r\n\xff5\r\n--x--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    problem(post(site, content, headers=headers), 422, "invalid_image")  # there is no file; the field is taken as UTF-8


# --- sizes ---


def test_an_image_may_be_larger_than_other_bodies_and_has_a_bound_of_its_own(make_site: MakeSite) -> None:
    site = make_site(max_image_bytes=20_000)
    picture = noise(100, 150)
    data = encode(picture, compress_level=0)
    assert LIMITS.max_body_bytes < len(data) < 20_000
    padded = data.ljust(20_000, b"\0")  # bytes after the image are ignored
    for content in (data, padded):
        assert post(site, content, t=5).status_code == 200
        answer = post_form(site, {"image": content}, t=5)
    assert answer.status_code == 200, answer.text
    for answer in (post(site, padded + b"\0", t=5), post_form(site, {"image": padded + b"\0"}, t=5)):
        document = problem(answer, 413, "body_too_large")
        assert (document["field"], document["bound"]) == ("image", "at most 20000 bytes")
    document = problem(post(site, padded + bytes(FORM_BYTES + 1), t=5), 413, "body_too_large")
    assert document["field"] == "body"
    problem(site.post(content=padded), 413, "body_too_large")


def test_a_client_that_disconnects_while_sending_leaves_nothing_behind(site: Site) -> None:
    form = [(b"content-type", b"multipart/form-data; boundary=x")]
    for headers in ([(b"content-type", b"image/png")], form):
        received = iter([{"type": "http.request", "body": HALF_A_FORM, "more_body": True}])
        status, _, _ = call(site.app, received, scope_of("/noise", b"t=5", headers))
        assert status in (0, 499)
    assert post(site, t=5).status_code == 200


def test_a_client_that_goes_away_is_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by its request, nor by those that wait for their turn behind it."""
    worker, asked = site.worker, []

    def run(act: Any, really: Any = worker.run, **model: int) -> Any:
        asked.append(really(act, **model))
        return asked[-1]

    monkeypatch.setattr(worker, "run", run)
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(site.post, json={"steps": 20, "seed": 1})
        site.engine.next_begun()  # the worker is in a tick, so new work waits for it
        for count in (1, 2):
            received = iter([{"type": "http.request", "body": CAT, "more_body": False}])
            scope = scope_of("/noise", b"t=5", [(b"content-type", b"image/png")])
            status, _, _ = call(site.app, received, scope, lambda count=count: wait_until(lambda: len(asked) == count))
            assert status in (0, 499)
        assert all(each.cancelled() for each in asked)
        site.engine.gate.open()
        assert job.result().status_code == 200
    assert post(site, t=5).status_code == 200


@pytest.fixture
def keyed(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site with two keys, whose client has ann's. Their bodies are bounded to 3 times the largest, 100,000 bytes."""
    monkeypatch.setattr(middleware, "MAX_HELD_BYTES", 0)
    monkeypatch.setattr("tminus.service.startup.app.FORM_BYTES", 0)
    monkeypatch.setattr(Limits, "max_edit_bytes", 100_000)
    access = access_of(*(key_line(name, f"tm_{name}") for name in ("ann", "ben")))
    site = make_site(max_image_bytes=100_000, app={"access": access})
    site.client.headers.update(bearer("tm_ann"))
    return site


LARGE = CAT.ljust(100_000, b"\0")


def test_the_bodies_of_a_caller_and_of_all_are_bounded(keyed: Site) -> None:
    as_ben = RAW | bearer("tm_ben")
    tag = post(keyed, t=5, seed=1).headers["etag"]
    turns = keyed.application.served.models.default.noise_turns
    keyed.engine.gate.shut()
    with ThreadPoolExecutor(4) as pool:
        job = pool.submit(keyed.post, json={"steps": 1, "seed": 1})
        keyed.engine.next_begun()  # the worker is in a tick, so new work waits for it
        taken = [pool.submit(post, keyed, LARGE, t=5, seed=1) for _ in range(2)]
        wait_until(lambda: len(turns._waiting) == 1)
        refusal = post(keyed, LARGE, t=5)
        assert problem(refusal, 429, "too_many_bytes")["bound"] == "at most 225000 bytes"
        assert refusal.headers["retry-after"] == "1"
        taken.append(pool.submit(post, keyed, LARGE[:75_000], headers=as_ben, t=5, seed=1))
        wait_until(lambda: len(turns._waiting) == 2)
        assert post(keyed, LARGE[:75_001], headers=as_ben, t=5).status_code == 429
        known = post(keyed, t=5, seed=1, headers=RAW | {"If-None-Match": tag})
        assert known.status_code == 412, "a small body is always accepted"
        keyed.engine.gate.open()
        assert [each.result().status_code for each in (job, *taken)] == [200] * 4
    assert post(keyed, LARGE, t=5).status_code == 200, "the bytes were released"


def test_callers_take_turns_at_the_worker(keyed: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    noised, seeds, turns = keyed.engine.noised, list[int](), keyed.application.served.models.default.noise_turns

    def noted(images: Any, t: int, seed: int) -> Any:
        seeds.append(seed)
        return noised(images, t, seed)

    monkeypatch.setattr(keyed.engine, "noised", noted)
    keyed.engine.gate.shut()
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(keyed.post, json={"steps": 1, "seed": 1})]
        keyed.engine.next_begun()  # the worker is in a tick, so new work waits for it
        for waiting, (caller, seed) in enumerate((("ann", 1), ("ann", 2), ("ann", 3), ("ben", 4))):
            answers.append(pool.submit(post, keyed, headers=RAW | bearer(f"tm_{caller}"), t=5, seed=seed))
            wait_until(lambda waiting=waiting: len(turns._waiting) == waiting and turns._current is not None)
        keyed.engine.gate.open()
        assert [each.result().status_code for each in answers] == [200] * 5
    assert seeds == [1, 4, 2, 3]


def test_an_upload_is_not_counted_while_its_answer_is_sent(keyed: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader may take long, and would keep other uploads out."""
    monkeypatch.setattr(byte_budget, "SHARE", 0.5)  # so that a caller's is one image
    beside: list[Any] = []
    messages = iter([{"type": "http.request", "body": LARGE, "more_body": False}])

    async def receive() -> Any:
        return next(messages, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            beside.append(await asyncio.to_thread(post, keyed, LARGE, t=5))

    scope = scope_of("/noise", b"t=5", [(b"content-type", b"image/png"), (b"authorization", b"Bearer tm_ann")])
    asyncio.run(keyed.app(scope, receive, send))
    assert [answer.status_code for answer in beside] == [200]


# --- beside the jobs ---


def test_images_are_noised_between_ticks_and_one_at_a_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, asked = site.worker, []

    def run(act: Any, really: Any = worker.run, **model: int) -> Any:
        assert all(future.done() for future in asked)
        asked.append(really(act, **model))
        return asked[-1]

    monkeypatch.setattr(worker, "run", run)
    threads: set[str] = set()
    site.engine.on_noised = lambda: threads.add(threading.current_thread().name)
    site.engine.gate.shut()
    with ThreadPoolExecutor(8) as pool:
        job = pool.submit(site.post, json={"steps": 20, "seed": 1})
        site.engine.next_begun()
        noised = [pool.submit(post, site, t=5, seed=seed) for seed in range(7)]
        wait_until(lambda: len(asked) == 1)
        assert not asked[0].done(), "a tick is not interrupted"
        site.engine.gate.open()
        for seed, each in enumerate(noised):
            np.testing.assert_array_equal(pixels(each.result().content), PICTURE + np.uint8(5 + seed))
        assert job.result().status_code == 200
    assert threads == {"tminus-worker"}
