"""POST /v1/images/generations and /edits, through the app on a fake engine."""

import base64
import io
import json
import time
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.service.api.asgi import call, scope_of
from tests.service.api.openai.asking import CAT, SAME, SIZE, edit, error_of, generate
from tests.service.api.pictures import INPUTS, MASK, MASK_PIXELS, PICTURE, b64, encode, got, noise, same
from tests.service.conftest import TABLES_OF_50, MakeSite, Site, pixels
from tests.service.durable import wait_for
from tests.service.fakes import INFO, PATIENCE_S, wait_until
from tests.service.keys import access_of, bearer, key_line
from tests.service.several import COLOUR, make_several
from tminus.model.catalogue import Recommended
from tminus.service.api.openai.schemas import EXTENSIONS
from tminus.service.errors import DeadlinePassed, EngineFailed, NotFinite, ServiceError, StorageFailed

PNG = encode(PICTURE)
# As OpenAI has it: transparent where the image is made new. Its colours say nothing.
CLEAR = encode(np.dstack([noise(4, 6, 3, seed=2), np.where(MASK_PIXELS, 0, 255).astype(np.uint8)]))


def image(entry: dict[str, Any]) -> bytes:
    return base64.b64decode(entry["b64_json"])


def step_until(site: Site, answered: "Future[Any]") -> None:
    """Let tick after tick happen until a request is answered."""

    def stepped() -> bool:
        site.engine.gate.let()
        return answered.done()

    wait_until(stepped)


def same_pngs(site: Site, **parameters: Any) -> list[bytes]:
    """The images of POST /sample, each as a file."""
    archive = site.post(json=SAME | parameters, headers={"Accept": "application/zip"}).content
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        return [files.read(name) for name in sorted(files.namelist())]


# --- the images ---


def test_the_images_are_those_of_post_sample_to_the_byte(site: Site) -> None:
    answer = generate(site, **CAT, n=3, index=7)
    assert answer.status_code == 200
    document = answer.json()
    assert [image(each) for each in document["data"]] == same_pngs(site, n=3, index=7)
    assert [image(each) for each in generate(site, **CAT).json()["data"]] == [site.post(json=SAME).content]


def test_an_answer_has_openais_members_and_says_what_each_image_was_made_with(site: Site) -> None:
    before_s = int(time.time())
    answer = generate(site, **CAT | {"prompt": "Dog", "guidance": 2, "guidance_interval": [1, 900]}, n=2, index=3)
    document = answer.json()
    assert before_s <= document.pop("created") <= time.time()
    entries = document.pop("data")
    assert document == {
        "background": "opaque",
        "output_format": "png",
        "quality": "medium",
        "size": SIZE,
        "usage": {
            "input_tokens": 0,
            "output_tokens": 0,
            "total_tokens": 0,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        },
    }
    for k, entry in enumerate(entries):
        del entry["b64_json"]
        assert entry == {
            "revised_prompt": "dog",
            "seed": 5,
            "to_seed": None,
            "mix": None,
            "index": 3 + k,
            "steps": 4,
            "sampler": "ddpm",
            "guidance": 2,
            "guidance_interval": [1, 900],
            "class_label": 1,
            "fingerprint": INFO.fingerprint,
            "job_id": answer.headers["x-job-id"],
        }
    assert answer.headers["x-seed"] == "5"
    assert answer.headers["x-fingerprint"] == INFO.fingerprint
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["server-timing"].startswith("queue;dur=")


def test_no_prompt_is_no_class_and_a_null_is_as_if_left_out(site: Site) -> None:
    nothing = dict.fromkeys(("model", "n", "size", "quality", "seed", "steps", "stream", "user", "guidance"))
    (entry,) = generate(site, **nothing | {"prompt": "", "steps": 2}).json()["data"]
    assert (entry["revised_prompt"], entry["class_label"], entry["guidance"]) == ("", None, 1)
    assert entry["sampler"] == "dpmpp_2m"


def test_quality_is_a_number_of_steps(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, recommended=Recommended("ddim", 6, 1.5)))
    made = [generate(site, prompt="cat", quality=quality).json() for quality in ("low", "medium", "auto", "high")]
    assert [answer["data"][0]["steps"] for answer in made] == [3, 6, 6, 12]
    assert {answer["data"][0]["guidance"] for answer in made} == {1.5}
    assert [answer["quality"] for answer in made] == ["low", "medium", "medium", "high"]


