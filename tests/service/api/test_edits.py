"""Edits through the app: JSON, forms and the stream; what is refused; durable ones. The engine is a fake."""

import base64
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.api.schemas import SampleRequest, parameters_of
from service.spec import Inputs
from tests.service.api.test_noise import encode, noise
from tests.service.api.test_stream import Client, connect
from tests.service.conftest import MakeSite, Site, problem
from tests.service.fakes import INFO, LIMITS, wait_until
from tests.service.jobs.conftest import Restarts, restarts  # noqa: F401

PICTURE = noise(4, 6)
CAT = encode(PICTURE)
MASK_PIXELS = np.repeat(np.arange(6)[None] < 3, 4, axis=0)
MASK = encode(np.where(MASK_PIXELS, 255, 0).astype(np.uint8))
INPUTS = Inputs(PICTURE[..., None], MASK_PIXELS)
SPEC: dict[str, Any] = {"steps": 5, "seed": 1, "n": 2}


def b64(data: bytes, kind: str | None = None) -> str:
    text = base64.b64encode(data).decode()
    return text if kind is None else f"data:{kind};base64,{text}"


def got(site: Site) -> Inputs | None:
    """What came with the last job."""
    return site.engine.inputs[-1]


def same(inputs: Inputs | None, image: np.ndarray = PICTURE, mask: np.ndarray | None = None) -> bool:
    if inputs is None or (inputs.mask is None) != (mask is None):
        return False
    return np.array_equal(inputs.image[..., 0], image) and (mask is None or np.array_equal(inputs.mask, mask))


