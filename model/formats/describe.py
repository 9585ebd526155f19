"""Describes a checkpoint in lines of text: a folder that tminus loads, or a foreign file or folder."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tminus.model.catalogue import Recommended, usual_settings
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.denoiser import NetConfig
from tminus.model.formats.conversion import GivenFacts, MissingFacts
from tminus.model.formats.flags import flag
from tminus.model.formats.read import is_bare, read_foreign
from tminus.model.networks import build
from tminus.model.noise import NoiseConfig
from tminus.model.unet_config import CLASS_NAME, UNetConfig
from tminus.model.weights import hash_weights, to_float32

# Placeholders for missing facts, so that the rest can be described. Lines that depend on them are left out.
ASSUMED = GivenFacts(
    image_size=1 << 8,
    timesteps=1000,
    beta_schedule="linear",
    beta_start=1e-4,
    beta_end=0.02,
    variance="fixed_small",
    prediction="epsilon",
    heads=1,
    attention_order="legacy",
    rescale_timesteps="no",
)


@dataclass(frozen=True, slots=True)
class Description:
    """The description of a checkpoint. The checkpoint and its settings are None if facts are missing."""

    format: str
    lines: tuple[tuple[str, str], ...]
    checkpoint: Checkpoint | None = None
    settings: Recommended | None = None
    missing: tuple[str, ...] = ()
    """Flags of `tminus convert` for facts that the file does not state."""
    notes: tuple[str, ...] = ()
    """Assumptions about facts that the file does not state, for the user to check."""


PREDICTS = {
    "consistency": "where trajectories end (a consistency model)",
    "edm": "x_0 by EDM's preconditioning",
    "edm_v_prediction": "x_0 by EDM's preconditioning, with the sign turned",
    "flow": "eps - x_0 (flow matching)",
    "score": "the score, of images in [0, 1] (VE)",
}


def describe(path: Path, given: GivenFacts) -> Description:
    """Describe a folder or file. Raises CheckpointError, and ValueError for facts that do not apply."""
    if path.is_file() or is_bare(path):
        return _of_foreign(path, given)
    given.check("a checkpoint folder", ())
    checkpoint = load_checkpoint(path)
    unet, noise, labels = checkpoint.net.config, checkpoint.noise, checkpoint.labels
    kind = "a folder of diffusers" + ("" if unet.class_name == CLASS_NAME else ", for tminus alone")
    lines = [("format", kind)]
    lines += network_lines(unet, sum(value.numel() for value in checkpoint.net.parameters()))
    lines.append(("images", images(checkpoint.image_shape[0], checkpoint.size_px)))
    if (autoencoder := checkpoint.autoencoder) is not None:
        size = "x".join(map(str, checkpoint.row_shape))
        parameters = sum(value.numel() for value in autoencoder.parameters())
        lines.append(("latents", f"{size}, by {autoencoder.config.kind} of {parameters / 1e6:.2f} M parameters"))
    if labels.num_classes:
        null = "no null class, so no guidance" if labels.null_class is None else f"null class {labels.null_class}"
        lines.append(("classes", f"{labels.num_classes} ({', '.join(labels.class_names)}); {null}"))
    if checkpoint.folded_guidance != 1:
        further = ", which a request's own multiplies" if checkpoint.student is None else ""
        lines.append(("guidance", f"{checkpoint.folded_guidance:g} in the weights{further}"))
    lines += noise_lines(noise)
    lines.append(("samplers", ", ".join(checkpoint.samplers)))
    usual = " (the usual: its tminus.json recommends nothing)" if checkpoint.recommended is None else ""
    lines.append(("recommended", f"{checkpoint.settings}{usual}"))
    lines.append(("scheduler", f"{checkpoint.default_sampler}, for requests that name steps and no sampler"))
    lines += [("refused table", refused) for refused in checkpoint.refused_tables]
    return Description(kind, tuple(lines), checkpoint, checkpoint.settings)


def _of_foreign(file: Path, given: GivenFacts) -> Description:
    missing: tuple[str, ...] = ()
    try:
        converted = read_foreign(file, given)
    except MissingFacts as error:
        missing = error.names
        assumed = {name: getattr(ASSUMED, name) for name in missing}
        converted = read_foreign(file, dataclasses.replace(given, **assumed))
    lines = [("format", converted.format)]
    lines += network_lines(converted.unet, sum(value.numel() for value in converted.state.values()), missing)
    size = converted.unet.size_px if "image_size" not in missing else None
    lines.append(("images", images(converted.unet.in_channels, size)))
    if converted.labels.num_classes:
        null = "no null class" if converted.labels.null_class is None else "and a null class"
        lines.append(("classes", f"{converted.labels.num_classes}, {null}"))
    if missing:
        lines += [("missing", line) for line in MissingFacts("", missing).asked]
        lines.append(("then", f"tminus convert {file} FOLDER {' '.join(f'{flag(name)} …' for name in missing)}"))
        return Description(converted.format, tuple(lines), missing=tuple(map(flag, missing)), notes=converted.notes)
    lines += noise_lines(converted.noise)
    lines += [("taken", note) for note in converted.notes]
    lines.append(("then", f"tminus convert {file} FOLDER, with the same flags"))
    net = build(converted.unet)
    net.load_state_dict(to_float32(file, converted.state))
    assert size is not None
    net.requires_grad_(False).eval()
    noise, own = converted.noise, ("consistency",) if converted.noise.is_consistency else ()
    settings = usual_settings(noise.num_train_timesteps, *own)
    checkpoint = Checkpoint(net, noise, converted.labels, hash_weights(net.state_dict()), file.stem, size)
    return Description(converted.format, tuple(lines), checkpoint, settings, notes=converted.notes)


def images(count: int, size_px: tuple[int, int] | None) -> str:
    """Describe the size and channels of the images."""
    channels = "one channel" if count == 1 else f"{count} channels"
    return f"{size_px[0]}x{size_px[1]}, {channels}" if size_px is not None else channels


def network_lines(unet: NetConfig, parameters: int, missing: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Describe the architecture. Details that depend on missing facts are left out."""
    if isinstance(unet, UNetConfig):
        yield from _details(unet, missing)
    else:
        yield "network", f"{unet.class_name}: widths {', '.join(map(str, unet.widths))}"
    yield "parameters", f"{parameters / 1e6:.2f} M"


