"""Checkpoints as people published them: each is served as diffusers samples it, or refused by the field that is why.

The configs lie in published/, each with its source. There is no model hub here, so the weights are random, and the
networks are narrowed to what a test can run: widths and sizes are smaller, all else is as it was published.
"""

import json
import logging
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DModel, VQModel
from torch import Tensor

from tests.model.formats.conftest import randomised
from tests.model.loops import loop_of_diffusers, noise_of, to_theirs
from tminus.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tminus.model.files import CheckpointError
from tminus.model.formats.conversion import GivenFacts
from tminus.model.formats.describe import describe
from tminus.model.samplers import sample

ROWS = {
    file.stem: json.loads(file.read_text("utf-8")) for file in sorted((Path(__file__).parent / "published").iterdir())
}
SERVED = [name for name, row in ROWS.items() if "serves" in row]
REFUSED = [name for name, row in ROWS.items() if "refuses" in row]
STEPS = 6


def narrowed(config: dict[str, Any]) -> dict[str, Any]:
    """The network with its narrowest width 32, at twice the smallest size that it takes."""
    widths = config["block_out_channels"]
    size = 2 ** len(widths)
    if config["attention_head_dim"] is not None:
        config = config | {"attention_head_dim": min(32, config["attention_head_dim"])}
    narrow = {"block_out_channels": [32 * round(width / min(widths)) for width in widths], "layers_per_block": 1}
    sides = [size, size] if isinstance(config["sample_size"], list) else size
    return config | narrow | {"sample_size": sides}


def write(folder: Path, name: str) -> UNet2DModel | None:
    """Write the folder of a row; returns the network as diffusers has it."""
    row, net = ROWS[name], None
    folder.joinpath("model_index.json").write_text(json.dumps(row["model_index"]))
    for part, file in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        (folder / part).mkdir()
        config = row[part] or {}
        if config.get("_class_name") == "UNet2DModel":
            config = narrowed(config)
            net = randomised(UNet2DModel.from_config(config))
            net.save_pretrained(folder / part)
        (folder / part / file).write_text(json.dumps(config))
    if "vqvae" in row:
        config = row["vqvae"] | {"block_out_channels": [32, 32, 64], "num_vq_embeddings": 64, "sample_size": 64}
        VQModel.from_config(config).save_pretrained(folder / "vqvae")
    return net


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_it_is_sampled_as_by_its_own_scheduler(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row, net = ROWS[name], write(tmp_path, name)
    assert net is not None
    with caplog.at_level(logging.INFO):
        checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.default_sampler == row["serves"]
    assert row.get("log", "") in caplog.text
    shape = (1, *checkpoint.row_shape)
    labels = torch.tensor([3]) if "num_class_embeds" in row["unet"] else None
    plan = checkpoint.plan(checkpoint.default_sampler, STEPS)
    got = sample(checkpoint.net, plan, noise_of(shape, 0), lambda k: noise_of(shape, 1 + k), class_labels=labels)
    x = to_theirs(checkpoint.noise, noise_of(shape, 0), plan)
    if name.startswith("cm_edm"):  # no release of diffusers has its scheduler
        theirs = karras_edm(checkpoint, net, x, labels)
    else:
        scheduler = getattr(diffusers, row["scheduler"]["_class_name"]).from_pretrained(tmp_path / "scheduler")
        theirs = loop_of_diffusers(net, scheduler, x, STEPS, monkeypatch, labels)
    if checkpoint.noise.prediction_type == "score":
        theirs = 2 * theirs - 1
    # 1e-4 of what a picture shows; without a clip a random network's values go to hundreds.
    torch.testing.assert_close(got, theirs, rtol=1e-6, atol=1e-4)
    assert got.std() > 0.05


def karras_edm(checkpoint: Checkpoint, net: UNet2DModel, x: Tensor, labels: Tensor | None) -> Tensor:
    """Karras et al. 2022, algorithm 1, with table 1's preconditioning and the time of OpenAI's networks."""
    ramp = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), STEPS, dtype=torch.float64) ** 7
    sigmas = [*ramp.tolist(), 0.0]
    assert checkpoint.noise.precondition_type == "cm_edm"

    def denoised(x: Tensor, sigma: float) -> Tensor:
        root = (sigma**2 + 0.25) ** 0.5
        out = net(x.float() / root, torch.tensor([250.0 * torch.tensor(sigma).log()]), labels).sample
        return 0.25 / root**2 * x + sigma * 0.5 / root * out.double()

    x = x.double()
    for now, then in pairwise(sigmas):
        slope = (x - denoised(x, now)) / now
        end = x + (then - now) * slope
        if then > 0:
            end = x + (then - now) * (slope + (end - denoised(end, then)) / then) / 2
        x = end
    return x.float()