def spec_in(png: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        found: dict[str, Any] = json.loads(image.text["tminus"])["spec"]  # type: ignore[attr-defined]
    return found


# --- how it is asked for ---


def test_json_and_a_form_are_the_same_edit(site: Site) -> None:
    body = SPEC | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    answers = [site.post(json=body), site.post(json=body | {"image": b64(CAT, "image/png")})]
    files = {"image": ("cat.png", CAT), "mask": ("mask.png", MASK)}
    answers.append(site.post(files=files, data={k: str(v) for k, v in (SPEC | {"strength": 0.6}).items()}))
    answers.append(site.post(files=files, params=SPEC, data={"strength": "0.6"}))
    answers.append(site.post(json={"image": b64(CAT), "mask": b64(MASK)}, params=SPEC | {"strength": 0.6}))
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.content == answers[0].content
        assert answer.headers["etag"] == answers[0].headers["etag"]
        assert same(got(site), PICTURE, MASK_PIXELS)
    fields = spec_in(answers[0].content)
    assert (fields["strength"], fields["image_sha256"]) == (0.6, INPUTS.image_sha256)
    assert fields["mask_sha256"] == INPUTS.mask_sha256


def test_only_the_steps_that_are_left_are_taken(site: Site) -> None:
    site.post(json=SPEC | {"strength": 0.4, "image": b64(CAT)})
    assert [set(batch.steps) for batch in site.engine.batches[-2:]] == [{3}, {4}]
    assert same(got(site))
    site.post(json=SPEC | {"image": b64(CAT), "mask": b64(MASK)})
    assert [set(batch.steps) for batch in site.engine.batches[-5:]] == [{0}, {1}, {2}, {3}, {4}]


def test_another_image_mask_or_strength_is_another_answer(site: Site) -> None:
    body = SPEC | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    others = [
        {},
        {"image": b64(encode(noise(4, 6, seed=1)))},
        {"mask": b64(encode(255 - noise(4, 6, seed=2)))},
        {"strength": 0.61},
        {"mask": None},
        {"strength": None},
    ]
    tags = [site.post(json=body | other).headers["etag"] for other in others]
    assert len(set(tags)) == len(tags)
    jpeg = site.post(json=body | {"image": b64(encode(PICTURE, "WEBP", lossless=True), "image/webp")})
    assert jpeg.headers["etag"] == tags[0], "it is the pixels that count"
    again = site.client.post("/sample", json=body, headers={"If-None-Match": tags[0]})
    assert again.status_code == 304


def test_a_plain_request_knows_nothing_of_edits(site: Site) -> None:
    answer = site.post(json=SPEC)
    assert got(site) is None
    assert not spec_in(answer.content).keys() & {"strength", "image_sha256", "mask_sha256"}


def test_what_is_given_in_the_query_alone_may_not_be_an_image(site: Site) -> None:
    for ask in (site.client.get, site.client.post):
        for name in ("image", "mask"):
            document = problem(ask("/sample", params=SPEC | {name: b64(CAT)}), 422, "invalid_field")
            assert document["field"] == name
            assert f"-F {name}=@file" in document["detail"]


def test_an_image_may_be_wrapped_in_lines(site: Site) -> None:
    wrapped = base64.encodebytes(CAT).decode()
    assert "\n" in wrapped
    assert site.post(json=SPEC | {"strength": 0.5, "image": wrapped}).status_code == 200


def test_image_and_mask_of_any_size_are_fitted_each_by_itself(site: Site) -> None:
    mask = np.zeros((40, 120), np.uint8)
    mask[:, :46] = 255  # the crop is 60 wide, from 30 on: ten columns a pixel
    answer = site.post(json=SPEC | {"image": b64(encode(noise(90, 50, 3))), "mask": b64(encode(mask))})
    assert answer.status_code == 200
    inputs = got(site)
    assert inputs is not None
    assert inputs.image.shape == (4, 6, 1)
    np.testing.assert_array_equal(inputs.mask, np.repeat([[True, True, False, False, False, False]], 4, 0))


@pytest.mark.parametrize(
    ("grey", "new"), [(0, False), (127, False), (128, True), (255, True)], ids=["black", "127", "128", "white"]
)
def test_a_mask_is_new_from_grey_128_on(site: Site, grey: int, new: bool) -> None:
    site.post(json=SPEC | {"image": b64(CAT), "mask": b64(encode(np.full((4, 6), grey, np.uint8)))})
    inputs = got(site)
    assert inputs is not None
    assert inputs.mask is not None
    assert (inputs.mask == new).all()


def test_what_is_transparent_in_a_mask_is_kept(site: Site) -> None:
    mask = np.full((4, 6, 4), 255, np.uint8)
    mask[:, 3:, 3] = 0
    site.post(json=SPEC | {"image": b64(CAT), "mask": b64(encode(mask))})
    assert same(got(site), PICTURE, MASK_PIXELS)


# --- what is refused ---


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"strength": 0.5}, "image", "given where strength is"),
        ({"mask": b64(MASK)}, "image", "given where mask is"),
        ({"mask": ""}, "image", "given where mask is"),
        ({"image_sha256": "0" * 64}, "image", "given where image_sha256 is"),
        ({"image": b64(CAT)}, "strength", "given with an image, or else a mask"),
        ({"image": b64(CAT), "strength": 0}, "strength", "above 0, at most 1"),
        ({"image": b64(CAT), "strength": 1.01}, "strength", "above 0, at most 1"),
        ({"image": b64(CAT), "strength": -1}, "strength", "above 0, at most 1"),
        ({"image": b64(CAT), "strength": True}, "strength", "above 0, at most 1"),
        ({"image": b64(CAT), "strength": "much"}, "strength", "above 0, at most 1"),
        ({"image": 5, "strength": 0.5}, "image", "base64"),
        ({"image": [b64(CAT)], "strength": 0.5}, "image", "base64"),
        ({"image": b64(CAT), "strength": 0.5, "image_sha256": "0" * 64}, "image_sha256", INPUTS.image_sha256),
        ({"image": b64(CAT), "strength": 0.5, "image_sha256": "short"}, "image_sha256", "64 hexadecimal digits"),
        ({"image": b64(CAT), "strength": 0.5, "mask_sha256": "0" * 64}, "mask", "given where mask_sha256 is"),
        ({"image": b64(CAT), "mask": b64(MASK), "mask_sha256": "0" * 64}, "mask_sha256", INPUTS.mask_sha256),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(
    site: Site, fields: dict[str, Any], field: str, says: str
) -> None:
    for path in ("/sample", "/jobs"):
        document = problem(site.client.post(path, json=SPEC | fields), 422, "invalid_field")
        assert document["field"] == field
        assert says in document["detail"]
        assert len(document["detail"]) < 500, "no echo of a picture"
    assert site.client.get("/jobs").json()["jobs"] == []


