"""OpenAI's own libraries and LiteLLM against the real server, and the examples of docs/openai.md, word for word."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

from tests.e2e.conftest import ROOT, RunningServer, SlowDown
from tests.service.keys import bearer, key_line
from tests.tools import needs

NODE = ROOT / "tests" / "e2e" / "node"
# Where `make test` installs OpenAI's library for Node.js.
PACKAGES = Path(sys.prefix) / "node_modules"
SNEAKER: dict[str, Any] = {"seed": 7, "steps": 10}
SAME: dict[str, Any] = SNEAKER | {"class_label": "sneaker", "sampler": "dpmpp_2m", "guidance": 1.5}
EXAMPLES = re.findall(
    r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / "openai.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
)


def png_of(text: str | None) -> bytes:
    assert text is not None
    return base64.b64decode(text)


def encode(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def grey(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("L"))


def alone(server: RunningServer, **parameters: Any) -> bytes:
    answer = server.post(json=SAME | parameters)
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def pictures(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """An image, a mask of OpenAI's, whose upper half is transparent, and the same as one of ours."""
    folder = tmp_path_factory.mktemp("pictures")
    upper = np.repeat(np.arange(32)[:, None] < 16, 32, axis=1)
    (folder / "image.png").write_bytes(alone(server))
    grey = np.full((32, 32, 3), 90, np.uint8)
    (folder / "mask.png").write_bytes(encode(np.dstack([grey, np.where(upper, 0, 255).astype(np.uint8)])))
    return folder / "image.png", folder / "mask.png", encode(np.where(upper, 255, 0).astype(np.uint8))


def edited(server: RunningServer, pictures: tuple[Path, Path, bytes], **parameters: Any) -> bytes:
    image, _, white = pictures
    texts = {
        name: [str(each) for each in value] if isinstance(value, list) else str(value)
        for name, value in (SAME | parameters).items()
    }
    answer = server.post(data=texts, files={"image": image.read_bytes(), "mask": white})
    assert answer.status_code == 200, answer.text
    return answer.content


# --- openai for Python ---


def test_the_images_are_those_of_post_sample(server: RunningServer, client: OpenAI) -> None:
    answer = client.images.generate(prompt="Sneaker", n=2, size="32x32", extra_body=SNEAKER)
    assert answer.data is not None
    assert [png_of(each.b64_json) for each in answer.data] == [alone(server), alone(server, index=1)]
    assert [each.revised_prompt for each in answer.data] == ["sneaker"] * 2
    assert answer.usage is not None
    assert answer.usage.total_tokens == 0
    second: Any = answer.data[1]
    assert (second.seed, second.index, second.steps, second.sampler, second.guidance) == (7, 1, 10, "dpmpp_2m", 1.5)
    asked = {name: getattr(second, name) for name in ("seed", "index", "steps", "sampler", "guidance", "class_label")}
    assert server.post(json=asked).content == png_of(second.b64_json), "what is echoed makes it again"


def test_a_stream_as_in_the_librarys_readme(server: RunningServer, client: OpenAI) -> None:
    stream = client.images.generate(prompt="sneaker", stream=True, partial_images=3, extra_body=SNEAKER)
    seen, final = [], b""
    for event in stream:
        if event.type == "image_generation.partial_image":
            picture = Image.open(io.BytesIO(png_of(event.b64_json)))
            seen.append((event.partial_image_index, picture.size, event.size, event.background))
        elif event.type == "image_generation.completed":
            final = png_of(event.b64_json)
            assert event.usage.input_tokens_details.text_tokens == 0
    assert seen == [(k, (32, 32), "32x32", "opaque") for k in range(3)]
    assert final == alone(server)


