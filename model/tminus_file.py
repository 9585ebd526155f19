"""What a checkpoint's tminus.json holds: classes, approvals, recommended settings, and what a student is made from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tminus.model.catalogue import SAMPLERS, TABLE_SAMPLERS, Recommended
from tminus.model.denoiser import NetConfig
from tminus.model.files import CheckpointError, read_json
from tminus.model.noise import NoiseConfig

TMINUS_FILE = "tminus.json"
CLASS_TABLE = "class_embedding.weight"


@dataclass(frozen=True, slots=True)
class Labels:
    """The classes in tminus.json. null_class is the label that means 'no class' (the e_u of guidance)."""

    class_names: tuple[str, ...] = ()
    null_class: int | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes, without the null class."""
        return len(self.class_names)


def read_labels(file: Path, meta: Mapping[str, Any], unet: NetConfig) -> Labels:
    """Read the classes; without names they are numbered. The null class comes last, see `null_last`.

    Raises CheckpointError.
    """
    embeds = unet.num_class_embeds
    if embeds is None:
        return Labels()
    names, null = meta.get("class_names"), meta.get("null_class")
    if null is not None and not (type(null) is int and 0 <= null < embeds):
        raise CheckpointError(f"{file}: null_class must be 0..{embeds - 1}, got {null!r}")
    count = embeds - (null is not None)
    if names is None:
        names = [str(i) for i in range(count)]
    if not isinstance(names, list) or len(names) != count or len({str(name).casefold() for name in names}) != count:
        bound = f"{count} names that differ by more than case"
        raise CheckpointError(f"{file}: class_names must be {bound}, got {names!r:.500}")
    return Labels(tuple(map(str, names)), embeds - 1 if null is not None else None)


def null_last(state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights with the null class, whichever label it was trained as, as the last; the others keep their order."""
    null, table = meta.get("null_class"), state.get(CLASS_TABLE)
    if null is None or table is None:
        return dict(state)
    return {**state, CLASS_TABLE: torch.cat([table[:null], table[null + 1 :], table[null : null + 1]])}


def read_approved(file: Path, meta: Mapping[str, Any], weights_hash: str) -> tuple[tuple[str, str], ...]:
    """Read the (executor, precision) approved for these very weights. Raises CheckpointError."""
    checks = meta.get("approved", [])
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        raise CheckpointError(f"{file}: approved must be a list of checks, got {checks!r:.200}")
    fitting = [check for check in checks if check.get("weights_hash") == weights_hash]
    return tuple((str(check.get("executor")), str(check.get("precision"))) for check in fitting)


def recommended_of(file: Path, meta: Mapping[str, Any], noise: NoiseConfig, labels: Labels) -> Recommended | None:
    """Read what is recommended; None for nothing. Raises CheckpointError."""
    if meta.get("recommended") is None:
        return None
    try:
        return Recommended.from_json(
            meta["recommended"],
            samplers=(*SAMPLERS, *TABLE_SAMPLERS),
            num_timesteps=noise.num_train_timesteps,
            has_null_class=labels.null_class is not None,
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_recommended(folder: Path, noise: NoiseConfig, labels: Labels) -> Recommended | None:
    """Read only what a folder's tminus.json recommends; None without one. Raises CheckpointError."""
    file = folder / TMINUS_FILE
    return recommended_of(file, read_json(file), noise, labels) if file.is_file() else None


def read_student(file: Path, meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Read what a student is made from; None for other networks. Raises CheckpointError."""
    student = meta.get("student")
    if student is not None and not isinstance(student, dict):
        raise CheckpointError(f"{file}: student must be an object, got {student!r:.100}")
    return student


def folded_guidance_of(file: Path, meta: Mapping[str, Any]) -> float:
    """Read the guidance that the weights have in them, as `train` and `distill` fold it; 1 is none.

    Students of earlier versions tell it as their `guidance` alone. Raises CheckpointError.
    """
    folded = meta.get("folded_guidance", (read_student(file, meta) or {}).get("guidance", 1.0))
    if type(folded) not in (int, float) or not math.isfinite(folded) or folded < 0:
        raise CheckpointError(f"{file}: folded_guidance must be a number, 0 or more, got {folded!r:.100}")
    return float(folded)


def read_folded_guidance(folder: Path) -> float | None:
    """Read only that of a folder's tminus.json; None where it has none. Raises CheckpointError."""
    file = folder / TMINUS_FILE
    meta = read_json(file) if file.is_file() else {}
    return folded_guidance_of(file, meta) if "folded_guidance" in meta else None


def read_size(folder: Path, meta: Mapping[str, Any]) -> int:
    """Read the sides of images, where config.json has no sample_size. Raises CheckpointError."""
    size = meta.get("size_px")
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{folder}: config.json has no sample_size; give size_px in {TMINUS_FILE}")
    return size
