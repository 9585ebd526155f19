"""Find, read, hash and write network weights.

Weights may be in a checkpoint folder or in a single file. Pickle files are read with weights_only=True.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tminus.model.files import WEIGHTS_NAME, CheckpointError, first_line, read_json, write_atomically
from tminus.model.machine import GIB, free_memory_bytes

LFS_POINTER = b"version https://git-lfs"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
SAFETENSORS_DTYPES = {  # includes unsupported dtypes, so that error messages can name them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # limit set by safetensors


def load_state_dict(unet_folder: Path) -> dict[str, Tensor]:
    """Read the weights in a U-Net folder, from one file or from shards, and update old parameter names.

    Raises CheckpointError if a file is missing, truncated or unsafe, or if a tensor has fewer values than its shape
    requires. NaN and infinity are not detected.
    """
    state: dict[str, Tensor] = {}
    files = _weight_files(unet_folder)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: the weight map names this file, and it is not there")
    _check_memory(unet_folder, files)
    for file in files:
        state.update(_read_tensors(file))
    _check_tensors(unet_folder, state)
    return present_names(state)


def read_file(file: Path, part_of: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]) -> dict[str, Tensor]:
    """Read a state dict from a single file, without renaming parameters.

    part_of: given the content of a file, returns the part that is the weights, or None if the whole content is.

    Raises CheckpointError like `load_state_dict`.
    """
    _check_memory(file, [file])
    state = _read_tensors(file, part_of)
    _check_tensors(file, state)
    return state


def _check_memory(where: Path, files: Iterable[Path]) -> None:
    """Raise CheckpointError if the weight files are larger than the free memory."""
    size, free = sum(file.stat().st_size for file in files), free_memory_bytes()
    if free is not None and size > free:
        raise CheckpointError(f"{where}: {size / GIB:.1f} GiB of weights, and {free / GIB:.1f} GiB of memory are free")


def _check_tensors(where: Path, state: Mapping[str, Tensor]) -> None:
    if not state:
        raise CheckpointError(f"{where}: the weights hold no tensors")
    for key, value in state.items():
        if value.dtype not in DTYPES:
            raise CheckpointError(f"{where}: {key} must be of {DTYPE_NAMES}, got {value.dtype}")
        if value.layout != torch.strided or value.device.type != "cpu":
            kind = value.layout if value.layout != torch.strided else value.device
            raise CheckpointError(f"{where}: {key} must hold plain values, got {kind}")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise CheckpointError(f"{where}: {key} must hold each of its values, got fewer than {value.numel()}")


def misfit(state: Mapping[str, Tensor], net: nn.Module, asks: str = "config.json") -> str | None:
    """Return a message about the first parameter that does not fit the network, or None if all fit."""
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which that has not"
        more = len(missing) + len(extra) - 1
        return f"the weights do not fit {asks}: {what} (and {more} more)"
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            return f"wrong shape of {key}: {asks} asks for {shape}, got {tuple(state[key].shape)}"
    return None


def to_float32(unet_folder: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights to float32. Raises CheckpointError for NaN and infinite values."""
    cast = {key: value.to(torch.float32) for key, value in state.items()}
    for key, value in cast.items():
        # The sum is fast to compute and is not finite if any value is not. Check all values only then.
        if not bool(value.sum().isfinite()) and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{unet_folder}: {key} holds NaN or infinite weights")
    return cast


_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
OLD_FOURIER = "time_proj.W"
_NEW_NAME = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def present_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename parameters that have old names.

    These are Fourier features, and attention from before 2023 (query, key, value, proj_attn).
    """
    renamed = {}
    for key, value in state.items():
        if key == OLD_FOURIER:  # a file may contain the old name and the new one
            key = "time_proj.weight"
        if match := _OLD_ATTENTION.fullmatch(key):
            key = f"{match[1]}.{_NEW_NAME[match[2]]}.{match[3]}"
        renamed[key] = value
    return renamed


def write_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write weights to a folder atomically, as float32 safetensors."""
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}
    file = folder / f"{WEIGHTS_NAME}.safetensors"
    write_atomically(file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of all names, shapes and values. It does not depend on the file format."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().reshape(-1).data)
    return digest.hexdigest()


def _weight_files(unet_folder: Path) -> list[Path]:
    """List the weight files to read, preferring the same files as diffusers.

    safetensors files come before .bin files, and whole files before shards. Variants such as fp16 and non_ema are used
    only if there are no plain weights.
    """
    for variant in ("", ".*"):
        for suffix in ("safetensors", "bin"):
            whole = sorted(unet_folder.glob(f"{WEIGHTS_NAME}{variant}.{suffix}"))
            if whole := [file for file in whole if "-of-" not in file.name]:  # without shards
                return whole[:1]
            if indexes := sorted(unet_folder.glob(f"{WEIGHTS_NAME}.{suffix}.index{variant}.json")):
                return _shards(indexes[0])
    raise CheckpointError(f"{unet_folder}: no {WEIGHTS_NAME}.safetensors or .bin in it")


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map", {})
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise CheckpointError(f"{index}: weight_map must map keys to file names in the same folder")
    return [index.parent / name for name in sorted(set(names.values()))]


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file into memory that belongs to this process.

    safetensors would map the file into memory instead. Then overwriting the file would change the weights being served,
    and truncating it would kill the process. Copying mapped tensors would take twice the memory.

    Raises ValueError if the file changes while it is read.
    """
    with safe_open(file, "pt"):  # validates the header
        pass
    state = {}
    with file.open("rb") as opened:
        header = json.loads(opened.read(min(int.from_bytes(opened.read(8), "little"), MAX_HEADER_BYTES)))
        start = opened.tell()
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise CheckpointError(f"{file}: {key} must be of {DTYPE_NAMES}, got {entry['dtype']}")
            tensor = torch.empty(entry["shape"], dtype=SAFETENSORS_DTYPES[entry["dtype"]])
            begin, end = entry["data_offsets"]
            values = tensor.reshape(-1).view(torch.uint8).numpy()
            opened.seek(start + begin)
            if len(values) != end - begin or opened.readinto(values.data) != end - begin:
                raise ValueError("it changed while it was read")
            state[key] = tensor
    return state


def _read_tensors(
    file: Path, part_of: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] = lambda _: None
) -> dict[str, Tensor]:
    with file.open("rb") as opened:  # an unreadable file raises a clear OSError here, unlike below
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(
                f"{file}: a pointer of Git LFS and not the weights; run git lfs pull where it is from"
            )
    try:
        if file.suffix == ".safetensors":
            return _read_safetensors(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    except CheckpointError:
        raise
    except UnpicklingError as error:
        raise CheckpointError(f"{file}: refused, it is not plain tensors (a pickle with code is never run)") from error
    except Exception as error:  # a damaged .bin file raises many types, such as KeyError or struct.error
        # Only error messages from safetensors and the operating system describe the file.
        is_clear = file.suffix == ".safetensors" or isinstance(error, OSError)
        why = f" ({first_line(error)})" if is_clear else ""
        raise CheckpointError(f"{file}: truncated or not a weights file{why}") from error
    if isinstance(loaded, dict) and (part := part_of(loaded)) is not None:
        loaded = dict(part)
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        held = f"a dict of {', '.join(map(str, loaded))}" if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(f"{file}: must hold a state dict of tensors, got {held:.200}")
    return {str(key): value for key, value in loaded.items()}
