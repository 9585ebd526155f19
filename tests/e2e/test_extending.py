"""docs/extending.md: its blocks, applied to a copy of the package, whose commands and server have what they add."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from tests.documents import ROOT, code_blocks
from tests.e2e.conftest import pixels
from tminus.model.checkpoint import load_checkpoint
from tminus.model.pixels import to_uint8
from tminus.model.rng import image_noise

NET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
FACTS = ("--image-size", "16", "--head-width", "8", "--timesteps", "1000", "--beta-schedule", "linear",
         "--prediction", "sample", "--variance", "fixed_small")  # fmt: skip
STEPS = 6


def apply(folder: Path) -> None:
    """Apply the blocks of the page to the files in a folder."""
    for block in code_blocks("docs/extending.md", "python"):
        name = block.partition("\n")[0].removeprefix("# ")
        assert not (folder / name).exists(), name
        (folder / name).write_text(block.partition("\n")[2], "utf-8")
    for block in code_blocks("docs/extending.md", "diff"):
        for change in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
            name, *hunks = change.split("@@\n")
            file = folder / name.strip()
            for hunk in hunks:
                before, after = ("".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in signs)
                                 for signs in (" -", " +"))  # fmt: skip
                text = file.read_text("utf-8")
                assert text.count(before) == 1, f"{file.name} has not this once:\n{before}"
                file.write_text(text.replace(before, after), "utf-8")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with what the page adds."""
    folder = tmp_path_factory.mktemp("package")
    for part in ("tminus", "model", "service", "docs/site", "docs/reference"):
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    apply(folder)
    return folder


def run(package: Path, *words: str, **env: str) -> str:
    """Run Python on the copy; what it printed."""
    env = os.environ | {"PYTHONPATH": str(package)} | env
    done = subprocess.run(
        [sys.executable, *words], cwd=package, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**NET).eval()


@pytest.fixture(scope="module")
def checkpoint(package: Path, unet: UNet2DModel) -> Path:
    """The file of the format, converted."""
    torch.save(unet.state_dict(), package / "unet.pt")
    run(package, "-m", "tminus", "convert", "unet.pt", "converted", *FACTS)
    return package / "converted"


@contextlib.contextmanager
def serving(package: Path, checkpoint: Path, *flags: str, **env: str) -> Iterator[httpx.Client]:
    words = [sys.executable, "-m", "tminus", "serve", "--checkpoint", str(checkpoint), "--port", "0", *flags]
    env = os.environ | {"PYTHONPATH": str(package), "TMINUS_STATE_DIR": ":memory:", "TMINUS_EXECUTOR": "eager"} | env
    with subprocess.Popen(words, cwd=package, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            log = []
            for line in process.stderr:
                log.append(line)
                if found := re.search(r"ready: open (http://\S+) in", line):
                    break
            else:
                raise AssertionError("".join(log))
            with httpx.Client(base_url=found[1], timeout=60) as client:
                yield client
        finally:
            process.terminate()


def test_the_format_is_read_and_its_network_is_that_of_the_file(checkpoint: Path, unet: UNet2DModel) -> None:
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    with torch.inference_mode():
        ours, theirs = load_checkpoint(checkpoint).net(x, t, None), unet(x, t).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert UNet2DModel.from_pretrained(checkpoint, subfolder="unet").config["attention_head_dim"] == 8


def by_quadrature(checkpoint: Path, unet: UNet2DModel) -> Tensor:
    """x_0 of seed 5, by x' = s'/s x + s' times the integral of e^lambda x_0, where x_0 is a line in lambda."""
    loaded, x, past = load_checkpoint(checkpoint), image_noise(5, [0], 0, (3, 16, 16), torch.device("cpu")), None
    timesteps = [*map(int, loaded.plan("dpmpp_2m", STEPS).timesteps)]
    alpha_bar = loaded.noise.schedule().alpha_bar[timesteps]
    lambdas, sigmas = ((alpha_bar / (1 - alpha_bar)).log() / 2).tolist(), (1 - alpha_bar).sqrt().tolist()
    for k, t in enumerate(timesteps):
        with torch.inference_mode():
            x_0 = unet(x.float(), torch.tensor([t])).sample.double().clamp(-1, 1)
        if k + 1 < STEPS:
            length = (lambdas[k + 1] - lambdas[k]) / 10_000
            middles = (torch.arange(10_000, dtype=torch.float64) + 0.5) * length
            weights = (lambdas[k] + middles).exp() * length
            slope = 0 if past is None else (x_0 - past) / (lambdas[k] - lambdas[k - 1])
            integral = x_0 * weights.sum() + slope * (weights * middles).sum()
            x, past = sigmas[k + 1] / sigmas[k] * x + sigmas[k + 1] * integral, x_0
    return x_0


def test_the_sampler_is_served_and_makes_what_its_formula_says_and_the_setting_holds(
    package: Path, checkpoint: Path, unet: UNet2DModel
) -> None:
    asked = {"steps": STEPS, "seed": 5}
    with serving(package, checkpoint, "--no-docs") as client:
        assert "res_2m" in client.get("/model").json()["samplers"]
        assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404
        answer, other = (client.post("/sample", json=asked | {"sampler": name}) for name in ("res_2m", "dpmpp_2m"))
        assert answer.headers["x-sampler"] == "res_2m"
        assert "res_2m" in client.post("/sample", json={"sampler": "res_3m"}).json()["bound"]
    expected = to_uint8(by_quadrature(checkpoint, unet))[0].permute(1, 2, 0).int().numpy()
    assert abs(pixels(answer.content) - expected).max() <= 1
    assert abs(pixels(other.content) - expected).max() > 1


def test_the_setting_is_a_flag_a_variable_and_in_the_reference(package: Path) -> None:
    assert "--no-docs" in run(package, "-m", "tminus", "serve", "--help")
    told = json.loads(run(package, "-m", "tminus", "config", "--json", TMINUS_DOCS="no"))
    assert told["settings"]["docs"]["value"] is False
    assert "`TMINUS_DOCS`" in run(package, "-c", "from docs.site import reference; print(*reference.settings())")


def test_a_job_of_the_sampler_is_left_to_servers_that_have_it(package: Path) -> None:
    code = """
from types import SimpleNamespace as S
from tminus.service.jobs.store.postgres_store import JOB_FORMAT, format_of
jobs = [S(webhook=None, spec=S(sampler=name, bit_depth=None, to_seed=None)) for name in ("res_2m", "ddim")]
print(JOB_FORMAT, *map(format_of, jobs))
"""
    assert run(package, "-c", code) == "5 5 1\n"
