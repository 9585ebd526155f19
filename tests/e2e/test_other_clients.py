"""docs/other-clients.md, word for word, on the bundled checkpoint."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import ROOT, RunningServer
from tests.tools import needs

BOOT = {"steps": 20, "guidance": 1.5, "seed": 7, "class_label": "ankle-boot"}
EXAMPLES = re.findall(
    r"^```(python|sh)\n(.*?)^```$", (ROOT / "docs" / "other-clients.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
)
HUGGING_FACE, HUGGING_FACE_CURL, HUGGING_FACE_EDIT, KSERVE, KSERVE_CURL = range(5)


def run(server: RunningServer, folder: Path, *examples: int) -> None:
    """Run examples of one kind as one program."""
    kind, code = EXAMPLES[examples[0]][0], "".join(EXAMPLES[example][1] for example in examples)
    code = code.replace("http://localhost:8000", server.url).replace(
        "localhost:8000", server.url.removeprefix("http://")
    )
    if kind == "sh":
        needs("curl")
    command = ["bash", "-euo", "pipefail", "-c", code] if kind == "sh" else [sys.executable, "-c", code]
    environment = os.environ | {"HF_TOKEN": ""}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("example", [HUGGING_FACE, HUGGING_FACE_CURL])
def test_a_prompt_becomes_a_boot(bundled_server: RunningServer, tmp_path: Path, example: int) -> None:
    run(bundled_server, tmp_path, example)
    wanted = bundled_server.post(json=BOOT).content
    made = (tmp_path / "boot.png").read_bytes()
    np.testing.assert_array_equal(pixels(made), pixels(wanted))
    assert made == wanted or example == HUGGING_FACE  # whose Pillow writes the file


def test_a_boot_becomes_a_sneaker(bundled_server: RunningServer, tmp_path: Path) -> None:
    run(bundled_server, tmp_path, HUGGING_FACE, HUGGING_FACE_EDIT)
    picture = base64.b64encode((tmp_path / "boot.png").read_bytes()).decode()
    asked = {"steps": 20, "strength": 0.6, "seed": 11, "class_label": "sneaker", "image": picture}
    wanted = bundled_server.post(json=asked).content
    np.testing.assert_array_equal(pixels((tmp_path / "sneaker.png").read_bytes()), pixels(wanted))


def test_tensors_become_a_boot(bundled_server: RunningServer, tmp_path: Path) -> None:
    run(bundled_server, tmp_path, KSERVE)
    wanted = bundled_server.post(json=BOOT | {"sampler": "dpmpp_2m", "index": 1}).content
    np.testing.assert_array_equal(pixels((tmp_path / "boot.png").read_bytes()), pixels(wanted))


def test_curl_gets_numbers(bundled_server: RunningServer, tmp_path: Path) -> None:
    run(bundled_server, tmp_path, KSERVE_CURL)
    (images,) = json.loads((tmp_path / "answer.json").read_text())["outputs"]
    assert images["shape"] == [2, 32, 32, 1]
    assert len(images["data"]) == 2 * 32 * 32
    assert max(images["data"]) > 200