def test_what_is_shown_on_the_way_is_the_estimate_of_x_0(server: RunningServer, client: OpenAI) -> None:
    members: dict[str, Any] = {"seed": 7, "steps": 8}
    stream = client.images.generate(prompt="sneaker", stream=True, partial_images=3, extra_body=members)
    shown = [grey(png_of(event.b64_json)) for event in stream]
    animated = server.post(json=SAME | members | {"every": 2, "show": "x_0"}, headers={"Accept": "image/webp"})
    with Image.open(io.BytesIO(animated.content)) as image:
        for number, expected in enumerate(shown):
            image.seek(number)
            np.testing.assert_array_equal(np.asarray(image.convert("L")), expected)
        assert image.n_frames == 4  # type: ignore[attr-defined]


def test_an_edit_is_that_of_post_sample(
    server: RunningServer, client: OpenAI, pictures: tuple[Path, Path, bytes]
) -> None:
    image, mask, _ = pictures
    extra = SNEAKER | {"guidance": 2, "guidance_interval": [100, 900]}
    with image.open("rb") as opened, mask.open("rb") as transparent:
        answer = client.images.edit(image=opened, mask=transparent, prompt="sneaker", extra_body=extra)
    assert answer.data is not None
    assert png_of(answer.data[0].b64_json) == edited(server, pictures, guidance=2, guidance_interval=[100, 900])
    with image.open("rb") as opened:
        stream = client.images.edit(
            image=[opened], prompt="", stream=True, partial_images=2, extra_body=SNEAKER | {"strength": 0.5}
        )
        assert [event.type for event in stream] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


def test_errors_are_the_librarys_own(client: OpenAI, server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="a red shoe")
    assert (bad.value.code, bad.value.param, bad.value.type) == ("invalid_field", "prompt", "invalid_request_error")
    assert "0..9 or t-shirt, trouser" in bad.value.message
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError) as many:
        client.images.generate(prompt="bag", n=11)
    assert many.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="bag", model="gpt-image-1")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")
    with pytest.raises(openai.BadRequestError):
        next(iter(client.images.generate(prompt="bag", stream=True, size="1024x1024")))


def test_a_client_that_leaves_a_stream_frees_its_rows(
    client: OpenAI, server: RunningServer, slow_down: SlowDown
) -> None:
    slow: dict[str, Any] = {"steps": 1000, "sampler": "ddpm"}
    gone = server.metric("tminus_cancelled_total")
    slow_down(server, between_ticks_s=0.02)
    with client.images.generate(prompt="bag", n=2, stream=True, partial_images=3, extra_body=slow) as stream:
        assert next(iter(stream)).type == "image_generation.partial_image"
    server.wait_until(lambda: server.metric("tminus_cancelled_total") == gone + 1)
    server.wait_until(lambda: server.metric("tminus_rows_active") == 0)


