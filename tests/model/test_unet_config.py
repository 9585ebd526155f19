import logging
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from tminus.model.unet_config import UNetConfig

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

BAD: list[tuple[str, Any]] = [
    ("in_channels", 0),
    ("in_channels", "3"),
    ("out_channels", -1),
    ("out_channels", True),
    ("layers_per_block", 0),
    ("layers_per_block", 1.5),
    ("norm_num_groups", None),
    ("block_out_channels", (16, 30, 64)),
    ("block_out_channels", ()),
    ("block_out_channels", (16, 32, 0)),
    ("down_block_types", ("DownBlock2D", "DownBlock2D")),
    ("down_block_types", ("DownBlock2D", "KDownBlock2D", "DownBlock2D")),
    ("up_block_types", ("UpBlock2D", "SkipUpBlock2D", "UpBlock2D")),
    ("mid_block_type", "UNetMidBlock2DCrossAttn"),
    ("time_embedding_type", "fourier"),
    ("time_embedding_dim", 0),
    ("freq_shift", "1"),
    ("freq_shift", 8),
    ("downsample_padding", 2),
    ("downsample_type", "fir"),
    ("upsample_type", "fir"),
    ("dropout", 1.5),
    ("dropout", "0"),
    ("norm_eps", 0),
    ("norm_eps", float("nan")),
    ("mid_block_scale_factor", 0),
    ("act_fn", "tanh"),
    ("attention_head_dim", 0),
    ("attention_head_dim", 128),
    ("attn_norm_num_groups", 5),
    ("resnet_time_scale_shift", "spatial"),
    ("class_embed_type", "timestep"),
    ("num_class_embeds", -1),
    ("num_heads", 0),
    ("num_heads", 5),
    ("time_proj_dim", 0),
    ("timestep_scale", 0),
    ("timestep_scale", float("inf")),
    ("sample_size", 0),
    ("sample_size", (32, 0)),
    ("sample_size", (32,)),
    ("sample_size", 32.0),
    ("sample_size", "32"),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_config_value_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"unet config: .*{field}") as refusal:
        UNetConfig.from_dict({**SMALL, "_class_name": "TminusUNet2DModel", field: value})
    assert repr(value) in str(refusal.value)


def test_learned_time_embedding_needs_the_number_of_timesteps() -> None:
    with pytest.raises(ValueError, match="num_train_timesteps must be a positive integer, got None"):
        UNetConfig.from_dict({**SMALL, "time_embedding_type": "learned"})


def test_value_of_a_type_nobody_expects_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="unet config"):
        UNetConfig.from_dict({**SMALL, "block_out_channels": 64})


def test_a_field_of_training_or_one_that_is_off_is_logged_and_any_other_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        config = UNetConfig.from_dict({**SMALL, "decay": 0.9999, "cross_attention_dim": None})
    assert config == UNetConfig(**SMALL)
    assert "decay=0.9999 changes nothing" in caplog.text
    with pytest.raises(ValueError, match="cross_attention_dim=768 is not something UNet2DModel is known to have"):
        UNetConfig.from_dict({**SMALL, "cross_attention_dim": 768})


def test_underscored_keys_are_dropped_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = UNetConfig.from_dict({**SMALL, "_class_name": "UNet2DModel", "_diffusers_version": "0.1.0"})
    assert config == UNetConfig(**SMALL)
    assert caplog.text == ""


def test_unetres_prefix_of_block_names_is_stripped() -> None:
    old = {
        **SMALL,
        "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D", "UNetResDownBlock2D"],
        "up_block_types": ["UNetResUpBlock2D", "UNetResAttnUpBlock2D", "UNetResUpBlock2D"],
    }
    assert UNetConfig.from_dict(old) == UNetConfig(**SMALL)


def test_keys_in_use_default_values_revert_to_the_defaults() -> None:
    config = UNetConfig.from_dict({**SMALL, "norm_eps": 0.5, "_use_default_values": ["norm_eps"]})
    assert config.norm_eps == UNetConfig().norm_eps


def test_config_survives_a_round_trip_through_its_json_form() -> None:
    config = UNetConfig(**{**SMALL, "sample_size": (16, 24), "num_class_embeds": 4})
    assert UNetConfig.from_dict(config.to_dict()) == config


def test_defaults_are_those_of_diffusers() -> None:
    ours = UNetConfig().to_dict()
    with torch.device("meta"):
        theirs = dict(UNet2DModel().config)
    theirs.pop("_use_default_values", None)
    assert {key: theirs[key] for key in ours if key in theirs} == {k: v for k, v in ours.items() if k != "_class_name"}


@pytest.mark.parametrize(
    ("own", "usual"), [({"num_heads": 4}, None), ({"time_proj_dim": 24}, None), ({"timestep_scale": 0.25}, 1.0)]
)
def test_config_with_a_field_of_our_own_is_not_named_as_diffusers(own: dict[str, Any], usual: Any) -> None:
    field = next(iter(own))
    config = UNetConfig(**SMALL, **own)
    written = config.to_dict()
    assert written["_class_name"] == "TminusUNet2DModel"
    assert UNetConfig.from_dict(written) == config
    with pytest.raises(ValueError, match=f"{field}=.* is not something UNet2DModel is known to have"):
        UNetConfig.from_dict({**written, "_class_name": "UNet2DModel"})
    plain = UNetConfig(**SMALL, **{field: usual}).to_dict()
    assert plain["_class_name"] == "UNet2DModel"
    assert field not in plain


def test_size_multiple_is_two_to_the_number_of_halvings() -> None:
    six = {"down_block_types": ("DownBlock2D",) * 6, "up_block_types": ("UpBlock2D",) * 6}
    config = UNetConfig(block_out_channels=(16,) * 6, norm_num_groups=8, **six)  # type: ignore[arg-type]
    assert config.size_multiple == 32
