"""Read and write checkpoint folders in the diffusers layout. The weights are read in weights.py.

    model_index.json, unet/{config.json, diffusion_pytorch_model.safetensors}, scheduler/scheduler_config.json
    vqvae/         the autoencoder of a latent model
    tminus.json    what diffusers does not store: class names, null class, recommended settings, ladder, provenance

Flat folders such as google/ddpm-*, with config.json and the weights at the top level, can also be read.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch import Tensor

from tminus.model.archives import release
from tminus.model.catalogue import (
    MAX_RUNGS,
    SAMPLER_FACTS,
    SAMPLERS,
    TABLE_SAMPLERS,
    Recommended,
    Rung,
    default_ladder,
    ladder_from_json,
    ladder_of,
    usual_settings,
)
from tminus.model.config import is_count, is_number
from tminus.model.consistency import consistency_tables
from tminus.model.denoiser import Denoiser, NetConfig
from tminus.model.files import AUTOENCODERS, WEIGHTS_NAME, CheckpointError, first_line, read_json, write_json
from tminus.model.hub import hub_name
from tminus.model.latent.autoencoder import (
    KL,
    VQ,
    Autoencoder,
    AutoencoderConfig,
    check_place,
    find_autoencoder,
    load_autoencoder,
    save_autoencoder,
    with_autoencoder,
)
from tminus.model.networks import build, read_net_config
from tminus.model.noise import NoiseConfig
from tminus.model.pixels import MAX_CHANNELS, RGBA
from tminus.model.sampler_tables import FOLDER as TABLES
from tminus.model.sampler_tables import Table, nearest, read_tables, steps_and_guidances
from tminus.model.samplers import Plan, compile_plan, table_plan
from tminus.model.unet import UNet2D
from tminus.model.unet_config import CLASS_NAME, UNetConfig
from tminus.model.weights import hash_weights, load_state_dict, misfit, to_float32, write_weights

log = logging.getLogger(__name__)
Parsed = TypeVar("Parsed")

INDEX_FILE = "model_index.json"
TMINUS_FILE = "tminus.json"
CLASS_TABLE = "class_embedding.weight"
LATENT_PIPELINE = "LDMPipeline"
PIPELINES = (
    "DDPMPipeline",
    "DDIMPipeline",
    "PNDMPipeline",
    "ConsistencyModelPipeline",
    "ScoreSdeVePipeline",
    LATENT_PIPELINE,
)
LAYOUTS = (
    "A checkpoint is a folder of diffusers: with unet/ and scheduler/, or flat with config.json, "
    f"scheduler_config.json and {WEIGHTS_NAME}.safetensors"
)
LATENT_FOLDER = AUTOENCODERS[0]
# Allowed parts of a pipeline. mel converts spectrograms to sound and does not affect images.
OWN_PARTS = frozenset({"unet", "scheduler", "mel", *AUTOENCODERS})
PIPELINE_OF = {
    "DDIMScheduler": "DDIMPipeline",
    "PNDMScheduler": "PNDMPipeline",
    "CMStochasticIterativeScheduler": "ConsistencyModelPipeline",
    "ScoreSdeVeScheduler": "ScoreSdeVePipeline",
    "KarrasEDMScheduler": "KarrasEDMPipeline",  # from a pull request, see scheduler_kinds.py
}
DIFFUSERS_VERSION = "0.30.0"  # written to model_index.json; the layout has not changed since


@dataclass(frozen=True, slots=True)
class Labels:
    """The classes of a checkpoint. null_class is the label for "no class", which guidance needs."""

    class_names: tuple[str, ...] = ()
    null_class: int | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes, not counting the null class."""
        return len(self.class_names)