def _details(unet: UNetConfig, missing: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    attends = [name.startswith("Attn") for name in unet.down_block_types]
    levels = [f"{width}{'*' if attend else ''}" for width, attend in zip(unet.block_out_channels, attends, strict=True)]
    marked = " (* with attention)" if any(attends) else ""
    layers = f"{unet.layers_per_block} layer{'s' if unet.layers_per_block > 1 else ''} a level"
    told = not {"heads", "rescale_timesteps"} & set(missing)
    name = unet.class_name if told else "U-Net"
    yield "network", f"{name}: widths {', '.join(levels)}{marked}; {layers}"
    heads = "one head"
    if unet.num_heads or unet.attention_head_dim:
        heads = f"{unet.num_heads} heads" if unet.num_heads else f"heads of {unet.attention_head_dim} channels"
    timestep = "scales and shifts" if unet.resnet_time_scale_shift == "scale_shift" else "is added"
    resample = "resnets" if unet.downsample_type == "resnet" or unet.has_skip_blocks else "convolutions"
    yield "details", f"the timestep {timestep}, resampled by {resample}{'' if 'heads' in missing else f', {heads}'}"


def noise_lines(noise: NoiseConfig) -> Iterator[tuple[str, str]]:
    """Describe the noise schedule and the prediction type."""
    clip = f"x_0 is clipped to ±{noise.clip_sample_range:g}" if noise.clip_sample else "x_0 is not clipped"
    if noise.is_continuous:
        by = f"shift {noise.shift:g}" if noise.family == "flow" else f"sigma {noise.sigma_min:g} to {noise.sigma_max:g}"
        data = f"; sigma_data {noise.sigma_data:g}" if noise.family in ("consistency", "edm") else ""
        yield "noise", f"{noise.num_train_timesteps} levels, {noise.levels}, {by}"
        yield "predicts", f"{PREDICTS[noise.prediction_type]}{data}; {clip}"
        return
    ends = "" if noise.beta_schedule == "squaredcos_cap_v2" else f" {noise.beta_start:g} to {noise.beta_end:g}"
    betas = f"{noise.beta_schedule}{ends}" if noise.trained_betas is None else "betas of its own"
    yield "noise", f"T = {noise.num_train_timesteps}, {betas}"
    yield "predicts", f"{noise.prediction_type}; variance {noise.variance_type}; {clip}"
