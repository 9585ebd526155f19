"""POST /v1/images/generations and /edits, through the app on a fake engine."""

import asyncio
import base64
import io
import json
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.service.api.openai.asking import CAT, SAME, SIZE, edit, error_of, generate
from tests.service.api.pictures import INPUTS, MASK, MASK_PIXELS, PICTURE, b64, encode, got, noise, same
from tests.service.conftest import INSTANT, TABLES_OF_50, MakeSite, Site, pixels, prepare
from tests.service.durable import events, wait_for
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, FakeEngine, fake_pixels, make_spec, wait_until
from tests.service.several import COLOUR, make_several
from tminus.model.catalogue import Recommended, Rung
from tminus.service.api.answers import progress
from tminus.service.api.openai.images import steps_shown
from tminus.service.images.encoder import Encoder

PNG = encode(PICTURE)
# As OpenAI has it: transparent where the image is made new. Its colours say nothing.
CLEAR = encode(np.dstack([noise(4, 6, 3, seed=2), np.where(MASK_PIXELS, 0, 255).astype(np.uint8)]))


def image(entry: dict[str, Any]) -> bytes:
    return base64.b64decode(entry["b64_json"])


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
    (entry,) = generate(site, **nothing | {"prompt": ""}).json()["data"]
    assert (entry["revised_prompt"], entry["class_label"], entry["guidance"]) == ("", None, 1)
    assert (entry["sampler"], entry["steps"]) == ("dpmpp_2m", 20)


