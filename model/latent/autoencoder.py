"""The autoencoders `AutoencoderKL` (Kingma & Welling 2014) and `VQModel` (Esser et al. 2021).

Modules are named as in diffusers. Images are [B, C, H, W] in [-1, 1], latents [B, c, H / factor, W / factor].
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tminus.model.config import (
    Checked,
    Count,
    Counts,
    Flag,
    Number,
    OptionalCount,
    PositiveNumber,
    given_fields,
    is_count,
    is_off,
)
from tminus.model.files import AUTOENCODERS, CheckpointError, first_line, read_json, write_json
from tminus.model.layers import ACTIVATIONS, Attention, Downsample, ResnetBlock, Upsample
from tminus.model.pixels import MAX_CHANNELS, to_model_range
from tminus.model.weights import hash_weights, load_state_dict, misfit, to_float32, write_weights

VQ, KL = "VQModel", "AutoencoderKL"
# The default of diffusers' AutoencoderKL: 1 / the standard deviation of Stable Diffusion's latents.
USUAL_SCALE = 0.18215
DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
MAX_LAYERS = 64
MAPS_PER_LAYER = 3  # feature maps of full width that are in memory at the same time
# Ignored fields: force_upcast only matters in half precision, and decoding never uses lookup_from_codebook.
OF_OTHERS = frozenset(("force_upcast", "lookup_from_codebook"))
EPS = 1e-6  # for all group norms
LOGVAR = (-30.0, 20.0)  # as in diffusers
BATCH_PIXELS = 2**18  # 64 images of 64x64, or 4 of 256x256
IMAGES, CELLS, LATENTS = 32, 4, 8  # images of each kind; patches and latents along each side of an image
TINT = 0.25  # largest tint of a grey patch
RIDGE = 1e-3  # keeps the fit finite if a latent channel carries no colour


@dataclass(frozen=True, slots=True)
class AutoencoderConfig(Checked):
    """The configuration of an AutoencoderKL or a VQModel. Fields of the other class keep their defaults.

    Raises ValueError, with the field and its value, if the autoencoder cannot be built.
    """

    KIND: ClassVar[str] = "autoencoder config: "

    kind: str = KL
    in_channels: Count = 3
    out_channels: Count = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: Counts = (64,)
    layers_per_block: Count = 1
    act_fn: str = "silu"
    latent_channels: Count = 4
    sample_size: int | tuple[int, int] = 32
    norm_num_groups: Count = 32
    scaling_factor: PositiveNumber = USUAL_SCALE
    """Latents are multiplied by this before they enter the denoising network: 1 / their standard deviation."""
    shift_factor: Number = 0.0
    """Latents are shifted by minus this before they are scaled; AutoencoderKL only."""
    mid_block_add_attention: Flag = True
    use_quant_conv: Flag = True
    use_post_quant_conv: Flag = True
    num_vq_embeddings: Count = 256
    vq_embed_dim: OptionalCount = None

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        require, widths, groups = self.require, self.block_out_channels, self.norm_num_groups
        self.require_among("kind", VQ, KL)
        require(self.in_channels == self.out_channels, "out_channels", f"in_channels ({self.in_channels})")
        require(self.in_channels <= MAX_CHANNELS, "in_channels", f"at most {MAX_CHANNELS}")
        sizes = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,)
        require(all(map(is_count, sizes)), "sample_size", "a positive integer or two")
        require(self.layers_per_block <= MAX_LAYERS, "layers_per_block", f"at most {MAX_LAYERS}")
        require(all(w % groups == 0 for w in widths), "block_out_channels", f"multiples of norm_num_groups ({groups})")
        for field, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            self.require_names(field, len(widths), *known)
        self.require_among("act_fn", *ACTIVATIONS)

    @property
    def factor(self) -> int:
        """Pixels per latent along each side. Every block but the last halves the size."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def code_width(self) -> int:
        """Width of a VQModel's codes."""
        return self.vq_embed_dim or self.latent_channels

    @property
    def channels(self) -> int:
        """Number of latent channels."""
        return self.code_width if self.kind == VQ else self.latent_channels

    def pass_bytes(self, size_px: tuple[int, int]) -> int:
        """Estimate the memory in bytes for decoding one image of (height, width) in float32."""
        height, width = size_px
        last = len(self.block_out_channels) - 1
        total = 0
        for level, (channels, name) in enumerate(zip(self.block_out_channels, self.up_block_types[::-1], strict=True)):
            pixels = height * width >> 2 * level
            total += 4 * channels * pixels * MAPS_PER_LAYER
            if name.startswith("Attn") or (level == last and self.mid_block_add_attention):
                total += 4 * pixels**2
        if self.kind == VQ:  # distances from all latents to all codes
            total += 4 * (height * width >> 2 * last) * self.num_vq_embeddings
        return total

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "AutoencoderConfig":
        """Parse a config.json of diffusers. Raises ValueError for another class or an unsupported field.

        If a VQModel has no scaling_factor, it is 1: the latents of CompVis' ldm-celebahq-256 are not scaled. The
        default in diffusers, 0.18215, belongs to another autoencoder.
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
                values[key] = value
            elif not is_off(value) and key not in OF_OTHERS and (key, value) != ("norm_type", "group"):
                raise ValueError(f"autoencoder config: {key}={value!r:.100} is not served")
        return cls.from_json(values, kind=kind)

    def to_dict(self) -> dict[str, Any]:
        """Return the config.json for diffusers."""
        fields = dataclasses.asdict(self)
        for name in ("kind", *(_OF_KL if self.kind == VQ else ("num_vq_embeddings", "vq_embed_dim"))):
            del fields[name]
        return {"_class_name": self.kind, **fields}


_OF_KL = frozenset(("shift_factor", "use_quant_conv", "use_post_quant_conv"))


class Autoencoder(nn.Module):
    """An encoder, a bottleneck and a decoder. The latents are scaled for the denoising network."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        inner, codes = config.latent_channels, config.code_width
        vector_quantised = config.kind == VQ
        self.encoder = _Encoder(config, inner if vector_quantised else 2 * inner)
        self.decoder = _Decoder(config)
        self.quantize: Quantizer | None = None
        self.quant_conv: nn.Conv2d | None = None
        self.post_quant_conv: nn.Conv2d | None = None
        if vector_quantised:
            self.quantize = Quantizer(config.num_vq_embeddings, codes)
            self.quant_conv, self.post_quant_conv = nn.Conv2d(inner, codes, 1), nn.Conv2d(codes, inner, 1)
        else:
            if config.use_quant_conv:
                self.quant_conv = nn.Conv2d(2 * inner, 2 * inner, 1)
            if config.use_post_quant_conv:
                self.post_quant_conv = nn.Conv2d(inner, inner, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images into scaled latents. For an AutoencoderKL, these are the means."""
        return self.scaled(self.moments(images)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents. A VQModel first replaces each latent by the nearest code, as in training."""
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return self.decode_codes(self.quantize(z)[0] if self.quantize is not None else z)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the unscaled latents of images, and the log variance (None for a VQModel)."""
        h = self.encoder(images)
        if self.quant_conv is not None:
            h = self.quant_conv(h)
        if self.quantize is not None:
            return h, None
        mean, logvar = h.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    def scaled(self, z: Tensor) -> Tensor:
        """Shift and scale latents for the denoising network."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def decode_codes(self, z: Tensor) -> Tensor:
        """Decode unscaled latents, without replacing them by codes."""
        out: Tensor = self.decoder(self.post_quant_conv(z) if self.post_quant_conv is not None else z)
        return out


class Quantizer(nn.Module):
    """A codebook, which replaces each latent by the nearest code (van den Oord et al. 2017)."""

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        codes = torch.empty(num_codes, width).uniform_(-1 / num_codes, 1 / num_codes)
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(codes, freeze=False)  # type: ignore[no-untyped-call]

    @property
    def codes(self) -> Tensor:
        """The codebook [K, width]."""
        weight: Tensor = self.embedding.weight
        return weight

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the code nearest to each latent in z [B, width, h, w], and the codes' indices [B, h, w]."""
        flat = z.movedim(1, -1)
        # |z - e|^2 without the term |z|^2, which is the same for all codes
        distance = self.codes.square().sum(1) - 2 * flat.flatten(0, -2) @ self.codes.T
        nearest = distance.argmin(dim=1)
        return self.codes[nearest].reshape(flat.shape).movedim(-1, 1), nearest.reshape(flat.shape[:-1])


class _Block(nn.Module):
    """Resnets, each followed by attention if `attends`. Subclasses add the downsampling or upsampling."""

    def __init__(self, config: AutoencoderConfig, in_channels: int, out: int, layers: int, *, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(
                in_channels if k == 0 else out, out, None, groups=config.norm_num_groups, eps=EPS, act=config.act_fn
            )
            for k in range(layers)
        )
        self.attentions: nn.ModuleList | None = None
        if attends:
            self.attentions = nn.ModuleList(_attention(config, out) for _ in range(layers))

    def forward(self, h: Tensor) -> Tensor:
        for k, resnet in enumerate(self.resnets):
            h = resnet(h)
            if self.attentions is not None:
                h = self.attentions[k](h)
        return h


def _attention(config: AutoencoderConfig, channels: int) -> Attention:
    return Attention(channels, channels, groups=config.norm_num_groups, eps=EPS)  # one head


class _DownBlock(_Block):
    def __init__(self, config: AutoencoderConfig, in_channels: int, level: int) -> None:
        out, attends = config.block_out_channels[level], config.down_block_types[level].startswith("Attn")
        super().__init__(config, in_channels, out, config.layers_per_block, attends=attends)
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(out, padding=0)])

    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h)
        return h if self.downsamplers is None else self.downsamplers[0](h)


