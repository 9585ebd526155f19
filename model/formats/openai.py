"""U-Nets of OpenAI's improved-diffusion and guided-diffusion (Nichol & Dhariwal 2021, Dhariwal & Nichol 2021).

A file holds only a state dict, for example `ema_0.9999_250000.pt`. Blocks are numbered consecutively across levels. In
the up path, each level except the last ends with an upsampler, which gives the number of blocks per level.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from tminus.model.files import CheckpointError
from tminus.model.formats.conversion import CLIPS, HO_TIMESTEPS, Converted, FactsError, GivenFacts, numbered
from tminus.model.formats.flags import OF_SIGMA
from tminus.model.noise import NoiseConfig
from tminus.model.unet_config import UNetConfig

FORMAT = "OpenAI's guided-diffusion or improved-diffusion"
GROUPS = 32
# How many parts of a key name the module; the remaining parts name the parameter.
DEPTH = {"input_blocks": 3, "middle_block": 2, "output_blocks": 3}
TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
Modules = dict[str, dict[str, Tensor]]  # module path -> parameter name -> value


class _Levels(NamedTuple):
    """The number of levels, and the number of layers in each."""

    number: int
    layers: int  # resnets per level in the down path; the up path has one more


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has this format."""
    return "time_embed.0.weight" in state and "input_blocks.0.0.weight" in state