@pytest.mark.parametrize(("kind", "pillows"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_are_smaller_where_their_quality_is_less(make_site: MakeSite, kind: str, pillows: str) -> None:
    site = make_site(info=replace(INFO, channels=3, width_px=64, height_px=64))
    noisy = noise(1, 64, 64, 3)
    site.engine.images = lambda rows: lambda: noisy  # type: ignore[method-assign,assignment]
    sizes = []
    for quality in (100, 30, None):
        answer = generate(site, **CAT, output_format=kind, output_compression=quality)
        assert answer.json()["output_format"] == kind
        data = image(answer.json()["data"][0])
        with Image.open(io.BytesIO(data)) as opened:
            assert (opened.format, opened.size) == (pillows, (64, 64))
        sizes.append(len(data))
    assert sizes[1] < sizes[0] == sizes[2]
    assert site.metrics()[f'tminus_encode_duration_seconds_count{{"kind": "{kind}"}}'] == 3


def test_few_steps_are_a_table_unless_a_setting_contradicts_it(make_site: MakeSite) -> None:
    table = replace(TABLES_OF_50[0], steps=8, guidance=1.0)
    tuned = replace(INFO, samplers=(*INFO.samplers, "tuned"), tables=(table,), recommended=Recommended("ddim", 20, 1.5))
    site = make_site(info=tuned)

    def made(**members: Any) -> list[Any]:
        entry = generate(site, prompt="cat", **members).json()["data"][0]
        return [entry[name] for name in ("sampler", "steps", "guidance")]

    # A number may be text, as in a form.
    for agreeing in ({}, {"guidance": 1}, {"steps": "8"}, {"guidance": "1.0", "sampler": "tuned"}):
        assert made(quality="low", **agreeing) == ["tuned", 8, 1], agreeing
    assert made(quality="low", guidance=2) == ["ddim", 10, 2]
    assert made(table=table.hash) == ["tuned", 8, 1]
    wrong = error_of(generate(site, prompt="cat", table="0" * 16), 400, "invalid_field")
    assert (wrong["param"], table.hash in wrong["message"]) == ("table", True)


def test_members_without_effect_have_none(site: Site) -> None:
    plain = generate(site, **CAT).json()
    more = generate(site, **CAT, user="ann", style="vivid", moderation="low", background="auto", size="auto").json()
    assert image(more["data"][0]) == image(plain["data"][0])


def test_the_model_is_named_in_the_request(make_site: MakeSite) -> None:
    several = make_several(make_site)
    red = generate(several.site, **CAT | {"prompt": "red"}, model="colour", size="8x8")
    assert pixels(image(red.json()["data"][0])).shape == (8, 8, 3)
    assert red.headers["x-fingerprint"] == COLOUR.fingerprint
    assert generate(several.site, **CAT, model="fake").json()["size"] == SIZE
    assert error_of(generate(several.site, **CAT, model="colour"), 400, "invalid_field")["param"] == "prompt"
    missing = error_of(generate(several.site, **CAT, model="gpt-image-1"), 404, "model_not_found")
    assert (missing["param"], missing["type"]) == ("model", "invalid_request_error")
    assert "colour, fake" in missing["message"]
    assert several.post("/models/colour/v1/images/generations", json=CAT).status_code == 404


# --- what is refused ---


@pytest.mark.parametrize(
    ("members", "param", "says"),
    [
        ({"prompt": "a red cat"}, "prompt", "0..2 or cat, dog, 3d-print"),
        ({"prompt": None}, "prompt", "given"),
        ({"prompt": 3}, "prompt", "a text"),
        ({"n": 11}, "n", "1..10"),
        ({"n": 0}, "n", "1..10"),
        ({"n": "two"}, "n", "an integer in 1..10, got 'two'"),
        ({"n": 1.5}, "n", "an integer in 1..10, got 1.5"),
        ({"n": [1]}, "n", "an integer in 1..10, got [1]"),
        ({"size": "1024x1024"}, "size", f"auto or {SIZE}"),
        ({"quality": "hd"}, "quality", "auto, low, medium, high"),
        ({"background": "transparent"}, "background", "no pixel of these images is transparent"),
        ({"output_format": "gif"}, "output_format", "png, jpeg, webp"),
        ({"output_compression": 50}, "output_compression", "png"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression", "0..100"),
        ({"response_format": "url", "stream": True}, "response_format", "b64_json with stream"),
        ({"response_format": "url", "output_format": "webp"}, "output_format", "png with response_format url"),
        ({"response_format": "file"}, "response_format", "b64_json or url"),
        ({"partial_images": 1}, "partial_images", "stream"),
        ({"partial_images": 4, "stream": True}, "partial_images", "0..3"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"user": 7}, "user", "a text"),
        ({"steps": 1001}, "steps", "1..1000"),
        ({"sampler": "best"}, "sampler", "ddpm"),
        ({"seed": -1}, "seed", "0.."),
        ({"seed": "x"}, "seed", "0.."),
        ({"table": "x"}, "table", "16 hexadecimal digits"),
        ({"guidance": 2, "prompt": ""}, "guidance", "no class"),
        ({"guidance_interval": [5, 2], "guidance": 2}, "guidance_interval", "lo <= hi"),
    ],
)
def test_a_wrong_member_is_named_with_its_bound(site: Site, members: dict[str, Any], param: str, says: str) -> None:
    error = error_of(generate(site, **CAT | members), 400, "invalid_field")
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert says in error["message"]
    assert site.metrics()['tminus_rejected_total{"reason": "invalid_field"}'] == 1


@pytest.mark.parametrize(
    "name", ["class_label", "image", "mask", "strength", "image_sha256", "every", "negative_prompt"]
)
def test_an_unknown_member_is_named(site: Site, name: str) -> None:
    error = error_of(generate(site, **CAT, **{name: "x"}), 400, "unknown_field")
    assert error["param"] == name
    assert "prompt, model, n" in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "malformed_body"),
        (b"[]", 400, "malformed_body"),
        (b'{"prompt": "cat", "prompt": "dog"}', 400, "conflicting_field"),
        (b'{"prompt": "cat", "guidance": NaN}', 400, "malformed_body"),
        (b"", 400, "invalid_field"),
        (b"prompt=cat", 400, "malformed_body"),
    ],
)
def test_a_body_that_is_no_object_is_refused(site: Site, body: bytes, status: int, code: str) -> None:
    error_of(site.client.post("/v1/images/generations", content=body), status, code)
    compressed = site.client.post("/v1/images/generations", content=body, headers={"Content-Encoding": "gzip"})
    error_of(compressed, 415, "unsupported_encoding")
    error_of(site.client.post("/v1/images/generations?n=2", json=CAT), 400, "unknown_field")


