import asyncio
import binascii
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message, Scope

from tests.service.api.pictures import (
    CAT,
    EDIT,
    INPUTS,
    MASK,
    MASK_PIXELS,
    PICTURE,
    b64,
    encode,
    got,
    noise,
    same,
    spec_in,
)
from tests.service.conftest import MakeSite, Site, problem
from tminus.service.api import submission
from tminus.service.api.request import reading as request
from tminus.service.api.request.reading import merge, negotiate
from tminus.service.api.request.schemas import Edit
from tminus.service.byte_budget import Hold
from tminus.service.errors import ConflictingField, MalformedBody, NotAcceptable, SlowBody, ValidationErrors
from tminus.service.work import Ticket
from tminus.service.worker.running_job import NewJob


def from_body(body: bytes) -> dict[str, Any]:
    return request.from_body(body, max_bytes=2**20)


# --- body ---


@pytest.mark.parametrize(
    "body",
    [
        b"steps=5",
        b'{"steps": 5} {}',
        b'{"steps": NaN}',
        b'{"guidance": Infinity}',
        b"[1, 2]",
        b"null",
        b"\x89PNG\r\n\x1a\n",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_json_object_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody) as caught:
        from_body(body)
    error = caught.value
    assert (error.status, error.code) == (400, "malformed_body")
    assert error.detail.startswith("the body must be a JSON object")
    assert len(error.detail) < 300


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789eE+-.\\untrfalse ', max_size=40).map(str.encode))
@example(b"\xef\xbb\xbf{}")
@example(b'{"\\ud800": 1}')
@example(b'{"a": 1e400}')
def test_any_bytes_are_parameters_or_malformed(body: bytes) -> None:
    try:
        assert isinstance(from_body(body), dict)
    except MalformedBody:
        pass


# --- both ---


def joined(query: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """Merge, or raise what is wrong."""
    errors = ValidationErrors()
    merged = merge(query, body, errors)
    errors.check()
    return merged


def test_only_the_same_value_may_be_in_query_and_body() -> None:
    for query, body in [("5", 5), ("2", 2.0), ("null", None), (["1", "cat"], [1, "cat"]), ("1", [1]), (["2"], 2)]:
        assert joined({"x": query}, {"x": body}) == {"x": body}
    others: list[tuple[Any, Any]] = [
        ("ten", 10),
        ("5", None),
        ("5", True),
        ("", 0),
        (["1", "cat"], ["cat", 1]),
        ("1", [1, 2]),
        ("1", {"a": 1}),
        ("5_0", 50),
        ("9007199254740993", 9007199254740992),
        ("٥", 5),
        ("1e99999999999999999999", "2e99999999999999999999"),
    ]
    for query, body in others:
        with pytest.raises(ConflictingField) as caught:
            joined({"x": query, "n": "1"}, {"x": body, "n": 1})
        error = caught.value
        assert (error.status, error.code, error.field, error.value) == (422, "conflicting_field", "x", query)


@given(
    st.dictionaries(st.sampled_from("abc"), st.text(max_size=5) | st.lists(st.text(max_size=3), min_size=2)),
    st.dictionaries(
        st.sampled_from("abc"),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=5,
        ),
    ),
)
def test_merging_anything_gives_the_union_or_a_conflict(query: dict[str, Any], body: dict[str, Any]) -> None:
    try:
        merged = joined(query, body)
    except ConflictingField as error:
        assert error.field in query.keys() & body.keys()
        json.dumps(error.problem())
    else:
        assert merged == query | body


# --- through the app ---


def test_no_depth_of_nesting_crashes(one_site: Site) -> None:
    for field in (b"class_label", b"extra"):
        for depth in (100, 400, *range(700, 1100, 25)):  # Python's limit of recursion is at 1000
            nested = b'{"%s": %s}' % (field, b"[" * depth + b"]" * depth)
            response = one_site.client.post("/sample?class_label=1", content=nested)
            assert response.status_code in (400, 422), (field, depth)


def test_only_pictures_may_make_a_body_large(make_site: MakeSite) -> None:
    site = make_site(max_image_bytes=100_000)
    padded = CAT.ljust(100_000, b"\0")
    assert (
        site.post(json=EDIT | {"image": b64(padded), "mask": b64(MASK.ljust(100_000)), "strength": 0.5}).status_code
        == 200
    )
    for body in (
        b'{"image": "' + b"A" * 300_000 + b'"}',  # over both pictures together
        b'{"sampler": "' + b"A" * 5000 + b'"}',
        b'{"class_label": [' + b"[]," * 5000 + b"[]]}",
        b" " * 5000,
        json.dumps({"x": ["A" * 3000] * 3}).encode(),
    ):
        for path in ("/sample", "/jobs"):
            document = problem(site.client.post(path, content=body), 413, "body_too_large")
            assert document["field"] == "body"
    assert site.post(json=EDIT).status_code == 200


# --- one spelling ---


def test_an_integer_in_json_is_a_number_without_fraction_however_it_is_written(site: Site) -> None:
    bodies = [b'{"steps": 2, "seed": 50, "class_label": 1}', b'{"steps": 2.0, "seed": 5e1, "class_label": 1.0}']
    assert len({site.post(content=body).headers["etag"] for body in bodies}) == 1


def test_an_unknown_or_repeated_parameter_is_refused_by_name_in_every_call(one_site: Site) -> None:
    for method, path, known in (
        ("GET", "/jobs", "limit"),
        ("POST", "/jobs", "steps"),
        ("POST", "/sample", "steps"),
        ("GET", "/sample", "steps"),
        ("POST", "/noise", "t"),
        ("GET", "/model", None),
        ("GET", "/model/schedule", None),
        ("GET", "/jobs/x", None),
        ("GET", "/jobs/x/image", None),
        ("GET", "/jobs/x/events", "every"),
        ("POST", "/jobs/x/cancel", None),
        ("DELETE", "/jobs/x", None),
    ):
        body = {"content": CAT} if path == "/noise" else {}
        response = one_site.client.request(method, path, params={"bogus": 1}, **body)
        assert problem(response, 422, "unknown_field")["field"] == "bogus"
        if known is not None:
            response = one_site.client.request(method, f"{path}?{known}=5&{known}=5", **body)
            assert problem(response, 422, "conflicting_field")["field"] == known


def test_a_compressed_body_is_refused(one_site: Site) -> None:
    for encoding in ("br", "identity, gzip", "x" * 5000):
        for path, body in (("/sample", b"{}"), ("/jobs", b"{}"), ("/noise?t=5", CAT)):
            response = one_site.client.post(path, content=body, headers={"Content-Encoding": encoding})
            document = problem(response, 415, "unsupported_encoding")
            assert (document["field"], document["bound"]) == ("Content-Encoding", "identity, or absent")
            assert response.headers["accept-encoding"] == "identity"
            assert len(response.content) < 1500


# --- what a large body costs ---

LARGE = 2**20 - 100


def large(name: str, item: str) -> bytes:
    """A body of a mebibyte, with as many of these items as have room in one list."""
    return f'{{"{name}":[{",".join([item] * (LARGE // (len(item) + 1)))}]}}'.encode()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (large("class_label", "[]"), 400),
        *[(large(name, "0"), 422) for name in ("class_label", "guidance_interval", "image", "bogus")],
        (b"{" + b",".join(b'"%x":0' % k for k in range(90_000)) + b"}", 400),
    ],
    ids=lambda value: f"{value[:20]!r}" if isinstance(value, bytes) else str(value),
)
def test_a_large_body_that_is_wrong_leaves_the_event_loop_to_others(
    make_site: MakeSite, body: bytes, status: int
) -> None:
    site = make_site(max_body_bytes=2**20)
    gaps: list[float] = []

    async def tick() -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            gaps.append(now - before)
            before = now

    portal = site.client.portal
    assert portal is not None
    ticking = portal.start_task_soon(tick)
    for path in ("/sample", "/jobs"):
        assert site.client.post(path, content=body).status_code == status
    with site.client.websocket_connect("/sample/stream") as ws:
        ws.send_text(body.decode())
        assert ws.receive_json()["status"] == status
    ticking.cancel()
    assert max(gaps) < 0.5, "pydantic alone takes several seconds to list 698,000 errors"


