import asyncio
import binascii
import io
import json
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from starlette.requests import Request
from starlette.types import Message, Scope

from tests.service.api.pictures import CAT, EDIT, MASK, b64, encode, noise
from tests.service.conftest import MakeSite, Site, problem
from tminus.service.api import submission
from tminus.service.api.request import reading as request
from tminus.service.api.request.reading import from_items, merge
from tminus.service.api.request.schemas import SampleRequest
from tminus.service.byte_budget import Hold
from tminus.service.errors import ConflictingField, MalformedBody, SlowBody
from tminus.service.work import Ticket
from tminus.service.worker.running_job import NewJob

QUICK = {"steps": 2, "seed": 5, "class_label": "cat"}
GUIDED = {"guidance": 2, "class_label": 1}


def from_body(body: bytes) -> dict[str, Any]:
    return request.from_body(body, max_bytes=2**20)


# --- query ---


def test_query_items_are_taken_as_text() -> None:
    assert from_items([("n", "8"), ("sampler", "ddim")]) == {"n": "8", "sampler": "ddim"}
    assert from_items([]) == {}


def test_class_label_may_repeat_and_keeps_its_order() -> None:
    assert from_items([("class_label", "2"), ("n", "2"), ("class_label", "cat")]) == {
        "class_label": ["2", "cat"],
        "n": "2",
    }


def test_one_class_label_is_no_list() -> None:
    assert from_items([("class_label", "2")]) == {"class_label": "2"}


def test_a_field_repeated_with_another_value_conflicts() -> None:
    with pytest.raises(ConflictingField) as caught:
        from_items([("steps", "5"), ("steps", "6")])
    error = caught.value
    assert (error.status, error.code, error.field, error.value) == (422, "conflicting_field", "steps", ["5", "6"])


def test_a_field_repeated_with_the_same_value_conflicts_too() -> None:
    with pytest.raises(ConflictingField):
        from_items([("steps", "5"), ("steps", "5")])


# --- body ---


@pytest.mark.parametrize("body", [b"", b"  \r\n\t"])
def test_an_empty_body_has_no_parameters(body: bytes) -> None:
    assert from_body(body) == {}


def test_a_body_is_a_json_object() -> None:
    assert from_body(b'{"n": 8, "class_label": [1, "cat", null], "clip": true}') == {
        "n": 8,
        "class_label": [1, "cat", None],
        "clip": True,
    }


@pytest.mark.parametrize(
    "body",
    [
        b"steps=5",
        b"{",
        b"{'steps': 5}",
        b'{"steps": 5} {}',
        b'{"steps": NaN}',
        b'{"guidance": Infinity}',
        b'{"guidance": -Infinity}',
        b'{"steps": }',
        b"[1, 2]",
        b'"text"',
        b"5",
        b"null",
        b"true",
        b"\xff\xfe\xfa",
        b"\x89PNG\r\n\x1a\n",
        b'{"sampler": "\xff"}',
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


def test_the_message_names_what_the_body_is_instead() -> None:
    with pytest.raises(MalformedBody, match="got list"):
        from_body(b"[]")


@given(st.binary(max_size=60))
@example(b"\xef\xbb\xbf{}")
@example(b'{"\\ud800": 1}')
@example(b'{"a": 1e400}')
def test_any_bytes_are_parameters_or_malformed(body: bytes) -> None:
    try:
        assert isinstance(from_body(body), dict)
    except MalformedBody:
        pass


@given(st.text(alphabet='{}[]":,0123456789eE+-.\\untrfalse ', max_size=40))
def test_any_text_like_json_is_parameters_or_malformed(text: str) -> None:
    try:
        assert isinstance(from_body(text.encode()), dict)
    except MalformedBody:
        pass


# --- both ---


def test_query_and_body_join() -> None:
    assert merge({"n": "2"}, {"steps": 5}) == {"n": "2", "steps": 5}


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("5", 5),
        ("5", "5"),
        ("2", 2.0),
        ("2.50", 2.5),
        ("true", True),
        ("null", None),
        ("ddim", "ddim"),
        ("18446744073709551615", 18446744073709551615),
        (["1", "cat"], [1, "cat"]),
        ("1", [1]),
        (["2"], 2),
    ],
)
def test_the_same_value_in_both_is_one(query: Any, body: Any) -> None:
    assert merge({"x": query}, {"x": body}) == {"x": body}


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("5", 6),
        ("ten", 10),
        ("5", None),
        ("5", True),
        ("true", False),
        ("ddim", "ddpm"),
        ("", 0),
        (["1", "cat"], ["cat", 1]),
        (["1", "2"], [1]),
        ("1", [1, 2]),
        ("1", {"a": 1}),
        (["1", "2"], 1),
        ("5", []),
        ("5_0", 50),
        ("+5", 5),
        (" 5", 5),
        ("٥", 5),
        ("1e99999999999999999999", "2e99999999999999999999"),
        ("1", "1e99999999999999999999"),
    ],
)
def test_another_value_in_query_and_body_conflicts(query: Any, body: Any) -> None:
    with pytest.raises(ConflictingField) as caught:
        merge({"x": query, "n": "1"}, {"x": body, "n": 1})
    error = caught.value
    assert (error.status, error.code, error.field, error.value) == (422, "conflicting_field", "x", query)
    assert "query" in error.detail
    assert "body" in error.detail


