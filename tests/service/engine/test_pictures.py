"""What the engine gives of finished rows: of any number of channels, as whole numbers of 8 or 16 bits or as floats."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from tests.model.latent.folders import save_latent_pipeline
from tests.service.conftest import MakeCheckpoint
from tests.service.engine.edits import edit
from tests.service.engine.engines import CPU, alone, make_engine, spec_of
from tests.tiny import TINY, randomize
from tminus.model.checkpoint import load_checkpoint
from tminus.model.pixels import to_model_range, to_uint8
from tminus.model.rng import image_noise
from tminus.service.engine.protocol import sample_locally
from tminus.service.spec import Inputs

PIPELINES = {
    "ddim": (DDIMPipeline, DDIMScheduler, "diffusers.pipelines.ddim.pipeline_ddim"),
    "ddpm": (DDPMPipeline, DDPMScheduler, "diffusers.pipelines.ddpm.pipeline_ddpm"),
}


def our_noise(seed: int, n: int) -> Callable[..., torch.Tensor]:
    """A stand-in for diffusers' randn_tensor: x_T, then the z of each step, as tminus draws them."""
    draws: Iterator[int] = iter(range(1000))

    def draw(shape: Any, **_given: Any) -> torch.Tensor:
        return image_noise(seed, range(n), next(draws), tuple(shape)[1:], CPU)

    return draw


@pytest.mark.parametrize("sampler", PIPELINES)
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_the_floats_are_those_of_diffusers_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, sampler: str
) -> None:
    pipeline_kind, scheduler_kind, module = PIPELINES[sampler]
    config = {name: getattr(TINY, name) for name in ("sample_size", "block_out_channels", "layers_per_block")}
    blocks = {"down_block_types": TINY.down_block_types, "up_block_types": TINY.up_block_types, "norm_num_groups": 4}
    net = UNet2DModel(in_channels=channels, out_channels=channels, **config, **blocks)
    randomize(net)
    scheduler = scheduler_kind(num_train_timesteps=20, beta_end=0.3, clip_sample=False)
    pipeline = pipeline_kind(net, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    noise = our_noise(3, 2)
    for name in (module, "diffusers.schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"{name}.randn_tensor", noise)
    wanted = pipeline(batch_size=2, num_inference_steps=5, output_type="np").images  # in [0, 1], clipped
    checkpoint = load_checkpoint(tmp_path)
    spec = spec_of(n=2, steps=5, seed=3, sampler=sampler, clip=False, class_labels=None, bit_depth=32)
    floats = alone(checkpoint, spec)
    assert (floats.shape, floats.dtype) == ((2, 8, 8, channels), np.float32)
    assert np.abs(floats).max() > 1, "not clipped"
    np.testing.assert_allclose((floats / 2 + 0.5).clip(0, 1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_whole_numbers_are_the_floats_rounded(make_checkpoint: MakeCheckpoint, channels: int) -> None:
    checkpoint = make_checkpoint(in_channels=channels, out_channels=channels)
    given = {"n": 3, "steps": 6, "class_labels": (0, 1, 2)}
    eight, sixteen, floats = (alone(checkpoint, spec_of(**given, bit_depth=each)) for each in (None, 16, 32))
    exact = (floats.clip(-1, 1).astype(np.float64) + 1) / 2
    assert (eight.dtype, sixteen.dtype) == (np.uint8, np.uint16)
    np.testing.assert_array_equal(eight, to_uint8(torch.from_numpy(floats)).numpy())
    np.testing.assert_array_equal(sixteen, np.rint(exact * 65535))
    assert len(np.unique(sixteen)) > len(np.unique(eight)), "it says more than 8 bits can"


@pytest.mark.parametrize(("channels", "alpha", "shown"), [(1, False, 1), (2, False, 1), (4, True, 4), (5, False, 3)])
def test_a_preview_has_the_channels_that_pictures_show(
    make_checkpoint: MakeCheckpoint, channels: int, alpha: bool, shown: int
) -> None:
    checkpoint = replace(make_checkpoint(in_channels=channels, out_channels=channels), alpha=alpha)
    engine, spec = make_engine(checkpoint), spec_of(n=2, class_labels=(0, 1))
    rows = engine.add(spec)
    frame = engine.preview(rows, ("x_t", "x_0"))()
    x_T = torch.from_numpy(engine.latents(rows))
    np.testing.assert_array_equal(frame["x_t"], to_uint8(x_T).permute(0, 2, 3, 1).numpy()[..., :shown])
    engine.remove(rows)


@pytest.mark.parametrize("bit_depth", [None, 16, 32])
def test_a_latent_model_gives_the_decoded_pixels_before_they_are_rounded(tmp_path: Path, bit_depth: int | None) -> None:
    save_latent_pipeline(tmp_path, "kl", scaling_factor=0.8)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.autoencoder is not None
    spec = spec_of(n=2, steps=4, sampler="ddim", clip=False, class_labels=None, bit_depth=bit_depth)
    engine, latents = make_engine(checkpoint), []

    def keep(engine: Any, rows: Any, _taken: Any) -> None:
        latents[:] = [engine.latents(rows)]

    found = sample_locally(engine, spec, 8, lambda _rows: None, record=keep)
    decoded = checkpoint.autoencoder.decode(torch.from_numpy(latents[0])).permute(0, 2, 3, 1).numpy().clip(-1, 1)
    as_floats = {None: 127.5, 16: 32767.5}
    floats = found if bit_depth == 32 else found / as_floats[bit_depth] - 1
    np.testing.assert_allclose(floats.clip(-1, 1), decoded, rtol=0, atol=1e-4 if bit_depth else 1 / 127)


def test_what_a_mask_keeps_is_kept_in_floats_too(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    save_latent_pipeline(tmp_path, "kl", scaling_factor=0.8)
    for checkpoint in (load_checkpoint(tmp_path), make_checkpoint(classes=False, in_channels=4, out_channels=4)):
        height, width = checkpoint.size_px
        image = np.random.default_rng(0).integers(0, 256, (height, width, checkpoint.image_shape[0]), dtype=np.uint8)
        mask = np.zeros((height, width), bool)
        mask[: height // 2] = True
        given = {"n": 2, "steps": 4, "sampler": "ddim", "clip": False, "class_labels": None, "bit_depth": 32}
        spec, inputs = edit(Inputs(image, mask), **given)
        found = sample_locally(make_engine(checkpoint), spec, 8, lambda _rows: None, inputs)
        known = to_model_range(torch.from_numpy(image)).numpy()
        np.testing.assert_array_equal(found[:, ~mask], np.broadcast_to(known, found.shape)[:, ~mask])