def test_large_pictures_are_parsed_and_decoded_in_a_thread(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    parse, decode = request.json.loads, binascii.a2b_base64

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                threads.append("another")
            else:
                threads.append("event loop")
            return function(*args, **kwargs)

        return call

    big = EDIT | {"strength": 0.5, "image": b64(encode(noise(300, 300)))}
    small = EDIT | {"strength": 0.5, "image": b64(CAT)}
    bodies = [json.dumps(body).encode() for body in (big, small)]
    monkeypatch.setattr("tminus.service.api.request.reading.json.loads", noted(parse))
    monkeypatch.setattr("tminus.service.api.request.schemas.binascii.a2b_base64", noted(decode))
    answers = [site.post(content=body).status_code for body in bodies]
    monkeypatch.undo()
    assert answers == [200, 200]
    assert threads == ["another"] * 2 + ["event loop"] * 2


# --- a client that goes away ---


def test_what_is_wrong_with_a_body_that_nobody_has_read_is_told() -> None:
    """And is not taken for a client that went away: it is there, and waits for an answer."""

    async def receive() -> Message:
        raise SlowBody(1, 1.0)

    async def test() -> None:
        wanted = asyncio.get_running_loop().create_future()
        with pytest.raises(SlowBody):
            await request.while_connected(Request({"type": "http"}, receive), wanted)
        assert wanted.cancelled()

    asyncio.run(test())


# --- what is held of a body ---

IN_JSON, IN_FORM = {"image": b64(CAT), "strength": 0.5, "steps": 4}, {"data": {"strength": "0.5", "steps": "4"}}


def holds_pictures() -> bool:
    """Whether the parameters of a request have their upload, still."""
    asked = [each for each in gc.get_objects() if isinstance(each, Edit)]
    return any(each.image or each.mask for each in asked)


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/sample", {"json": IN_JSON}),
        ("/sample", {**IN_FORM, "files": {"image": CAT}}),
        ("/jobs", {"json": IN_JSON, "headers": {"Idempotency-Key": "k"}}),
        ("/", {"json": {"inputs": b64(CAT), "parameters": {"strength": 0.5, "prompt": "cat"}}}),
        ("/v1/images/edits", {"data": {"prompt": "cat", "strength": "0.5"}, "files": {"image": CAT}}),
        (
            "/v2/models/fake/infer",
            {"json": {"inputs": [{"name": "steps", "datatype": "INT32", "shape": [1], "data": [4]}]}},
        ),
    ],
)
def test_while_a_job_runs_its_upload_is_neither_held_nor_counted(
    site: Site, monkeypatch: pytest.MonkeyPatch, path: str, sent: dict[str, Any]
) -> None:
    bodies: list[Hold] = []
    looked: list[bool] = []
    body_of, enter = submission.body_of, site.worker.submit

    def noted_body(scope: Scope) -> Hold:
        bodies.append(body_of(scope))
        return bodies[-1]

    def look(new: NewJob) -> Ticket:
        looked.append(not holds_pictures() and not bodies[0]._size_bytes)
        return enter(new)

    monkeypatch.setattr(submission, "body_of", noted_body)
    monkeypatch.setattr(site.worker, "submit", look)
    assert site.client.post(path, **sent).is_success
    assert looked == [True]


