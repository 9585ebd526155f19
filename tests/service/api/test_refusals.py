"""What each call refuses: changes to a request that is right, each with the field and the bound that it is told."""

import json
import logging
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.service.api.kserve.requests import as_bytes, body, plain, tensor, texts
from tests.service.api.openai.asking import CAT as PROMPT
from tests.service.api.openai.asking import SIZE, generate
from tests.service.api.pictures import CAT, EDIT, INPUTS, MASK, MASK_PIXELS, b64, encode, noise
from tests.service.api.test_tables import NONE, OWN, TUNED, table
from tests.service.conftest import Site, problem, running_sites
from tests.service.fakes import INFO
from tests.service.webhooks import make_telling
from tminus.model.catalogue import SAMPLERS
from tminus.model.timesteps import SPACINGS
from tminus.service.images.encoder import JSON, NPY, WEBP
from tminus.service.images.trajectory import TRAJECTORY

RIGHT = {"n": 2, "steps": 10, "seed": 4, "class_label": "cat"}
SEED = "an integer in 0..18446744073709551615"
INDEX = "an integer in 0..4294967295 less n - 1"
CLASSES = "a class, or a list of n of them: 0..2 or cat, dog, 3d-print"
INTERVAL = "two integers [lo, hi] with 0 <= lo <= hi <= 999"
KEEP = "one or more numbers of passes in 0..9, each greater than the one before"
PASSES = f"a list of at most {INFO.num_timesteps} numbers of passes"
NO_TRAJECTORY = f"absent without Accept: {TRAJECTORY}"
T = "an integer in 0..999"
EVENTS = "start, output, completed"
PUBLIC = {"webhook": "https://hooks.example/x"}
CLEAR = encode(np.dstack([noise(4, 6, 3), np.where(MASK_PIXELS, 0, 255).astype(np.uint8)]))
OPAQUE = encode(np.dstack([noise(4, 6, 3), np.full((4, 6), 255, np.uint8)]))
HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\x86\xa0\0\1\x86\xa0\x08\2\0\0\0\0\0\0\0"
LENGTH = "Inference-Header-Content-Length"
NO_IMAGE, UNKNOWN, TWICE, NO_JSON = "invalid_image", "unknown_field", "conflicting_field", "malformed_body"
DEEP = b'{"inputs": ' + b"[" * 1500 + b"]" * 1500 + b"}"


@pytest.fixture(scope="module")
def one_site() -> Iterator[Site]:
    """A site whose model has tables, and that sends webhooks. Nothing here leaves anything behind."""
    with running_sites() as make_site:
        yield make_telling(make_site, info=TUNED)


# --- how the calls are made ---


def sample(site: Site, change: dict[str, Any], *, accept: str = "", right: dict[str, Any] = RIGHT) -> Any:
    return site.post(json=right | change, headers={"Accept": accept})


def by_query(site: Site, change: dict[str, Any]) -> Any:
    return site.post(params=change)


def by_form(site: Site, change: dict[str, Any]) -> Any:
    return site.post(files={"image": CAT}, data={"strength": "1"} | change)


def submit(site: Site, change: dict[str, Any], right: dict[str, Any] = RIGHT) -> Any:
    return site.client.post("/jobs", json=right | change)


def stream(site: Site, change: dict[str, Any]) -> Any:
    with site.client.websocket_connect("/sample/stream") as ws:
        ws.send_json(RIGHT | change)
        return ws.receive_json()


def follow(site: Site, query: dict[str, Any]) -> Any:
    return site.client.get("/jobs/x/events", params=query)


def add_noise(site: Site, query: dict[str, Any], *, picture: bytes = CAT) -> Any:
    return site.client.post("/noise", content=picture, headers={"Content-Type": "image/png"}, params=query)


def add_noise_by_form(site: Site, fields: dict[str, Any]) -> Any:
    return site.client.post("/noise", files={"image": CAT}, data=fields)


def noise_of(site: Site, picture: bytes) -> Any:
    return add_noise(site, {"t": 5}, picture=picture)


def noise_of_form(site: Site, files: dict[str, Any]) -> Any:
    return site.client.post("/noise", files=files, params={"t": 5})