class _UpBlock(_Block):
    def __init__(self, config: AutoencoderConfig, in_channels: int, number: int) -> None:
        out, attends = config.block_out_channels[::-1][number], config.up_block_types[number].startswith("Attn")
        super().__init__(config, in_channels, out, config.layers_per_block + 1, attends=attends)
        last = number == len(config.block_out_channels) - 1
        self.upsamplers = None if last else nn.ModuleList([Upsample(out)])

    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h)
        return h if self.upsamplers is None else self.upsamplers[0](h)


class _MidBlock(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width, groups, act = config.block_out_channels[-1], config.norm_num_groups, config.act_fn
        self.resnets = nn.ModuleList(ResnetBlock(width, width, None, groups=groups, eps=EPS, act=act) for _ in range(2))
        self.attentions: nn.ModuleList | None = None
        if config.mid_block_add_attention:
            self.attentions = nn.ModuleList([_attention(config, width)])

    def forward(self, h: Tensor) -> Tensor:
        h = self.resnets[0](h)
        if self.attentions is not None:
            h = self.attentions[0](h)
        out: Tensor = self.resnets[1](h)
        return out


class _Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig, out_channels: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _DownBlock(config, widths[max(level - 1, 0)], level) for level in range(len(widths))
        )
        self.mid_block = _MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for block in self.down_blocks:
            h = block(h)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))
        return out


