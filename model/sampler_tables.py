"""A checkpoint's sampler tables: coefficients fitted by `tminus tune` or written for a student.

Each table is a file samplers/NAME.json in the checkpoint folder. It applies to one sampler, number of steps and
guidance, and defines the update

    x' = a x + b x0 + c x0_previous + d (the x0 before x0_previous) + s z

Tables are plain numbers and need no torch. The service counts passes from them, and the engine compiles them to plans.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tminus.model.catalogue import MAX_GUIDANCE, TABLE_SAMPLERS
from tminus.model.config import is_number
from tminus.model.files import CheckpointError, read_json, write_json

log = logging.getLogger(__name__)

FOLDER = "samplers"
FORMAT = 1
MAX_TABLES = 256
LINE = ("a", "b", "c", "d", "s")
MAX_COEFFICIENT = 1e3


@dataclass(frozen=True, slots=True)
class Table:
    """A sampler for one checkpoint: decreasing timesteps, and a, b, c, d and s for each of them."""

    sampler: str
    steps: int
    guidance: float
    timesteps: tuple[float, ...]
    lines: tuple[tuple[float, ...], ...]
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)  # for users: teacher, loss, measurements

    @property
    def hash(self) -> str:
        """A hash of the fields that affect images, that is, of all fields except `about`."""
        return _hash_of(self)

    def started(self, start: int) -> tuple[tuple[float, ...], ...]:
        """Return the lines from step `start` on, adjusted for the missing earlier predictions.

        The coefficient of a missing prediction is added to that of the oldest available prediction.
        """
        lines = [list(line) for line in self.lines[start:]]
        if start and lines:
            a, b, c, d, s = lines[0]
            lines[0] = [a, b + c + d, 0.0, 0.0, s]
            if len(lines) > 1:
                a, b, c, d, s = lines[1]
                lines[1] = [a, b, c + d, 0.0, s]
        return tuple(tuple(line) for line in lines)


@cache  # a request needs the hash several times
def _hash_of(table: Table) -> str:
    parts = [table.sampler, table.steps, table.guidance, table.timesteps, table.lines]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def nearest(tables: Iterable[Table], steps: int, guidance: float) -> Table:
    """Return the table with the nearest number of steps (by ratio), then the nearest guidance.

    In a tie, the larger value wins.
    """
    return min(
        tables,
        key=lambda table: (
            round(abs(math.log(table.steps / max(1, steps))), 9),
            abs(table.guidance - guidance),
            -table.steps,
            -table.guidance,
        ),
    )


def table_file(folder: Path, sampler: str, steps: int, guidance: float) -> Path:
    """Return the path of a table in a checkpoint folder. The file may not exist."""
    guided = f"-guidance-{guidance:g}" if guidance != 1 else ""
    return folder / FOLDER / f"{sampler}-{steps}{guided}.json"


def write_table(folder: Path, table: Table, weights_hash: str, noise: Mapping[str, Any]) -> Path:
    """Write a table to a checkpoint folder atomically, and return its path."""
    (folder / FOLDER).mkdir(exist_ok=True)
    file = table_file(folder, table.sampler, table.steps, table.guidance)
    value = {
        "format": FORMAT,
        "sampler": table.sampler,
        "steps": table.steps,
        "guidance": table.guidance,
        "weights_hash": weights_hash,
        "noise": dict(noise),
        "timesteps": list(table.timesteps),
        "lines": [list(line) for line in table.lines],
        "about": dict(table.about),
    }
    write_json(file, value)
    return file


def read_tables(
    folder: Path, weights_hash: str, noise: Mapping[str, Any], *, num_timesteps: int, null_class: bool, fractional: bool
) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """Read a checkpoint's tables, skipping invalid files.

    Returns the tables, and one message per invalid file with the file's name and the reason.
    """
    tables: dict[tuple[str, int, float], Table] = {}
    refused: list[str] = []
    files = sorted((folder / FOLDER).glob("*.json"))
    for file in files[:MAX_TABLES]:
        try:
            table = _read(file, weights_hash, noise, num_timesteps, null_class, fractional)
            key = (table.sampler, table.steps, table.guidance)
            if key in tables:
                raise CheckpointError(f"{file}: must be the only one of its sampler, steps and guidance, got {key}")
            tables[key] = table
        except (CheckpointError, OSError) as error:
            why = getattr(error, "strerror", None) or str(error).removeprefix(f"{file}: ")
            refused.append(f"{FOLDER}/{file.name}: {why}")
            log.warning("%s is not used: %s", file, refused[-1].split(": ", 1)[1])
    if len(files) > MAX_TABLES:
        refused.append(f"{FOLDER}: holds {len(files)} files, of which the first {MAX_TABLES} are read")
        log.warning("%s", refused[-1])
    return tuple(tables[key] for key in sorted(tables)), tuple(refused)


def _read(
    file: Path, weights_hash: str, noise: Mapping[str, Any], num_timesteps: int, null_class: bool, fractional: bool
) -> Table:
    value = read_json(file)

    def require(ok: bool, name: str, bound: str) -> None:
        if not ok:
            raise CheckpointError(f"{file}: {name} must be {bound}, got {value.get(name)!r:.100}")

    version = value.get("format")
    newer = isinstance(version, int) and version > FORMAT
    require(version == FORMAT, "format", f"{FORMAT}{' (it is of a newer version of tminus)' if newer else ''}")
    require(value.get("sampler") in TABLE_SAMPLERS, "sampler", f"one of {', '.join(TABLE_SAMPLERS)}")
    require(value.get("weights_hash") == weights_hash, "weights_hash", f"{weights_hash}, of this checkpoint's weights")
    require(value.get("noise") == dict(noise), "noise", "the checkpoint's own noise schedule")
    steps: Any = value.get("steps")
    guidance: Any = value.get("guidance")
    require(type(steps) is int and 1 <= steps <= num_timesteps, "steps", f"an integer in 1..{num_timesteps}")
    require(is_number(guidance) and 0 <= guidance <= MAX_GUIDANCE, "guidance", f"a number in 0..{MAX_GUIDANCE:g}")
    require(guidance == 1 or null_class, "guidance", "1 (off) for a checkpoint without a null class")
    t, lines = value.get("timesteps"), value.get("lines")
    kind = "numbers" if fractional else "whole numbers"
    bound = f"{steps} falling {kind} in 0..{num_timesteps - 1}"
    require(isinstance(t, list) and len(t) == steps and all(map(is_number, t)), "timesteps", bound)
    assert isinstance(t, list)
    fits = t[-1] >= 0 and t[0] <= num_timesteps - 1 and all(now > then for now, then in pairwise(t))
    require(fits and (fractional or all(each == int(each) for each in t)), "timesteps", bound)
    bound = f"{steps} lists of {len(LINE)} numbers, none above {MAX_COEFFICIENT:g} in size"
    require(isinstance(lines, list) and len(lines) == steps and all(map(_line, lines)), "lines", bound)
    assert isinstance(lines, list)
    require(all(line[4] >= 0 for line in lines), "lines", "without a negative s, which is a standard deviation")
    require(lines[-1][4] == 0, "lines", "without noise in the last")
    about = value.get("about")
    return Table(
        value["sampler"],
        int(steps),
        float(guidance),
        tuple(map(float, t)),
        tuple(tuple(map(float, line)) for line in lines),
        about if isinstance(about, dict) else {},
    )


def _line(line: object) -> bool:
    return (
        isinstance(line, list)
        and len(line) == len(LINE)
        and all(is_number(c) and abs(c) <= MAX_COEFFICIENT for c in line)
    )


def steps_and_guidances(tables: Sequence[Table]) -> str:
    """Describe tables by steps and guidance: `5, 8, 10 steps at guidance 1; 8 steps at guidance 1.5`."""
    by_guidance: dict[float, list[int]] = {}
    for table in tables:
        by_guidance.setdefault(table.guidance, []).append(table.steps)
    return "; ".join(
        f"{', '.join(map(str, sorted(steps)))} steps at guidance {guidance:g}"
        for guidance, steps in sorted(by_guidance.items())
    )
