"""Latent models on the engine: against diffusers, the same bytes alone and together, edits, previews."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from tests.model.latent.folders import save_latent_pipeline
from tests.service.engine.edits import edit
from tests.service.engine.engines import CPU, alone, make_engine, spec_of, together
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.pixels import to_model_range, to_uint8
from tminus.model.rng import image_noise
from tminus.service.engine import openvino_executor
from tminus.service.engine.protocol import sample_locally
from tminus.service.spec import Images, Inputs, SampleSpec
from tminus.service.work import Batch


@pytest.fixture(scope="module", autouse=True)
def converted() -> Iterator[dict[object, Any]]:
    """Each autoencoder is converted once for all tests: that takes longer than all else here."""
    made: dict[object, Any] = {}
    one_thread = openvino_executor.one_thread

    def once(module: Any, shape: Sequence[int], _file: object) -> Any:
        key = (type(module), id(module.autoencoder), shape)
        if key not in made:
            made[key] = (one_thread(module, shape), module)  # which keeps its id
        return made[key][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_executor, "one_thread", once)
        yield made


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("latent")
    save_latent_pipeline(folder, "kl", classes=3, scaling_factor=0.8)
    return load_checkpoint(folder)


def spec(**fields: object) -> SampleSpec:
    return spec_of(**{"clip": False, "sampler": "ddim", "class_labels": None} | fields)


def classy(**fields: object) -> SampleSpec:
    return spec(**{"class_labels": (1,) * int(str(fields.get("n", 1)))} | fields)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sampler"), [("vq", "ddim"), ("kl", "ddpm")])
def test_twenty_steps_are_those_of_diffusers_pipeline(tmp_path: Path, kind: str, sampler: str) -> None:
    """Its loop, with our noise: LDMPipeline itself draws x_T by a generator, and takes steps of DDIM."""
    kinds = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
    scheduler = kinds[sampler](clip_sample=False, beta_schedule="scaled_linear")
    pipeline = save_latent_pipeline(tmp_path, kind, scheduler=scheduler, scaling_factor=0.9)
    job = spec(n=2, steps=20, sampler=sampler, seed=5)
    x = image_noise(5, range(2), 0, (3, 8, 8), CPU)
    scheduler.set_timesteps(20)
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            out = pipeline.unet(x, t).sample
            z = image_noise(5, range(2), k + 1, (3, 8, 8), CPU)
            x = ddim_step(scheduler, out, int(t), x) if sampler == "ddim" else ddpm_step(scheduler, out, int(t), x, z)
        wanted = to_uint8(pipeline.vqvae.decode(x / 0.9).sample).permute(0, 2, 3, 1).numpy()
    got = alone(load_checkpoint(tmp_path), job)
    assert np.abs(got.astype(int) - wanted).max() <= 1


def ddim_step(scheduler: DDIMScheduler, out: Tensor, t: int, x: Tensor) -> Tensor:
    return scheduler.step(out, t, x).prev_sample


def ddpm_step(scheduler: DDPMScheduler, out: Tensor, t: int, x: Tensor, z: Tensor) -> Tensor:
    """One step of theirs with noise of ours."""
    before = scheduler.previous_timestep(t)
    mean = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    if t == 0:
        return mean
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    deviation = scheduler._get_variance(t) ** 0.5
    assert before < t
    return mean + deviation * (z - drawn)


@pytest.mark.parametrize("openvino", [True, False])
def test_the_same_bytes_alone_and_together(latent: Checkpoint, monkeypatch: pytest.MonkeyPatch, openvino: bool) -> None:
    monkeypatch.setattr(openvino_executor, "available", lambda: openvino)
    specs = [classy(n=n, steps=4 + n, sampler=name, seed=n) for n, name in ((1, "ddpm"), (3, "dpmpp_2m"), (2, "unipc"))]
    found = together(make_engine(latent), specs, max_batch=8)
    for one, images in zip(specs, found, strict=True):
        assert images.shape == (one.n, 16, 16, 3)
        np.testing.assert_array_equal(images, alone(latent, one))


def test_image_k_alone_is_image_k_of_many(latent: Checkpoint) -> None:
    many = alone(latent, classy(n=3, seed=4))
    np.testing.assert_array_equal(alone(latent, classy(seed=4, index=2))[0], many[2])


def test_openvino_and_torch_decode_alike(latent: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    job = classy(n=2, steps=5)
    by_openvino = alone(latent, job)
    monkeypatch.setattr(openvino_executor, "available", lambda: False)
    assert np.abs(by_openvino.astype(int) - alone(latent, job)).max() <= 1


def photo() -> Images:
    return np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)


def edited(checkpoint: Checkpoint, inputs: Inputs, **fields: object) -> Images:
    job, given = edit(inputs, **{"clip": False, "sampler": "ddim", "class_labels": (0,)} | fields)
    return sample_locally(make_engine(checkpoint), job, 8, lambda _: None, given)


def test_strength_starts_from_the_latents_of_the_image_under_noise(latent: Checkpoint) -> None:
    inputs = Inputs(photo())
    job, _ = edit(inputs, clip=False, sampler="ddim", class_labels=(0,), strength=0.5, steps=10, seed=6)
    engine = make_engine(latent)
    rows = engine.add(job, inputs=inputs)
    t = torch.tensor([int(engine.plan(job).timesteps[0])])
    assert latent.autoencoder is not None
    with torch.no_grad():
        x_0 = latent.autoencoder.encode(to_model_range(torch.tensor(inputs.image).permute(2, 0, 1)[None]))
    wanted = latent.noise.schedule().q_sample(x_0, t, image_noise(6, [0], 0, (3, 8, 8), CPU))
    np.testing.assert_allclose(engine.latents(rows), wanted.numpy(), atol=1e-4)


def test_inputs_encoded_before_are_the_same_as_inputs_encoded_on_the_way(latent: Checkpoint) -> None:
    inputs = Inputs(photo())
    given = make_engine(latent).encoder(inputs)()
    assert given.latents is not None
    assert given.latents.shape == (3, 8, 8)
    np.testing.assert_array_equal(
        edited(latent, given, strength=0.4, seed=2), edited(latent, inputs, strength=0.4, seed=2)
    )


def test_known_pixels_come_out_as_they_went_in(latent: Checkpoint) -> None:
    mask = np.zeros((16, 16), bool)
    mask[:, 9:] = True  # splits a latent: it is made new, and its known pixels are kept all the same
    found = edited(latent, Inputs(photo(), mask), steps=6)
    np.testing.assert_array_equal(found[0][~mask], photo()[~mask])
    assert (found[0][mask] != photo()[mask]).any()


def test_a_latent_is_made_new_if_any_of_its_pixels_is(latent: Checkpoint) -> None:
    mask = np.zeros((16, 16), bool)
    mask[3, 5] = True
    engine = make_engine(latent)
    job, inputs = edit(Inputs(photo(), mask), clip=False, sampler="ddim", class_labels=(0,), n=2)
    rows = engine.add(job, inputs=inputs)
    for step in range(job.num_passes):
        engine.step(Batch(rows, (step,) * 2, ()))
    given = engine.encoder(inputs)().latents
    assert given is not None
    new = (engine.latents(rows) != given).any(1)
    assert np.argwhere(new).tolist() == [[0, 1, 2], [1, 1, 2]]


def test_previews_have_the_size_of_images(latent: Checkpoint) -> None:
    engine = make_engine(latent)
    rows = engine.add(classy(n=2))
    shown = engine.preview(rows, ("x_t", "x_0"))()
    assert {name: images.shape for name, images in shown.items()} == dict.fromkeys(("x_t", "x_0"), (2, 16, 16, 3))


def test_the_forward_process_is_in_latents(latent: Checkpoint) -> None:
    engine = make_engine(latent)
    assert latent.autoencoder is not None
    with torch.no_grad():
        x_0 = latent.autoencoder.encode(to_model_range(torch.tensor(photo()).permute(2, 0, 1)[None]))
        x_t = latent.noise.schedule().q_sample(x_0, torch.tensor([400]), image_noise(9, [0], 0, (3, 8, 8), CPU))
        wanted = to_uint8(latent.autoencoder.decode(x_t))[0].permute(1, 2, 0).numpy()
    found = engine.noised(photo()[None], 400, 9)()
    assert np.abs(found[0].astype(int) - wanted).max() <= 1


def test_what_decodes_is_in_the_fingerprint(latent: Checkpoint, converted: dict[object, Any]) -> None:
    fingerprint = make_engine(latent).info.fingerprint
    converted.clear()
    assert make_engine(latent).info.fingerprint == fingerprint
    assert latent.autoencoder is not None
    other = load_scaled(latent)
    assert make_engine(other).info.fingerprint != fingerprint


def load_scaled(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights, whose latents are scaled otherwise."""
    assert checkpoint.autoencoder is not None
    twin = type(checkpoint.autoencoder)(replace(checkpoint.autoencoder.config, scaling_factor=0.4))
    twin.load_state_dict(checkpoint.autoencoder.state_dict())
    return replace(checkpoint, autoencoder=twin.eval())


def test_decoding_has_a_time_and_pixel_models_have_none(latent: Checkpoint, tiny: Checkpoint) -> None:
    assert min(make_engine(latent).coding_seconds()) > 0
    assert make_engine(tiny).coding_seconds() == (0, 0)
    inputs = Inputs(photo())
    assert make_engine(tiny).encoder(inputs)() is inputs
