"""Results kept in a folder, so that an evaluation that was killed repeats none that it had finished.

Each result has a file, named by a hash of its key, which is everything that it depends on. The file holds the key too.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tminus.model.files import CheckpointError, read_json, write_json
from tminus.model.samplers import Plan
from tminus.model.training.data import ImageSet

FORMAT = 3  # raise it where the same key would mean other figures
MAX_RESULT_BYTES = 256 * 2**20  # of a file, with a sheet of large images in it


class ResultCache:
    """The folder of results. A damaged file, or one of another key, counts as missing. folder=None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        """Make the folder. Raises OSError."""
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read a result; None where there is none."""
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

    def _file(self, key: Mapping[str, Any]) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.json"


def plan_hash(plan: Plan) -> str:
    """Hash the plan of a sampler: a new version may make other samples under the same name."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        digest.update(f"{field.name} {getattr(value, 'shape', '')} ".encode())
        digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


def data_hash(data: ImageSet) -> str:
    """Hash the images and their classes, since a folder of the same name may hold others."""
    digest = hashlib.sha256(data.images.contiguous().numpy().data)
    digest.update(repr((tuple(data.images.shape), data.class_names)).encode())
    if data.labels is not None:
        digest.update(data.labels.numpy().tobytes())
    return digest.hexdigest()


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    """The key as JSON reads it back, where tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **key}))
    return plain