def convert(state: Mapping[str, Tensor], given: GivenFacts) -> Converted:
    """Convert a state dict. Raises MissingFacts, FactsError, and CheckpointError for an unsupported network."""
    _refuse_others(state)
    modules = _modules(state)
    levels = _levels(modules)
    firsts = [f"input_blocks.{1 + level * (levels.layers + 1)}" for level in range(levels.number)]
    widths = tuple(len(modules[f"{first}.0"]["in_layers.2.weight"]) for first in firsts)
    attends = [f"{first}.1" in modules for first in firsts]
    # The mid block always has attention.
    attending = [width for width, attend in zip(widths, attends, strict=True) if attend] + [widths[-1]]
    out_channels, in_channels = len(state["out.2.weight"]), state["input_blocks.0.0.weight"].shape[1]
    learned = out_channels == 2 * in_channels
    heads = _heads(given, attending)

    of_sigma = given.prediction in OF_SIGMA  # a network of consistency_models
    needed = ["image_size", "prediction"] if of_sigma else ["image_size", *given.needed_for_noise(learned=learned)]
    needed += ["timesteps"] if given.prediction == "consistency" else []  # edm computes its levels from sigma
    needed += ["head_width" if given.head_width is not None else "heads"]
    one_order = of_sigma or (heads and max(heads.values()) == 1)  # With one head, the order does not matter.
    needed += [] if one_order else ["attention_order"]
    needed += [] if of_sigma or given.timesteps == HO_TIMESTEPS else ["rescale_timesteps"]
    taken = ["attention_order"] if of_sigma else ["attention_order", "rescale_timesteps", *given.taken_for_noise()]
    given.check(f"a file of {FORMAT}", needed, taken)
    if of_sigma and given.attention_order == "legacy":
        asked = f"for --prediction {given.prediction}, got 'legacy'"
        raise FactsError(f"--attention-order must be new, or left out, {asked}")

    by_resnet = "in_layers.0.weight" in modules.get(f"input_blocks.{levels.layers + 1}.0", {})
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if by_resnet else ("DownBlock2D", "UpBlock2D")
    head_widths = {width // heads[width] for width in attending}
    of_one_width = len(head_widths) == 1
    temb_width, proj_width = (state["time_embed.0.weight"].shape[side] for side in (0, 1))
    unet = UNetConfig(
        sample_size=given.image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        time_embedding_dim=temb_width,
        time_proj_dim=proj_width if proj_width != widths[0] else None,
        timestep_scale=HO_TIMESTEPS / (given.timesteps or 1) if given.rescale_timesteps == "yes" else 1.0,
        down_block_types=tuple("AttnDownBlock2D" if attend else plain[0] for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else plain[1] for attend in reversed(attends)),
        block_out_channels=widths,
        layers_per_block=levels.layers,
        downsample_type="resnet" if by_resnet else "conv",
        upsample_type="resnet" if by_resnet else "conv",
        attention_head_dim=head_widths.pop() if of_one_width else None,  # None means one head.
        num_heads=None if of_one_width or given.heads == 1 else given.heads,
        norm_num_groups=GROUPS,
        attn_norm_num_groups=GROUPS,
        resnet_time_scale_shift="scale_shift" if _shifts(modules[f"{firsts[0]}.0"]) else "default",
        num_class_embeds=len(state["label_emb.weight"]) if "label_emb.weight" in state else None,
    )
    notes: tuple[str, ...]
    if of_sigma:
        noise = _noise_of_sigma(given)
        notes = (f"sigma from {noise.sigma_min:g} to {noise.sigma_max:g}, sigma_data {noise.sigma_data:g}", CLIPS)
    else:
        noise = given.noise(learned=learned, scaled=True)
        notes = given.noise_notes(noise)
    if given.heads is not None and given.heads > 1:
        notes = (*notes, "as many attention heads on the way up (no num_heads_upsample)")
    # In consistency_models, use_new_attention_order has no effect: q, k and v are always split before the heads.
    renamed = _renamed(state, modules, levels, heads, "new" if of_sigma else given.attention_order)
    return Converted(FORMAT, unet, renamed, noise, numbered(unet.num_class_embeds), notes)


def _noise_of_sigma(given: GivenFacts) -> NoiseConfig:
    """Return the default noise schedule of consistency_models. The network's time is 250 log sigma."""
    if given.prediction == "consistency":
        assert given.timesteps is not None
        return NoiseConfig(given.timesteps, prediction_type="consistency", default_sampler="consistency")
    return NoiseConfig(prediction_type="edm", precondition_type="cm_edm", default_sampler="heun")


def _refuse_others(state: Mapping[str, Tensor]) -> None:
    if any(".transformer_blocks." in key for key in state):
        raise CheckpointError("a network with cross-attention, as of text-to-image models, which is not served")
    if not any(key.startswith("output_blocks.") for key in state):
        raise CheckpointError("a classifier of guided-diffusion, which is no diffusion model; that is in another file")
    if state["input_blocks.0.0.weight"].ndim != 4:
        raise CheckpointError(f"a network of {FORMAT} that is not for images: its convolutions are not 2D")


def _modules(state: Mapping[str, Tensor]) -> Modules:
    modules: Modules = {}
    for key, value in state.items():
        parts = key.split(".")
        if depth := DEPTH.get(parts[0]):
            modules.setdefault(".".join(parts[:depth]), {})[".".join(parts[depth:])] = value
    return modules


def _levels(modules: Modules) -> _Levels:
    """Count the levels and their layers. Raises CheckpointError if the levels differ."""
    numbers = {part: {path.split(".")[1] for path in modules if path.startswith(part)} for part in DEPTH}
    outputs = numbers["output_blocks"]
    ends = [block for block in range(len(outputs)) if _upsampler(modules, block)]
    per_level = ends[0] + 1 if ends else len(outputs)
    count = len(outputs) // per_level
    every = set(map(str, range(count * per_level)))
    wanted = list(range(per_level - 1, (count - 1) * per_level, per_level))
    if per_level < 2 or ends != wanted or outputs != every or numbers["input_blocks"] != every:
        raise CheckpointError(f"a network of {FORMAT} whose levels do not repeat, as without conv_resample: not served")
    return _Levels(count, per_level - 1)


def _upsampler(modules: Modules, block: int) -> str | None:
    """Return the path of an up block's upsampler, or None.

    The upsampler is a convolution, or a resnet that is not the first module of the block.
    """
    for number in (1, 2):
        path = f"output_blocks.{block}.{number}"
        if modules.get(path, {}).keys() & {"conv.weight", "in_layers.0.weight"}:
            return path
    return None


def _shifts(resnet: Mapping[str, Tensor]) -> bool:
    """Return whether the timestep both scales and shifts. If so, its layer has two outputs per channel."""
    return len(resnet["emb_layers.1.weight"]) == 2 * len(resnet["in_layers.2.weight"])


def _heads(given: GivenFacts, attending: list[int]) -> dict[int, int]:
    """Return the number of heads for each layer width; empty if the user gave none. Raises FactsError."""
    heads = {}
    for width in attending if given.heads is not None or given.head_width is not None else ():
        heads[width] = given.heads or width // (given.head_width or 1)
        if width % (given.head_width or heads[width]) or not heads[width]:
            name, value = ("--heads", given.heads) if given.heads else ("--head-width", given.head_width)
            raise FactsError(f"{name} must divide the {width} channels of attention, got {value}")
    return heads


def _places(modules: Modules, levels: _Levels) -> Iterator[tuple[str, str]]:
    """Yield the path of each module in the file, and its path in a UNet2DModel."""
    per_level = levels.layers + 1
    yield "input_blocks.0.0", "conv_in"
    for level in range(levels.number):
        for layer in range(per_level):
            down, up = f"input_blocks.{1 + level * per_level + layer}", f"output_blocks.{level * per_level + layer}"
            if layer < levels.layers:
                yield f"{down}.0", f"down_blocks.{level}.resnets.{layer}"
                yield f"{down}.1", f"down_blocks.{level}.attentions.{layer}"
            else:
                yield f"{down}.0", f"down_blocks.{level}.downsamplers.0"
            yield f"{up}.0", f"up_blocks.{level}.resnets.{layer}"
            if "qkv.weight" in modules.get(f"{up}.1", {}):
                yield f"{up}.1", f"up_blocks.{level}.attentions.{layer}"
            if upsampler := _upsampler(modules, level * per_level + layer):
                yield upsampler, f"up_blocks.{level}.upsamplers.0"
    for number, place in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{number}", f"mid_block.{place}"


def _renamed(
    state: Mapping[str, Tensor], modules: Modules, levels: _Levels, heads: Mapping[int, int], order: str | None
) -> dict[str, Tensor]:
    """Rename a state dict for UNet2DModel, splitting q, k and v. Raises CheckpointError for an unknown weight."""
    renamed = {}
    left = dict(state)
    for top, place in TOP.items():
        for leaf in ("weight", "bias"):
            if f"{top}.{leaf}" in left:
                renamed[f"{place}.{leaf}"] = left.pop(f"{top}.{leaf}")
    for path, place in _places(modules, levels):
        for inside, value in modules.get(path, {}).items():
            name, _, leaf = inside.rpartition(".")
            if name == "qkv":
                for which, part in zip("qkv", _apart(value, heads, order), strict=True):
                    renamed[f"{place}.to_{which}.{leaf}"] = part
            elif name == "proj_out":
                renamed[f"{place}.to_out.0.{leaf}"] = value.reshape(value.shape[:2])
            elif name in ("norm", "op", "conv", "", *RESNET):
                ours = {"norm": "group_norm", "op": "conv"}.get(name, RESNET.get(name, name))
                renamed[".".join(filter(None, (place, ours, leaf)))] = value
            else:
                continue
            del left[f"{path}.{inside}"]
    if left:
        raise CheckpointError(f"a network of {FORMAT} with {min(left)}, which is not known (and {len(left) - 1} more)")
    return renamed


def _apart(qkv: Tensor, heads: Mapping[int, int], order: str | None) -> list[Tensor]:
    """Split a 1x1 convolution [3 C, C, 1] or its bias [3 C] into q, k and v: [C, C] or [C] each."""
    width = len(qkv) // 3
    rest = qkv.shape[1:2]  # empty for a bias
    if order == "legacy":  # layout: [heads, 3, channels per head]
        return list(qkv.reshape(heads[width], 3, -1, *rest).transpose(0, 1).reshape(3, width, *rest))
    return list(qkv.reshape(3, width, *rest))
