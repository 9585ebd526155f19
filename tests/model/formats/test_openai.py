"""Against tests/model/formats/guided.py, which is written from the papers and knows nothing of model/."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.formats.conftest import close_to_scale, randomised, save
from tests.model.formats.guided import Guided
from tminus.model.checkpoint import load_checkpoint
from tminus.model.formats.conversion import FactsError, GivenFacts, MissingFacts
from tminus.model.formats.read import convert, read_foreign
from tminus.model.samplers import sample

HO = {"image_size": 16, "timesteps": 1000, "beta_schedule": "linear", "prediction": "epsilon"}
FIXED = HO | {"variance": "fixed_large"}
# What the published checkpoints are made of, in small: the network, and what is given of it.
NETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "improved, cifar10": (
        {"mult": (1, 2, 3), "attends": (1, 2), "heads": 4, "blocks": 3},
        FIXED | {"heads": 4, "attention_order": "legacy"},
    ),
    "improved, learned sigma and scale-shift": (
        {"mult": (1, 2), "heads": 4, "shift": True, "out_channels": 6},
        HO | {"heads": 4, "attention_order": "legacy", "beta_schedule": "squaredcos_cap_v2"},
    ),
    "guided, imagenet64": (
        {
            **{"mult": (1, 2, 3), "attends": (1, 2), "head_width": 32, "order": "new", "shift": True},
            **{"updown": True, "classes": 7, "out_channels": 6, "blocks": 3},
        },
        HO | {"head_width": 32, "attention_order": "new", "beta_schedule": "squaredcos_cap_v2"},
    ),
    "guided, lsun": (
        {"mult": (1, 1, 2), "attends": (1, 2), "head_width": 16, "shift": True, "updown": True, "out_channels": 6},
        HO | {"head_width": 16, "attention_order": "legacy"},
    ),
    "guided, imagenet512": (
        {"model_channels": 64, "mult": (0.5, 1, 1), "attends": (2,), "heads": 4, "shift": True, "updown": True},
        FIXED | {"heads": 4, "attention_order": "legacy"},
    ),
    "one head": ({"heads": 1, "attends": ()}, FIXED | {"heads": 1}),
    "one head at two widths": ({"mult": (1, 2), "heads": 1, "attends": (0, 1)}, FIXED | {"heads": 1}),
    "one level": ({"mult": (1,), "attends": (0,), "heads": 2}, FIXED | {"heads": 2, "attention_order": "legacy"}),
    "heads of one width at every level": (
        {"mult": (1, 1), "attends": (0, 1), "heads": 2, "order": "new"},
        FIXED | {"heads": 2, "attention_order": "new"},
    ),
    "grey": (
        {"channels": 1, "out_channels": 1, "heads": 2, "blocks": 1, "order": "new"},
        FIXED | {"heads": 2, "attention_order": "new"},
    ),
}


def net_of(**settings: Any) -> Guided:
    net = randomised(Guided(**settings))
    assert isinstance(net, Guided)
    return net


@pytest.mark.parametrize(("settings", "facts"), NETS.values(), ids=NETS.keys())
def test_converted_network_equals_the_oracle(
    settings: dict[str, Any], facts: dict[str, Any], batch: dict[str, Any], tmp_path: Path
) -> None:
    theirs = net_of(**settings)
    convert(save(theirs, tmp_path / "ema.pt"), tmp_path / "out", GivenFacts(**facts))
    ours = load_checkpoint(tmp_path / "out")
    x, t = batch["x"][:, : settings.get("channels", 3)], batch["t"]
    labels = torch.tensor([0, 6, 3, 2]) if "classes" in settings else None
    with torch.no_grad():
        close_to_scale(ours.net(x, t, labels), theirs(x, t, labels))
    assert ours.size_px == (16, 16)
    assert ours.labels.num_classes == settings.get("classes", 0)
    assert ours.noise.variance_type == ("learned_range" if settings.get("out_channels") == 6 else "fixed_large")


def test_consistency_model_has_q_k_and_v_before_heads_without_being_asked(
    batch: dict[str, Any], tmp_path: Path
) -> None:
    """As consistency_models' QKVFlashAttention takes them apart: "b (three h d) s -> b s three h d"."""
    theirs = net_of(heads=4, order="new")
    # Their 1x1 convolutions are 2D, those of guided-diffusion 1D.
    two_d = {
        key: value[..., None] if value.ndim == 3 and ("qkv" in key or "proj_out" in key) else value
        for key, value in theirs.state_dict().items()
    }
    assert sum(value.ndim == 4 for key, value in two_d.items() if "qkv" in key) > 0
    torch.save(two_d, tmp_path / "cd.pt")
    facts = {"image_size": 16, "timesteps": 40, "prediction": "consistency", "heads": 4}
    convert(tmp_path / "cd.pt", tmp_path / "out", GivenFacts(**facts))  # type: ignore[arg-type]
    ours = load_checkpoint(tmp_path / "out")
    with torch.no_grad():
        close_to_scale(ours.net(batch["x"], batch["t"]), theirs(batch["x"], batch["t"]))
    named = read_foreign(tmp_path / "cd.pt", GivenFacts(**facts, attention_order="new"))  # type: ignore[arg-type]
    assert all(torch.equal(value, named.state[key]) for key, value in ours.net.state_dict().items())
    with pytest.raises(FactsError, match="--attention-order must be new, or left out, for --prediction consistency"):
        read_foreign(tmp_path / "cd.pt", GivenFacts(**facts, attention_order="legacy"))  # type: ignore[arg-type]


