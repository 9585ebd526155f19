"""The U-Net that predicts eps, and its configuration: the module names and the fields of diffusers' `UNet2DModel`."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tminus.model.config import given_fields, is_count, is_off
from tminus.model.denoiser import Denoiser, NetConfig
from tminus.model.layers import (
    ACTIVATIONS,
    Attention,
    Downsample,
    FourierFeatures,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    average_down,
    nearest_up,
    sinusoidal_embedding,
)
from tminus.model.skip_blocks import IMAGE_CHANNELS, WIDTH_MULTIPLE, SkipDownBlock, SkipUpBlock, groups_of

log = logging.getLogger(__name__)

CLASS_NAME = "UNet2DModel"
OWN_CLASS_NAME = "TminusUNet2DModel"  # of networks with OWN_FIELDS, which diffusers would run wrongly
MAX_LAYERS = 64  # far above any known net, far below one that takes minutes to build
MAPS_PER_LAYER = 3  # of a layer's width that are alive at once: its input, its output, and one between
# Fields of training that change nothing of the network: those of the EMA in diffusers' training scripts.
OF_TRAINING = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
SKIP_DOWN_BLOCKS = ("SkipDownBlock2D", "AttnSkipDownBlock2D")  # of networks that have no others
# Fields that are not of UNet2DModel, and the values by which a network is one.
OWN_FIELDS: Mapping[str, Any] = {"num_heads": None, "time_proj_dim": None, "timestep_scale": 1.0}
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
SKIP_UP_BLOCKS = ("SkipUpBlock2D", "AttnSkipUpBlock2D")


@dataclass(frozen=True, slots=True)
class UNetConfig(NetConfig):
    """The fields and defaults of diffusers' `UNet2DModel` that DDPM-family checkpoints use, and OWN_FIELDS.

    Raises ValueError, naming the field and its value, for a network that cannot be built.
    """

    KIND: ClassVar[str] = "unet config: "

    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int | None = 32
    """None only of a network of Skip blocks, see `groups`."""
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_train_timesteps: int | None = None
    num_heads: int | None = None
    """The heads of every attention, whatever its width; goes before attention_head_dim."""
    time_proj_dim: int | None = None
    """The width of the timestep's sines and cosines, where it is not the first of block_out_channels."""
    timestep_scale: float = 1.0
    """What timesteps are multiplied by: 1000 / T for networks trained with OpenAI's rescale_timesteps."""

    def __post_init__(self) -> None:
        NetConfig.__post_init__(self)
        self.require_counts("layers_per_block", *(() if self.has_skip_blocks else ("norm_num_groups",)))
        self.require_optional_counts("time_embedding_dim", "attention_head_dim", "attn_norm_num_groups")
        self.require_optional_counts("norm_num_groups", "num_heads", "time_proj_dim")
        self.require_lists("block_out_channels")
        self.require_positive_numbers("timestep_scale", "norm_eps", "mid_block_scale_factor")
        self.require_numbers("dropout", "freq_shift")
        require, widths, groups = self.require, self.block_out_channels, self.norm_num_groups or 1
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
            self.require_counts("num_train_timesteps")
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
        """Roughly what one row takes in a forward pass: feature maps, those kept for the way up, attention."""
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
        """Whether it has the blocks of skip_blocks.py."""
        lists = (self.down_block_types, self.up_block_types)
        named = (name for names in lists if isinstance(names, tuple) for name in names)
        return any(name in SKIP_DOWN_BLOCKS + SKIP_UP_BLOCKS for name in named)

    def groups(self, channels: int) -> int:
        """The groups of a group norm over so many channels, outside of Skip blocks."""
        return self.norm_num_groups or groups_of(channels)

    @property
    def time_width(self) -> int:
        """The width of the timestep's sines and cosines."""
        width = self.time_proj_dim or self.block_out_channels[0]
        return 2 * width if self.time_embedding_type == "fourier" else width

    @property
    def temb_dim(self) -> int:
        """The width of what timestep and class are embedded to."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def class_name(self) -> str:
        """UNet2DModel for a network that diffusers can run too."""
        own = any(getattr(self, field) != usual for field, usual in OWN_FIELDS.items())
        return OWN_CLASS_NAME if own else CLASS_NAME

    def head_width(self, channels: int) -> int:
        """The width of a head of an attention over so many channels."""
        return channels // self.num_heads if self.num_heads is not None else self.attention_head_dim or channels

    @property
    def _attending_widths(self) -> list[int]:
        widths = self.block_out_channels
        named = zip(self.down_block_types + self.up_block_types, widths + widths[::-1], strict=True)
        mid = widths[-1:] if self.mid_block_type is not None and self.add_attention else ()
        return [width for name, width in named if name.startswith("Attn")] + list(mid)

    @property
    def size_multiple(self) -> int:
        """Height and width must divide by this: every block but the last halves them."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Read a diffusers config.json. A leading UNetRes of a block's name is stripped.

        Raises ValueError for another network than UNet2DModel, and for a field that is not known and not off.
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
        """The config.json of diffusers' UNet2DModel, or of a network that is not one."""
        fields = dataclasses.asdict(self)
        if self.class_name == CLASS_NAME:
            fields = {name: value for name, value in fields.items() if name not in OWN_FIELDS}
        return {"_class_name": self.class_name, **fields}


