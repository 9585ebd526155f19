"""Measurements and verdicts of this machine, kept between starts in a folder of small files.

File contents are not trusted. If a file cannot be read or written, the next start measures again.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tminus.model.checkpoint import Checkpoint
from tminus.model.files import write_text
from tminus.service.engine import openvino_executor

log = logging.getLogger(__name__)

CPU_LINES = ("model name", "flags")  # lines of /proc/cpuinfo
GIVEN = "given"  # subfolder with results from another machine; it may be read-only
NOISE_KEY = "noisy"  # marks a choice from a busy machine, which an idle one makes again


def default_cache() -> Path | None:
    """Return the user's cache folder; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tminus"
    except RuntimeError:
        return None


class ChoiceCache:
    """One file of the cache."""

    def __init__(
        self,
        folder: Path | None,
        checkpoint: Checkpoint,
        device: torch.device,
        wish: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
    ) -> None:
        """Name the file by a hash of all arguments. Without a folder nothing is kept."""
        self.file: Path | None = None  # this machine's file
        self.found: Path | None = None  # the file that was read last
        if folder is not None:
            parts = {
                # The host name is left out: each container has a new one.
                "machine": (platform.machine(), *_cpu(), os.cpu_count()),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "openvino": openvino_executor.version(),
                "unet": checkpoint.net.config.to_dict(),
                "size_px": checkpoint.row_shape[1:],
                "wish": wish,
                "candidates": candidates,
            }
            key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
            self.file = folder / f"choice-{key}.json"

    def read(self) -> Mapping[str, Any] | None:
        """Read an earlier start's result, or one from GIVEN, which counts as made on an idle machine."""
        if self.file is None:
            return None
        self.found = self.file
        if (own := _load(self.found)) is not None:
            return own
        self.found = self.file.parent / GIVEN / self.file.name
        given = _load(self.found)
        return None if given is None else {name: value for name, value in given.items() if name != NOISE_KEY}

    def write(self, fields: Mapping[str, Any]) -> None:
        """Keep a result for the next start."""
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(fields) + "\n")
        except OSError as error:  # for example on a read-only file system: the next start measures again
            log.info("what was measured is not kept: %s", error)


def _cpu() -> tuple[str, str]:
    """Return the processor's name and its features: virtual machines give different processors the same name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor(), ""
    found = (
        next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "") for name in CPU_LINES
    )
    name, flags = found
    return name, hashlib.sha256(flags.encode()).hexdigest()[:16]


def _load(file: Path) -> dict[str, Any] | None:
    try:
        fields = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