def test_no_more_images_are_made_than_the_server_allows(make_site: MakeSite) -> None:
    site = make_site(max_n=2)
    assert len(generate(site, **CAT, n=2).json()["data"]) == 2
    assert "1..2" in error_of(generate(site, **CAT, n=3), 400, "invalid_field")["message"]


def test_an_overloaded_server_says_when_to_come_back(make_site: MakeSite) -> None:
    site = make_site(max_jobs=1)
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(generate, site, **CAT)
        site.engine.next_begun()
        for members in ({}, {"stream": True}, {"response_format": "url"}):
            refused = generate(site, **CAT, **members)
            assert error_of(refused, 429, "overloaded")["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) >= 1
        site.engine.gate.open()
        assert first.result(PATIENCE_S).status_code == 200


def test_a_key_pays_for_it_and_is_refused_when_its_quota_is_used_up(make_site: MakeSite) -> None:
    site = make_site(app={"access": access_of(key_line("ann", "tm_ann", row_steps_per_minute=8))})
    headers = bearer("tm_ann")
    paid = site.client.post("/v1/images/generations", json=CAT | {"n": 2}, headers=headers)
    assert (paid.status_code, paid.headers["ratelimit-policy"]) == (200, '"row-steps";q=8;w=60')
    refused = site.client.post("/v1/images/generations", json=CAT | {"n": 2}, headers=headers)
    error_of(refused, 429, "quota_exceeded")
    assert int(refused.headers["retry-after"]) >= 1


def test_a_deadline_that_passes_is_504(held: Site) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generate, held, **CAT | {"steps": 1000}, deadline_s=0.05)
        step_until(held, asked)
        error_of(asked.result(PATIENCE_S), 504, "deadline_passed")