def _resnet(config: UNetConfig, in_channels: int, out_channels: int, **kwargs: Any) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        config.temb_dim,
        groups=config.groups(in_channels),
        groups_out=config.groups(out_channels),
        eps=config.norm_eps,
        act=config.act_fn,
        dropout=config.dropout,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        **kwargs,
    )


def _attentions(config: UNetConfig, channels: int, count: int) -> nn.ModuleList:
    width, groups, eps = config.head_width(channels), config.groups(channels), config.norm_eps
    return nn.ModuleList(Attention(channels, width, groups=groups, eps=eps) for _ in range(count))


class DownBlock(nn.Module):
    """Resnets (each followed by attention in an Attn block), then a downsampler unless this is the last block."""

    def __init__(self, kind: str, config: UNetConfig, in_channels: int, out: int, last: bool) -> None:
        super().__init__()
        layers = config.layers_per_block
        self.resnets = nn.ModuleList(_resnet(config, in_channels if i == 0 else out, out) for i in range(layers))
        attends = kind == "AttnDownBlock2D"
        self.attentions = _attentions(config, out, layers) if attends else None
        by_resnet = kind == "ResnetDownsampleBlock2D" or (attends and config.downsample_type == "resnet")
        self.downsamplers: nn.ModuleList | None = None
        if not last:
            by_conv = None if by_resnet else Downsample(out, config.downsample_padding)
            self.downsamplers = nn.ModuleList([by_conv or _resnet(config, out, out, resample=average_down)])

    def forward(self, h: Tensor, act_temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, act_temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
            skips.append(h)
        if self.downsamplers is not None:
            h = _resample(self.downsamplers[0], h, act_temb)
            skips.append(h)
        return h, skips


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, scale = config.block_out_channels[-1], float(config.mid_block_scale_factor)
        groups = config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift != "scale_shift":
            groups = config.groups(channels)
        self.resnets = nn.ModuleList(_resnet(config, channels, channels, output_scale_factor=scale) for _ in range(2))
        self.attentions: nn.ModuleList | None = None
        if config.add_attention:
            width, eps = config.head_width(channels), config.norm_eps
            attention = Attention(channels, width, groups=groups, eps=eps, output_scale_factor=scale)
            self.attentions = nn.ModuleList([attention])

    def forward(self, h: Tensor, act_temb: Tensor) -> Tensor:
        h = self.resnets[0](h, act_temb)
        if self.attentions is not None:
            h = self.attentions[0](h)
        out: Tensor = self.resnets[1](h, act_temb)
        return out


class UpBlock(nn.Module):
    """One resnet more than the down block, each with a skip connection, then an upsampler unless this is the last."""

    def __init__(self, kind: str, config: UNetConfig, prev: int, skip_last: int, out: int, last: bool) -> None:
        super().__init__()
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList()
        for i in range(layers):
            h_channels, skip_channels = (prev if i == 0 else out), (skip_last if i == layers - 1 else out)
            self.resnets.append(_resnet(config, h_channels + skip_channels, out))
        attends = kind == "AttnUpBlock2D"
        self.attentions = _attentions(config, out, layers) if attends else None
        by_resnet = kind == "ResnetUpsampleBlock2D" or (attends and config.upsample_type == "resnet")
        self.upsamplers: nn.ModuleList | None = None
        if not last:
            by_conv = None if by_resnet else Upsample(out)
            self.upsamplers = nn.ModuleList([by_conv or _resnet(config, out, out, resample=nearest_up)])

    def forward(self, h: Tensor, skips: list[Tensor], act_temb: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), act_temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
        if self.upsamplers is not None:
            h = _resample(self.upsamplers[0], h, act_temb)
        return h


def _down_block(kind: str, config: UNetConfig, in_channels: int, out: int, last: bool) -> nn.Module:
    if kind in SKIP_DOWN_BLOCKS:
        return SkipDownBlock(kind == "AttnSkipDownBlock2D", config, in_channels, out, last)
    return DownBlock(kind, config, in_channels, out, last)


def _up_block(kind: str, config: UNetConfig, prev: int, skip_last: int, out: int, last: bool) -> nn.Module:
    if kind in SKIP_UP_BLOCKS:
        return SkipUpBlock(kind == "AttnSkipUpBlock2D", config, prev, skip_last, out, last)
    return UpBlock(kind, config, prev, skip_last, out, last)


def _resample(module: nn.Module, h: Tensor, act_temb: Tensor) -> Tensor:
    out: Tensor = module(h, act_temb) if isinstance(module, ResnetBlock) else module(h)
    return out


def _embedding(count: int, width: int) -> nn.Embedding:
    """An embedding with nn.Embedding's own initialisation, but on the meta device none.

    There torch would import torch._dynamo or sympy, which takes longer than all the rest of loading a checkpoint.
    """
    weight = torch.empty(count, width)
    if not weight.is_meta:
        torch.randn(count, width, out=weight)
    embedding: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
    return embedding


def _embed_time(
    config: UNetConfig, own: nn.Embedding | FourierFeatures | None, mlp: TimestepEmbedding, t: Tensor
) -> Tensor:
    if isinstance(own, nn.Embedding):
        embedding = own(t.long())
    elif own is not None:
        embedding = own(t * config.timestep_scale)
    else:
        embedding = sinusoidal_embedding(
            t * config.timestep_scale,
            config.time_width,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
    out: Tensor = mlp(embedding.to(mlp.linear_1.weight.dtype))
    return out


class UNet2D(Denoiser):
    """The U-Net of Ho et al. 2020 and its descendants, as diffusers' `UNet2DModel`."""

    config: UNetConfig
    unit_input = False
    """Whether it was trained on images in [0, 1], which its config does not say: (x + 1) / 2 is then what it sees."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.act = ACTIVATIONS[config.act_fn]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_proj: nn.Embedding | FourierFeatures | None = None
        if config.time_embedding_type == "learned":
            self.time_proj = _embedding(config.num_train_timesteps or 0, config.time_width)
        elif config.time_embedding_type == "fourier":
            self.time_proj = FourierFeatures(config.time_width // 2)
        self.time_embedding = TimestepEmbedding(config.time_width, config.temb_dim)
        self.class_embedding: nn.Embedding | None = None
        if config.num_class_embeds is not None:
            self.class_embedding = _embedding(config.num_class_embeds, config.temb_dim)

        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            _down_block(kind, config, widths[max(i - 1, 0)], widths[i], last=i == last)
            for i, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidBlock(config) if config.mid_block_type is not None else None
        up = widths[::-1]
        self.up_blocks = nn.ModuleList(
            _up_block(kind, config, up[max(i - 1, 0)], up[min(i + 1, last)], up[i], last=i == last)
            for i, kind in enumerate(config.up_block_types)
        )
        self.conv_norm_out = nn.GroupNorm(config.groups(widths[0]), widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @property
    def fractional(self) -> bool:
        """A learned embedding has whole timesteps only."""
        return not isinstance(self.time_proj, nn.Embedding)

    def time_embedder(self) -> Callable[[Tensor], Tensor]:
        return partial(_embed_time, self.config, self.time_proj, self.time_embedding)

    def denoise(self, x: Tensor, act_temb: Tensor) -> Tensor:
        centred = self.config.center_input_sample
        if centred != self.unit_input:  # both together give x back
            x = 2 * x - 1 if centred else (x + 1) / 2
        h: Tensor = self.conv_in(x)
        skips, image = [h], x  # the image is Skip blocks'
        for block in self.down_blocks:
            if isinstance(block, SkipDownBlock):
                h, block_skips, image = block(h, act_temb, image)
            else:
                h, block_skips = block(h, act_temb)
            skips += block_skips
        if self.mid_block is not None:
            h = self.mid_block(h, act_temb)
        added: Tensor | None = None
        for block in self.up_blocks:
            if isinstance(block, SkipUpBlock):
                h, added = block(h, skips, act_temb, added)
            else:
                h = block(h, skips, act_temb)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out if added is None else out + added

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.down_blocks, *([self.mid_block] if self.mid_block is not None else []), *self.up_blocks]