def openai(site: Site, members: dict[str, Any], *, right: dict[str, Any] = PROMPT) -> Any:
    return generate(site, **right | members)


def openai_edit(site: Site, files: dict[str, Any]) -> Any:
    """With its fields as parts, so that it is a form where there is no file either."""
    parts = [(name, (name, data)) for name, data in files.items()]
    return site.client.post("/v1/images/edits", files=parts + [(k, (None, str(v))) for k, v in PROMPT.items()])  # type: ignore[arg-type]


def hugging_face(site: Site, parameters: dict[str, Any], *, inputs: object = "dog") -> Any:
    return site.client.post("/", json={"inputs": inputs, "parameters": {"steps": 4, "seed": 7} | parameters})


def edit_of(site: Site, inputs: str) -> Any:
    return hugging_face(site, {"prompt": "dog", "strength": 0.5}, inputs=inputs)


def kserve(site: Site, members: dict[str, Any]) -> Any:
    return site.client.post("/v2/models/fake/infer", json={"inputs": []} | members)


def kserve_tensor(site: Site, given: Any) -> Any:
    return kserve_body(site, body([given if isinstance(given, tuple) else (given, b"")]))


def kserve_body(site: Site, given: tuple[bytes, dict[str, str]]) -> Any:
    return site.client.post("/v2/models/fake/infer", content=given[0], headers=given[1])


def error_of(answer: Any) -> dict[str, Any]:
    """Code, field and detail, which each API calls by names of its own."""
    document = answer if isinstance(answer, dict) else json.loads(answer.content, parse_constant=pytest.fail)
    error = document.get("error", {})
    if isinstance(error, str):
        return {"detail": error, **document}
    return {"field": error.get("param"), "detail": error.get("message")} | document | error


Ask = Callable[[Site, Any], Any]
Row = tuple[Any, str | None, str] | tuple[Any, str | None, str, str]  # and the code, if it is not invalid_field

EDITS: list[Row] = [
    ({"strength": 0.5}, "image", "given together with strength"),
    ({"mask": b64(MASK)}, "image", "given together with mask"),
    ({"image_sha256": "0" * 64}, "image", "given together with image_sha256"),
    ({"image": b64(CAT)}, "strength", "given with an image, or else a mask"),
    ({"image": b64(CAT), "strength": 1.01}, "strength", "above 0, at most 1"),
    ({"image": 5, "strength": 0.5}, "image", "base64"),
    ({"image": b64(CAT), "strength": 0.5, "image_sha256": "0" * 64}, "image_sha256", f"{INPUTS.image_sha256}"),
    ({"image": b64(CAT), "strength": 0.5, "mask_sha256": "0" * 64}, "mask", "given together with mask_sha256"),
    ({"image": b64(CAT), "mask": b64(MASK), "mask_sha256": "0" * 64}, "mask_sha256", f"{INPUTS.mask_sha256}"),
]
SPELLINGS: list[Row] = [  # numbers and truth values are written as in JSON
    *[({"seed": text}, "seed", SEED) for text in ("5_0", " 5", "+5", "5.0", "0x5", "٥", "", "-5")],
    *[
        ({"deadline_s": text}, "deadline_s", "a number above 0")
        for text in ("1_0", " 1", "+1", ".5", "1.", "nan", "inf", "1e400", "٥", "0x1", "")
    ],
    *[({"clip": text}, "clip", "true or false") for text in ("True", "1", "yes", " true", "")],
]
NOT_PICTURES = ("", "%%%", "é", b64(CAT, "image/png").replace(";base64", ""), b64(b"<svg/>"))

