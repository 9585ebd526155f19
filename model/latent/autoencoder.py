"""Autoencoders with diffusers' module names: `AutoencoderKL` (Kingma & Welling 2014) and `VQModel` (Esser et al. 2021).

Images [B, C, H, W] in [-1, 1], latents [B, c, H / factor, W / factor].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tminus.model.latent.config import VQ, AutoencoderConfig
from tminus.model.layers import Attention, Downsample, ResnetBlock, Upsample

EPS = 1e-6  # of every group norm
LOGVAR = (-30.0, 20.0)  # as diffusers clamps it


class Autoencoder(nn.Module):
    """An encoder, a bottleneck and a decoder. Latents have the spread that the network of eps is trained on."""

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
        """Latents of images, scaled; of an AutoencoderKL the means."""
        return self.scaled(self.moments(images)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Images of scaled latents. A VQModel takes the nearest codes first, as it was trained to."""
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return self.decode_codes(self.quantize(z)[0] if self.quantize is not None else z)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The unscaled latents of images, and of an AutoencoderKL log sigma^2 of their distribution."""
        h = self.encoder(images)
        if self.quant_conv is not None:
            h = self.quant_conv(h)
        if self.quantize is not None:
            return h, None
        mean, logvar = h.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    def scaled(self, z: Tensor) -> Tensor:
        """Bring latents to the spread that the network of eps is trained on."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def decode_codes(self, z: Tensor) -> Tensor:
        """Images of unscaled latents as they are, not quantised."""
        out: Tensor = self.decoder(self.post_quant_conv(z) if self.post_quant_conv is not None else z)
        return out


class Quantizer(nn.Module):
    """The codebook: each latent's nearest code (van den Oord et al. 2017)."""

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        codes = torch.empty(num_codes, width).uniform_(-1 / num_codes, 1 / num_codes)
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(codes, freeze=False)  # type: ignore[no-untyped-call]

    @property
    def codes(self) -> Tensor:
        """[K, width]."""
        weight: Tensor = self.embedding.weight
        return weight

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes of z [B, width, h, w], and their numbers [B, h, w]."""
        flat = z.movedim(1, -1)
        # |z - e|^2 less |z|^2, which is the same for all codes.
        distance = self.codes.square().sum(1) - 2 * flat.flatten(0, -2) @ self.codes.T
        nearest = distance.argmin(dim=1)
        return self.codes[nearest].reshape(flat.shape).movedim(-1, 1), nearest.reshape(flat.shape[:-1])


class _Block(nn.Module):
    """Resnets, each followed by attention in an Attn block, then a change of size unless it is the last block."""

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
    """Resnet, attention (of one head), resnet."""

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