def test_seeds_that_only_a_float_confuses_conflict() -> None:
    with pytest.raises(ConflictingField):
        merge({"seed": "9007199254740993"}, {"seed": 9007199254740992})
    with pytest.raises(ConflictingField):
        merge({"seed": "18446744073709551615"}, {"seed": 18446744073709551614})


def test_a_deeply_nested_value_conflicts_and_does_no_harm() -> None:
    body = from_body(b'{"class_label": ' + b"[" * 900 + b"]" * 900 + b"}")
    with pytest.raises(ConflictingField):
        merge({"class_label": "1"}, body)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_integers_conflict_exactly_where_they_differ(a: int, b: int) -> None:
    assert merge({"seed": str(a)}, {"seed": a}) == {"seed": a}
    if a != b:
        with pytest.raises(ConflictingField):
            merge({"seed": str(a)}, {"seed": b})


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
        merged = merge(query, body)
    except ConflictingField as error:
        assert error.field in query.keys() & body.keys()
        json.dumps(error.problem())
    else:
        assert merged == query | body


def test_a_name_twice_in_the_body_is_a_conflict() -> None:
    with pytest.raises(ConflictingField) as caught:
        from_body(b'{"steps": 1, "n": 2, "steps": 2}')
    assert caught.value.field == "steps"


# --- through the app ---


def test_an_unknown_parameter_is_a_problem_in_query_and_body(site: Site) -> None:
    for response in (site.post(params={"stepz": 5}), site.post(json={"stepz": 5})):
        document = problem(response, 422, "unknown_field")
        assert document["field"] == "stepz"
        assert "steps" in document["bound"]


def test_a_field_with_two_values_is_a_problem(site: Site) -> None:
    for response in (site.post(params={"steps": 2}, json={"steps": 3}), site.post(params={"steps": [2, 3]})):
        assert problem(response, 422, "conflicting_field")["field"] == "steps"


@pytest.mark.parametrize("body", [b"steps=2", b"[]", b"{", b"\xff", b'{"steps": NaN}', b"[" * 3000])
def test_a_body_that_is_no_json_object_is_a_problem(site: Site, body: bytes) -> None:
    problem(site.post(content=body), 400, "malformed_body")


@pytest.mark.parametrize("query", ["", "?steps=1&class_label=1"])
def test_no_depth_of_nesting_crashes(site: Site, query: str) -> None:
    for field in (b"steps", b"class_label", b"extra"):
        for depth in range(100, 1400, 25):
            response = site.client.post(f"/sample{query}", content=b'{"%s": %s}' % (field, b"[" * depth + b"]" * depth))
            assert response.status_code in (400, 422), (field, depth)