class _Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        up = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, up[0], 3, padding=1)
        self.mid_block = _MidBlock(config)
        self.up_blocks = nn.ModuleList(_UpBlock(config, up[max(k - 1, 0)], k) for k in range(len(up)))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, up[-1], EPS)
        self.conv_out = nn.Conv2d(up[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out


@torch.no_grad()
def latents_of(autoencoder: Autoencoder, images: Tensor, device: torch.device) -> Tensor:
    """Encode images, uint8 [N, C, H, W], into scaled latents, float32 [N, c, h, w], on `device`.

    Moves the autoencoder to `device`.
    """
    autoencoder = autoencoder.to(device)
    parts = list(_batches(images, images.shape[2] * images.shape[3]))
    progress = tqdm(parts, unit="batch", desc="latents", disable=None if len(parts) > 100 else True)
    return torch.cat([autoencoder.encode(to_model_range(part.to(device))) for part in progress])


@torch.no_grad()
def images_of(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Decode scaled latents [N, c, h, w] into images [N, C, H, W] in about [-1, 1], on the same device."""
    autoencoder = autoencoder.to(latents.device)
    pixels = latents.shape[2] * latents.shape[3] * autoencoder.config.factor**2
    return torch.cat([autoencoder.decode(part) for part in _batches(latents, pixels)])


def _batches(values: Tensor, pixels: int) -> Iterator[Tensor]:
    yield from torch.split(values, max(1, BATCH_PIXELS // pixels))


@torch.no_grad()
def fit_colours(autoencoder: Autoencoder) -> Tensor:
    """Fit a linear map [C, c + 1] from a latent to the mean colour of its pixels. The last column is an offset.

    This needs no data. The map is fitted to patches of random colours, of tinted greys, and of black and white. The
    patches are always the same. On avatars-64, the mean error is 0.150 for colours in [-1, 1], as good as the best
    linear map for those images. With random colours alone it is 0.19, and with smooth colours 0.22.
    """
    config, generator = autoencoder.config, torch.Generator().manual_seed(0)

    def draw(channels: int, side: int = CELLS) -> Tensor:
        return torch.rand(IMAGES, channels, side, side, generator=generator) * 2 - 1

    colours, greys, tints = draw(config.in_channels), draw(1), TINT * draw(config.in_channels, 1)
    black_and_white = draw(1).sign().expand_as(colours)
    patches = torch.cat([colours, (greys + tints).clamp(-1, 1), black_and_white])
    images = F.interpolate(patches, size=LATENTS * config.factor, mode="nearest")
    latents = autoencoder.encode(images).movedim(1, -1).flatten(0, -2).double()  # [N, c]
    target = F.avg_pool2d(images, config.factor).movedim(1, -1).flatten(0, -2).double()  # [N, C]
    known = F.pad(latents, (0, 1), value=1.0)
    square = known.T @ known + RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
    fitted: Tensor = torch.linalg.solve(square, known.T @ target).T.float()
    return fitted


def colours_of(latents: Tensor, fitted: Tensor, factor: int) -> Tensor:
    """Turn latents [B, c, h, w] into images of one colour per latent, [B, C, h factor, w factor] in about [-1, 1]."""
    flat = F.conv2d(latents, fitted[:, :-1, None, None], fitted[:, -1])
    return F.interpolate(flat, scale_factor=float(factor), mode="nearest")


# --- folders, in diffusers' layout: config.json and the weights ---


def find_autoencoder(folder: Path) -> Path | None:
    """Return the folder of a checkpoint's autoencoder, or None for a pixel model."""
    return next((folder / name for name in AUTOENCODERS if (folder / name).is_dir()), None)


def check_place(folder: Path, autoencoder: Autoencoder | None) -> None:
    """Raise CheckpointError if a pixel model's folder has an autoencoder, which would be loaded with it."""
    if autoencoder is None and (found := find_autoencoder(folder)) is not None:
        why = f"has an autoencoder in {found.name}/, and this model is one of pixels"
        raise CheckpointError(f"{folder}: {why}; remove it or choose another folder")


def load_autoencoder(folder: Path) -> Autoencoder:
    """Load an autoencoder in float32 and eval mode, on the CPU. Raises CheckpointError if that fails."""
    try:
        config = AutoencoderConfig.from_dict(read_json(folder / "config.json"))
        with torch.device("meta"):
            autoencoder = Autoencoder(config)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {first_line(error)}") from error
    state = load_state_dict(folder)
    if wrong := misfit(state, autoencoder):
        raise CheckpointError(f"{folder}: {wrong}")
    state = to_float32(folder, state)
    autoencoder.load_state_dict(state, assign=True)
    return autoencoder.requires_grad_(False).eval()


def with_autoencoder(weights_hash: str, autoencoder: Autoencoder | None) -> str:
    """Combine the hash of a network's weights with that of its autoencoder, if there is one."""
    if autoencoder is None:
        return weights_hash
    return hashlib.sha256(f"{weights_hash} {hash_autoencoder(autoencoder)}".encode()).hexdigest()


def hash_autoencoder(autoencoder: Autoencoder) -> str:
    """Hash an autoencoder's weights and config. The config includes the scale of the latents."""
    parts = hash_weights(autoencoder.state_dict()), json.dumps(autoencoder.config.to_dict(), sort_keys=True)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def save_autoencoder(folder: Path, config: AutoencoderConfig, state: Mapping[str, Tensor]) -> None:
    """Write a folder that tminus and diffusers can load. Each file is written atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, state)
    write_json(folder / "config.json", config.to_dict())  # last, because a folder with a config.json counts as complete