@pytest.mark.parametrize(("kind", "pillows"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_are_smaller_where_their_quality_is_less(make_site: MakeSite, kind: str, pillows: str) -> None:
    site = make_site(info=replace(INFO, channels=3, width_px=64, height_px=64))
    noisy = noise(1, 64, 64, 3)
    site.engine.images = lambda *_: lambda: noisy  # type: ignore[method-assign,assignment]
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


def test_low_is_the_last_rung_unless_the_request_names_a_setting(make_site: MakeSite) -> None:
    table = replace(TABLES_OF_50[0], steps=8, guidance=1.0)
    tuned = replace(INFO, samplers=(*INFO.samplers, "tuned"), tables=(table,), recommended=Recommended("ddim", 20, 1.5))
    site = make_site(info=replace(tuned, ladder=(Rung("ddim", 20, 1.5), Rung("tuned", 8))))

    def made(**members: Any) -> list[Any]:
        entry = generate(site, prompt="cat", **members).json()["data"][0]
        return [entry[name] for name in ("sampler", "steps", "guidance")]

    # A number may be text, as in a form.
    assert made(quality="low") == made(quality="low", guidance="1.0", sampler="tuned") == ["tuned", 8, 1]
    assert made(quality="low", steps="8") == ["ddpm", 8, 1], "steps alone are those of the checkpoint's scheduler"
    assert made(quality="low", guidance=2) == ["ddim", 20, 2]
    assert made(table=table.hash) == ["tuned", 8, 1]
    wrong = error_of(generate(site, prompt="cat", table="0" * 16), 400, "invalid_field")
    assert (wrong["param"], table.hash in wrong["message"]) == ("table", True)


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


def test_the_only_model_is_also_the_default_one(make_site: MakeSite) -> None:
    alone = make_site()
    for path in ("/v1/models/default", "/v1/models/fake"):
        assert alone.client.get(path).json()["id"] == "fake"
    assert [each["id"] for each in alone.client.get("/v1/models").json()["data"]] == ["fake"]
    assert image(generate(alone, **CAT, model="default").json()["data"][0]) == alone.post(json=SAME).content
    assert alone.client.get("/models/default/model").status_code == 404, "it is a name of OpenAI's API only"
    several = make_several(make_site)
    for refused in (generate(several.site, **CAT, model="default"), several.site.client.get("/v1/models/default")):
        assert "one of colour, fake" in error_of(refused, 404, "model_not_found")["message"]
    assert several.change("colour", "unload").status_code == 204
    assert generate(several.site, **CAT, model="default").status_code == 200


@pytest.mark.parametrize("named", ["fake", "colour"])
def test_a_model_that_is_called_default_has_its_name(make_site: MakeSite, named: str) -> None:
    first, second = (replace(each, name="default") if each.name == named else each for each in (INFO, COLOUR))
    site = make_site(info=first, app={"others": [prepare(FakeEngine(second), LIMITS, INSTANT)]})
    wanted = first if first.name == "default" else second
    answer = generate(site, prompt=wanted.class_names[0], model="default")
    assert answer.headers["x-fingerprint"] == wanted.fingerprint
    assert site.client.get("/v1/models/default").json()["id"] == "default"


def test_steps_and_guidance_have_the_names_of_diffusers_too(site: Site) -> None:
    theirs = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
    named = {new: CAT[old] for new, old in theirs.items()} | {"prompt": "cat", "sampler": "ddpm", "seed": 5}
    wanted = generate(site, **CAT).json()["data"][0]
    for members in (named, named | {"steps": None}, {**CAT, "guidance_scale": None}):
        assert image(generate(site, **members).json()["data"][0]) == image(wanted), members
    edited = [edit(site, {"image": PNG}, **members, strength=0.5) for members in (CAT, named)]
    first, second = (image(each.json()["data"][0]) for each in edited)
    assert first == second
    assert generate(site, prompt="cat", quality="low", num_inference_steps=7).json()["data"][0]["steps"] == 7
    properties = site.client.get("/openapi.json").json()["components"]["schemas"]
    for component in ("ImageGenerationRequest", "ImageEditForm"):
        for new, old in theirs.items():
            described = properties[component]["properties"]
            assert described[new] | {"description": ""} == described[old] | {"description": ""}


def test_a_setting_is_given_by_one_of_its_names(site: Site) -> None:
    error_of(edit(site, {"image": PNG}, **CAT, guidance_scale=1, strength=0.5), 400, "conflicting_field")
    twice = b'{"prompt": "cat", "num_inference_steps": 4, "num_inference_steps": 4}'
    error_of(site.client.post("/v1/images/generations", content=twice), 400, "conflicting_field")
    form = {"prompt": "cat", "strength": "0.5", "num_inference_steps": ["4", "4"]}
    both = site.client.post("/v1/images/edits", data=form, files={"image": ("i.png", PNG)})
    assert error_of(both, 400, "conflicting_field")["param"] == "num_inference_steps"


# --- what is refused ---


def test_a_body_that_is_no_object_is_refused(site: Site) -> None:
    path = "/v1/images/generations"
    error_of(site.client.post(path, content=b"{"), 400, "malformed_body")
    error_of(site.client.post(path, content=b'{"prompt": "cat", "prompt": "dog"}'), 400, "conflicting_field")
    error_of(site.client.post(path, content=b""), 400, "invalid_field")
    error_of(site.client.post(path, json=CAT, headers={"Content-Encoding": "gzip"}), 415, "unsupported_encoding")
    error_of(site.client.post(f"{path}?n=2", json=CAT), 400, "unknown_field")


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


def test_the_job_of_an_edit_has_addresses_too_and_one_key_is_one_job_of_one_kind_of_mask(site: Site) -> None:
    fields, key = CAT | {"response_format": "url"}, {"Idempotency-Key": "once"}
    made = []
    for _ in range(2):
        files = {"image": ("i.png", PNG), "mask": ("m.png", CLEAR)}
        answer = site.client.post("/v1/images/edits", data=fields, files=files, headers=key)
        made.append(answer.json()["data"][0]["url"])
    assert made[0] == made[1]
    assert same(got(site), PICTURE, MASK_PIXELS)
    by_white = SAME | {"class_label": 0, "image": b64(PNG), "mask": b64(CLEAR)}
    assert site.client.post("/jobs", json=by_white, headers=key).json()["code"] == "idempotency_key_reused"


def test_a_server_that_drains_sends_whoever_waits_for_a_durable_job_elsewhere(
    held: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.jobs.jobs.POLL_INTERVAL_S", 0.01)
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


def test_strength_says_how_much_an_edit_without_a_mask_changes(site: Site) -> None:
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


def test_an_edit_is_a_form_with_a_file_and_known_fields(site: Site) -> None:
    assert error_of(edit(site, {"mask": CLEAR}, **CAT, image="x"), 400, "invalid_image")["param"] == "image"
    assert error_of(edit(site, {"image": PNG}, **CAT, bogus=1), 400, "unknown_field")["param"] == "bogus"
    as_json = site.client.post("/v1/images/edits", json=CAT)
    assert error_of(as_json, 415, "unsupported_media_type")["param"] == "Content-Type"


def test_an_image_may_be_larger_than_other_bodies_but_not_than_images_may_be(make_site: MakeSite) -> None:
    site = make_site(max_image_bytes=20_000)
    large = edit(site, {"image": PNG.ljust(15_000, b"\0")}, **CAT, strength=0.5)
    assert large.status_code == 200, large.text
    assert error_of(edit(site, {"image": b"\0" * 20_001}, **CAT), 413, "body_too_large")["param"] == "image"


def test_the_models_that_are_served_are_listed_the_default_one_first(make_site: MakeSite) -> None:
    before_s = int(time.time())
    several = make_several(make_site)
    document = several.get("/v1/models").json()
    assert document["object"] == "list"
    assert [entry["id"] for entry in document["data"]] == ["fake", "colour"]
    for entry in document["data"]:
        assert before_s <= entry["created"] <= time.time()
        assert entry | {"created": 0, "id": ""} == {"id": "", "object": "model", "created": 0, "owned_by": "tminus"}
        assert several.get(f"/v1/models/{entry['id']}").json() == entry
    error_of(several.get("/v1/models/nobody"), 404, "model_not_found")


STREAM: dict[str, Any] = CAT | {"stream": True}


@pytest.mark.parametrize(
    ("passes", "count", "at"),
    [(20, 0, ()), (20, 1, (10,)), (20, 3, (5, 10, 15)), (2, 3, (1,)), (1, 3, ())],
)  # fmt: skip
def test_what_is_shown_is_spread_evenly(passes: int, count: int, at: tuple[int, ...]) -> None:
    assert steps_shown(passes, count) == at


def test_a_stream_shows_the_estimate_of_x_0_and_then_the_image(site: Site) -> None:
    answer = generate(site, **STREAM | {"steps": 8}, partial_images=3)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    found = [(name, data) for name, data, _ in events(answer.text)]
    assert [name for name, _ in found] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert all(name == data["type"] for name, data in found)
    spec = make_spec(seed=5, steps=8)
    for number, (_, data) in enumerate(found[:3]):
        assert data.keys() == {
            *("type", "b64_json", "partial_image_index", "created_at", "size", "quality", "background"),
            *("output_format", "image_index"),
        }
        assert (data["partial_image_index"], data["size"], data["background"]) == (number, SIZE, "opaque")
        shown = pixels(base64.b64decode(data["b64_json"]))
        np.testing.assert_array_equal(shown, 255 - fake_pixels(spec, 2 * number + 2)[0, :, :, 0])
    done = found[-1][1]
    assert base64.b64decode(done["b64_json"]) == site.post(json=SAME | {"steps": 8}).content
    assert done["usage"]["total_tokens"] == 0
    assert (done["image_index"], done["seed"], done["steps"], done["revised_prompt"]) == (0, 5, 8, "cat")
    assert done["job_id"] == answer.headers["x-job-id"]
    assert site.metrics()["tminus_frames_sent_total"] == 3


def test_each_of_several_images_has_events_of_its_own(site: Site) -> None:
    found = events(generate(site, **STREAM, n=3, partial_images=1, output_format="webp").text)
    names = [(name.rpartition(".")[2], data["image_index"]) for name, data, _ in found]
    assert names == [(name, k) for name in ("partial_image", "completed") for k in range(3)]
    assert [data["index"] for name, data, _ in found if name.endswith("completed")] == [0, 1, 2]
    assert {base64.b64decode(data["b64_json"])[8:12] for _, data, _ in found} == {b"WEBP"}


def test_an_edit_is_streamed_under_its_own_names(site: Site) -> None:
    fields = STREAM | {"stream": "true", "partial_images": 2, "strength": 0.5, "steps": 12}
    found = events(edit(site, {"image": encode(PICTURE)}, **fields).text)
    assert [name for name, *_ in found] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


def test_no_image_on_the_way_is_lost_where_the_job_is_faster_than_its_stream(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_frame = Encoder.encode_frame

    async def late(self: Encoder, *given: Any, **more: Any) -> Any:
        while site.engine.jobs:  # noqa: ASYNC110  it is another thread's
            await asyncio.sleep(0)
        return await encode_frame(self, *given, **more)

    monkeypatch.setattr(Encoder, "encode_frame", late)
    assert len(events(generate(site, **STREAM | {"steps": 8}, partial_images=3).text)) == 4


def test_a_frame_that_is_lost_does_not_end_the_stream(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_frame, failures = Encoder.encode_frame, iter([True])

    async def fail_once(self: Encoder, *given: Any, **more: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("secret")
        return await encode_frame(self, *given, **more)

    monkeypatch.setattr(Encoder, "encode_frame", fail_once)
    found = events(generate(site, **STREAM | {"steps": 8}, partial_images=3).text)
    assert [data.get("partial_image_index") for _, data, _ in found] == [0, 1, None]


def test_comments_keep_a_stream_alive_while_the_job_waits(held: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.01)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(generate, held, **STREAM)
        held.engine.next_begun()
        wait_until(lambda: held.streams.open == 1)
        with pytest.raises(TimeoutError):
            reading.result(0.1)
        held.engine.gate.open()
        text = reading.result(PATIENCE_S).text
    assert text.count(": ping") >= 2
    assert [name for name, *_ in events(text)] == ["image_generation.completed"]


def test_an_error_in_mid_stream_is_an_event(site: Site) -> None:
    def fail(_batch: object) -> None:
        if len(site.engine.batches) > 3:
            raise RuntimeError("secret")

    site.engine.on_step = fail
    text = generate(site, **STREAM | {"steps": 8}, partial_images=3).text
    site.engine.on_step = lambda batch: None
    found = events(text)
    assert found[-1][0] == "error"
    assert found[-1][1]["error"] | {"message": ""} == {
        "message": "", "type": "server_error", "param": None, "code": "engine_failed",
    }  # fmt: skip
    assert "secret" not in text
    assert [name for name, *_ in found[:-1]] == ["image_generation.partial_image"]


def test_what_is_refused_is_refused_before_the_stream_begins(make_site: MakeSite) -> None:
    site = make_site(max_streams=1)
    error_of(generate(site, **STREAM | {"n": 11}), 400, "invalid_field")
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(generate, site, **STREAM)
        site.engine.next_begun()
        refused = generate(site, **STREAM)
        assert error_of(refused, 429, "too_many_streams")["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        site.engine.gate.open()
        assert reading.result(PATIENCE_S).status_code == 200
    assert site.streams.open == 0
    assert generate(site, **STREAM).status_code == 200


def test_a_job_that_is_deleted_ends_its_stream_by_an_error(held: Site) -> None:
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(generate, held, **STREAM)
        held.engine.next_begun()
        (job,) = held.client.get("/jobs").json()["jobs"]
        assert (job["durable"], job["model"]) == (False, INFO.name)
        deleting = pool.submit(held.client.delete, f"/jobs/{job['id']}")
        assert deleting.result(PATIENCE_S).status_code == 204
        held.engine.gate.open()
        ((name, data, _),) = events(reading.result(PATIENCE_S).text)
    assert (name, data["error"]["code"]) == ("error", "cancelled")


# --- alpha ---

RGBA = replace(INFO, channels=4, alpha=True)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_background_is_transparent_or_white_and_the_answer_says_which(make_site: MakeSite, streamed: bool) -> None:
    site = make_site(info=RGBA)
    value = int(fake_pixels(make_spec(n=1, steps=4, seed=5), 4, RGBA)[0, 0, 0, 0])
    for background, output_format, mode in (
        ("transparent", "png", "RGBA"),
        ("transparent", "webp", "RGBA"),
        ("auto", "png", "RGBA"),
        ("auto", "jpeg", "RGB"),
        ("opaque", "png", "RGB"),
        ("opaque", "webp", "RGB"),
    ):
        members = CAT | {"background": background, "output_format": output_format}
        if streamed:
            told = [data for _, data, _ in events(generate(site, **members, stream=True, partial_images=1).text)]
            assert len(told) == 2
        else:
            answer = generate(site, **members).json()
            told = [answer | answer["data"][0]]
        for each in told:
            assert each["background"] == ("transparent" if mode == "RGBA" else "opaque")
            with Image.open(io.BytesIO(image(each))) as opened:
                assert opened.mode == mode
                last = np.asarray(opened)
        wanted = [value] * 4 if mode == "RGBA" else [value * value / 255 + 255 - value] * 3
        np.testing.assert_allclose(last, np.broadcast_to(wanted, last.shape), atol=0.5 if output_format == "png" else 3)


def test_a_background_that_cannot_be_had_is_refused_with_the_reason(make_site: MakeSite) -> None:
    site = make_site(info=RGBA)
    for members, says in (
        ({"background": "transparent", "output_format": "jpeg"}, "jpeg, which has no alpha"),
        ({"background": "opaque", "response_format": "url"}, "keep their alpha"),
    ):
        error = error_of(generate(site, **CAT | members), 400, "invalid_field")
        assert (error["param"], says in error["message"]) == ("background", True)
    assert generate(make_site(), **CAT, background="opaque", response_format="url").status_code == 200


def test_an_rgba_image_is_its_own_mask_where_it_is_transparent_and_keeps_the_alpha_of_the_rest(
    make_site: MakeSite,
) -> None:
    site, picture = make_site(info=RGBA), noise(4, 6, 4)
    picture[..., 3] = np.where(MASK_PIXELS, 0, 100)
    answer = edit(site, {"image": encode(picture)}, **CAT)
    assert answer.status_code == 200, answer.text
    inputs = got(site)
    assert inputs is not None
    np.testing.assert_array_equal(inputs.image, picture)
    np.testing.assert_array_equal(inputs.mask, MASK_PIXELS)