@pytest.mark.parametrize(
    "text", ["", "%%%", "cat.png", "é", b64(CAT)[:-3], b64(CAT, "image/png").replace(";base64", ""), b64(b"<svg/>")]
)
@pytest.mark.parametrize("name", ["image", "mask"])
def test_what_is_no_image_is_refused_by_name(site: Site, name: str, text: str) -> None:
    fields = {"image": b64(CAT), "mask": b64(MASK)} | {name: text}
    document = problem(site.post(json=SPEC | fields), 422, "invalid_image")
    assert document["field"] == name
    assert len(document["detail"]) < 500


@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_broken_or_large_file_of_a_form_is_refused_by_name(make_site: MakeSite, name: str) -> None:
    site = make_site(max_image_bytes=20_000)
    files = {"image": ("a", CAT), "mask": ("b", MASK)}
    broken = site.post(files=files | {name: ("c", CAT[:40])}, params=SPEC)
    assert problem(broken, 422, "invalid_image")["field"] == name
    text = site.post(
        files={other: each for other, each in files.items() if other != name} | {"x": ("x", b"")}, params=SPEC
    )
    assert problem(text, 422, "unknown_field")["bound"] == "image, mask"
    large = CAT.ljust(20_001, b"\0")
    for answer in (
        site.post(files=files | {name: ("c", large)}, params=SPEC),
        site.post(json=SPEC | {"image": b64(CAT), "mask": b64(MASK), name: b64(large)}),
    ):
        document = problem(answer, 413, "body_too_large")
        assert (document["field"], document["bound"]) == (name, "at most 20000 bytes")


def test_the_name_of_a_file_is_no_file(site: Site) -> None:
    answer = site.post(data={"image": "cat.png", "strength": "0.5"}, files={"mask": ("m", MASK)})
    assert "curl -F image=@file" in problem(answer, 422, "invalid_image")["detail"]


def test_one_file_twice_is_a_conflict(site: Site) -> None:
    answer = site.post(files=[("image", ("a", CAT)), ("image", ("b", CAT))], data={"strength": "0.5"})
    assert problem(answer, 422, "conflicting_field")["field"] == "image"


def test_a_field_in_form_and_query_must_be_the_same(site: Site) -> None:
    form = {"files": {"image": ("a", CAT)}, "data": {"strength": "0.5"}}
    assert site.post(**form, params={"strength": "0.50"}).status_code == 200
    assert problem(site.post(**form, params={"strength": "0.6"}), 422, "conflicting_field")["field"] == "strength"


def test_a_deadline_is_held_against_the_steps_that_are_left(make_site: MakeSite) -> None:
    site = make_site(tick_times=((1, 1.0), (LIMITS.max_batch, 1.0)))
    body = {"steps": 100, "deadline_s": 20, "image": b64(CAT)}
    assert problem(site.post(json=body | {"strength": 0.3}), 422, "invalid_field")["field"] == "deadline_s"
    answer = site.post(json=body | {"strength": 0.2})
    assert answer.status_code == 200
    assert float(answer.headers["x-eta-seconds"]) == 20.0


# --- the size of a body ---


