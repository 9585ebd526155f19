"""Read and write checkpoint folders, in diffusers' layout. Nothing is ever unpickled beyond tensors.

    model_index.json, unet/{config.json, diffusion_pytorch_model.safetensors}, scheduler/scheduler_config.json
    tminus.json    what diffusers has no place for: class names, the null class, where the weights came from

A flat folder (config.json and weights in the root, as google/ddpm-*) is read too.
"""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.noise import NoiseConfig
from model.unet import UNet2D
from model.unet_config import UNetConfig

WEIGHTS_NAME = "diffusion_pytorch_model"
TMINUS_FILE = "tminus.json"
DIFFUSERS_VERSION = "0.30.0"  # what model_index.json declares: the layout has not changed since
MAX_JSON_BYTES = 8 * 2**20


class CheckpointError(Exception):
    """A checkpoint folder cannot be served; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What tminus.json says of classes. null_class is the label that means 'no class' (guidance's e_u)."""

    class_names: tuple[str, ...] = ()
    null_class: int | None = None

    @property
    def num_classes(self) -> int:
        """How many real classes there are; the null class is not one."""
        return len(self.class_names)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model: the network in float32 on the CPU in eval mode, and all that sampling from it needs."""

    net: UNet2D
    noise: NoiseConfig
    labels: Labels
    weights_hash: str
    name: str
    size_px: tuple[int, int]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    approved: tuple[tuple[str, str], ...] = ()
    """(executor, precision) whose images `tminus evaluate --approve` found no worse, for these very weights."""


# --- reading -----------------------------------------------------------------------------------------------------


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a checkpoint folder. Raises CheckpointError with one clear line for whatever is wrong with it."""
    try:
        return _load(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _load(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder}: the folder is empty")
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    try:
        unet = UNetConfig.from_dict(_read_json(unet_folder / "config.json"))
        noise = NoiseConfig.from_dict(_read_json(_scheduler_file(folder)))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    meta = _read_json(folder / TMINUS_FILE) if (folder / TMINUS_FILE).is_file() else {}
    labels = _labels(folder / TMINUS_FILE, meta, unet)
    state = load_state_dict(unet_folder)
    _check_shapes(unet_folder, state, unet)
    with torch.device("meta"):
        net = UNet2D(unet)
    net.load_state_dict(state, assign=True)
    net.requires_grad_(False).eval()
    size_px = unet.size_px or _size_from_meta(folder, meta)
    if any(side % unet.size_multiple for side in size_px):
        raise CheckpointError(f"{folder}: sample_size {size_px} must divide by {unet.size_multiple} for this U-Net")
    learned = noise.variance_type == "learned_range"  # the second half of its channels is v, see samplers.py
    if unet.in_channels not in (1, 3) or unet.out_channels != unet.in_channels * (2 if learned else 1):
        channels = f"{unet.in_channels} -> {unet.out_channels}"
        out = "twice as many out" if learned else "as many out"
        bound = f"only 1 or 3 channels in and {out} can be served with variance_type {noise.variance_type}"
        raise CheckpointError(f"{folder}: {bound}, got {channels}")
    name = str(meta.get("name") or folder.resolve().name)
    weights_hash = hash_weights(state)
    approved = _approved(folder / TMINUS_FILE, meta, weights_hash)
    return Checkpoint(net, noise, labels, weights_hash, name, size_px, meta.get("provenance", {}), approved)


def load_state_dict(unet_folder: Path) -> dict[str, Tensor]:
    """Read the weights of a U-Net folder, whole or in shards, with today's attention names, as float32.

    Raises CheckpointError for missing, truncated, non-finite or unsafe files.
    """
    state: dict[str, Tensor] = {}
    for file in _weight_files(unet_folder):
        state.update(_read_tensors(file))
    if not state:
        raise CheckpointError(f"{unet_folder}: the weights hold no tensors")
    for key, value in state.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{unet_folder}: {key} must be floating point, got {value.dtype}")
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{unet_folder}: {key} holds NaN or infinite weights")
    return rename_attention({key: value.to(torch.float32) for key, value in state.items()})


_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_NAME = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give attention weights from before 2023 (query, key, value, proj_attn) their present names."""
    renamed = {}
    for key, value in state.items():
        if match := _OLD_ATTENTION.fullmatch(key):
            key = f"{match[1]}.{_NEW_NAME[match[2]]}.{match[3]}"
        renamed[key] = value
    return renamed


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values: the same weights have one hash, whatever file they lie in."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _weight_files(unet_folder: Path) -> list[Path]:
    """The files to read, in diffusers' order of preference: safetensors before .bin, whole before shards.

    A variant (fp16, non_ema) is read only where there are no plain weights.
    """
    for variant in ("", ".*"):
        for suffix in ("safetensors", "bin"):
            whole = sorted(unet_folder.glob(f"{WEIGHTS_NAME}{variant}.{suffix}"))
            if whole := [file for file in whole if "-of-" not in file.name]:  # a shard is no whole file
                return whole[:1]
            if indexes := sorted(unet_folder.glob(f"{WEIGHTS_NAME}.{suffix}.index{variant}.json")):
                return _shards(indexes[0])
    raise CheckpointError(f"{unet_folder}: no {WEIGHTS_NAME}.safetensors or .bin in it")


def _shards(index: Path) -> list[Path]:
    names = _read_json(index).get("weight_map", {})
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise CheckpointError(f"{index}: weight_map must map keys to file names in the same folder")
    return [index.parent / name for name in sorted(set(names.values()))]


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file}: the weight map names this file, and it is not there")
    with file.open("rb"):  # a file that may not be read says so here, as neither of the two below does
        pass
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: refused, it is not plain tensors (a pickle with code is never run)") from error
    except Exception as error:  # a damaged .bin fails in many ways: KeyError, IndexError, struct.error, AssertionError
        raise CheckpointError(f"{file}: truncated or not a weights file ({_first_line(error)})") from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{file}: must hold a state dict of tensors")
    return {str(key): value for key, value in loaded.items()}


def _check_shapes(unet_folder: Path, state: Mapping[str, Tensor], unet: UNetConfig) -> None:
    # On the meta device nothing is allocated, so a config that asks for a huge net is refused before it costs memory.
    try:
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in UNet2D(unet).state_dict().items()}
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{unet_folder / 'config.json'}: {_first_line(error)}") from error
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the config's U-Net has not"
        more = len(missing) + len(extra) - 1
        raise CheckpointError(f"{unet_folder}: the weights do not fit config.json: {what} (and {more} more)")
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            got = tuple(state[key].shape)
            raise CheckpointError(f"{unet_folder}: wrong shape of {key}: config.json asks for {shape}, got {got}")


def _scheduler_file(folder: Path) -> Path:
    nested = folder / "scheduler" / "scheduler_config.json"
    return nested if nested.is_file() else folder / "scheduler_config.json"


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file}: larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: not JSON that can be read, it is nested too deeply") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return value


def _labels(file: Path, meta: Mapping[str, Any], unet: UNetConfig) -> Labels:
    embeds = unet.num_class_embeds
    if embeds is None:
        return Labels()
    names, null = meta.get("class_names"), meta.get("null_class")
    if null is not None and not (isinstance(null, int) and 0 <= null < embeds):
        raise CheckpointError(f"{file}: null_class must be 0..{embeds - 1}, got {null!r}")
    if null is not None and null != embeds - 1:
        raise CheckpointError(f"{file}: null_class must be the last label, {embeds - 1}, got {null}")
    count = embeds - (null is not None)
    if names is None:
        names = [str(i) for i in range(count)]
    if not isinstance(names, list) or len(names) != count or len(set(map(str, names))) != count:
        raise CheckpointError(f"{file}: class_names must be {count} different names, got {names!r}")
    return Labels(tuple(map(str, names)), null)


def _approved(file: Path, meta: Mapping[str, Any], weights_hash: str) -> tuple[tuple[str, str], ...]:
    checks = meta.get("approved", [])
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        raise CheckpointError(f"{file}: approved must be a list of checks, got {checks!r:.200}")
    fitting = [check for check in checks if check.get("weights_hash") == weights_hash]
    return tuple((str(check.get("executor")), str(check.get("precision"))) for check in fitting)


def _size_from_meta(folder: Path, meta: Mapping[str, Any]) -> tuple[int, int]:
    size = meta.get("size_px")
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{folder}: config.json has no sample_size; give size_px in {TMINUS_FILE}")
    return (size, size)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# --- writing -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Tensor],
    unet: UNetConfig,
    noise: NoiseConfig,
    labels: Labels,
    provenance: Mapping[str, Any],
) -> None:
    """Write a folder that tminus and `DDPMPipeline.from_pretrained` both load. Each file appears whole or not."""
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}
    scheduler_class = noise.to_dict()["_class_name"]
    pipeline_class = "DDIMPipeline" if scheduler_class == "DDIMScheduler" else "DDPMPipeline"
    index = {
        "_class_name": pipeline_class,
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_class],
        "unet": ["diffusers", "UNet2DModel"],
    }
    meta = {
        "name": folder.resolve().name,
        "class_names": list(labels.class_names),
        "null_class": labels.null_class,
        "provenance": dict(provenance),
    }
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "unet" / "config.json", unet.to_dict())
    _write_json(folder / "scheduler" / "scheduler_config.json", noise.to_dict())
    _write_json(folder / "model_index.json", index)
    _write_json(folder / TMINUS_FILE, meta)
    weights = folder / "unet" / f"{WEIGHTS_NAME}.safetensors"
    write_atomically(weights, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def approve(folder: Path, check: Mapping[str, Any]) -> None:
    """Note a check in tminus.json: executor, precision and weights_hash that it holds for, and the figures."""
    meta = _read_json(folder / TMINUS_FILE) if (folder / TMINUS_FILE).is_file() else {}
    same = ("executor", "precision", "weights_hash")
    others = [old for old in meta.get("approved", []) if any(old.get(key) != check[key] for key in same)]
    _write_json(folder / TMINUS_FILE, {**meta, "approved": [*others, dict(check)]})


def write_atomically(file: Path, write: Callable[[Path], None]) -> None:
    """Write beside `file`, sync, and rename over it: a reader or a crash sees the old file or the new, never a part."""
    temporary = file.with_name(f".{file.name}.part")  # one name: what a kill leaves is overwritten the next time
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    write_atomically(file, lambda path: _dump(path, value))


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