def test_a_client_that_goes_away_frees_its_rows_at_the_next_tick(site: Site) -> None:
    site.engine.gate.shut()
    body = json.dumps(CAT | {"n": 4, "steps": 1000}).encode()
    request = iter([{"type": "http.request", "body": body, "more_body": False}])
    status, _, _ = call(site.app, request, scope_of("/v1/images/generations"), before_last=site.engine.next_begun)
    assert status in (0, 499)
    site.engine.gate.let()
    wait_until(lambda: not site.engine.jobs)
    assert len(site.engine.batches) - 1 == 1
    site.engine.gate.open()


# --- addresses in place of images ---


def test_a_url_is_that_of_one_image_of_a_durable_job(site: Site) -> None:
    answer = generate(site, **CAT, n=2, index=3, response_format="url")
    entries = answer.json()["data"]
    assert all("b64_json" not in entry for entry in entries)
    job = wait_for(site, entries[0]["job_id"])
    assert (job["durable"], job["n"], answer.headers["x-job-id"]) == (True, 2, job["id"])
    assert [entry["url"] for entry in entries] == [
        f"http://localhost/jobs/{job['id']}/image?index={3 + k}" for k in range(2)
    ]
    found = [site.client.get(entry["url"]) for entry in entries]
    assert [each.headers["content-type"] for each in found] == ["image/png"] * 2
    assert [each.content for each in found] == same_pngs(site, n=2, index=3)


def test_the_job_of_an_edit_has_addresses_too_and_one_key_is_one_job(site: Site) -> None:
    fields = CAT | {"response_format": "url"}
    key = {"Idempotency-Key": "once"}
    made = []
    for _ in range(2):
        files = {"image": ("i.png", PNG), "mask": ("m.png", CLEAR)}
        answer = site.client.post("/v1/images/edits", data=fields, files=files, headers=key)
        made.append(answer.json()["data"][0]["url"])
    assert made[0] == made[1]
    assert same(got(site), PICTURE, MASK_PIXELS)


def test_a_key_of_a_mask_by_white_is_not_that_of_a_mask_by_transparency(site: Site) -> None:
    key = {"Idempotency-Key": "once"}
    pictures = {"image": b64(PNG), "mask": b64(CLEAR)}
    by_white = site.client.post("/jobs", json=SAME | {"class_label": 0} | pictures, headers=key)
    assert by_white.status_code == 202, by_white.text
    fields, files = CAT | {"response_format": "url"}, {"image": ("i.png", PNG), "mask": ("m.png", CLEAR)}
    other = site.client.post("/v1/images/edits", data=fields, files=files, headers=key)
    assert error_of(other, 400, "idempotency_key_reused")["param"] == "Idempotency-Key"


def test_a_key_of_a_request_without_a_picture_is_the_same_everywhere(site: Site) -> None:
    key = {"Idempotency-Key": "once"}
    first = site.client.post("/jobs", json=SAME | {"class_label": 0}, headers=key).json()["id"]
    again = site.client.post("/v1/images/generations", json=CAT | {"response_format": "url"}, headers=key)
    assert again.json()["data"][0]["job_id"] == first


@pytest.mark.parametrize("key", ["", "x" * 256])
@pytest.mark.parametrize("response_format", ["b64_json", "url"])
def test_a_key_of_a_wrong_length_is_refused_with_or_without_a_job(site: Site, key: str, response_format: str) -> None:
    fields = CAT | {"response_format": response_format}
    answer = site.client.post("/v1/images/generations", json=fields, headers={"Idempotency-Key": key})
    assert error_of(answer, 400, "invalid_field")["param"] == "Idempotency-Key"


def test_a_job_that_fails_is_told_as_its_error(site: Site) -> None:
    site.engine.on_step = lambda batch: site.engine.nan.update(batch.rows)
    answer = generate(site, **CAT, response_format="url")
    assert error_of(answer, 500, "not_finite")["type"] == "server_error"


def test_a_job_that_is_cancelled_meanwhile_has_no_images(held: Site) -> None:
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(generate, held, **CAT | {"steps": 1000}, response_format="url")
        held.engine.next_begun()
        (job,) = held.client.get("/jobs").json()["jobs"]
        cancelled = pool.submit(held.client.post, f"/jobs/{job['id']}/cancel")
        step_until(held, cancelled)
        assert cancelled.result(PATIENCE_S).status_code == 200
        error = error_of(asked.result(PATIENCE_S), 410, "no_images")
    assert (error["type"], error["message"]) == ("invalid_request_error", "this job was cancelled, and has no images")