REFUSED: dict[tuple[str, Ask], list[Row]] = {
    ("POST /sample", sample): [
        *[({"steps": steps}, "steps", "an integer in 1..1000") for steps in (0, 1001, "ten", 2.5, [5], True)],
        ({"n": 65}, "n", "an integer in 1..64"),
        ({"n": None}, "n", "an integer in 1..64"),
        *SPELLINGS,
        *[({"seed": seed}, "seed", SEED) for seed in (-1, 2**64, 5.5, 1e17, 9007199254740994.0, True, [5], {})],
        ({"sampler": "rk45"}, "sampler", f"one of {', '.join(SAMPLERS)}"),
        ({"eta": 1.1, "sampler": "ddim"}, "eta", "a number in 0..1"),
        ({"eta": "nan", "sampler": "ddim"}, "eta", "a number in 0..1"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta", "absent for sampler ddpm: only ddim has it"),
        ({"guidance": 50.1}, "guidance", "a number in 0..50"),
        ({"guidance": "inf"}, "guidance", "a number in 0..50"),
        ({"guidance": 2, "class_label": ["cat", None]}, "guidance", "1 (off) if an image has no class_label"),
        *[
            ({"guidance": 2, "guidance_interval": interval}, "guidance_interval", INTERVAL)
            for interval in ([800, 100], [0, 1000], [False, True])
        ],
        ({"guidance": 2, "guidance_rescale": "much"}, "guidance_rescale", "a number in 0..1"),
        ({"index": -1}, "index", INDEX),
        ({"index": 2**32 - 1}, "index", INDEX),
        ({"clip": 1}, "clip", "true or false"),
        ({"timestep_spacing": ""}, "timestep_spacing", f"one of {', '.join(SPACINGS)}"),
        *[({"class_label": label}, "class_label", CLASSES) for label in ("bird", 3, "-1", "9" * 150, 1.5, {"a": 1})],
        ({"class_label": [0, "bird"]}, "class_label", CLASSES),
        *[({"class_label": labels}, "class_label", "one class or a list of n=2") for labels in ([0, 1, 2], [0], [])],
        ({"to_seed": 7}, "mix", "given together with to_seed"),
        ({"to_seed": 4, "mix": 0.5}, "to_seed", "different from seed"),
        ({"to_seed": 7, "mix": 1.1}, "mix", "a number in 0..1"),
        ({"deadline_s": -1.5}, "deadline_s", "a number above 0, at most 86400"),
        ({"deadline_s": [5]}, "deadline_s", "a number above 0, at most 86400"),
        ({"show": "x_t"}, "show", "absent without `every`"),
        ({"keep": [1]}, "keep", NO_TRAJECTORY),
        ({"dtype": "float16"}, "dtype", NO_TRAJECTORY),
        ({"bit_depth": 12}, "bit_depth", "8, 16 or 32"),
        ({"bit_depth": "16.0"}, "bit_depth", "8, 16 or 32"),
        ({"bit_depth": 32}, "bit_depth", "8 or 16 with Accept: image/png; application/x-npy has 32"),
        ({"clip_output": False}, "clip_output", "absent with Accept: image/png: pictures have no values beyond the"),
    ],
    ("floats", partial(sample, accept=NPY)): [
        ({"bit_depth": 8}, "bit_depth", "32 or absent"),
        ({"clip_output": "no"}, "clip_output", "true or false"),
    ],
    ("an animation", partial(sample, accept=WEBP)): [
        *[({"every": every}, "every", "an integer of at least 1") for every in (0, "5_0", "5.0", "٥")],
        ({"every": 1, "show": ["x_t", "x_t"]}, "show", "one of x_t, x_0, or with application/json a list of both"),
        ({"every": 1, "show": []}, "show", "one of x_t, x_0"),
        ({"every": 1, "show": ["x_t", "x_0"]}, "show", "one of x_t, x_0 in an animation"),
        ({"every": 1, "until": 2}, "until", "absent in an animation"),
        ({"every": 2, "keep": [1]}, "keep", NO_TRAJECTORY),
        ({"every": 1, "bit_depth": 16}, "bit_depth", "8 or absent with every"),
    ],
    ("JSON", partial(sample, accept=JSON)): [
        ({"until": 2}, "until", "absent without `every`"),
        ({"every": 1, "until": -1}, "until", "an integer of at least 0"),
        ({"every": 1, "bit_depth": 16}, "bit_depth", "8 or absent with every"),
    ],
    ("a trajectory", partial(sample, accept=TRAJECTORY)): [
        ({"sampler": "dpmpp_2m"}, "sampler", "one of ddpm, ddim (eta at least 0.01), dpmpp_2m_sde with"),
        ({"sampler": "ddim", "eta": 0.00999}, "eta", "at least 0.01 with"),
        ({"steps": 1}, "steps", "at least 2 with"),
        ({"image": b64(CAT), "strength": 0.05}, "strength", "enough for two steps with"),
        ({"image": b64(CAT), "mask": b64(MASK)}, "mask", "absent with"),
        ({"bit_depth": 16}, "bit_depth", "8 or absent"),
        *[({"keep": keep}, "keep", KEEP) for keep in ([], [10], [-1, 3], [3, 3], [5, 3])],
        ({"keep": [9]}, "keep", "numbers of passes of which one or more add noise"),
        *[({"keep": keep}, "keep", PASSES) for keep in (list(range(INFO.num_timesteps + 1)), 3, [1.5], "1,2")],
        ({"dtype": "bfloat16"}, "dtype", "one of float32, float16"),
        ({"dtype": None}, "dtype", "one of float32, float16"),
    ],
    ("tables", partial(sample, right={"sampler": "tuned"})): [
        ({"steps": 7}, "steps", NONE),
        ({"steps": 6}, "guidance", NONE),
        ({"steps": 8, "guidance": 2, "class_label": 0}, "guidance", NONE),
        ({"steps": 1001, "nearest": True}, "steps", "an integer in 1..1000"),
        ({"steps": 8, "timestep_spacing": "karras"}, "timestep_spacing", OWN),
        ({"steps": 8, "table": "0" * 16}, "table", f"that of the chosen table, {table(8).hash}"),
        ({"steps": 8, "table": "x"}, "table", "16 hexadecimal digits, in small letters"),
        ({"sampler": "ddim", "nearest": True}, "nearest", "absent for sampler ddim, which has no tables"),
    ],
    ("the query", by_query): SPELLINGS,
    ("a form", by_form): SPELLINGS,
    ("an edit", partial(sample, right=EDIT)): EDITS,
    ("an edit as a job", partial(submit, right=EDIT)): EDITS,
    ("pictures of an edit", partial(sample, right=EDIT | {"image": b64(CAT), "mask": b64(MASK)})): [
        *[({name: text}, name, "", NO_IMAGE) for name in ("image", "mask") for text in NOT_PICTURES],
    ],
    ("webhooks", submit): [
        ({"webhook": "https://169.254.169.254/latest"}, "webhook", "public host"),
        ({"webhook": "http://hooks.example/x"}, "webhook", "https"),
        ({"webhook": "https://hooks.example/" + "x" * 1024}, "webhook", "at most 1024 characters"),
        ({"webhook": "not a URL"}, "webhook", "absolute https URL"),
        ({"webhook": ["https://hooks.example/s3cret"]}, "webhook", "text"),
        ({"webhook_events_filter": ["completed"]}, "webhook", "given together with"),
        (PUBLIC | {"webhook_events_filter": ["logs"]}, "webhook_events_filter", EVENTS),
        (PUBLIC | {"webhook_events_filter": []}, "webhook_events_filter", EVENTS),
        (PUBLIC | {"webhook_events_filter": ["start"] * 99}, "webhook_events_filter", "a list"),
        ({"keep": [1]}, "keep", "steps", UNKNOWN),
        ({"dtype": "float16"}, "dtype", "steps", UNKNOWN),
    ],
    ("a stream", stream): [
        ({"steps": 0}, "steps", "an integer in 1..1000"),
        ({"every": 0}, "every", "an integer of at least 1"),
        ({"fps": 61}, "fps", "60"),
        ({"fps": 5, "every": 2}, "fps", "every"),
        ({"show": ["x_t", "x_t"]}, "show", "x_t, x_0"),
        ({"frame_format": "gif"}, "frame_format", "png"),
        ({"frame_format": "npy"}, "frame_format", "a trajectory has the floats"),
        ({"bit_depth": 32}, "bit_depth", "8"),
        ({"seed": "5.0"}, "seed", SEED),
        ({"keep_open": "True"}, "keep_open", "true or false"),
        ({"strength": 0.5}, "image", "given together with strength"),
        ({"image": "%", "strength": 0.5}, "image", "base64", NO_IMAGE),
    ],
    ("events", follow): [
        ({"every": 0}, "every", "at least 1"),
        ({"show": "x"}, "show", "x_t, x_0"),
        ({"keep_open": 1}, "keep_open", "every", UNKNOWN),
    ],
    ("POST /noise", add_noise): [
        ({}, "t", T),
        ({"t": "1.5"}, "t", T),
        ({"t": "9" * 5000}, "t", T),
        ({"t": "5", "seed": str(2**64)}, "seed", SEED),
    ],
    ("a form for noise", add_noise_by_form): [
        ({}, "t", T),
        ({"t": "1.5"}, "t", T),
        ({"t": "5", "seed": str(2**64)}, "seed", SEED),
    ],
    ("a picture for noise", noise_of): [
        (b"", "image", "nothing", NO_IMAGE),
        (b"hello", "image", "b'hello'", NO_IMAGE),
        (CAT[:40], "image", "broken", NO_IMAGE),
        (HUGE, "image", "16384 pixels wide, got 100000", NO_IMAGE),
    ],
    ("a file for noise", noise_of_form): [
        ({"image": ("cat.png", b"hello", "image/png")}, "image", "b'hello'", NO_IMAGE),
        ({"seed": (None, "5")}, "image", "a file in the form", NO_IMAGE),
        ({"image": (None, "cat.png")}, "image", "a file: curl -F image=@file", NO_IMAGE),
        ([("image", CAT), ("image", CAT)], "image", "image", TWICE),
        ({"image": CAT, "mask": CAT}, "mask", "image", UNKNOWN),
        ({"image": CAT, "t": (None, "6")}, "t", "5", TWICE),
    ],
    ("OpenAI", openai): [
        ({"prompt": "a red cat"}, "prompt", "0..2 or cat, dog, 3d-print"),
        ({"prompt": None}, "prompt", "given"),
        ({"n": 11}, "n", "1..10"),
        ({"size": "1024x1024"}, "size", f"auto or {SIZE}"),
        ({"background": "transparent"}, "background", "this model's images have no alpha"),
        ({"background": "white"}, "background", "one of auto, opaque, transparent"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression", "0..100"),
        ({"response_format": "url", "stream": True}, "response_format", "b64_json with stream"),
        ({"response_format": "url", "output_format": "webp"}, "output_format", "png with response_format url"),
        ({"partial_images": 1}, "partial_images", "stream"),
        ({"table": "x"}, "table", "16 hexadecimal digits"),
        ({"guidance": 2, "prompt": ""}, "guidance", "no class"),
        ({"class_label": "x"}, "class_label", "prompt, model, size", UNKNOWN),
        ({"every": "x"}, "every", "prompt, model, size", UNKNOWN),
        ({"nsteps": 1}, "nsteps", "num_inference_steps, guidance_scale", UNKNOWN),
        *[({name: 9}, name, name, TWICE) for name in ("num_inference_steps", "guidance_scale")],
    ],
    ("OpenAI, by names of diffusers", partial(openai, right={"prompt": "cat"})): [
        ({"num_inference_steps": 0}, "num_inference_steps", "an integer in 1..1000, got 0"),
        ({"num_inference_steps": "many"}, "num_inference_steps", "an integer in 1..1000, got 'many'"),
        ({"sampler": "heun", "num_inference_steps": 501}, "num_inference_steps", "1..500 for heun"),
        ({"guidance_scale": 51, "response_format": "url"}, "guidance_scale", "0..50, got 51"),
        ({"guidance_scale": 2, "prompt": ""}, "guidance_scale", "no class"),
    ],
    ("pictures for OpenAI", openai_edit): [
        ({}, "image", "a file in the form", NO_IMAGE),
        ({"mask": CLEAR}, "image", "a file in the form", NO_IMAGE),
        ({"image": b"no image"}, "image", "PNG, JPEG or WebP", NO_IMAGE),
        ({"image": encode(noise(8, 6))}, "image", "of 6x4 pixels, as the model's images are, got one of 6x8", NO_IMAGE),
        (
            {"image": CAT},
            "image",
            "or come with a mask or with strength, got one without a transparent pixel",
            NO_IMAGE,
        ),
        ({"image": CAT, "mask": MASK}, "mask", "transparent where the image is to be made new", NO_IMAGE),
        ({"image": CAT, "mask": OPAQUE}, "mask", "transparent where the image is to be made new", NO_IMAGE),
        ({"image": CAT, "mask": encode(noise(4, 6).astype(np.uint16) * 257)}, "mask", "transparent", NO_IMAGE),
        ({"image": CAT, "mask": CLEAR[:60]}, "mask", "broken", NO_IMAGE),
        ({"photo": CAT}, "photo", "image", UNKNOWN),
    ],
    ("Hugging Face", hugging_face): [
        ({"negative_prompt": "cat"}, "negative_prompt", "no class can be avoided"),
        ({"width": 512}, "width", "6, as all images"),
        ({"height": True}, "height", "4, as all images"),
        ({"target_size": {"width": 512, "height": 4}}, "target_size", "own size"),
        ({"scheduler": "LMSDiscreteScheduler"}, "scheduler", "DDIMScheduler"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "scheduler", "DDIMScheduler"),
        ({"guidance_scale": 51}, "guidance_scale", "0..50"),
        ({"num_images_per_prompt": 10**30}, "num_images_per_prompt", "1.."),
        *[({name: 1}, name, "", UNKNOWN) for name in ("image", "class_label", "lora")],
        ({"num_inference_steps": 4}, "num_inference_steps", "both", TWICE),
        ({"scheduler": "ddim", "sampler": "ddim"}, "sampler", "the request has both sampler and scheduler", TWICE),
    ],
    ("an edit of Hugging Face's", partial(hugging_face, inputs=b64(CAT))): [
        ({"prompt": "dog"}, "strength", "given with an image"),
        ({"prompt": "dog", "strength": 2}, "strength", "a number above 0"),
        ({"prompt": "cow", "strength": 0.5}, "prompt", "a class"),
        ({"prompt": 1, "strength": 0.5}, "prompt", "text"),
    ],
    ("a picture for Hugging Face", edit_of): [
        ("dog!", "inputs", "base64 of an image", NO_IMAGE),
        (b64(b"no"), "inputs", "a PNG", NO_IMAGE),
    ],
    ("KServe", kserve): [
        ({"id": 42}, "id", ""),
        ({"parameters": None}, "parameters", ""),
        ({"parameters": {"sampler": None}}, "sampler", ""),
        ({"parameters": {"eta": {}}}, "eta", ""),
        *[({"parameters": {"timeout": wrong}}, "timeout", "") for wrong in (0, -1, 1.5, "1", True, 10**400)],
        ({"outputs": [{"name": "latents"}]}, "outputs", ""),
        ({"outputs": [{"name": "images"}] * 3}, "outputs", ""),
        ({"outputs": [{"name": "images", "parameters": {"binary_data": "yes"}}]}, "binary_data", ""),
        ({"model_name": "other"}, "model_name", "fake, got 'other'"),
        ({"model_version": "1"}, "model_version", ""),
        *[({"inputs": inputs}, "inputs", "") for inputs in (None, "x", ["steps"], [plain()[0]] * 6)],
        ({"instances": [1]}, "instances", "", UNKNOWN),
        ({"parameters": {"steps": 4}}, "steps", "", UNKNOWN),
        ({"outputs": [{"name": "images", "parameters": {"classification": 3}}]}, "classification", "", UNKNOWN),
        ({"inputs": plain()[:1] * 2}, "steps", "twice", TWICE),
        ({"outputs": [{"name": "seed"}] * 2}, "outputs", "twice", TWICE),
        ({"parameters": {"timeout": 1, "deadline_s": 1}}, "timeout", "both", TWICE),
    ],
    ("a tensor", kserve_tensor): [
        (tensor("class_label", "INT64", *[0] * 65), "class_label.shape", ""),
        (tensor("class_label", "INT64", 0, shape=[2**70]), "class_label.shape", ""),
        (tensor("class_label", "INT64", 0, shape=[True]), "class_label.shape", ""),
        (tensor("steps", "INT32", 20, 20), "steps.shape", ""),
        (tensor("guidance", ["FP32"], 1.5), "guidance.datatype", ""),
        (tensor("class_label", "INT64", 0, 1, shape=[3]), "class_label.data", ""),
        (tensor("class_label", "INT64", "cat"), "class_label.data", ""),
        (tensor("class_label", "BYTES", "cat", "a dog"), "class_label", "cat, dog"),
        (tensor("seed", "UINT64", 2**64), "seed.data", ""),
        (tensor("guidance", "FP32", 10**400), "guidance.data", ""),
        (tensor("images", "UINT8", 1), "inputs", ""),
        ({"name": 3, "shape": [1], "datatype": "INT32", "data": [1]}, "inputs", ""),
        ({"name": "steps", "shape": [1], "datatype": "INT32"}, "steps.data", ""),
        (tensor("steps", "INT32", 4, parameters=[1]), "steps.parameters", ""),
        (as_bytes("class_label", "INT64", bytes(8), [2]), "class_label.binary_data_size", ""),
        (as_bytes("steps", "INT32", bytes(4), [1], size=2**62), "steps.binary_data_size", ""),
        (as_bytes("steps", "INT32", bytes(4), [1], size=-4), "steps.binary_data_size", ""),
        (as_bytes("guidance", "FP32", struct.pack("<f", float("nan")), [1]), "guidance.data", ""),
        (as_bytes("class_label", "BYTES", texts(b"cat"), [2]), "class_label.binary_data_size", ""),
        (as_bytes("class_label", "BYTES", b"\xff\xff\xff\xffcat", [1]), "class_label.binary_data_size", ""),
        (as_bytes("class_label", "BYTES", b"\x01\x00", [1]), "class_label.binary_data_size", ""),
        (as_bytes("class_label", "BYTES", texts(b"\xff\xfe"), [1]), "class_label.data", ""),
        (tensor("steps", "INT32", 4, parameters={"shared_memory_region": "x"}), "shared_memory_region", "", UNKNOWN),
        (
            (tensor("steps", "INT32", 4, parameters={"binary_data_size": 4}), bytes(4)),
            "steps",
            "both",
            TWICE,
        ),
    ],
    ("the length of KServe's JSON", kserve_body): [
        *[
            ((b'{"inputs": []}', {LENGTH: length}), LENGTH, "")
            for length in ("0", "-1", "15", "1e1", "99999999999999999999")
        ],
        (body([], behind=b"abc"), LENGTH, "3 bytes behind the JSON"),
        *[((content, {}), "inputs", "given") for content in (b"{}", b"")],
        *[((content, {}), None, "", NO_JSON) for content in (b'{"inputs": []}' + bytes(9), b'{"inputs": [NaN]}', DEEP)],
    ],
}


@pytest.mark.parametrize(
    ("ask", "rows"), [(ask, rows) for (_, ask), rows in REFUSED.items()], ids=[k for k, _ in REFUSED]
)
def test_what_is_wrong_is_refused_with_its_field_value_and_bound_before_any_step(
    one_site: Site, ask: Ask, rows: list[Row], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        for row in rows:
            change, field, bound, code = (*row, "invalid_field")[:4]
            error = error_of(ask(one_site, change))
            assert (error["code"], error.get("field")) == (code, field), (change, error)
            assert bound in error["detail"], change
            assert len(error["detail"]) < 600, "no echo of what is large"
            if code == "invalid_field" and ask is not kserve_body:
                assert error["detail"].startswith(f"{field} must be "), change
            if ask is sample and field in change:
                assert error["value"] == change[field] or error["value"] in change[field], change
    assert "s3cret" not in caplog.text
    assert one_site.engine.batches[1:] == [], "the first is the warm-up's"
    assert one_site.client.get("/jobs").json()["jobs"] == []


def test_a_media_type_that_does_not_go_with_every_is_not_acceptable(one_site: Site) -> None:
    document = problem(one_site.post(json=RIGHT, headers={"Accept": WEBP}), 406, "not_acceptable")
    assert "image/webp together with the parameter `every`" in document["bound"]
    for accept in ("image/png", NPY, TRAJECTORY):
        document = problem(one_site.post(json=RIGHT | {"every": 2}, headers={"Accept": accept}), 406, "not_acceptable")
        assert "application/vnd.tminus.trajectory the latents of each step" in document["detail"]
