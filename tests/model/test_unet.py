import dataclasses
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from tests.tiny import TINY, randomize
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
ATTENDS_EVERYWHERE = {"down_block_types": ("AttnDownBlock2D",) * 3, "up_block_types": ("AttnUpBlock2D",) * 3}
RESNET_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}

# The architecture fields of the published config.json files.
DDPM_CIFAR10_32: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": (128, 256, 256, 256),
    "center_input_sample": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
DDPM_CELEBAHQ_256: dict[str, Any] = {
    **DDPM_CIFAR10_32,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    "sample_size": 256,
}

VARIATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding 0, shift 1, sin first": {"downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False},
    "no attention in the mid block": {"add_attention": False},
    "no mid block": {"mid_block_type": None},
    "attention in every block, one head": {**ATTENDS_EVERYWHERE, "attention_head_dim": None},
    "attention in every block, heads of 8": {**ATTENDS_EVERYWHERE, "attention_head_dim": 8},
    "heads of 12, which divide no width": {**ATTENDS_EVERYWHERE, "attention_head_dim": 12},
    "heads wider than a block that does not attend": {"attention_head_dim": 32},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift with a mid group norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "default with other mid groups": {"attn_norm_num_groups": 16},
    "resnet resampling in attention blocks": {
        **ATTENDS_EVERYWHERE,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "resnet blocks": RESNET_BLOCKS,
    "consistency model's mixture": {
        **RESNET_BLOCKS,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "layers_per_block": 3,
        "num_class_embeds": 5,
    },
    "classes": {"num_class_embeds": 11},
    "mid block scaled by sqrt 2": {"mid_block_scale_factor": 2**0.5},
    "mid block scaled, without attention": {"mid_block_scale_factor": 3, "add_attention": False},
    "learned time embedding": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "wider time embedding": {"time_embedding_dim": 50},
    "an odd first width": {"block_out_channels": (15, 30, 60), "norm_num_groups": 5, "attention_head_dim": 15},
    "centred input": {"center_input_sample": True},
    "one layer, one channel": {"layers_per_block": 1, "in_channels": 1, "out_channels": 1},
    "three layers, two channels out": {"layers_per_block": 3, "out_channels": 2},
    "mish": {"act_fn": "mish"},
    "swish and a large eps": {"act_fn": "swish", "norm_eps": 0.1},
    "dropout, which eval leaves out": {"dropout": 0.5},
    "one block": {
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (16,),
    },
}
# Of diffusers' own test of its Skip blocks.
NCSNPP: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "time_embedding_type": "fourier",
    "norm_eps": 1e-6,
    "mid_block_scale_factor": 2**0.5,
    "norm_num_groups": None,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
}
NCSNPP_VARIATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "of google/ncsnpp-celebahq-256, narrower": {
        "block_out_channels": (32, 32, 64, 64, 64, 64, 64),
        "layers_per_block": 2,
        "down_block_types": ("SkipDownBlock2D",) * 4 + ("AttnSkipDownBlock2D",) + ("SkipDownBlock2D",) * 2,
        "up_block_types": ("SkipUpBlock2D",) * 2 + ("AttnSkipUpBlock2D",) + ("SkipUpBlock2D",) * 4,
        "attention_head_dim": None,
        "center_input_sample": True,
    },
    "groups in the mid block": {"norm_num_groups": 8, "attn_norm_num_groups": 16},
    "scale_shift, classes": {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 3},
    "wide, no mid block": {"block_out_channels": (32, 64, 96, 160), "mid_block_type": None},
    "positional": {"time_embedding_type": "positional"},
    "Fourier features and plain blocks": {
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",) * 4,
        "up_block_types": ("UpBlock2D",) * 4,
    },
    "one block": {
        "down_block_types": ("AttnSkipDownBlock2D",),
        "up_block_types": ("AttnSkipUpBlock2D",),
        "block_out_channels": (32,),
    },
}
BAD: list[tuple[str, Any]] = [
    ("in_channels", 0),
    ("num_class_embeds", -1),
    ("block_out_channels", (16, 30, 64)),
    ("down_block_types", ("DownBlock2D", "KDownBlock2D", "DownBlock2D")),
    ("down_block_types", ("DownBlock2D",) * 2),
    ("down_block_types", "DownBlock2D"),
    ("act_fn", ("silu",)),
    ("time_embedding_type", "rotary"),
    ("norm_num_groups", None),
    ("freq_shift", 8),
    ("downsample_padding", 2),
    ("dropout", 1.5),
    ("attention_head_dim", 128),
    ("attn_norm_num_groups", 5),
    ("class_embed_type", "timestep"),
    ("num_heads", 5),
    ("timestep_scale", float("inf")),
    ("sample_size", (32,)),
]


def twins(config: dict[str, Any]) -> tuple[UNet2D, UNet2DModel]:
    """tminus' net and diffusers', with the same random weights."""
    theirs = UNet2DModel(**config).eval()
    randomize(theirs)
    with torch.device("meta"):
        ours = UNet2D(UNetConfig.from_dict(config))
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs


@torch.no_grad()
def assert_same_outputs(config: dict[str, Any], height: int, width: int, batch: int = 2) -> None:
    ours, theirs = twins(config)
    x = torch.randn(batch, theirs.config.in_channels, height, width, generator=torch.Generator().manual_seed(1))
    fourier = theirs.config.time_embedding_type == "fourier"
    t = torch.tensor([1348.0, 0.01] if fourier else [999, 0])[:batch]
    labels = torch.arange(batch) if theirs.config.num_class_embeds else None
    expected, out = theirs(x, t, labels).sample, ours(x, t, labels)
    if fourier:
        expected *= t.reshape(-1, 1, 1, 1)  # which parametrization.py does where diffusers' network does
    assert out.shape == expected.shape
    assert expected.std() > 0.01
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("change", VARIATIONS.values(), ids=VARIATIONS.keys())
def test_outputs_equal_those_of_diffusers(change: dict[str, Any]) -> None:
    assert_same_outputs({**SMALL, **change}, 16, 16)


@pytest.mark.parametrize("change", NCSNPP_VARIATIONS.values(), ids=NCSNPP_VARIATIONS.keys())
def test_outputs_of_skip_blocks_and_of_fourier_features_equal_those_of_diffusers(change: dict[str, Any]) -> None:
    config = {**NCSNPP, **change}
    side = 2 ** len(config["block_out_channels"])
    assert_same_outputs(config, side, 2 * side)


def test_fourier_features_are_finite_at_every_time_that_an_executor_may_ask_for() -> None:
    embed = twins(NCSNPP)[0].time_embedder()
    assert bool(embed(torch.arange(10)).isfinite().all())
    assert bool(embed(torch.tensor([-5.0, 1e-30, 1e6])).isfinite().all())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("in_channels", 1),
        ("out_channels", 6),
        ("block_out_channels", (32, 64, 64, 72)),
        ("down_block_types", ("SkipDownBlock2D",) * 3 + ("DownBlock2D",)),
        ("up_block_types", ("UpBlock2D",) * 4),
    ],
)
def test_skip_blocks_in_what_diffusers_cannot_build_are_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"unet config: {field} must be") as refusal:
        UNetConfig.from_dict({**NCSNPP, field: value})
    assert repr(value)[:20] in str(refusal.value)


def test_ddpm_cifar10_32_equals_diffusers() -> None:
    assert_same_outputs(DDPM_CIFAR10_32, 32, 32)


def test_published_architectures_have_their_published_number_of_parameters() -> None:
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in UNet2D(UNetConfig(**config)).parameters())
            for config in (DDPM_CIFAR10_32, DDPM_CELEBAHQ_256)
        ]
    assert sizes == [35_746_307, 113_673_219]  # Ho et al. 2020, appendix B: 35.7 and 114 million


def test_gradients_equal_those_of_diffusers() -> None:
    ours, theirs = twins({**SMALL, "num_class_embeds": 3})
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([10, 500]), torch.tensor([0, 2])
    ours.requires_grad_(True)(x, t, labels).square().mean().backward()
    ours_grad = {name: p.grad.clone() for name, p in ours.named_parameters()}  # the twins share their parameters' data
    theirs(x, t, labels).sample.square().mean().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours_grad[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    net = UNet2D(dataclasses.replace(TINY, dropout=0.5))
    randomize(net)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    with torch.no_grad():
        assert torch.equal(net.eval()(x, t), net(x, t))
        assert not torch.equal(net.train()(x, t), net(x, t))


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_config_value_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"unet config: .*{field}") as refusal:
        UNetConfig.from_dict({**SMALL, "_class_name": "TminusUNet2DModel", field: value})
    assert repr(value) in str(refusal.value)


def test_unetres_prefix_of_block_names_is_stripped() -> None:
    old = {
        **SMALL,
        "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D", "UNetResDownBlock2D"],
        "up_block_types": ["UNetResUpBlock2D", "UNetResAttnUpBlock2D", "UNetResUpBlock2D"],
    }
    assert UNetConfig.from_dict(old) == UNetConfig(**SMALL)


@pytest.mark.parametrize(
    ("own", "usual"), [({"num_heads": 4}, None), ({"time_proj_dim": 24}, None), ({"timestep_scale": 0.25}, 1.0)]
)
def test_config_with_a_field_of_our_own_is_not_named_as_diffusers(own: dict[str, Any], usual: Any) -> None:
    field = next(iter(own))
    config = UNetConfig(**SMALL, **own)
    written = config.to_dict()
    assert written["_class_name"] == "TminusUNet2DModel"
    assert UNetConfig.from_dict(written) == config
    with pytest.raises(ValueError, match=f"{field}=.* is not a known setting of UNet2DModel"):
        UNetConfig.from_dict({**written, "_class_name": "UNet2DModel"})
    plain = UNetConfig(**SMALL, **{field: usual}).to_dict()
    assert plain["_class_name"] == "UNet2DModel"
    assert field not in plain