def test_only_pictures_may_make_a_body_large(make_site: MakeSite) -> None:
    site = make_site(max_image_bytes=100_000)
    padded = CAT.ljust(100_000, b"\0")
    assert (
        site.post(json=SPEC | {"image": b64(padded), "mask": b64(MASK.ljust(100_000)), "strength": 0.5}).status_code
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
    assert site.post(json=SPEC).status_code == 200


# --- durable ---


def accepted(site: Site, key: str | None = None, **kwargs: Any) -> Any:
    response = site.client.post("/jobs", headers={"Idempotency-Key": key} if key else {}, **kwargs)
    assert response.status_code == 202, response.text
    return response


def ended(site: Site, job_id: str) -> dict[str, Any]:
    wait_until(lambda: site.client.get(f"/jobs/{job_id}").json()["state"] == "done")
    found: dict[str, Any] = site.client.get(f"/jobs/{job_id}").json()
    return found


def test_a_durable_edit_is_asked_for_told_and_fetched(site: Site) -> None:
    body = SPEC | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    job_id = accepted(site, json=body).json()["id"]
    document = ended(site, job_id)
    assert (document["step"], document["steps"]) == (3, 3)
    told = document["parameters"]
    assert (told["steps"], told["strength"], told["image_sha256"]) == (5, 0.6, INPUTS.image_sha256)
    assert told["mask_sha256"] == INPUTS.mask_sha256
    assert "image" not in told
    image = site.client.get(f"/jobs/{job_id}/image")
    direct = site.post(json=body)
    assert (image.content, image.headers["etag"]) == (direct.content, direct.headers["etag"])
    again = site.post(json=told | {"image": b64(CAT), "mask": b64(MASK)})
    assert again.content == direct.content, "the parameters and the pictures make it again"
    assert problem(site.post(json=told), 422, "invalid_field")["field"] == "image"


def test_a_key_covers_the_pictures_in_json_and_form_alike(site: Site) -> None:
    fields = SPEC | {"strength": 0.6}
    body = fields | {"image": b64(CAT), "mask": b64(MASK)}
    first = accepted(site, "k", json=body).json()["id"]
    files = {"image": ("a.png", CAT), "mask": ("b.png", MASK)}
    for retry in ({"json": body}, {"files": files, "data": {k: str(v) for k, v in fields.items()}}):
        response = accepted(site, "k", **retry)
        assert response.json()["id"] == first
        assert response.headers["idempotent-replayed"] == "true"
    for other in ({"image": b64(encode(noise(4, 6, seed=9)))}, {"mask": b64(CAT)}, {"strength": 0.7}, {"mask": None}):
        answer = site.client.post("/jobs", json=body | other, headers={"Idempotency-Key": "k"})
        problem(answer, 422, "idempotency_key_reused")


def test_a_durable_edit_of_an_earlier_process_has_its_pictures(restarts: Restarts) -> None:  # noqa: F811
    site = restarts.start(shut=True)
    body = SPEC | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    job_id = accepted(site, json=body).json()["id"]
    site.engine.next_begun()
    restarts.stop()
    again = restarts.start()
    document = ended(again, job_id)
    assert document["parameters"]["image_sha256"] == INPUTS.image_sha256
    assert same(again.engine.inputs[-1], PICTURE, MASK_PIXELS)
    assert again.engine.batches[-1].steps == (4, 4)


# --- the stream ---


def test_a_stream_shows_the_steps_that_are_left(site: Site) -> None:
    with connect(site) as ws:
        client = Client(ws)
        client.send(**SPEC, strength=0.6, image=b64(CAT, "image/png"), mask=b64(MASK), every=1)
        assert client.get("accepted")["seed"] == 1
        steps = []
        while (message := ws.receive_json())["type"] == "frame":
            steps.append((message["step"], message["steps"], message["t"]))
            client.picture()
        assert message["type"] == "done"
        assert client.picture() == site.post(
            json=SPEC | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
        ).content  # fmt: skip
    assert {entry[1] for entry in steps} == {3}
    assert set(steps) <= {(1, 3, 200), (2, 3, 0)}
    assert same(got(site), PICTURE, MASK_PIXELS)


def test_a_bad_edit_ends_a_stream_with_the_reason(site: Site) -> None:
    for fields, code, close in (
        ({"strength": 0.5}, "invalid_field", 1008),
        ({"image": "%", "strength": 0.5}, "invalid_image", 1008),
        ({"sampler": "x" * 5000}, "body_too_large", 1009),
    ):
        with connect(site) as ws:
            client = Client(ws)
            client.send(**SPEC, **fields)  # type: ignore[arg-type]
            client.refused(code, close)


# --- the way back ---


def test_the_parameters_of_an_edit_lead_back_to_it() -> None:
    body = SPEC | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    asked = SampleRequest.parse(body, INFO, LIMITS)
    spec = asked.with_inputs(asked.to_spec(INFO, LIMITS), INPUTS)
    told = parameters_of(spec)
    again = SampleRequest.parse(told | {"image": b64(CAT), "mask": b64(MASK)}, INFO, LIMITS)
    assert again.with_inputs(again.to_spec(INFO, LIMITS), INPUTS) == spec
    assert type(spec).from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert hash(spec) != hash(replace(spec, mask_sha256=None))