def test_a_key_is_asked_for_and_its_quota_waited_for(own_server: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(key_line("ann", "tm_ann", row_steps_per_minute=600) + "\n")
    server = own_server("--keys-file", str(keys))
    url = f"{server.url}/v1"
    with pytest.raises(openai.AuthenticationError), OpenAI(base_url=url, api_key="none") as stranger:
        stranger.models.list()
    with server.client(headers=bearer("tm_ann")) as http, OpenAI(base_url=url, api_key="tm_ann") as client:
        assert [model.id for model in client.models.list()] == ["small"]
        assert http.post("/jobs", json={"n": 10, "steps": 60}).status_code == 202  # all of the quota
        answer = client.images.generate(prompt="bag", extra_body={"steps": 10, "guidance": 1})
        assert answer.data is not None
        assert 'tminus_rejected_total{reason="quota_exceeded"}' in http.get("/metrics").text


# --- others ---


def node(*arguments: str, folder: Path) -> str:
    """Run a module of a folder, which gets a link to OpenAI's library; or skip."""
    needs("npm")
    assert (PACKAGES / "openai").is_dir(), "npm came after .venv: rm .venv/.installed-test, and `make test` installs it"
    link = folder / "node_modules"
    if not link.exists():
        link.symlink_to(PACKAGES)
    done = subprocess.run(["node", *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_openais_library_for_javascript(
    server: RunningServer, pictures: tuple[Path, Path, bytes], tmp_path: Path, slow_down: SlowDown
) -> None:
    image, mask, _ = pictures
    shutil.copy(NODE / "openai.mjs", tmp_path)
    gone = server.metric("tminus_cancelled_total")
    slow_down(server, between_ticks_s=0.02)
    said = json.loads(node("openai.mjs", f"{server.url}/v1", str(image), str(mask), folder=tmp_path))
    assert [png_of(each) for each in said["images"]] == [alone(server), alone(server, index=1)]
    assert said["indices"] == [0, 1]
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert said["events"] == [[partial, 0], [partial, 1], [completed, None]]
    assert png_of(said["streamed"]) == alone(server)
    assert png_of(said["edited"]) == edited(server, pictures, guidance=2, guidance_interval=[100, 900])
    assert (said["models"], said["model"]) == (["small"], "tminus")
    assert said["refusals"] == [
        ["BadRequestError", 400, "invalid_field", "prompt", True],
        ["NotFoundError", 404, "model_not_found", "model", True],
    ]
    assert said["stopped"] == partial
    server.wait_until(lambda: server.metric("tminus_cancelled_total") == gone + 1)


LITELLM = """
import json, sys
import litellm
made = litellm.image_generation(
    prompt="sneaker", n=2, size="32x32", model="openai/small", api_base=sys.argv[1], api_key="none",
    extra_body={"seed": 7, "steps": 10},
)
try:
    litellm.image_generation(prompt="a red shoe", model="openai/small", api_base=sys.argv[1], api_key="none")
except litellm.BadRequestError as error:
    refusal = str(error)
print(json.dumps({"images": [each["b64_json"] for each in made.data], "refusal": refusal}))
"""


def test_litellm(server: RunningServer) -> None:
    # It asks for the prices of models in the internet, unless it is told not to.
    env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    command = [sys.executable, "-c", LITELLM, f"{server.url}/v1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    said = json.loads(done.stdout.splitlines()[-1])
    assert [png_of(each) for each in said["images"]] == [alone(server), alone(server, index=1)]
    assert "0..9 or t-shirt" in said["refusal"]


# --- the page ---


def run_example(server: RunningServer, number: int, folder: Path) -> str:
    kind, code = EXAMPLES[number]
    code = code.replace("http://localhost:8000", server.url).replace("localhost:8000", server.url)
    if kind == "js":
        (folder / "example.mjs").write_text(code)
        return node("example.mjs", folder=folder)
    if kind == "sh":
        needs("curl")
    command = ["bash", "-euo", "pipefail", "-c"] if kind == "sh" else [sys.executable, "-c"]
    done = subprocess.run([*command, code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_examples_of_the_page_run(server: RunningServer, tmp_path: Path) -> None:
    assert [kind for kind, _ in EXAMPLES if kind != "json"] == ["python", "python", "js", "sh"]
    said = run_example(server, 0, tmp_path)
    assert said.splitlines()[2] == "sneaker dpmpp_2m 20 1.5 7 2"
    assert (tmp_path / "sneaker-2.png").read_bytes() == alone(server, steps=20, index=2)
    said = run_example(server, 1, tmp_path)
    assert said.split() == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert (tmp_path / "bag.png").read_bytes() == alone(server, steps=20, class_label="bag")
    assert sorted(each.name for each in tmp_path.glob("bag-*.png")) == ["bag-0.png", "bag-1.png", "bag-2.png"]
    (tmp_path / "sneaker.png").write_bytes(alone(server))
    answer = json.loads(run_example(server, 3, tmp_path))
    assert answer["data"][0]["revised_prompt"] == "ankle-boot"


def test_the_example_in_javascript_runs(server: RunningServer, tmp_path: Path) -> None:
    assert run_example(server, 2, tmp_path).splitlines() == ["ankle-boot 10"] * 2
    made = [(tmp_path / f"boot-{k}.png").read_bytes() for k in range(2)]
    assert made == [alone(server, class_label="ankle-boot", index=k) for k in range(2)]