@dataclass(frozen=True, slots=True)
class TminusJson:
    """The content of tminus.json. Methods that read a field raise CheckpointError if its value is invalid."""

    file: Path
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "TminusJson":
        """Read tminus.json from a folder. A missing file counts as empty."""
        file = folder / TMINUS_FILE
        return cls(file, read_json(file)) if file.is_file() else cls(file)

    def require(self, ok: bool, name: str, bound: str) -> None:
        """Raise CheckpointError unless `ok`. The message states the file, field, bound and value."""
        if not ok:
            raise CheckpointError(f"{self.file}: {name} must be {bound}, got {self.values.get(name)!r:.500}")

    def labels(self, unet: NetConfig) -> Labels:
        """Return the classes. If they have no names, their numbers serve as names.

        The null class gets the last label; `null_last` reorders the embeddings to match.
        """
        embeds = unet.num_class_embeds
        if embeds is None:
            return Labels()
        names, null = self.values.get("class_names"), self.values.get("null_class")
        self.require(null is None or (type(null) is int and 0 <= null < embeds), "null_class", f"0..{embeds - 1}")
        count = embeds - (null is not None)
        if names is None:
            names = [str(i) for i in range(count)]
        differ = isinstance(names, list) and len({str(name).casefold() for name in names}) == len(names) == count
        self.require(differ, "class_names", f"{count} names that differ by more than case")
        return Labels(tuple(map(str, names)), embeds - 1 if null is not None else None)

    def null_last(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move the null class's embedding to the end. The other classes keep their order."""
        null, table = self.values.get("null_class"), state.get(CLASS_TABLE)
        if null is None or table is None:
            return dict(state)
        return {**state, CLASS_TABLE: torch.cat([table[:null], table[null + 1 :], table[null : null + 1]])}

    def approved(self, weights_hash: str) -> dict[tuple[str, str], float | None]:
        """Return the approved (executor, precision) pairs for these weights.

        Each pair maps to its relative error, or to None if the error is unknown.
        """
        checks = self.values.get("approved", [])
        listed = isinstance(checks, list) and all(isinstance(check, dict) for check in checks)
        self.require(listed, "approved", "a list of checks")
        return {
            (str(check.get("executor")), str(check.get("precision"))): relative_error_of(check)
            for check in checks
            if check.get("weights_hash") == weights_hash
        }

    def recommended(self, noise: NoiseConfig, labels: Labels) -> Recommended | None:
        return self._settings("recommended", Recommended.from_json, noise, labels)

    def ladder(self, noise: NoiseConfig, labels: Labels) -> tuple[Rung, ...]:
        return self._settings("ladder", ladder_from_json, noise, labels) or ()

    def _settings(self, name: str, parse: Callable[..., Parsed], noise: NoiseConfig, labels: Labels) -> Parsed | None:
        if (value := self.values.get(name)) is None:
            return None
        try:
            return parse(value, noise.num_train_timesteps, has_null_class=labels.null_class is not None)
        except ValueError as error:
            raise CheckpointError(f"{self.file}: {error}") from error

    def student(self) -> Mapping[str, Any] | None:
        """Return the facts about a student, or None if the network is not a student."""
        student = self.values.get("student")
        self.require(student is None or isinstance(student, dict), "student", "an object")
        return student

    def folded_guidance(self) -> float:
        """Return the guidance that `train` or `distill` folded into the weights; 1 if none.

        Students made by earlier versions store it only in student.guidance.
        """
        folded = self.values.get("folded_guidance", (self.student() or {}).get("guidance", 1.0))
        self.require(is_number(folded) and folded >= 0, "folded_guidance", "a number, 0 or more")
        return float(folded)

    def trained_on(self) -> str | None:
        """Return the name of the training data, or None if it is unknown."""
        provenance = self.values.get("provenance", {})
        self.require(isinstance(provenance, dict), "provenance", "an object")
        return str(provenance["data"]) if provenance.get("data") else None

    def alpha(self, channels: int) -> bool:
        """Return True if the last of four channels is alpha, which is the default for four channels."""
        alpha = self.values.get("alpha", channels == RGBA)
        bound = "true or false" if channels == RGBA else f"false: images have {channels} channels, and RGBA four"
        self.require(isinstance(alpha, bool) and alpha <= (channels == RGBA), "alpha", bound)
        return bool(alpha)

    def side_px(self) -> int:
        """Return size_px, the network's input size, which replaces a missing sample_size in config.json."""
        size: Any = self.values.get("size_px")
        if not is_count(size):
            folder = self.file.parent
            raise CheckpointError(f"{folder}: config.json has no sample_size; give size_px in {TMINUS_FILE}")
        return int(size)


def check_layout(folder: Path) -> str | None:
    """Check that a folder looks like a checkpoint, and return the scheduler class of model_index.json.

    Returns None if there is no such entry. Raises CheckpointError with an explanation if the folder cannot be loaded.
    """
    if folder.is_file():
        other = "; tminus convert makes one of a file of some other projects"
        raise CheckpointError(f"{folder}: a file ({folder.suffix or 'no suffix'}). {LAYOUTS}{other}")
    if not folder.is_dir():
        advice = f"; tminus pull {folder.name} fetches one of that name" if folder.name in release().archives else ""
        raise CheckpointError(f"{folder}: no such folder{advice}")
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        raise CheckpointError(f"{folder}: the folder is empty")
    index = check_pipeline(folder)
    class_name = read_json(folder / "config.json").get("_class_name") if "config.json" in names else None
    if "Transformer" in str(class_name):
        raise CheckpointError(f"{folder}: config.json: {class_name!r:.100} is a transformer; tminus runs U-Nets only")
    if class_name in (VQ, KL):
        raise CheckpointError(
            f"{folder}: an autoencoder, which makes no images by itself; tminus train --latent trains a network on its "
            "latents"
        )
    if not (folder / "unet").is_dir() and "config.json" not in names:
        raise CheckpointError(f"{folder}: holds {shorten(', '.join(names), 200)}. {LAYOUTS}")
    if not find_scheduler(folder).is_file():
        raise CheckpointError(
            f"{folder}: a U-Net without a scheduler_config.json, which says how its noise was made. {LAYOUTS}; tminus "
            "convert writes one by flags"
        )
    entry = index.get("scheduler")
    if entry is None:
        return None
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise CheckpointError(f"{folder}: {INDEX_FILE}: scheduler must be [library, class], got {entry!r:.100}")
    return str(entry[1])


def check_pipeline(folder: Path) -> dict[str, Any]:
    """Return the content of model_index.json, or an empty dict if the file is missing.

    Raises CheckpointError if the pipeline is not supported. A pipeline of an unknown class is supported if it consists
    of a U-Net and a scheduler.
    """
    index = read_json(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else {}
    pipeline = index.get("_class_name", PIPELINES[0])
    if pipeline not in PIPELINES:
        if why := _why_not(index):
            kinds = f"those that are: {', '.join(PIPELINES)}, and others of a UNet2DModel and a scheduler alone"
            raise CheckpointError(f"{folder}: {INDEX_FILE}: {pipeline!r:.100} is not served: {why}; {kinds}")
        parts = ", ".join(f"{name} {class_name}" for name, class_name in sorted(_parts(index).items()))
        log.info(
            "%s: %s: %s is no pipeline of diffusers that is known, and is served as its parts: %s",
            folder,
            INDEX_FILE,
            pipeline,
            parts,
        )
    if pipeline == LATENT_PIPELINE and find_autoencoder(folder) is None:
        raise CheckpointError(f"{folder}: {INDEX_FILE}: an {pipeline} without its autoencoder, the folder vqvae/")
    return index


def _parts(index: Mapping[str, Any]) -> dict[str, str]:
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: str(entry[1]) for name, entry in entries.items() if entry[1] is not None}


def _why_not(index: Mapping[str, Any]) -> str:
    """Return why a pipeline is not supported, or an empty string if it is."""
    parts = _parts(index)
    if any(name.startswith(("text_encoder", "tokenizer", "prior")) for name in parts):
        return "it makes images of text, and a class is all that is taken here"
    if "transformer" in parts:
        return "its denoiser is a transformer; tminus runs U-Nets only"
    if missing := [name for name in ("unet", "scheduler") if name not in parts]:
        return f"it has no {missing[0]}"
    if others := sorted(parts.keys() - OWN_PARTS):
        return f"its {others[0]}, {parts[others[0]]:.100}, is not run here"
    return ""


def find_scheduler(folder: Path) -> Path:
    """Return the path of the folder's scheduler_config.json. The file may not exist."""
    nested = folder / "scheduler" / "scheduler_config.json"
    return nested if nested.is_file() else folder / "scheduler_config.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint. The network is in float32, on the CPU, in eval mode."""

    net: Denoiser
    noise: NoiseConfig
    labels: Labels
    weights_hash: str
    name: str
    size_px: tuple[int, int]
    """(height, width) of the images."""
    approved: Mapping[tuple[str, str], float | None] = field(default_factory=dict)
    """The approved (executor, precision) pairs. Each maps to its relative error, or to None if that is unknown."""
    recommended: Recommended | None = None
    """The recommended settings in tminus.json, if any. See `settings`."""
    tables: tuple[Table, ...] = ()
    refused_tables: tuple[str, ...] = ()
    """A message for each table file that cannot be used, with the file name and the reason."""
    student: Mapping[str, Any] | None = None
    """Facts about a student, or None if the network is not one. A student can use only its own tables."""
    autoencoder: Autoencoder | None = None
    """None unless the model works on latents."""
    folded_guidance: float = 1.0
    """The guidance folded into the weights. A request's guidance is multiplied by it. Students accept no guidance."""
    alpha: bool = False
    """True if the last of four channels is alpha."""
    stated_ladder: tuple[Rung, ...] = ()
    """The ladder in tminus.json; empty if it has none. See `ladder`."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape [C, H, W] of an image."""
        net, autoencoder = self.net.config, self.autoencoder
        return (net.in_channels if autoencoder is None else autoencoder.config.in_channels, *self.size_px)

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """The shape [C, H, W] of the network's input, which is an image or the latents of one."""
        factor = self.autoencoder.config.factor if self.autoencoder is not None else 1
        height, width = self.size_px
        return self.net.config.in_channels, height // factor, width // factor

    @property
    def samplers(self) -> tuple[str, ...]:
        """The available samplers. A student can use only those of its tables."""
        own = tuple(dict.fromkeys(table.sampler for table in self.tables))
        return own if self.student is not None else SAMPLERS + own

    @property
    def default_sampler(self) -> str:
        """The sampler of scheduler_config.json; for a student, the sampler of its tables."""
        return self.noise.default_sampler if self.student is None else self.samplers[0]

    @property
    def settings(self) -> Recommended:
        """The default sampler, steps and guidance: the recommended ones if there are any.

        Otherwise a student uses the table whose number of steps is nearest to the sampler's default, and other networks
        use `usual_settings`.
        """
        if self.recommended is not None:
            return self.recommended
        if self.student is None:
            return usual_settings(self.noise.num_train_timesteps)
        own = [table for table in self.tables if table.sampler == self.default_sampler]
        table = nearest(own, SAMPLER_FACTS[self.default_sampler].good_steps, 1.0)
        return Recommended(table.sampler, table.steps, table.guidance)

    @property
    def ladder(self) -> tuple[Rung, ...]:
        """The settings to choose from under load, from the best to the fastest."""
        tables = (Recommended(table.sampler, table.steps, table.guidance) for table in self.tables)
        return self.stated_ladder or default_ladder(self.settings, tables)

    @property
    def fractional(self) -> bool:
        return self.net.fractional

    def plan(
        self,
        sampler: str,
        steps: int,
        *,
        guidance: float = 1.0,
        eta: float = 0.0,
        clip: bool | None = None,
        spacing: str | None = None,
        start: int = 0,
    ) -> Plan:
        """Compile a sampler; see `compile_plan` for the arguments.

        Also raises ValueError if a table is needed and none matches the settings.
        """
        schedule = self.noise.schedule()
        if sampler not in TABLE_SAMPLERS:
            return compile_plan(
                self.noise,
                schedule,
                sampler,
                steps,
                eta=eta,
                clip=clip,
                spacing=spacing,
                start=start,
                fractional=self.fractional,
            )
        own = [table for table in self.tables if table.sampler == sampler]
        for table in own:
            if (table.steps, table.guidance) == (steps, guidance):
                return table_plan(self.noise, schedule, table, clip=clip, start=start)
        there = steps_and_guidances(own) or "none"
        raise ValueError(f"{sampler} has no table for {steps} steps at guidance {guidance:g}; there are: {there}")


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Needs:
    """The estimated memory use of a checkpoint in float32, derived from its configuration."""

    num_parameters: int
    row_px: tuple[int, int]
    """(height, width) of the network's input."""
    size_px: tuple[int, int]
    """(height, width) of the images."""
    pass_bytes: int
    """The memory of a forward pass of one image."""
    coding_bytes: int = 0
    """The memory for encoding or decoding one image; 0 without an autoencoder."""

    @property
    def weights_bytes(self) -> int:
        return 4 * self.num_parameters

    @property
    def loading_bytes(self) -> int:
        """The estimated peak while loading, when memory holds the weights twice."""
        return 2 * self.weights_bytes + max(self.pass_bytes, self.coding_bytes)

    @property
    def serving_bytes(self) -> int:
        """The estimated memory use while serving."""
        return self.weights_bytes + self.pass_bytes + self.coding_bytes


def needs_of(folder: Path) -> Needs:
    """Estimate a checkpoint's memory use without reading its weights. Raises CheckpointError."""
    try:
        unet, _, _, autoencoder = _read_configs(folder)
        with torch.device("meta"):
            net = build(unet)
            num_parameters = sum(parameter.numel() for parameter in net.parameters())
            if autoencoder is not None:
                num_parameters += sum(parameter.numel() for parameter in Autoencoder(autoencoder).parameters())
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {first_line(error)}") from error
    row_px = unet.size_px
    assert row_px is not None
    if autoencoder is None:
        return Needs(num_parameters, row_px, row_px, unet.pass_bytes(row_px))
    size_px = (row_px[0] * autoencoder.factor, row_px[1] * autoencoder.factor)
    return Needs(num_parameters, row_px, size_px, unet.pass_bytes(row_px), autoencoder.pass_bytes(size_px))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a checkpoint folder.

    Raises CheckpointError with a one-line message if the checkpoint is invalid or not supported.
    """
    try:
        return _load(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _read_configs(folder: Path) -> tuple[NetConfig, NoiseConfig, TminusJson, AutoencoderConfig | None]:
    scheduler_class = check_layout(folder)
    autoencoder_folder = find_autoencoder(folder)
    tminus_json = TminusJson.read(folder)
    try:
        unet = read_net_config(read_json(unet_folder_of(folder) / "config.json"))
        scheduler = read_json(find_scheduler(folder))
        if autoencoder_folder is not None:  # latents are unbounded, so do not clip by default
            scheduler.setdefault("clip_sample", False)
        noise = NoiseConfig.from_dict(scheduler, scheduler_class)
        if isinstance(unet, UNetConfig) and unet.sample_size is None:
            unet = replace(unet, sample_size=tminus_json.side_px())
        if noise.family == "ve":
            # VE models generate images in [0, 1]. Only UNet2DModel supports that range, and only without an
            # autoencoder.
            if not isinstance(unet, UNetConfig) or autoencoder_folder is not None:
                raise ValueError("scheduler config: ScoreSdeVeScheduler is served with a UNet2DModel of pixels alone")
            noise = replace(noise, divides_by_time=unet.time_embedding_type == "fourier")
        elif isinstance(unet, UNetConfig) and unet.time_embedding_type == "fourier":
            # With a Fourier embedding, diffusers divides the network's output by the time. This is only supported for
            # VE models.
            wanted = "positional or learned without a ScoreSdeVeScheduler"
            raise ValueError(f"unet config: time_embedding_type must be {wanted}, got 'fourier'")
        autoencoder = None
        if autoencoder_folder is not None:
            autoencoder = AutoencoderConfig.from_dict(read_json(autoencoder_folder / "config.json"))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return unet, noise, tminus_json, autoencoder


def unet_folder_of(folder: Path) -> Path:
    """Return the folder that holds the network: unet/ if it exists, otherwise the checkpoint folder."""
    return folder / "unet" if (folder / "unet").is_dir() else folder


def _load(folder: Path) -> Checkpoint:
    unet, noise, tminus_json, _ = _read_configs(folder)
    unet_folder, autoencoder_folder = unet_folder_of(folder), find_autoencoder(folder)
    labels = tminus_json.labels(unet)
    state = load_state_dict(unet_folder)
    net = fitting_network(unet_folder, state, unet)
    state = tminus_json.null_last(to_float32(unet_folder, state))
    net.load_state_dict(state, assign=True)
    net.requires_grad_(False).eval()
    if isinstance(net, UNet2D):
        net.unit_input = noise.family == "ve"
    if noise.is_continuous and not net.fractional:
        why = f"learned takes whole timesteps, and with prediction_type {noise.prediction_type} there are others"
        raise CheckpointError(f"{folder}: config.json: time_embedding_type {why}")
    size_px = unet.size_px
    assert size_px is not None
    if any(side % unet.size_multiple for side in size_px):
        raise CheckpointError(f"{folder}: sample_size {size_px} must divide by {unet.size_multiple} for this network")
    autoencoder = None
    if autoencoder_folder is not None:
        autoencoder = load_autoencoder(autoencoder_folder)
        size_px = (size_px[0] * autoencoder.config.factor, size_px[1] * autoencoder.config.factor)
    weights_hash = with_autoencoder(hash_weights(state), autoencoder)
    check_channels(folder, unet, noise, autoencoder.config.channels if autoencoder is not None else None)
    name = str(tminus_json.values.get("name") or hub_name(folder.resolve()) or folder.resolve().name)
    approved = tminus_json.approved(weights_hash)
    tables, refused = read_tables(
        folder,
        weights_hash,
        noise.to_dict(),
        num_timesteps=noise.num_train_timesteps,
        null_class=labels.null_class is not None,
        fractional=net.fractional,
    )
    student, folded_guidance = tminus_json.student(), tminus_json.folded_guidance()
    if noise.is_consistency:
        tables = consistency_tables(noise)
        student = {"kind": "consistency model", "guidance": 1.0, "steps": [table.steps for table in tables]}
    if student is not None and not tables:
        why = f" ({'; '.join(refused)})" if refused else ""
        raise CheckpointError(f"{folder}: a student without a table in {TABLES}/ to sample it by{why}")
    recommended = tminus_json.recommended(noise, labels)
    if recommended is not None and (recommended.sampler in TABLE_SAMPLERS or student is not None):
        keys = {(table.sampler, table.steps, table.guidance) for table in tables}
        if (recommended.sampler, recommended.steps, recommended.guidance) not in keys:
            log.warning("%s recommends %s, for which it has no table", folder, recommended)
            recommended = None
    return Checkpoint(
        net,
        noise,
        labels,
        weights_hash,
        name,
        size_px,
        approved,
        recommended,
        tables,
        refused,
        student,
        autoencoder,
        folded_guidance,
        tminus_json.alpha(unet.in_channels if autoencoder is None else autoencoder.config.in_channels),
        tminus_json.ladder(noise, labels),
    )


def check_channels(folder: Path, unet: NetConfig, noise: NoiseConfig, latent: int | None = None) -> None:
    """Raise CheckpointError if the network has an unsupported number of channels.

    latent: the number of latent channels, or None without an autoencoder.
    """
    learned = noise.variance_type == "learned_range"  # half of the output channels are v, see samplers.py
    possible = range(1, MAX_CHANNELS + 1) if latent is None else (latent,)
    if unet.in_channels not in possible or unet.out_channels != unet.in_channels * (2 if learned else 1):
        channels = f"{unet.in_channels} -> {unet.out_channels}"
        out = "twice as many out" if learned else "as many out"
        channels_in = f"1..{MAX_CHANNELS}" if latent is None else f"{latent}, the autoencoder's,"
        bound = f"only {channels_in} channels in and {out} can be served with variance_type {noise.variance_type}"
        raise CheckpointError(f"{folder}: {bound}, got {channels}")


def fitting_network(where: Path, state: Mapping[str, Tensor], unet: NetConfig, asks: str = "config.json") -> Denoiser:
    """Build the network on the meta device, and check that these weights fit it.

    Raises CheckpointError with the first parameter that does not fit.
    """
    # The meta device allocates no memory, so even the config of a huge network is harmless.
    try:
        with torch.device("meta"):
            net = build(unet)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: {asks}: {first_line(error)}") from error
    if wrong := misfit(state, net, asks):
        raise CheckpointError(f"{where}: {wrong}")
    return net


# --- writing -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Tensor],
    unet: NetConfig,
    noise: NoiseConfig,
    labels: Labels,
    provenance: Mapping[str, Any],
    recommended: Recommended | None = None,
    student: Mapping[str, Any] | None = None,
    autoencoder: Autoencoder | None = None,
    folded_guidance: float | None = None,
    alpha: bool | None = None,
) -> None:
    """Write a checkpoint folder. Each file is written atomically.

    Diffusers can load the folder if it supports the network class.

    alpha: True if the last of four channels is alpha; None omits the field from tminus.json.

    Raises CheckpointError if the folder contains an autoencoder but this model does not use one.
    """
    check_place(folder, autoencoder)
    scheduler_class = noise.to_dict()["_class_name"]
    index = {
        "_class_name": PIPELINE_OF.get(scheduler_class, "DDPMPipeline"),
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_class],
        "unet": ["diffusers" if unet.class_name == CLASS_NAME else "tminus", unet.class_name],
    }
    if autoencoder is not None:
        index |= {"_class_name": LATENT_PIPELINE, LATENT_FOLDER: ["diffusers", autoencoder.config.kind]}
        # Training does not change the autoencoder, but the folder may hold another one from an earlier run. Writing it
        # again is faster than comparing the two.
        save_autoencoder(folder / LATENT_FOLDER, autoencoder.config, autoencoder.state_dict())
    meta: dict[str, Any] = {
        "name": folder.resolve().name,
        "class_names": list(labels.class_names),
        "null_class": labels.null_class,
        "provenance": dict(provenance),
    }
    if recommended is not None:
        meta["recommended"] = asdict(recommended)
    if student is not None:
        meta["student"] = dict(student)
    if folded_guidance is not None:
        meta["folded_guidance"] = folded_guidance
    if alpha is not None:
        meta["alpha"] = alpha
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "unet" / "config.json", unet.to_dict())
    write_json(folder / "scheduler" / "scheduler_config.json", noise.to_dict())
    write_json(folder / INDEX_FILE, index)
    write_json(folder / TMINUS_FILE, meta)
    write_weights(folder / "unet", state)


def recommend(folder: Path, recommended: Recommended) -> None:
    """Write the recommended settings to tminus.json. The weights and their hash do not change."""
    tminus_json = TminusJson.read(folder)
    write_json(tminus_json.file, {**tminus_json.values, "recommended": asdict(recommended)})


def add_to_ladder(folder: Path, measured: Sequence[Rung]) -> tuple[Rung, ...]:
    """Add measured settings to the ladder in tminus.json, and return the new ladder, see `ladder_of`.

    Each replaces the same setting of an earlier measurement. Earlier settings without distances are left out. Raises
    CheckpointError if the earlier ladder is invalid, or the new one is too long.
    """
    before, checkpoint = TminusJson.read(folder), load_checkpoint(folder)
    new = {(rung.model, rung.sampler, rung.steps, rung.guidance) for rung in measured}
    kept = [
        rung for rung in checkpoint.stated_ladder if (rung.model, rung.sampler, rung.steps, rung.guidance) not in new
    ]
    ladder = ladder_of([*kept, *measured])
    if len(ladder) > MAX_RUNGS:
        raise CheckpointError(f"{before.file}: a ladder has at most {MAX_RUNGS} settings, this one has {len(ladder)}")
    members = [{name: value for name, value in asdict(rung).items() if value is not None} for rung in ladder]
    write_json(before.file, {**before.values, "ladder": members})
    return ladder


def relative_error_of(check: Mapping[str, Any]) -> float | None:
    """Return the relative error measured at approval, or None if it is unknown."""
    error = check.get("relative_error")
    return error if isinstance(error, float) and 0 < error < 1 else None


def approve(folder: Path, check: Mapping[str, Any]) -> None:
    """Add an approval to tminus.json. It replaces one for the same executor, precision and weights."""
    tminus_json = TminusJson.read(folder)
    same = ("executor", "precision", "weights_hash")
    others = [old for old in tminus_json.values.get("approved", []) if any(old.get(key) != check[key] for key in same)]
    write_json(tminus_json.file, {**tminus_json.values, "approved": [*others, dict(check)]})
