"""What POST /sample refuses: changes to a request that is right, each with the field and the bound that it is told."""

from typing import Any

import pytest

from tests.service.api.pictures import CAT, EDIT, INPUTS, MASK, b64
from tests.service.conftest import Site, problem
from tests.service.fakes import INFO
from tminus.model.catalogue import SAMPLERS
from tminus.model.timesteps import SPACINGS
from tminus.service.images.encoder import JSON, NPY, WEBP
from tminus.service.images.trajectory import TRAJECTORY

PNG = ""
RIGHT = {"n": 2, "steps": 10, "seed": 4, "class_label": "cat"}
SEED = "an integer in 0..18446744073709551615"
INDEX = "an integer in 0..4294967295 less n - 1"
CLASSES = "a class, or a list of n of them: 0..2 or cat, dog, 3d-print"
INTERVAL = "two integers [lo, hi] with 0 <= lo <= hi <= 999"
KEEP = "one or more numbers of passes in 0..9, each greater than the one before"
PASSES = f"a list of at most {INFO.num_timesteps} numbers of passes"
NO_TRAJECTORY = f"absent without Accept: {TRAJECTORY}"

# By the Accept of the request: a change, the field that is named, and how its bound begins.
REFUSED: dict[str, list[tuple[dict[str, Any], str, str]]] = {
    PNG: [
        *[({"steps": steps}, "steps", "an integer in 1..1000") for steps in (0, 1001, "ten", 2.5, [5], True)],
        ({"n": 65}, "n", "an integer in 1..64"),
        ({"n": None}, "n", "an integer in 1..64"),
        ({"seed": -1}, "seed", SEED),
        ({"seed": 2**64}, "seed", SEED),
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
        ({"clip": "perhaps"}, "clip", "true or false"),
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
    NPY: [
        ({"bit_depth": 8}, "bit_depth", "32 or absent"),
        ({"clip_output": "no"}, "clip_output", "true or false"),
    ],
    WEBP: [
        ({"every": 0}, "every", "an integer of at least 1"),
        ({"every": 1, "show": ["x_t", "x_t"]}, "show", "one of x_t, x_0, or with application/json a list of both"),
        ({"every": 1, "show": []}, "show", "one of x_t, x_0"),
        ({"every": 1, "show": ["x_t", "x_0"]}, "show", "one of x_t, x_0 in an animation"),
        ({"every": 1, "until": 2}, "until", "absent in an animation"),
        ({"every": 2, "keep": [1]}, "keep", NO_TRAJECTORY),
        ({"every": 1, "bit_depth": 16}, "bit_depth", "8 or absent with every"),
    ],
    JSON: [
        ({"until": 2}, "until", "absent without `every`"),
        ({"every": 1, "until": -1}, "until", "an integer of at least 0"),
        ({"every": 1, "bit_depth": 16}, "bit_depth", "8 or absent with every"),
    ],
    TRAJECTORY: [
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
}


@pytest.mark.parametrize("accept", REFUSED)
def test_what_is_wrong_is_refused_with_its_field_value_and_bound_before_any_step(one_site: Site, accept: str) -> None:
    for change, field, bound in REFUSED[accept]:
        response = one_site.post(json=RIGHT | change, headers={"Accept": accept})
        document = problem(response, 422, "invalid_field")
        assert (document["field"], document["bound"][: len(bound)]) == (field, bound), change
        assert document["detail"].startswith(f"{field} must be {document['bound']}, got "), change
        given = change.get(field)
        assert field in ("mask", "keep") or document["value"] == given or document["value"] in given, change
    assert one_site.engine.batches[1:] == [], "the first is the warm-up's"


def test_a_media_type_that_does_not_go_with_every_is_not_acceptable(one_site: Site) -> None:
    document = problem(one_site.post(json=RIGHT, headers={"Accept": WEBP}), 406, "not_acceptable")
    assert "image/webp together with the parameter `every`" in document["bound"]
    for accept in ("image/png", NPY, TRAJECTORY):
        document = problem(one_site.post(json=RIGHT | {"every": 2}, headers={"Accept": accept}), 406, "not_acceptable")
        assert "application/vnd.tminus.trajectory the latents of each step" in document["detail"]


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"strength": 0.5}, "image", "given together with strength"),
        ({"mask": b64(MASK)}, "image", "given together with mask"),
        ({"image_sha256": "0" * 64}, "image", "given together with image_sha256"),
        ({"image": b64(CAT)}, "strength", "given with an image, or else a mask"),
        ({"image": b64(CAT), "strength": 1.01}, "strength", "above 0, at most 1"),
        ({"image": 5, "strength": 0.5}, "image", "base64"),
        ({"image": b64(CAT), "strength": 0.5, "image_sha256": "0" * 64}, "image_sha256", INPUTS.image_sha256),
        ({"image": b64(CAT), "strength": 0.5, "mask_sha256": "0" * 64}, "mask", "given together with mask_sha256"),
        ({"image": b64(CAT), "mask": b64(MASK), "mask_sha256": "0" * 64}, "mask_sha256", INPUTS.mask_sha256),
    ],
)
def test_parts_of_an_edit_that_do_not_go_together_are_refused_with_what_to_do(
    one_site: Site, fields: dict[str, Any], field: str, says: str
) -> None:
    for path in ("/sample", "/jobs"):
        document = problem(one_site.client.post(path, json=EDIT | fields), 422, "invalid_field")
        assert document["field"] == field
        assert says in document["detail"]
        assert len(document["detail"]) < 500, "no echo of a picture"
    assert one_site.client.get("/jobs").json()["jobs"] == []
