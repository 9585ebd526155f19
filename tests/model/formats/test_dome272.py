"""Against tests/model/formats/dome.py, which is written from the tutorial and knows nothing of model/."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.formats.conftest import close_to_scale, randomised, save
from tests.model.formats.dome import Dome
from tminus.model.checkpoint import load_checkpoint
from tminus.model.formats.conversion import GivenFacts, MissingFacts
from tminus.model.formats.read import convert, read_foreign
from tminus.model.guidance import guide
from tminus.model.samplers import denoise

GIVEN = GivenFacts(image_size=16, timesteps=1000, beta_schedule="linear")


@pytest.mark.parametrize(
    "settings",
    [{"classes": 5}, {"middle": (256, 256)}, {"channels": 1, "temb": 64}],
    ids=["conditional", "later version", "grey"],
)
def test_converted_network_equals_the_oracle(settings: dict[str, Any], batch: dict[str, Any], tmp_path: Path) -> None:
    theirs = randomised(Dome(**settings))
    convert(save(theirs, tmp_path / "ema_ckpt.pt"), tmp_path / "out", GIVEN)
    ours = load_checkpoint(tmp_path / "out")
    x, t = batch["x"][:, : settings.get("channels", 3)], batch["t"]
    labels = torch.tensor([0, 4, 1, 2]) if "classes" in settings else None
    with torch.no_grad():
        close_to_scale(ours.net(x, t, labels), theirs(x, t, labels))


def test_no_label_is_a_null_class_and_guidance_is_its_lerp(batch: dict[str, Any], tmp_path: Path) -> None:
    theirs = randomised(Dome(classes=5))
    convert(save(theirs, tmp_path / "ckpt.pt"), tmp_path / "out", GIVEN)
    ours = load_checkpoint(tmp_path / "out")
    assert ours.labels.class_names == ("0", "1", "2", "3", "4")
    assert ours.labels.null_class == 5
    x, t, y = batch["x"], batch["t"], torch.tensor([0, 4, 1, 2])
    with torch.no_grad():
        out_u = ours.net(x, t, torch.full_like(y, 5))
        close_to_scale(out_u, theirs(x, t, None))
        close_to_scale(guide(out_u, ours.net(x, t, y), 3.0), torch.lerp(theirs(x, t, None), theirs(x, t, y), 3.0))


def test_a_step_of_the_chain_is_its_own_with_the_variance_beta_and_no_clip(tmp_path: Path) -> None:
    """x_{t-1} = (x_t - (1 - alpha) / sqrt(1 - alpha_hat) eps) / sqrt(alpha) + sqrt(beta) z."""
    converted = read_foreign(save(randomised(Dome()), tmp_path / "ckpt.pt"), GIVEN)
    convert(tmp_path / "ckpt.pt", tmp_path / "out", GIVEN)
    plan = load_checkpoint(tmp_path / "out").plan("ddpm", 1000)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha, alpha_hat = 1 - beta, (1 - beta).cumprod(0)
    x, eps, z = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    for t in (999, 500, 1):
        k = 999 - t
        mean = (x - (1 - alpha[t]) / (1 - alpha_hat[t]).sqrt() * eps) / alpha[t].sqrt()
        ours = denoise(x, eps, torch.zeros_like(x), z, plan.lines[k : k + 1].expand(2, -1)).x
        torch.testing.assert_close(ours, mean + beta[t].sqrt() * z, rtol=1e-9, atol=1e-9)
    assert "x_0 is not clipped" in converted.notes[1]


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    file = save(randomised(Dome()), tmp_path / "ckpt.pt")
    with pytest.raises(MissingFacts) as missing:
        read_foreign(file, GivenFacts())
    assert missing.value.names == ("image_size", "timesteps", "beta_schedule")
    with pytest.raises(ValueError, match="--variance says nothing about a file of dome272"):
        read_foreign(file, GivenFacts(image_size=16, timesteps=10, beta_schedule="linear", variance="fixed_small"))