def test_edm_model_makes_the_images_of_its_paper_from_250_log_sigma(batch: dict[str, Any], tmp_path: Path) -> None:
    """Karras et al. 2022, table 1 and algorithm 1 without churn, with the time of their KarrasDenoiser."""
    theirs, steps = net_of(heads=4, order="new", classes=7), 6
    labels = torch.tensor([0, 6, 3, 2])
    facts = {"image_size": 16, "prediction": "edm", "heads": 4}
    convert(save(theirs, tmp_path / "edm.pt"), tmp_path / "out", GivenFacts(**facts))  # type: ignore[arg-type]
    ours = load_checkpoint(tmp_path / "out")
    assert ours.default_sampler == "heun"
    plan = ours.plan("heun", steps)

    def denoised(x: Tensor, sigma: float) -> Tensor:
        root = (sigma**2 + 0.25) ** 0.5
        out = theirs((x / root).float(), torch.full((4,), 250 * math.log(sigma)), labels)
        return (0.25 / root**2 * x + 0.5 * sigma / root * out.double()).clamp(-1, 1)

    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [*((high + k / (steps - 1) * (low - high)) ** 7 for k in range(steps)), 0.0]
    with torch.no_grad():
        x = batch["x"].double() * (1 + 80**2) ** 0.5
        for now, then in pairwise(sigmas):
            slope = (x - denoised(x, now)) / now
            end = x + (then - now) * slope
            x = end if then == 0 else x + (then - now) / 2 * (slope + (end - denoised(end, then)) / then)
        close_to_scale(sample(ours.net, plan, batch["x"], lambda _k: batch["x"], class_labels=labels), x.float(), 1e-4)


def test_edm_asks_for_no_more_than_the_file_leaves_open(tmp_path: Path) -> None:
    file = save(net_of(heads=4), tmp_path / "edm.pt")
    with pytest.raises(MissingFacts) as missing:
        read_foreign(file, GivenFacts(prediction="edm"))
    assert missing.value.names == ("image_size", "heads")
    for name, value in (("timesteps", 40), ("beta_schedule", "linear"), ("rescale_timesteps", "yes")):
        with pytest.raises(FactsError, match=f"--{name.replace('_', '-')} says nothing about"):
            read_foreign(file, GivenFacts(prediction="edm", **{name: value}))  # type: ignore[arg-type]
    with pytest.raises(FactsError, match="--attention-order must be new, or left out, for --prediction edm"):
        read_foreign(file, GivenFacts(image_size=16, prediction="edm", heads=4, attention_order="legacy"))


@pytest.mark.parametrize("rescale", ["yes", "no"])
def test_long_chain_is_given_the_timesteps_it_was_trained_with(
    rescale: str, batch: dict[str, Any], tmp_path: Path
) -> None:
    theirs = net_of(heads=4)
    facts = FIXED | {"heads": 4, "attention_order": "legacy", "timesteps": 4000, "rescale_timesteps": rescale}
    ours = read_foreign(save(theirs, tmp_path / "ema.pt"), GivenFacts(**facts))
    convert(tmp_path / "ema.pt", tmp_path / "out", GivenFacts(**facts))
    net, t = load_checkpoint(tmp_path / "out").net, torch.tensor([0, 5, 2000, 3999])
    with torch.no_grad():
        close_to_scale(net(batch["x"], t), theirs(batch["x"], t * 0.25 if rescale == "yes" else t))
    # The linear betas are scaled with T, so that the last level stays the same.
    assert (ours.noise.beta_start, ours.noise.beta_end) == (2.5e-5, 0.005)


def test_all_that_the_file_does_not_say_is_asked_for_at_once(tmp_path: Path) -> None:
    file = save(net_of(heads=4), tmp_path / "ema.pt")
    with pytest.raises(MissingFacts) as missing:
        read_foreign(file, GivenFacts())
    assert missing.value.names == (
        *("image_size", "timesteps", "beta_schedule", "prediction", "variance", "heads", "attention_order"),
        "rescale_timesteps",
    )
    assert "--attention-order (Order of the attention's channels: legacy (heads before q, k, v) or new)" in str(
        missing.value
    )
    with pytest.raises(MissingFacts, match="--rescale-timesteps"):
        read_foreign(file, GivenFacts(**FIXED | {"heads": 4, "attention_order": "new", "timesteps": 4000}))
    with pytest.raises(MissingFacts) as missing:
        read_foreign(save(net_of(heads=1, out_channels=6), tmp_path / "learned.pt"), GivenFacts(heads=1))
    assert missing.value.names == ("image_size", "timesteps", "beta_schedule", "prediction", "rescale_timesteps")
    with pytest.raises(MissingFacts) as missing:
        read_foreign(tmp_path / "learned.pt", GivenFacts(heads=1, prediction="consistency"))
    assert missing.value.names == ("image_size", "timesteps")
    with pytest.raises(ValueError, match="--rescale-timesteps says nothing about"):
        read_foreign(tmp_path / "learned.pt", GivenFacts(heads=1, prediction="consistency", rescale_timesteps="yes"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"heads": 5}, "--heads must divide the 64 channels of attention, got 5"),
        ({"head_width": 128}, "--head-width must divide the 64 channels of attention, got 128"),
    ],
)
def test_heads_that_do_not_fit_are_refused(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = save(net_of(heads=4), tmp_path / "ema.pt")
    with pytest.raises(ValueError, match=message):
        read_foreign(file, GivenFacts(**FIXED | facts, attention_order="new"))
