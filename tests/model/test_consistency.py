from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

from tests.model.formats.conftest import randomised
from tests.tiny import TINY
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.consistency import MAX_STEPS
from tminus.model.noise import NoiseConfig
from tminus.model.samplers import sample

SETTINGS: dict[str, dict[str, Any]] = {
    "its defaults": {},
    "another ramp, no clip": {"num_train_timesteps": 201, "sigma_min": 0.01, "sigma_max": 30.0, "rho": 5.0},
}
SETTINGS["another ramp, no clip"] |= {"sigma_data": 1.0, "clip_denoised": False}
SETTINGS["a field of another class"] = {"clip_sample": False}


@pytest.fixture(params=SETTINGS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, ConsistencyModelPipeline]:
    fields = {key: value for key, value in TINY.to_dict().items() if key != "_class_name"}
    net = randomised(UNet2DModel(**fields))
    pipeline = ConsistencyModelPipeline(net, CMStochasticIterativeScheduler.from_config(SETTINGS[request.param]))
    pipeline.save_pretrained(tmp_path)
    return load_checkpoint(tmp_path), pipeline


@pytest.mark.parametrize("steps", [1, 8])
@torch.no_grad()
def test_full_loop_equals_diffusers(pair: tuple[Checkpoint, ConsistencyModelPipeline], steps: int) -> None:
    ours, pipeline = pair
    scheduler = pipeline.scheduler
    plan = ours.plan("consistency", steps)
    noise = torch.randn(1 + steps, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    got = sample(ours.net, plan, noise[0], lambda k: noise[1 + k])

    scheduler.set_timesteps(steps)
    x = noise[0] * (1 + scheduler.config.sigma_max**2) ** 0.5  # of variance 1 + sigma^2; theirs leaves the 1 out
    for k, t in enumerate(scheduler.timesteps):
        out = pipeline.unet(scheduler.scale_model_input(x, t), t).sample
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "diffusers.schedulers.scheduling_consistency_models.randn_tensor", lambda *_a, k=k, **_k: noise[1 + k]
            )
            x = scheduler.step(out, t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
    assert got.std() > 0.05


def test_it_is_sampled_by_its_own_tables_alone(pair: tuple[Checkpoint, ConsistencyModelPipeline]) -> None:
    ours, _ = pair
    assert ours.samplers == ("consistency",)
    assert [table.steps for table in ours.tables] == list(range(1, MAX_STEPS + 1))
    assert ours.student is not None
    assert ours.noise.default_sampler == "consistency"
    with pytest.raises(ValueError, match="consistency has no table for 9 steps"):
        ours.plan("consistency", 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_min": 90.0}, "sigma_min must be above 0 and below sigma_max 80"),
        ({"sigma_data": 0}, "sigma_data must be a positive number"),
        ({"rho": "7"}, "rho must be a positive number"),
        ({"num_train_timesteps": 1}, "num_train_timesteps must be 2 or more"),
        ({"s_noise": 1.1}, "s_noise must be 1.0 for consistency, got 1.1"),
        ({"beta_start": 0.1, "clip_denoised": 3}, "clip_sample must be true or false"),
    ],
)
def test_bad_config_is_refused_by_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseConfig.from_dict({"_class_name": "CMStochasticIterativeScheduler", **change})