def test_no_failure_that_is_kept_says_when_to_try_again() -> None:
    """Such as a job may end by: see Lifecycle. What is kept of them is told without headers."""
    kept = [EngineFailed(""), NotFinite(), DeadlinePassed.of(1), StorageFailed("", damaged=True), ServiceError("")]
    assert [error.headers for error in kept] == [{}] * len(kept)


def test_a_server_that_drains_sends_whoever_waits_for_a_durable_job_elsewhere(
    held: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.jobs.jobs.LOOK_S", 0.01)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generate, held, **CAT | {"steps": 1000}, response_format="url")
        held.engine.next_begun()
        held.worker.drain()
        refused = asked.result(PATIENCE_S)
    assert error_of(refused, 503, "draining")["type"] == "server_error"
    assert refused.headers["retry-after"] == "5"
    held.engine.gate.open()


# --- edits ---


def test_an_edit_with_a_mask_makes_new_what_is_transparent(site: Site) -> None:
    answer = edit(site, {"image": PNG, "mask": CLEAR}, **CAT, n=2)
    assert answer.status_code == 200, answer.text
    assert same(got(site), PICTURE, MASK_PIXELS)
    made = [image(each) for each in answer.json()["data"]]
    white = {"image": PNG, "mask": MASK}
    both = site.client.post("/sample", data=SAME | {"n": 2}, files=white, headers={"Accept": "application/json"})
    assert made == [base64.b64decode(each["png"]) for each in both.json()["images"]]
    assert INPUTS.mask_sha256 == json.loads(both.content)["spec"]["mask_sha256"]


def test_an_edit_without_a_mask_says_how_much_is_to_change(site: Site) -> None:
    refused = error_of(edit(site, {"image": PNG}, **CAT), 400, "invalid_image")
    assert refused["param"] == "image"
    assert "or come with a mask or with strength, got one without a transparent pixel" in refused["message"]
    made = edit(site, {"image": PNG}, **CAT, strength=0.5).json()["data"][0]
    assert image(made) == site.client.post("/sample", data=SAME | {"strength": 0.5}, files={"image": PNG}).content


def test_an_image_that_is_transparent_somewhere_is_its_own_mask(site: Site) -> None:
    own = encode(np.dstack([*[PICTURE] * 3, np.where(MASK_PIXELS, 0, 255).astype(np.uint8)]))
    made = edit(site, {"image": own}, **CAT)
    assert made.status_code == 200, made.text
    kept = np.where(MASK_PIXELS, 0, PICTURE)  # what is transparent is laid over black, and then made new
    assert same(got(site), kept, MASK_PIXELS)
    assert image(made.json()["data"][0]) == image(edit(site, {"image": own, "mask": own}, **CAT).json()["data"][0])
    edit(site, {"image": own}, **CAT, strength=0.5)
    assert same(got(site), kept), "with strength all of it changes"


def test_a_list_of_one_image_and_of_numbers_may_be_named_as_openais_libraries_do(site: Site) -> None:
    fields = CAT | {"guidance": 2, "strength": 1, "guidance_interval[]": ["3", "800"], "input_fidelity": "high"}
    answer = site.client.post("/v1/images/edits", data=fields, files={"image[]": ("a.png", PNG)})
    assert answer.json()["data"][0]["guidance_interval"] == [3, 800]
    two = [("image[]", ("a.png", PNG)), ("image[]", ("b.png", PNG))]
    error_of(site.client.post("/v1/images/edits", data=fields, files=two), 400, "conflicting_field")
    two = [("image[]", ("a.png", PNG)), ("image", ("b.png", PNG))]
    error_of(site.client.post("/v1/images/edits", data=fields, files=two), 400, "conflicting_field")


def turned(picture: np.ndarray) -> bytes:
    """What is shown after a quarter turn, as a camera writes it that was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture, exif=exif)


def test_a_picture_has_the_models_size_once_it_is_upright(site: Site) -> None:
    clear = np.dstack([noise(4, 6, 3, seed=2), np.where(MASK_PIXELS, 0, 255).astype(np.uint8)])
    answer = edit(site, {"image": turned(np.rot90(PICTURE)), "mask": turned(np.rot90(clear))}, **CAT)
    assert answer.status_code == 200, answer.text
    assert same(got(site), PICTURE, MASK_PIXELS), "nothing is cropped"
    lying = {"image": {"image": turned(PICTURE)}, "mask": {"image": PNG, "mask": turned(clear)}}
    for name, files in lying.items():
        error = error_of(edit(site, files, **CAT), 400, "invalid_image")
        assert error["param"] == name
        assert "of 6x4 pixels, as the model's images are, got one of 4x6" in error["message"]


OPAQUE = encode(np.dstack([noise(4, 6, 3), np.full((4, 6), 255, np.uint8)]))


@pytest.mark.parametrize(
    ("files", "param", "says"),
    [
        ({}, "image", "a file in the form"),
        ({"image": b"no image"}, "image", "PNG, JPEG or WebP"),
        ({"image": encode(noise(8, 6))}, "image", "of 6x4 pixels, as the model's images are, got one of 6x8"),
        ({"image": PNG, "mask": encode(noise(8, 12, 4))}, "mask", "of 6x4 pixels"),
        ({"image": PNG, "mask": MASK}, "mask", "transparent where the image is to be made new"),
        ({"image": PNG, "mask": OPAQUE}, "mask", "transparent where the image is to be made new"),
        ({"image": PNG, "mask": encode(noise(4, 6), "JPEG")}, "mask", "transparent"),
        ({"image": PNG, "mask": encode(noise(4, 6).astype(np.uint16) * 257)}, "mask", "transparent"),
        ({"image": PNG, "mask": CLEAR[:60]}, "mask", "broken"),
    ],
)
def test_a_wrong_picture_is_named(site: Site, files: dict[str, bytes], param: str, says: str) -> None:
    # With a part of its own, so that it is a form where there is no file either.
    answer = site.client.post(
        "/v1/images/edits",
        files=[(name, (name, data)) for name, data in files.items()]
        + [(name, (None, str(value))) for name, value in CAT.items()],  # type: ignore[list-item]
    )
    error = error_of(answer, 400, "invalid_image")
    assert error["param"] == param
    assert says in error["message"]
    assert site.engine.inputs in ([], [None])


def test_a_mask_alone_a_text_for_a_file_and_another_file_are_refused(site: Site) -> None:
    assert error_of(edit(site, {"mask": CLEAR}, **CAT), 400, "invalid_image")["param"] == "image"
    assert error_of(edit(site, {"mask": CLEAR}, **CAT, image="x"), 400, "invalid_image")["param"] == "image"
    assert error_of(edit(site, {"image": PNG, "photo": PNG}, **CAT), 400, "unknown_field")["param"] == "photo"
    assert error_of(edit(site, {"image": PNG}, **CAT, bogus=1), 400, "unknown_field")["param"] == "bogus"
    as_json = site.client.post("/v1/images/edits", json=CAT)
    assert error_of(as_json, 415, "unsupported_media_type")["param"] == "Content-Type"


def test_an_image_may_be_larger_than_other_bodies_but_not_than_images_may_be(make_site: MakeSite) -> None:
    site = make_site(max_image_bytes=20_000)
    large = edit(site, {"image": PNG.ljust(15_000, b"\0")}, **CAT, strength=0.5)
    assert large.status_code == 200, large.text
    assert error_of(edit(site, {"image": b"\0" * 20_001}, **CAT), 413, "body_too_large")["param"] == "image"


# --- the description ---


def test_openapi_has_every_member_and_the_bounds_that_hold(site: Site) -> None:
    document = site.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    asked = schemas["ImageGenerationRequest"]
    assert asked["required"] == ["prompt"]
    assert {*EXTENSIONS, "prompt", "model", "n", "stream", "partial_images"} <= asked["properties"].keys()
    assert not {"class_label", "image", "strength"} & asked["properties"].keys()
    (n, _, null) = asked["properties"]["n"]["anyOf"]
    assert (n["minimum"], n["maximum"], null) == (1, 10, {"type": "null"})
    edits = schemas["ImageEditForm"]["properties"]
    assert {"image", "mask", "strength", "input_fidelity", *EXTENSIONS} <= edits.keys()
    assert "its own mask" in edits["image"]["description"]
    for path in ("/v1/images/generations", "/v1/images/edits"):
        responses = document["paths"][path]["post"]["responses"]
        assert "409" not in responses
        assert "422" not in responses
        assert "410" in responses
        content = responses["200"]["content"]
        assert content.keys() == {"application/json", "text/event-stream"}
    assert "/v1/models" not in make_named(site)["paths"]


def make_named(site: Site) -> dict[str, Any]:
    """The document of one model by its name."""
    document: dict[str, Any] = site.client.get("/models/fake/openapi.json").json()
    return document
