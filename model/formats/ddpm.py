"""The U-Net of Ho et al. 2020, with the weight names of the PyTorch port pesser/pytorch_diffusion.

A file holds only a state dict. An example is `ema_diffusion_cifar10_model/model-790000.ckpt`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from tminus.model.files import CheckpointError
from tminus.model.formats.conversion import Converted, GivenFacts, numbered
from tminus.model.unet_config import UNetConfig

FORMAT = "the PyTorch port of Ho et al.'s DDPM"
RENAMES = (
    (r"temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"norm_out\.", "conv_norm_out."),
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
    (r"(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
)
INSIDE = (
    (r"(\.resnets\.\d+)\.temb_proj\.", r"\1.time_emb_proj."),
    (r"(\.resnets\.\d+)\.nin_shortcut\.", r"\1.conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has this format."""
    return "temb.dense.0.weight" in state and "down.0.block.0.norm1.weight" in state


def convert(state: Mapping[str, Tensor], given: GivenFacts) -> Converted:
    """Convert a state dict. Raises MissingFacts, FactsError, and CheckpointError for an unsupported network."""
    given.check(f"a file of {FORMAT}", ["image_size", *given.needed_for_noise()], given.taken_for_noise())
    levels = len({key.split(".")[1] for key in state if key.startswith("down.")})
    for level in range(levels - 1):
        if f"down.{level}.downsample.conv.weight" not in state or f"up.{level + 1}.upsample.conv.weight" not in state:
            raise CheckpointError(f"a network of {FORMAT} without resamp_with_conv, which is not served")
    if any(".conv_shortcut." in key for key in state):
        raise CheckpointError(f"a network of {FORMAT} with conv_shortcut (3x3), which is not served")
    widths = tuple(len(state[f"down.{level}.block.0.conv1.weight"]) for level in range(levels))
    attends = [f"down.{level}.attn.0.q.weight" in state for level in range(levels)]
    if len(state["conv_in.weight"]) != widths[0]:
        raise CheckpointError(f"a network of {FORMAT} with ch_mult that does not begin with 1, which is not served")
    unet = UNetConfig(
        sample_size=given.image_size,
        in_channels=state["conv_in.weight"].shape[1],
        out_channels=len(state["conv_out.weight"]),
        freq_shift=1,
        flip_sin_to_cos=False,
        time_embedding_dim=len(state["temb.dense.0.weight"]),
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        block_out_channels=widths,
        layers_per_block=len({key.split(".")[3] for key in state if key.startswith("down.0.block.")}),
        downsample_padding=0,
        attention_head_dim=None,  # one head
        norm_eps=1e-6,
    )
    noise = given.noise()
    renamed = {_name(key, levels): _linear(key, value) for key, value in state.items()}
    return Converted(FORMAT, unet, renamed, noise, numbered(None), given.noise_notes(noise))


def _name(key: str, levels: int) -> str:
    """Rename a key for UNet2DModel, which numbers the up blocks in the opposite order."""
    if match := re.match(r"up\.(\d+)\.", key):
        key = f"up.{levels - 1 - int(match[1])}.{key[match.end() :]}"
    for pattern, ours in RENAMES:
        key = re.sub(f"^{pattern}", ours, key)
    for pattern, ours in INSIDE:
        key = re.sub(pattern, ours, key)
    return key


def _linear(key: str, value: Tensor) -> Tensor:
    """Reshape a weight from a 1x1 convolution to a linear layer, if it belongs to attention."""
    of_attention = re.search(r"attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", key)
    return value.reshape(value.shape[:2]) if of_attention else value
