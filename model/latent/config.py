"""The configuration of an autoencoder: the fields of diffusers' `VQModel` and `AutoencoderKL`, and their bounds."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tminus.model.files import given_fields, is_off
from tminus.model.layers import ACTIVATIONS

VQ, KL = "VQModel", "AutoencoderKL"
USUAL_SCALE = 0.18215  # of diffusers' AutoencoderKL: 1 / the deviation of Stable Diffusion's latents
DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
MAX_LAYERS, MAX_BLOCKS, MAX_CHANNELS = 64, 16, 2**31 - 1
LARGEST = 1e30  # of a number that is not counted
MAPS_PER_LAYER = 3  # of a layer's width that are alive at once
# Fields that change nothing of what is served: how others save memory, and a look-up that decoding never makes.
OF_OTHERS = frozenset(("force_upcast", "lookup_from_codebook"))


@dataclass(frozen=True, slots=True)
class AutoencoderConfig:
    """The fields and defaults of both classes; those of one alone are left at their defaults in the other.

    Raises ValueError, naming the field and its value, for an autoencoder that cannot be built.
    """

    kind: str = KL
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    sample_size: int | tuple[int, int] = 32
    norm_num_groups: int = 32
    scaling_factor: float = USUAL_SCALE
    """Latents are multiplied by it before the network of eps sees them: 1 / their standard deviation."""
    shift_factor: float = 0.0
    """What is taken off them before that; AutoencoderKL only."""
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, field: str, bound: str) -> None:
            if not ok:
                raise ValueError(f"autoencoder config: {field} must be {bound}, got {getattr(self, field)!r}")

        def positive(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_CHANNELS

        require(self.kind in (VQ, KL), "kind", f"{VQ} or {KL}")
        for field in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "latent_channels"):
            require(positive(getattr(self, field)), field, "a positive integer")
        require(positive(self.num_vq_embeddings), "num_vq_embeddings", "a positive integer")
        require(self.vq_embed_dim is None or positive(self.vq_embed_dim), "vq_embed_dim", "a positive integer or null")
        require(self.in_channels == self.out_channels, "out_channels", f"in_channels ({self.in_channels})")
        require(self.in_channels in (1, 3), "in_channels", "1 or 3, as images are PNGs")
        widths, groups = self.block_out_channels, self.norm_num_groups
        for field in ("block_out_channels", "down_block_types", "up_block_types"):
            require(isinstance(getattr(self, field), tuple), field, "a list")
        sizes = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,)
        require(all(map(positive, sizes)), "sample_size", "a positive integer or two")
        require(self.layers_per_block <= MAX_LAYERS, "layers_per_block", f"at most {MAX_LAYERS}")
        require(1 <= len(widths) <= MAX_BLOCKS, "block_out_channels", f"1..{MAX_BLOCKS} widths")
        require(all(map(positive, widths)), "block_out_channels", "a list of positive integers")
        require(all(w % groups == 0 for w in widths), "block_out_channels", f"multiples of norm_num_groups ({groups})")
        for field, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            require(len(getattr(self, field)) == len(widths), field, f"{len(widths)} names, as block_out_channels")
            require(all(name in known for name in getattr(self, field)), field, f"among {', '.join(known)}")
        require(self.act_fn in ACTIVATIONS, "act_fn", f"among {', '.join(ACTIVATIONS)}")
        for field in ("scaling_factor", "shift_factor"):
            value = getattr(self, field)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST
            require(number and (value > 0 or field == "shift_factor"), field, "a finite number, a scale above 0")
        for field in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
            require(isinstance(getattr(self, field), bool), field, "true or false")

    @property
    def factor(self) -> int:
        """Pixels to a latent's side: every block but the last halves them."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def code_width(self) -> int:
        """Of a code of a VQModel, and so the channels of its latents."""
        return self.vq_embed_dim or self.latent_channels

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.code_width if self.kind == VQ else self.latent_channels

    def pass_bytes(self, size_px: tuple[int, int]) -> int:
        """Roughly what decoding one image of (height, width) takes in float32."""
        height, width = size_px
        last = len(self.block_out_channels) - 1
        total = 0
        for level, (channels, name) in enumerate(zip(self.block_out_channels, self.up_block_types[::-1], strict=True)):
            pixels = height * width >> 2 * level
            total += 4 * channels * pixels * MAPS_PER_LAYER
            if name.startswith("Attn") or (level == last and self.mid_block_add_attention):
                total += 4 * pixels**2
        if self.kind == VQ:  # from each latent to each code
            total += 4 * (height * width >> 2 * last) * self.num_vq_embeddings
        return total

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "AutoencoderConfig":
        """Read diffusers' config.json. Raises ValueError for another class, and for a field that is not honoured.

        A VQModel without a scaling_factor has 1: diffusers' default for it, 0.18215, is that of another autoencoder
        (the latents of CompVis' own ldm-celebahq-256 are not scaled).
        """
        kind = config.get("_class_name", KL)
        if kind not in (VQ, KL):
            raise ValueError(f"autoencoder config: _class_name must be {VQ} or {KL}, got {kind!r:.100}")
        known = {field.name for field in dataclasses.fields(cls)} - {"kind"}
        known -= {"num_vq_embeddings", "vq_embed_dim"} if kind == KL else _OF_KL
        values: dict[str, Any] = {"latent_channels": 4 if kind == KL else 3}
        values["scaling_factor"] = USUAL_SCALE if kind == KL else 1.0
        for key, value in given_fields(config).items():
            if key == "shift_factor" and is_off(value):
                continue
            if key in known:
                values[key] = tuple(value) if isinstance(value, list) else value
            elif not is_off(value) and key not in OF_OTHERS and (key, value) != ("norm_type", "group"):
                raise ValueError(f"autoencoder config: {key}={value!r:.100} is not served")
        try:
            return cls(kind=kind, **values)
        except TypeError as error:  # a value of a type that the checks do not expect
            raise ValueError(f"autoencoder config: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The config.json of diffusers' class."""
        fields = dataclasses.asdict(self)
        for name in ("kind", *(_OF_KL if self.kind == VQ else ("num_vq_embeddings", "vq_embed_dim"))):
            del fields[name]
        return {"_class_name": self.kind, **fields}


_OF_KL = frozenset(("shift_factor", "use_quant_conv", "use_post_quant_conv"))
