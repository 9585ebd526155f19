"""Hugging Face's own client against the real server."""

import io
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from tests.e2e.conftest import RunningServer
from tests.service.client.conftest import Served
from tests.service.conftest import INSTANT
from tests.service.fakes import INFO, LIMITS
from tests.service.keys import access_of, key_line

SPEC = {"steps": 20, "guidance": 1.5, "seed": 7, "class_label": "ankle-boot"}
THEIRS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 1.5, "seed": 7, "width": 32, "height": 32}


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")


def same(made: Image.Image, server: RunningServer) -> bool:
    """Whether the pixels are those of POST /sample, and so is what the file says of itself."""
    with Image.open(io.BytesIO(server.post(json=SPEC).content)) as wanted:
        return (made.format, made.info, made.tobytes()) == (wanted.format, wanted.info, wanted.tobytes())


@pytest.mark.parametrize("place", ["", "/models/small/"])
def test_a_prompt_becomes_the_image_of_post_sample(server: RunningServer, place: str) -> None:
    client = InferenceClient(model=server.url + place)
    assert same(client.text_to_image("ankle boot", **THEIRS), server)
    assert same(client.text_to_image("9", **THEIRS), server)


def test_a_picture_and_a_prompt_become_the_edit_of_post_sample(server: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "bag.png"
    file.write_bytes(server.post(json={"steps": 2, "seed": 3, "class_label": "bag"}).content)
    edit = {"num_inference_steps": 20, "guidance_scale": 1.5, "seed": 7, "strength": 0.6}
    made = InferenceClient(model=server.url).image_to_image(file, "ankle boot", **edit)
    wanted = server.post(data={"strength": 0.6, **SPEC}, files={"image": file.read_bytes()})
    with Image.open(io.BytesIO(wanted.content)) as image:
        assert (made.info, made.tobytes()) == (image.info, image.tobytes())
    with pytest.raises(HfHubHTTPError) as caught:
        InferenceClient(model=server.url).image_to_image(file, "ankle boot")
    assert "strength must be given with an image" in str(caught.value)
    with pytest.raises(HfHubHTTPError) as caught:
        InferenceClient(model=server.url).image_to_image(file)
    assert "a picture is its inputs, beside prompt and strength" in str(caught.value)


def test_a_scheduler_and_parameters_of_ours_pass_through(server: RunningServer) -> None:
    made = InferenceClient(model=server.url).text_to_image(
        "bag",
        num_inference_steps=10,
        seed=3,
        scheduler="DDIMScheduler",
        extra_body={"eta": 0.5, "num_images_per_prompt": 4},
    )
    wanted = server.post(json={"steps": 10, "seed": 3, "sampler": "ddim", "eta": 0.5, "n": 4, "class_label": "bag"})
    with Image.open(io.BytesIO(wanted.content)) as image:
        assert made.tobytes() == image.tobytes()


def test_a_key_of_the_server_is_the_client_s_token() -> None:
    access = access_of(key_line("ann", "tm_the-key-of-ann"))
    with Served(INFO, LIMITS, INSTANT, access=access).running() as served:
        with pytest.raises(HfHubHTTPError, match="send one: Authorization: Bearer KEY"):
            InferenceClient(model=served.url).text_to_image("dog", num_inference_steps=2)
        made = InferenceClient(model=served.url, token="tm_the-key-of-ann").text_to_image("dog", num_inference_steps=2)
    assert made.size == (INFO.width_px, INFO.height_px)