@pytest.mark.parametrize(
    ("name", "noise", "predicts"),
    [
        (
            "edm-euler-exponential-v",
            "1000 levels, exponential, sigma 0.002 to 80",
            "x_0 by EDM's preconditioning, with the",
        ),
        (
            "cm_edm_imagenet64_ema",
            "40 levels, karras, sigma 0.002 to 80",
            "x_0 by EDM's preconditioning; sigma_data 0.5",
        ),
        ("flow", "1000 levels, flow, shift 3", "eps - x_0 (flow matching); x_0 is not clipped"),
        ("score-sde-ve", "2000 levels, geometric, sigma 0.01 to 3", "the score, of images in [0, 1] (VE)"),
    ],
)
def test_inspect_says_what_it_is(name: str, noise: str, predicts: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    lines = dict(describe(tmp_path, GivenFacts()).lines)
    assert lines["format"] == "a folder of diffusers"
    assert lines["noise"] == noise
    assert lines["predicts"].startswith(predicts)


def test_latents_of_a_ve_model_are_refused_as_their_range_is_not_known(tmp_path: Path) -> None:
    write(tmp_path, "ldm-celebahq-256")
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(ROWS["score-sde-ve"]["scheduler"]))
    with pytest.raises(CheckpointError, match="ScoreSdeVeScheduler is served with a UNet2DModel of pixels alone"):
        load_checkpoint(tmp_path)


@torch.no_grad()
def test_a_flat_folder_is_the_nested_one(tmp_path: Path) -> None:
    nested, flat = tmp_path / "nested", tmp_path / "flat"
    nested.mkdir()
    flat.mkdir()
    write(nested, "audio-diffusion-256")
    for file in nested.rglob("*.*"):
        shutil.copy(file, flat / file.name)
    one, other = load_checkpoint(nested), load_checkpoint(flat)
    assert (one.noise, one.weights_hash, one.image_shape) == (other.noise, other.weights_hash, other.image_shape)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_the_field_that_is_why(name: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert ROWS[name]["refuses"] in str(caught.value)


@pytest.mark.parametrize("name", SERVED)
def test_what_is_written_is_the_same_model_to_diffusers_and_to_tminus(name: str, tmp_path: Path) -> None:
    read, written = tmp_path / "read", tmp_path / "written"
    read.mkdir()
    write(read, name)
    checkpoint = load_checkpoint(read)
    net, noise = checkpoint.net, checkpoint.noise
    save_checkpoint(
        written, net.state_dict(), net.config, noise, checkpoint.labels, {}, autoencoder=checkpoint.autoencoder
    )
    again = load_checkpoint(written)
    assert (again.noise, again.net.config, again.weights_hash) == (noise, net.config, checkpoint.weights_hash)
    nets = [UNet2DModel.from_config(UNet2DModel.load_config(folder / "unet")).config for folder in (read, written)]
    first, second = ({key: value for key, value in each.items() if not key.startswith("_")} for each in nets)
    assert first == second
    scheduler = noise.to_dict()
    class_name = scheduler["_class_name"]
    assert class_name == ROWS[name]["scheduler"]["_class_name"]
    if hasattr(diffusers, class_name):
        before, after = (
            getattr(diffusers, class_name).from_config(each) for each in (ROWS[name]["scheduler"], scheduler)
        )
        ours = {key: value for key, value in after.config.items() if not key.startswith("_") and key in scheduler}
        theirs = {key: before.config.get(key, value) for key, value in ours.items()}
        assert ours | {"clip_sample": None} == theirs | {"clip_sample": None}
