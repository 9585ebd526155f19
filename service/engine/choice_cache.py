"""Caches this machine's measurements and verdicts between starts, in a folder of small files.

The contents of the files are not trusted. If a file cannot be read or written, the next start measures again.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tminus.model.checkpoint import Checkpoint
from tminus.model.files import write_text
from tminus.service.engine import openvino_executor

log = logging.getLogger(__name__)

CPU_LINES = ("model name", "flags")  # lines of /proc/cpuinfo that describe the processor
GIVEN = "given"  # subfolder with results from another machine; may be read-only
NOISE_KEY = "noisy"  # marks what was measured on a busy machine; a start on an idle machine measures it again
MOST_WAIT_S = 120.0  # a start waits at most this long for another one that measures
POLL_S = 0.1


def default_cache() -> Path | None:
    """Return tminus's folder in the user's cache; None if the user has no home directory."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tminus"
    except RuntimeError:
        return None


class ChoiceCache:
    """Reads and writes one file of the cache."""

    def __init__(
        self,
        folder: Path | None,
        checkpoint: Checkpoint,
        device: torch.device,
        wish: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
    ) -> None:
        """Derive the file name from arguments, machine and library versions. If folder is None, store nothing."""
        self.file: Path | None = None  # None: nothing is stored
        self.found: Path | None = None  # the file that `read` tried last
        if folder is not None:
            parts = {
                # The host name is left out, because it changes with every new container.
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
        """Return the result of an earlier start, or else the result in the subfolder GIVEN; None if there is neither.

        A result from GIVEN counts as measured on an idle machine.
        """
        if self.file is None:
            return None
        self.found = self.file
        if (own := _load(self.found)) is not None:
            return own
        self.found = self.file.parent / GIVEN / self.file.name
        given = _load(self.found)
        return None if given is None else {name: value for name, value in given.items() if name != NOISE_KEY}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Let only one process with this folder measure at a time, because each would slow down the others.

        Waits for the others, but not longer than MOST_WAIT_S. The caller should read the result again inside: another
        process may have measured the same.
        """
        if self.file is None:
            yield
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.file.parent, os.O_RDONLY)
        except OSError:
            yield
            return
        try:
            until_s, waits = time.monotonic() + MOST_WAIT_S, False
            while not _locked(folder) and time.monotonic() < until_s:
                if not waits:
                    log.info("waiting for another start on this machine, which is measuring")
                waits = True
                time.sleep(POLL_S)
            yield
        finally:
            os.close(folder)  # ends the lock

    def mark_noisy(self) -> None:
        """Have the next start on an idle machine measure again."""
        if (fields := self.read()) is not None:
            self.write({**fields, NOISE_KEY: True})

    def write(self, fields: Mapping[str, Any]) -> None:
        """Store a result for later starts. If that fails, only log it."""
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(fields) + "\n")
        except OSError as error:  # for example, a read-only file system
            log.info("what was measured is not kept: %s", error)


def _locked(folder: int) -> bool:
    """Try to lock an open folder. Return True where folders cannot be locked, as on some network file systems."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _cpu() -> tuple[str, str]:
    """Return the processor's name and a hash of its features.

    The name is not enough: virtual machines may report the same name for different processors.
    """
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