# --- pictures in JSON ---


def test_an_image_is_one_file_of_a_form_and_a_field_is_the_same_in_form_and_query(site: Site) -> None:
    document = problem(site.post(params=EDIT | {"image": b64(CAT)}), 422, "invalid_field")
    assert (document["field"], "-F image=@file" in document["detail"]) == ("image", True)
    answer = site.post(data={"image": "cat.png", "strength": "0.5"}, files={"mask": ("m", MASK)})
    assert "curl -F image=@file" in problem(answer, 422, "invalid_image")["detail"]
    answer = site.post(files=[("image", ("a", CAT)), ("image", ("b", CAT))], data={"strength": "0.5"})
    assert problem(answer, 422, "conflicting_field")["field"] == "image"
    form = {"files": {"image": ("a", CAT)}, "data": {"strength": "0.5"}}
    assert site.post(**form, params={"strength": "0.50"}).status_code == 200
    assert problem(site.post(**form, params={"strength": "0.6"}), 422, "conflicting_field")["field"] == "strength"


# --- forms with the pictures of an edit; test_noise.py has the broken ones ---


def test_json_and_a_form_are_the_same_edit(site: Site) -> None:
    body = EDIT | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    answers = [site.post(json=body), site.post(json=body | {"image": b64(CAT, "image/png")})]
    files = {"image": ("cat.png", CAT), "mask": ("mask.png", MASK)}
    answers.append(site.post(files=files, data={k: str(v) for k, v in (EDIT | {"strength": 0.6}).items()}))
    answers.append(site.post(files=files, params=EDIT, data={"strength": "0.6"}))
    answers.append(site.post(json={"image": b64(CAT), "mask": b64(MASK)}, params=EDIT | {"strength": 0.6}))
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.content == answers[0].content
        assert answer.headers["etag"] == answers[0].headers["etag"]
        assert same(got(site), PICTURE, MASK_PIXELS)
    fields = spec_in(answers[0].content)
    assert (fields["strength"], fields["image_sha256"]) == (0.6, INPUTS.image_sha256)
    assert fields["mask_sha256"] == INPUTS.mask_sha256


