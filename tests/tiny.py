"""The tiny networks that the tests share."""

import torch

from tminus.model.networks.lucidrains import LucidrainsConfig
from tminus.model.unet_config import UNetConfig

TINY = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
)

LUCIDRAINS = LucidrainsConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    dim=8,
    init_dim=8,
    level_widths=(8, 16),
    attn_heads=(2, 2),
    attn_dim_head=(4, 4),
    full_attn=(False, True),
)


def randomize(net: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter at random, norms and biases too, so that no wrong path hides behind a one or a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            scale = fan_in**-0.5 if parameter.ndim > 1 else 0.3
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
