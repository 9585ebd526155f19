"""Against the package itself, denoising-diffusion-pytorch, which writes the files and runs the network."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.model.formats.conftest import close_to_scale, randomised
from tminus.model.checkpoint import load_checkpoint
from tminus.model.formats.conversion import GivenFacts, MissingFacts
from tminus.model.formats.read import convert, read_foreign

with warnings.catch_warnings(action="ignore"):
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

SIZE = GivenFacts(image_size=16)
NETS: dict[str, dict[str, Any]] = {
    "its defaults, in small": {"dim": 16, "dim_mults": (1, 2, 4)},
    "other heads, full attention twice": {
        **{"dim": 16, "dim_mults": (1, 2), "attn_heads": (2, 4), "attn_dim_head": (8, 16), "full_attn": (True, True)}
    },
    "grey, another first width": {"dim": 16, "init_dim": 24, "dim_mults": (1, 3), "channels": 1},
    "one level": {"dim": 16, "dim_mults": (2,)},
}


def diffusion_of(net: dict[str, Any], **settings: Any) -> Any:
    unet = Unet(**net)
    return GaussianDiffusion(randomised(unet), image_size=16, **{"timesteps": 100, **settings})


def saved(diffusion: Any, file: Path) -> Path:
    torch.save(diffusion.state_dict(), file)
    return file


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_converted_network_equals_the_package(net: dict[str, Any], batch: dict[str, Any], tmp_path: Path) -> None:
    theirs = diffusion_of(net)
    convert(saved(theirs, tmp_path / "diffusion.pt"), tmp_path / "out", SIZE)
    ours = load_checkpoint(tmp_path / "out")
    x, t = batch["x"][:, : net.get("channels", 3)], torch.tensor([0, 3, 50, 99])
    with torch.no_grad():
        close_to_scale(ours.net(x, t), theirs.model(x, t))
    assert ours.size_px == (16, 16)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize(
    ("objective", "prediction"), [("pred_noise", "epsilon"), ("pred_x0", "sample"), ("pred_v", "v_prediction")]
)
@pytest.mark.parametrize("min_snr", [False, True])
def test_schedule_and_objective_are_read_from_its_tables(
    schedule: str, objective: str, prediction: str, min_snr: bool, tmp_path: Path
) -> None:
    net = {"dim": 8, "dim_mults": (1,)}
    theirs = diffusion_of(net, beta_schedule=schedule, objective=objective, min_snr_loss_weight=min_snr, timesteps=1000)
    noise = read_foreign(saved(theirs, tmp_path / "diffusion.pt"), SIZE).noise
    assert noise.prediction_type == prediction
    assert noise.beta_schedule == {"linear": "linear", "cosine": "squaredcos_cap_v2"}.get(schedule, "linear")
    assert (noise.trained_betas is not None) == (schedule == "sigmoid")
    alpha_bar = noise.schedule().alpha_bar
    torch.testing.assert_close(alpha_bar.float(), theirs.alphas_cumprod, rtol=2e-4, atol=1e-9)
    assert (noise.variance_type, noise.clip_sample) == ("fixed_small", True)


def test_ancestral_sampling_through_the_converted_network_is_the_package_s_own(tmp_path: Path) -> None:
    theirs = diffusion_of(NETS["one level"], timesteps=20, objective="pred_v", beta_schedule="cosine")
    convert(saved(theirs, tmp_path / "diffusion.pt"), tmp_path / "out", SIZE)
    ours = load_checkpoint(tmp_path / "out")
    plan = ours.plan("ddpm", 20)
    lines = plan.lines.float()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    x_theirs = x
    from tminus.model.samplers import denoise

    with torch.no_grad():
        for k, t in enumerate(plan.timesteps.tolist()):
            torch.manual_seed(k)
            z = torch.randn_like(x)
            torch.manual_seed(k)
            x_theirs, _ = theirs.p_sample(x_theirs, int(t))
            out = ours.net(x, torch.full((2,), t))
            x = denoise(x, out, torch.zeros_like(x), z, lines[k : k + 1].expand(2, -1)).x
    torch.testing.assert_close(x, x_theirs, rtol=0, atol=2 / 255)


@pytest.fixture(scope="module")
def trainer_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What the package's Trainer saves, with an average that is another than the model."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "images").mkdir()
    for k in range(100):
        pixels = np.full((16, 16, 3), k, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{k}.png")
    with warnings.catch_warnings(action="ignore"):
        trainer = Trainer(
            diffusion_of(NETS["one level"]),
            str(folder / "images"),
            train_batch_size=16,
            calculate_fid=False,
            results_folder=str(folder / "results"),
        )
    randomised(trainer.ema.ema_model.model, seed=5)
    trainer.save(7)
    return folder / "results" / "model-7.pt", trainer


def test_average_of_a_trainer_s_file_is_what_is_converted(
    trainer_file: tuple[Path, Any], batch: dict[str, Any], tmp_path: Path
) -> None:
    file, trainer = trainer_file
    convert(file, tmp_path / "out", SIZE)
    ours = load_checkpoint(tmp_path / "out").net
    t = torch.tensor([0, 3, 50, 99])
    with torch.no_grad():
        close_to_scale(ours(batch["x"], t), trainer.ema.ema_model.model(batch["x"], t))


def test_all_that_is_asked_for_is_the_size_unless_the_loss_tells_nothing(tmp_path: Path) -> None:
    theirs = diffusion_of(NETS["one level"])
    with pytest.raises(MissingFacts) as missing:
        read_foreign(saved(theirs, tmp_path / "diffusion.pt"), GivenFacts())
    assert missing.value.names == ("image_size",)
    with pytest.raises(ValueError, match="--timesteps says nothing about a file of lucidrains"):
        read_foreign(tmp_path / "diffusion.pt", GivenFacts(image_size=16, timesteps=100))
    state = theirs.state_dict()
    for other in ({}, {"loss_weight": torch.rand(100)}):
        torch.save({**{key: value for key, value in state.items() if key != "loss_weight"}, **other}, tmp_path / "o.pt")
        with pytest.raises(MissingFacts) as missing:
            read_foreign(tmp_path / "o.pt", SIZE)
        assert missing.value.names == ("prediction",)
    noise = read_foreign(tmp_path / "o.pt", GivenFacts(image_size=16, prediction="sample")).noise
    assert noise.prediction_type == "sample"