@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_broken_or_large_file_of_a_form_is_refused_by_name(make_site: MakeSite, name: str) -> None:
    site = make_site(max_image_bytes=20_000)
    files = {"image": ("a", CAT), "mask": ("b", MASK)}
    broken = site.post(files=files | {name: ("c", CAT[:40])}, params=EDIT)
    assert problem(broken, 422, "invalid_image")["field"] == name
    text = site.post(
        files={other: each for other, each in files.items() if other != name} | {"x": ("x", b"")}, params=EDIT
    )
    assert problem(text, 422, "unknown_field")["bound"] == "image, mask"
    large = CAT.ljust(20_001, b"\0")
    for answer in (
        site.post(files=files | {name: ("c", large)}, params=EDIT),
        site.post(json=EDIT | {"image": b64(CAT), "mask": b64(MASK), name: b64(large)}),
    ):
        document = problem(answer, 413, "body_too_large")
        assert (document["field"], document["bound"]) == (name, "at most 20000 bytes")


# --- Accept ---


OFFERED = ("image/png", "application/zip", "application/json")
PNG, ZIP, JSON = OFFERED


def accepting(accept: str) -> Request:
    return Request({"type": "http", "headers": [(b"accept", accept.encode())]})


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", PNG),
        # What browsers send for <img>.
        ("image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5", PNG),
        ("application/json, application/zip", ZIP),  # a tie: the offer's order
        # The most specific range decides, wherever it stands.
        ("*/*;q=0, application/json;q=0.001", JSON),
        ("image/png;q=0.2, application/json;q=0.9, application/zip;q=0.5", JSON),
        # The same range twice: the better one counts.
        ("image/png;q=0.9, application/zip;q=0.5, image/png;q=0.1", PNG),
        # Case, spaces, parameters, empty members.
        (" image/png ; Q=0.1 ,, application/zip;charset=utf-8 ; q=0.2 ", ZIP),
        # A broken q is a no to that range, not to the header; and junk beside what counts.
        ("image/png;q=much, banana, ;;;, /, */png, application/zip", ZIP),
    ],
)
def test_the_client_gets_what_it_likes_best(accept: str, expected: str) -> None:
    assert negotiate(accepting(accept), OFFERED) == expected


words = ("*/*", "image/*", "text/html", ";", ",", "q=", "=", "0.5", "1", "0", "nan", "inf", "-1", "1e999", " ", "/")
pieces = st.sampled_from(OFFERED + words)


@given(st.text(max_size=40) | st.lists(pieces, max_size=12).map("".join))
@example("image/png;q=1e999")
@example("\x00")
@example("image/png;q=١")
def test_whatever_the_header_the_answer_is_on_offer_or_not_acceptable(accept: str) -> None:
    try:
        assert negotiate(accepting(accept), OFFERED) in OFFERED
    except NotAcceptable:
        pass
