"""The configuration of the U-Net, with the fields of diffusers' `UNet2DModel`."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tminus.model.config import Count, Counts, Number, OptionalCount, PositiveNumber, given_fields, is_count, is_off
from tminus.model.denoiser import NetConfig
from tminus.model.layers import ACTIVATIONS

log = logging.getLogger(__name__)

CLASS_NAME = "UNet2DModel"
OWN_CLASS_NAME = "TminusUNet2DModel"  # for networks with OWN_FIELDS, which diffusers would run incorrectly
MAX_LAYERS = 64  # far more than any known network has, and still quick to build
MAPS_PER_LAYER = 3  # feature maps held at the same time: a layer's input, its output and an intermediate one
# EMA settings that diffusers' training scripts write to config.json. They do not affect the network.
OF_TRAINING = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
SKIP_DOWN_BLOCKS = ("SkipDownBlock2D", "AttnSkipDownBlock2D")  # cannot be mixed with other kinds of blocks
# Fields that UNet2DModel does not have. With these values, the network is equivalent to a UNet2DModel.
OWN_FIELDS: Mapping[str, Any] = {"num_heads": None, "time_proj_dim": None, "timestep_scale": 1.0}
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
SKIP_UP_BLOCKS = ("SkipUpBlock2D", "AttnSkipUpBlock2D")
IMAGE_CHANNELS = 3  # Skip blocks in diffusers support only this number
WIDTH_MULTIPLE = 32  # block_out_channels must be multiples of this number with Skip blocks


@dataclass(frozen=True, slots=True)
class UNetConfig(NetConfig):
    """The fields of diffusers' `UNet2DModel` that DDPM-family checkpoints use, and OWN_FIELDS.

    The defaults are those of diffusers. Raises ValueError with the field and its value if the network cannot be built.
    """

    KIND: ClassVar[str] = "unet config: "

    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: OptionalCount = None
    freq_shift: Number = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: Counts = (224, 448, 672, 896)
    layers_per_block: Count = 2
    mid_block_scale_factor: PositiveNumber = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: Number = 0.0
    act_fn: str = "silu"
    attention_head_dim: OptionalCount = 8
    norm_num_groups: OptionalCount = 32
    """None is allowed only with Skip blocks, see `groups`."""
    attn_norm_num_groups: OptionalCount = None
    norm_eps: PositiveNumber = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_train_timesteps: int | None = None
    num_heads: OptionalCount = None
    """The number of heads of each attention, whatever its width. Overrides attention_head_dim."""
    time_proj_dim: OptionalCount = None
    """The width of the timestep's encoding; None means block_out_channels[0]. See `time_width`."""
    timestep_scale: PositiveNumber = 1.0
    """Multiplies timesteps. It is 1000 / T for networks trained with OpenAI's rescale_timesteps."""

    def __post_init__(self) -> None:
        NetConfig.__post_init__(self)
        require, widths, groups = self.require, self.block_out_channels, self.norm_num_groups or 1
        require(self.has_skip_blocks or self.norm_num_groups is not None, "norm_num_groups", "a positive integer")
        require(self.layers_per_block <= MAX_LAYERS, "layers_per_block", f"at most {MAX_LAYERS}")
        require(all(w % groups == 0 for w in widths), "block_out_channels", f"multiples of norm_num_groups ({groups})")
        down, up = (SKIP_DOWN_BLOCKS, SKIP_UP_BLOCKS) if self.has_skip_blocks else (DOWN_BLOCKS, UP_BLOCKS)
        self.require_names("down_block_types", len(widths), *down)
        self.require_names("up_block_types", len(widths), *up)
        if self.has_skip_blocks:
            bound = f"multiples of {WIDTH_MULTIPLE} with Skip blocks"
            require(all(w % WIDTH_MULTIPLE == 0 for w in widths), "block_out_channels", bound)
            for field in ("in_channels", "out_channels"):
                require(getattr(self, field) == IMAGE_CHANNELS, field, f"{IMAGE_CHANNELS} with Skip blocks")
        require(self.mid_block_type in ("UNetMidBlock2D", None), "mid_block_type", "UNetMidBlock2D or null")
        self.require_among("time_embedding_type", "positional", "fourier", "learned")
        if self.time_embedding_type == "learned":
            require(is_count(self.num_train_timesteps), "num_train_timesteps", "a positive integer")
        self.require_among("downsample_type", "conv", "resnet")
        self.require_among("upsample_type", "conv", "resnet")
        require(self.downsample_padding in (0, 1), "downsample_padding", "0 or 1")
        self.require_among("act_fn", *ACTIVATIONS)
        self.require_among("resnet_time_scale_shift", "default", "scale_shift")
        require(self.class_embed_type is None, "class_embed_type", "null (labels come from num_class_embeds)")
        sizes = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,) * 2
        sized = self.sample_size is None or (len(sizes) == 2 and all(map(is_count, sizes)))
        require(sized, "sample_size", "a positive integer, two of them (height, width) or null")
        narrowest = min(self._attending_widths, default=None)
        if self.attention_head_dim is not None and narrowest is not None:
            require(self.attention_head_dim <= narrowest, "attention_head_dim", f"at most {narrowest}")
        if self.num_heads is not None:
            divisor = f"a divisor of each width with attention, {self._attending_widths}"
            require(all(width % self.num_heads == 0 for width in self._attending_widths), "num_heads", divisor)
        if self.attn_norm_num_groups is not None:
            require(widths[-1] % self.attn_norm_num_groups == 0, "attn_norm_num_groups", f"a divisor of {widths[-1]}")
        require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        half = self.time_width // 2
        require(self.freq_shift < half, "freq_shift", f"below {half}")

    @property
    def widths(self) -> tuple[int, ...]:
        return self.block_out_channels

    def pass_bytes(self, size_px: tuple[int, int]) -> int:
        """Estimate the memory of a forward pass of one image, in bytes.

        The estimate includes feature maps, skip connections and attention.
        """
        height, width = size_px
        total = 0
        names = list(zip(self.down_block_types, self.up_block_types[::-1], strict=True))
        for level, (channels, blocks) in enumerate(zip(self.block_out_channels, names, strict=True)):
            pixels = height * width >> 2 * level
            total += 4 * channels * pixels * (self.layers_per_block + MAPS_PER_LAYER)
            if any(name.startswith("Attn") for name in blocks):
                total += 4 * (channels // self.head_width(channels)) * pixels**2
        return total

    @property
    def has_skip_blocks(self) -> bool:
        lists = (self.down_block_types, self.up_block_types)
        named = (name for names in lists if isinstance(names, tuple) for name in names)
        return any(name in SKIP_DOWN_BLOCKS + SKIP_UP_BLOCKS for name in named)

    def groups(self, channels: int) -> int:
        """Return the number of groups for a group norm over `channels`. Skip blocks use `groups_of`."""
        return self.norm_num_groups or groups_of(channels)

    @property
    def time_width(self) -> int:
        """The width of the timestep's encoding: sines and cosines, or a learned table."""
        width = self.time_proj_dim or self.block_out_channels[0]
        return 2 * width if self.time_embedding_type == "fourier" else width

    @property
    def temb_dim(self) -> int:
        """The width of the joint embedding of timestep and class."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def class_name(self) -> str:
        """UNet2DModel if diffusers can run the network, otherwise OWN_CLASS_NAME."""
        own = any(getattr(self, field) != usual for field, usual in OWN_FIELDS.items())
        return OWN_CLASS_NAME if own else CLASS_NAME

    def head_width(self, channels: int) -> int:
        return channels // self.num_heads if self.num_heads is not None else self.attention_head_dim or channels

    @property
    def _attending_widths(self) -> list[int]:
        widths = self.block_out_channels
        named = zip(self.down_block_types + self.up_block_types, widths + widths[::-1], strict=True)
        mid = widths[-1:] if self.mid_block_type is not None and self.add_attention else ()
        return [width for name, width in named if name.startswith("Attn")] + list(mid)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this number, because each block but the last halves them."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Read a diffusers config.json. Block names may have the old prefix UNetRes, which is removed.

        Raises ValueError for an unsupported _class_name, for an unknown field that is not off, and for invalid values.
        """
        class_name = config.get("_class_name", CLASS_NAME)
        if class_name not in (CLASS_NAME, OWN_CLASS_NAME):
            raise ValueError(f"unet config: _class_name must be {CLASS_NAME}, got {class_name!r:.100}")
        known = {field.name for field in dataclasses.fields(cls)}
        known -= OWN_FIELDS.keys() if class_name == CLASS_NAME else set()
        values: dict[str, Any] = {}
        for key, value in given_fields(config).items():
            if key not in known:
                if not is_off(value) and key not in OF_TRAINING:
                    raise ValueError(f"unet config: {key}={value!r:.100} is not a known setting of UNet2DModel")
                log.info("unet config: %s=%r changes nothing", key, value)
                continue
            if key in ("down_block_types", "up_block_types") and isinstance(value, (list, tuple)):
                value = [str(name).removeprefix("UNetRes") for name in value]
            values[key] = value
        return cls.from_json(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json. OWN_FIELDS are omitted if diffusers can run the network."""
        fields = dataclasses.asdict(self)
        if self.class_name == CLASS_NAME:
            fields = {name: value for name, value in fields.items() if name not in OWN_FIELDS}
        return {"_class_name": self.class_name, **fields}


def groups_of(channels: int) -> int:
    """Return the default number of groups for a group norm over `channels`."""
    return min(channels // 4, 32)
