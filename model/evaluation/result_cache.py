"""Results kept in a folder, so that an evaluation that was killed goes on where it was.

One file a result, named by a hash of all that the result depends on, which it holds too. While a result is being made,
each batch of its samples has a file beside it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tminus.model.files import CheckpointError, read_json, write_atomically, write_json
from tminus.model.samplers import Plan
from tminus.model.training.data import ImageSet

FORMAT = 3  # raise it where the same key would mean other figures
MAX_RESULT_BYTES = 256 * 2**20  # of a file, with a sheet of large images in it


class ResultCache:
    """The folder. What is damaged, or is of something else, counts as not there. folder=None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        """Make the folder. Raises OSError."""
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read a result, as it was written."""
        if self._folder is None:
            return None
        try:
            content = read_json(self._file(key), MAX_RESULT_BYTES)
        except (CheckpointError, OSError):
            return None
        value = content.get("result")
        return value if content.get("key") == _plain(key) and isinstance(value, dict) else None

    def write(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep a result, whole or not at all. Raises OSError."""
        if self._folder is not None:
            write_json(self._file(key), {"key": _plain(key), "result": result})

    def batches(self, key: Mapping[str, Any]) -> "BatchCache":
        """The batches of samples of a result that is being made."""
        return BatchCache(None if self._folder is None else self._file(key), key)

    def _file(self, key: Mapping[str, Any]) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.json"


class BatchCache:
    """Batches of samples beside the file of their result. What is damaged counts as not there."""

    def __init__(self, result: Path | None, key: Mapping[str, Any]) -> None:
        self._result, self._key = result, json.dumps(_plain(key), sort_keys=True)
        self.seconds = 0.0  # that those which were read took to make

    def read(self, images: range) -> Tensor | None:
        """Read these images of the seed, uint8 [B, C, H, W]."""
        if self._result is None:
            return None
        try:
            with safe_open(self._file(self._result, images), framework="pt") as opened:
                head = opened.metadata() or {}
                batch: Tensor = opened.get_tensor("images")
            seconds = float(head["seconds"])
        except (SafetensorError, OSError, KeyError, ValueError):
            return None
        if head.get("key") != self._key or batch.dtype != torch.uint8 or len(batch) != len(images):
            return None
        self.seconds += seconds
        return batch.clone()

    def write(self, images: range, batch: Tensor, seconds: float) -> None:
        """Keep them, whole or not at all. Raises OSError."""
        if self._result is not None:
            tensors, head = {"images": batch.contiguous()}, {"key": self._key, "seconds": repr(seconds)}
            write_atomically(self._file(self._result, images), lambda path: save_file(tensors, path, metadata=head))

    def forget(self) -> None:
        """Remove them all: their result is there, or there will be none."""
        if self._result is not None:
            for file in self._result.parent.glob(f"{self._result.stem}-*.safetensors"):
                file.unlink(missing_ok=True)

    @staticmethod
    def _file(result: Path, images: range) -> Path:
        return result.with_name(f"{result.stem}-{images.start}-{images.stop}.safetensors")


def plan_hash(plan: Plan) -> str:
    """Hash all that a compiled sampler holds: a sampler that is changed makes other samples under the same name."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        digest.update(f"{field.name} {getattr(value, 'shape', '')} ".encode())
        digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


def data_hash(data: ImageSet) -> str:
    """Hash the images and their classes: the name of a folder says nothing of what is in it."""
    digest = hashlib.sha256(data.images.contiguous().numpy().data)
    digest.update(repr((tuple(data.images.shape), data.class_names)).encode())
    if data.labels is not None:
        digest.update(data.labels.numpy().tobytes())
    return digest.hexdigest()


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    """The key as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **key}))
    return plain