def test_a_guidance_interval_comes_in_body_and_query_alike(site: Site) -> None:
    answers = [
        site.post(json=QUICK | GUIDED | {"guidance_interval": [100, 800]}),
        site.post(params=QUICK | GUIDED | {"guidance_interval": [100, 800]}),
        site.client.get("/sample?steps=2&seed=5&class_label=1&guidance=2&guidance_interval=100&guidance_interval=800"),
        site.post(params={"guidance_interval": [100, 800]}, json=QUICK | GUIDED | {"guidance_interval": [100, 800]}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.headers["etag"] for answer in answers}) == 1
    with Image.open(io.BytesIO(answers[0].content)) as image:
        image.load()
        spec = json.loads(image.text["tminus"])["spec"]  # type: ignore[attr-defined]
    assert spec["guidance_interval"] == [100, 800]


def test_the_order_of_an_interval_in_the_query_counts(site: Site) -> None:
    response = site.post(params=GUIDED | {"guidance_interval": [800, 100]})
    document = problem(response, 422, "invalid_field")
    assert (document["field"], document["value"]) == ("guidance_interval", [800, 100])
    assert document["bound"] == "two integers [lo, hi] with 0 <= lo <= hi <= 999"


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


def in_stream(site: Site, parameters: dict[str, Any]) -> dict[str, Any]:
    """The first message that answers a WebSocket's spec."""
    with site.client.websocket_connect("/sample/stream") as ws:
        ws.send_text(json.dumps(parameters))
        message: dict[str, Any] = ws.receive_json()
        return message


@pytest.mark.parametrize("name", ["n", "steps", "seed", "index", "every"])
@pytest.mark.parametrize("text", ["5_0", " 5", "5 ", "+5", "5.0", "5e0", "0x5", "٥", "５", "", "-5", "true"])
def test_an_integer_is_decimal_digits_wherever_it_is_written(one_site: Site, name: str, text: str) -> None:
    webp = {"Accept": "image/webp"} if name == "every" else {}
    answers = [
        one_site.post(params={name: text}, headers=webp),
        one_site.post(json={name: text}, headers=webp),
        one_site.post(files={"image": ("a.png", CAT)}, data={"strength": "1", name: text}, headers=webp),
        one_site.client.get("/sample", params={name: text}, headers=webp),
    ]
    if name != "every":
        answers += [
            one_site.client.post("/jobs", params={name: text}),
            one_site.client.post("/jobs", json={name: text}),
        ]
    for answer in answers:
        document = problem(answer, 422, "invalid_field")
        assert (document["field"], document["value"]) == (name, text)
    message = in_stream(one_site, {name: text})
    assert (message["type"], message["code"], message["field"]) == ("error", "invalid_field", name)


@pytest.mark.parametrize("value", ["5.5", "1e-1", "1e17", "9007199254740994.0", "true", '"5.0"', "[5]", "{}"])
def test_an_integer_in_json_is_a_number_without_fraction(site: Site, value: str) -> None:
    for name in ("n", "steps", "seed", "index"):
        answer = site.post(content=f'{{"{name}": {value}}}'.encode())
        assert problem(answer, 422, "invalid_field")["field"] == name


def test_what_json_schema_calls_an_integer_is_one(site: Site) -> None:
    bodies = [b'{"steps": 2, "seed": 50, "class_label": 1}', b'{"steps": 2.0, "seed": 5e1, "class_label": 1.0}']
    assert len({site.post(content=body).headers["etag"] for body in bodies}) == 1


@pytest.mark.parametrize(
    "text", ["1_0", " 1", "1 ", "+1", ".5", "1.", "nan", "inf", "Infinity", "1e400", "٥", "0x1", ""]
)
def test_a_number_is_written_as_in_json_wherever_it_is_written(site: Site, text: str) -> None:
    for name in ("guidance", "eta", "deadline_s"):
        companions = {"guidance": {"class_label": "cat"}, "eta": {"sampler": "ddim"}}.get(name, {})
        for answer in (site.post(params=companions | {name: text}), site.post(json=companions | {name: text})):
            assert problem(answer, 422, "invalid_field")["field"] == name


