from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import LUCIDRAINS, TINY
from tminus.model.denoiser import Denoiser
from tminus.model.networks import build, read_net_config
from tminus.model.networks.dome272 import Dome272Config

DOME = Dome272Config(sample_size=16, num_class_embeds=4)
CONFIGS: dict[str, Any] = {"unet": TINY, "dome272": DOME, "lucidrains": LUCIDRAINS}


@pytest.fixture(scope="module", params=CONFIGS)
def net(request: pytest.FixtureRequest) -> Denoiser:
    torch.manual_seed(0)
    return build(CONFIGS[request.param]).eval()


def inputs(net: Denoiser) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, net.config.in_channels, 16, 16, generator=generator)
    return x, torch.tensor([0.0, 7.5, 40.0]), torch.tensor([0, 1, 2]) if net.class_embedding is not None else None


@torch.no_grad()
def test_forward_pass_is_the_embedding_and_the_rest(net: Denoiser) -> None:
    x, t, labels = inputs(net)
    whole = net(x, t, labels)
    assert whole.shape == (3, net.config.out_channels, 16, 16)
    torch.testing.assert_close(net.denoise(x, net.embed(t, labels)), whole)
    assert net.time_embedder()(t).shape == net.embed(t, labels).shape
    assert len(net.blocks) > 0


@torch.no_grad()
def test_rows_do_not_touch_each_other(net: Denoiser) -> None:
    x, t, labels = inputs(net)
    whole = net(x, t, labels)
    for k in range(3):
        alone = net(x[k : k + 1], t[k : k + 1], labels[k : k + 1] if labels is not None else None)
        torch.testing.assert_close(alone, whole[k : k + 1], rtol=1e-4, atol=1e-4)


def test_class_labels_are_asked_for_and_refused(net: Denoiser) -> None:
    x, t, labels = inputs(net)
    wrong = torch.zeros(3, dtype=torch.long) if labels is None else None
    with pytest.raises(ValueError, match=r"this network (needs|takes no) class labels"):
        net(x, t, wrong)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (DOME, {"sample_size": "16"}, "sample_size must be a positive integer"),
    (DOME, {"sample_size": [16, 16]}, "sample_size must be a positive integer"),
    (DOME, {"middle": [512]}, "middle must be at most three widths, the last 256"),
    (DOME, {"middle": 256}, "middle must be a list of 1 to 16 positive integers"),
    (DOME, {"num_class_embeds": -1}, "num_class_embeds must be a positive integer"),
    (DOME, {"time_dim": 255}, "time_dim must be even"),
    (DOME, {"extra": 1}, "extra=1 is not a known setting"),
    (LUCIDRAINS, {"dim": 2}, "dim must be even and 4 or more"),
    (LUCIDRAINS, {"attn_heads": [2]}, "attn_heads must be a list with one for each level"),
    (LUCIDRAINS, {"full_attn": [1, 2]}, "full_attn must be true or false for each level"),
    (LUCIDRAINS, {"num_class_embeds": 3}, "num_class_embeds must be null"),
]


@pytest.mark.parametrize(("config", "change", "message"), BAD, ids=[str(change) for _, change, _ in BAD])
def test_bad_config_is_refused_by_field(config: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{config.class_name} config: .*{message}"):
        read_net_config({**config.to_dict(), **change})


def test_checkpoint_of_another_network_loads_and_samples(tmp_path: Path) -> None:
    from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint
    from tminus.model.noise import NoiseConfig

    labels = Labels(("a", "b", "c"), 3)
    save_checkpoint(tmp_path / "out", build(DOME).state_dict(), DOME, NoiseConfig(), labels, {})
    loaded = load_checkpoint(tmp_path / "out")
    assert (loaded.net.config, loaded.labels) == (DOME, labels)
    assert loaded.fractional
