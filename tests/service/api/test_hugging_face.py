"""POST to the address of the server, or of a model: what Hugging Face's client sends there, and what comes of it."""

from dataclasses import replace
from typing import Any

import pytest

from tests.service.api.pictures import CAT, b64
from tests.service.api.test_tables import TUNED, table
from tests.service.conftest import MakeSite, Site, pixels
from tests.service.keys import access_of, bearer, key_line
from tests.service.several import Several, make_several
from tminus.model.catalogue import Recommended

SPEC = {"steps": 4, "seed": 7}


def ask(site: Site, inputs: object = "dog", path: str = "/", **parameters: object) -> Any:
    return site.client.post(path, json={"inputs": inputs, "parameters": SPEC | parameters})


def refused(response: Any, status: int, code: str, field: str | None = None) -> str:
    """Check an error in the form that huggingface_hub shows, and return its text."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document["code"] == code
    assert document.get("field") == field
    return str(document["error"])


def test_a_prompt_is_sampled_to_the_bytes_of_post_sample(site: Site) -> None:
    parameters = {"num_inference_steps": 4, "guidance_scale": 2.5, "seed": 7, "width": 6, "height": 4}
    answer = site.client.post("/", json={"inputs": "dog", "parameters": parameters})
    wanted = site.post(json={"steps": 4, "guidance": 2.5, "seed": 7, "class_label": "dog"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == wanted.content
    assert answer.headers["etag"] == wanted.headers["etag"]
    for prompt, label in (("1", 1), ("3D Print", 2), ("", None)):
        wanted = site.post(json=SPEC | ({} if label is None else {"class_label": label}))
        assert ask(site, prompt).content == wanted.content
    for prompt in ("a dog", "3", "d" * 3000):
        text = refused(ask(site, prompt), 400, "invalid_field", "inputs")
        assert "cat, dog, 3d-print" in text
        assert len(text) < 1000


def test_a_parameter_with_an_honest_meaning_has_it(site: Site) -> None:
    honest: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"scheduler": "DDIMScheduler"}, {"sampler": "ddim"}),
        ({"num_images_per_prompt": 3}, {"n": 3}),
        ({"target_size": {"width": 6, "height": 4}}, {}),
        ({"negative_prompt": ""}, {}),
        ({"sampler": "ddim", "eta": 0.5, "index": 3}, {"sampler": "ddim", "eta": 0.5, "index": 3}),
        ({"guidance_scale": 2, "guidance_interval": [5, 900]}, {"guidance": 2, "guidance_interval": [5, 900]}),
    ]
    for given, meant in honest:
        answer = ask(site, "dog", **given)
        assert answer.status_code == 200, answer.text
        assert answer.content == site.post(json=SPEC | {"class_label": "dog"} | meant).content


def test_a_picture_and_a_prompt_make_the_edit_of_post_sample(site: Site) -> None:
    answer = ask(site, b64(CAT), prompt="dog", strength=0.5)
    wanted = site.post(json=SPEC | {"image": b64(CAT), "class_label": "dog", "strength": 0.5})
    assert answer.status_code == 200, answer.text
    assert (answer.content, answer.headers["etag"]) == (wanted.content, wanted.headers["etag"])
    without = ask(site, b64(CAT), strength=0.5)
    assert without.content == site.post(json=SPEC | {"image": b64(CAT), "strength": 0.5}).content
    answer = site.client.post("/", content=CAT, headers={"Content-Type": "image/png"})
    assert "a picture is its inputs, beside prompt and strength" in refused(answer, 400, "malformed_body")


def test_an_unknown_member_and_a_body_that_is_no_request_are_refused(site: Site) -> None:
    refused(site.client.post("/", json={"inputs": "dog", "lora": 1}), 400, "unknown_field", "lora")
    refused(site.client.post("/?steps=4", json={"inputs": "dog"}), 400, "unknown_field", "steps")
    for body, code in (
        (b"", "invalid_field"),
        (b'{"inputs": "dog", "inputs": "cat"}', "conflicting_field"),
        (b'{"inputs": "dog", "parameters": null}', "invalid_field"),
        (b'{"inputs": ' + b"[" * 2000 + b"]" * 2000 + b"}", "malformed_body"),
    ):
        answer = site.client.post("/", content=body)
        assert (answer.status_code, answer.json()["code"]) == (400, code)


@pytest.mark.parametrize("parameters", [{}, {"parameters": {"seed": 7}}])
def test_a_default_that_is_refused_has_our_name(make_site: MakeSite, parameters: dict[str, Any]) -> None:
    """A student whose one table is for guidance refuses the guidance 1 of images without a class."""
    student = {"samplers": ("tuned",), "default_sampler": "tuned", "recommended": Recommended("tuned", 1, 1.5)}
    site = make_site(info=replace(TUNED, tables=(table(1, 1.5),), **student))
    assert site.client.post("/", json={"inputs": "dog"} | parameters).headers["x-guidance"] == "1.5"
    refused(site.client.post("/", json={"inputs": ""} | parameters), 400, "invalid_field", "guidance")


def test_each_model_has_it_at_its_address_with_and_without_a_slash(make_site: MakeSite) -> None:
    several: Several = make_several(make_site)
    wanted = several.post("/models/colour/sample", json=SPEC | {"class_label": 0}).content
    assert pixels(wanted).ndim == 3
    for path in ("/models/colour", "/models/colour/"):
        assert ask(several.site, "0", path).content == wanted
    assert (
        ask(several.site, "cat", "/models/fake").content
        == several.post("/sample", json=SPEC | {"class_label": 0}).content
    )
    for path in ("/models/nobody", "/models/nobody/"):
        refused(ask(several.site, "cat", path), 404, "model_not_found", "model")


@pytest.mark.parametrize("path", ["/", "/models/fake"])
def test_the_page_is_for_anybody_but_a_prompt_needs_a_key(make_site: MakeSite, path: str) -> None:
    site = make_site(app={"access": access_of(key_line("ann", "tm_ann"))})
    before = len(site.engine.batches)
    refused(ask(site, "dog", path), 401, "unauthorized")
    assert len(site.engine.batches) == before
    body = {"inputs": "dog", "parameters": SPEC}
    assert site.client.post(path, json=body, headers=bearer("tm_ann")).status_code == 200
    assert site.client.get("/").status_code == 200