@pytest.mark.parametrize("text", ["True", "TRUE", "1", "0", "yes", "on", "t", " true", ""])
def test_a_truth_value_is_true_or_false(site: Site, text: str) -> None:
    for answer in (site.post(params={"clip": text}), site.post(json={"clip": text})):
        assert problem(answer, 422, "invalid_field")["field"] == "clip"
    assert problem(site.post(json={"clip": 1}), 422, "invalid_field")["field"] == "clip"
    assert in_stream(site, {"keep_open": text})["field"] == "keep_open"


def test_leading_zeros_exponents_and_text_in_json_are_right(site: Site) -> None:
    quick = {"seed": "5", "steps": "002"}
    for answer in (
        site.post(params=quick | {"guidance": "2e0", "class_label": "1"}),
        site.post(json=quick | {"guidance": "2.0", "class_label": "1", "clip": "true"}),
    ):
        assert answer.status_code == 200, answer.text


CALLS = [
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
]


@pytest.mark.parametrize(("method", "path", "known"), CALLS)
def test_an_unknown_or_repeated_parameter_is_refused_by_name_in_every_call(
    one_site: Site, method: str, path: str, known: str | None
) -> None:
    body = {"content": CAT} if path == "/noise" else {}
    response = one_site.client.request(method, path, params={"bogus": 1}, **body)
    assert problem(response, 422, "unknown_field")["field"] == "bogus"
    if known is not None:
        response = one_site.client.request(method, f"{path}?{known}=5&{known}=5", **body)
        assert problem(response, 422, "conflicting_field")["field"] == known


@pytest.mark.parametrize("encoding", ["br", "gzip", "deflate", "identity, gzip", "x" * 5000])
def test_a_compressed_body_is_refused(site: Site, encoding: str) -> None:
    headers = {"Content-Encoding": encoding}
    for path, body in (("/sample", b"{}"), ("/jobs", b"{}"), ("/noise?t=5", CAT)):
        response = site.client.post(path, content=body, headers=headers)
        document = problem(response, 415, "unsupported_encoding")
        assert (document["field"], document["bound"]) == ("Content-Encoding", "identity, or absent")
        assert response.headers["accept-encoding"] == "identity"
        assert len(response.content) < 1500


def test_a_body_that_is_called_identity_is_taken(site: Site) -> None:
    assert site.post(json=QUICK, headers={"Content-Encoding": "Identity"}).status_code == 200


# --- what a large body costs ---

LARGE = 2**20 - 100


def large(name: str, item: str) -> bytes:
    """A body of a mebibyte, with as many of these items as have room in one list."""
    return f'{{"{name}":[{",".join([item] * (LARGE // (len(item) + 1)))}]}}'.encode()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        *[(large(name, "[]"), 400) for name in ("class_label", "guidance_interval", "show", "bogus")],
        *[(large(name, "0"), 422) for name in ("class_label", "guidance_interval", "show", "image", "bogus")],
        (large("class_label", '"cat"'), 422),
        (large("class_label", "{}"), 400),
        (large("class_label", "1e9"), 422),
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
    monkeypatch.setattr("tminus.service.api.request.fields.binascii.a2b_base64", noted(decode))
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
STEPS = {"name": "steps", "datatype": "INT32", "shape": [1], "data": [4]}


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
    parsed: list[weakref.ref[SampleRequest]] = []
    bodies: list[Hold] = []
    looked: list[bool] = []
    parse, body_of, enter = SampleRequest.parse, submission.body_of, site.worker.submit

    def noted_parse(*args: Any) -> SampleRequest:
        asked = parse(*args)
        parsed.append(weakref.ref(asked))
        return asked

    def noted_body(scope: Scope) -> Hold:
        bodies.append(body_of(scope))
        return bodies[-1]

    def look(new: NewJob) -> Ticket:
        looked.append(bool(parsed) and not any(each() for each in parsed) and not bodies[0]._held_bytes)
        return enter(new)

    monkeypatch.setattr(SampleRequest, "parse", noted_parse)
    monkeypatch.setattr(submission, "body_of", noted_body)
    monkeypatch.setattr(site.worker, "submit", look)
    assert site.client.post(path, **sent).is_success
    assert looked == [True]
