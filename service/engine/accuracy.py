"""Checks that an executor runs on this machine, and that its outputs agree with PyTorch's in float32.

Some libraries compute wrong numbers on some processors, and crash the process on others. So each executor is compared
with PyTorch before it serves, once for each combination of weights, versions and processor.
"""

import faulthandler
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint
from tminus.service.engine.choice_cache import ChoiceCache

log = logging.getLogger(__name__)

# Largest relative error allowed in each precision. For comparison, the largest error over all bundled networks and
# timesteps was 5e-7 in float32 and 0.007 in bfloat16.
BOUNDS = {"float32": 0.001, "tf32": 0.02, "bfloat16": 0.04}
SLACK = 3.0  # the error may be this many times the error at approval, because processors round differently
MARK = ".attempt"  # suffix of a marker file that is left behind if a signal kills the process
ALL = "all"  # key of a verdict that covers all precisions


class Unfit(ValueError):
    """Raised if an executor must not run a part of a model."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far an executor's outputs are from PyTorch's in float32, for the row with the largest error."""

    relative_error: float  # |out - reference| / |reference|; inf if an output is not finite
    cosine: float


def deviation(outputs: Tensor, reference: Tensor) -> Deviation:
    """Compare outputs [B, ...] with a reference [B, ...] row by row. Rows with a non-finite reference are ignored."""
    reference, outputs = reference.cpu().flatten(1).double(), outputs.cpu().flatten(1).double()
    finite = reference.isfinite().all(1)
    reference, outputs = reference[finite], outputs[finite]
    if not len(reference):
        return Deviation(0.0, 1.0)
    errors = (outputs - reference).norm(dim=1) / reference.norm(dim=1).clamp(min=1e-9)
    errors = errors.nan_to_num(nan=torch.inf)
    worst = int(errors.argmax())
    cosine = torch.cosine_similarity(outputs[worst], reference[worst], dim=0)
    return Deviation(float(errors[worst]), float(cosine))


class Verdict:
    """Decides whether an executor may run a part of a checkpoint on this machine, and caches the decision."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        executor: str,
        precision: str,
        cache: Path | None,
        part: str = "network",
    ) -> None:
        """part: network, encoder or decoder. cache: the folder for verdicts; None disables the cache."""
        about = {
            "verdict": part, "executor": executor, "weights": checkpoint.weights_hash,
            # Some libraries fail only on certain sets of cores.
            "cores": sorted(os.sched_getaffinity(0)),
        }  # fmt: skip
        self.name = f"{part} by {executor} in {precision}"
        at_approval = checkpoint.approved.get((executor, precision))
        self._bound = BOUNDS[precision] if at_approval is None else max(SLACK * at_approval, BOUNDS["float32"])
        self._cache, self._precision = ChoiceCache(cache, checkpoint, device, about, ()), precision
        if (signal := self._fatal_signal()) is not None:
            self._keep(ALL, {"refused": f"an earlier start ended while it was tried: {signal}"})
        kept = self._cache.read() or {}
        self._kept: Mapping[str, Any] = kept.get(ALL) or kept.get(precision) or {}
        self._refused = f"{part} by {executor}" if ALL in kept else self.name

    @property
    def refusal(self) -> str | None:
        """Why an earlier start refused the executor, or None if none did."""
        reason = self._kept.get("refused")
        return f"{self._refused}: {reason}; delete {self._cache.found} to have it tried again" if reason else None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Run the body of the `with` block as an attempt. Raises Unfit if an earlier start refused the executor.

        The first attempt creates a marker file, which is left behind if a signal kills the process.
        """
        if (refusal := self.refusal) is not None:
            raise Unfit(refusal)
        file = self._cache.file
        if self._kept or file is None:
            yield
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            mark = NamedTemporaryFile(prefix=f"{file.stem}-", suffix=MARK, dir=file.parent)  # noqa: SIM115  closed below
        except OSError:  # for example, the folder is read-only
            yield
            return
        with mark:
            fcntl.flock(mark, fcntl.LOCK_EX)  # held until the attempt or the process ends
            elsewhere = faulthandler.is_enabled()
            if elsewhere:  # faulthandler writes to another file, so the marker cannot name the signal
                mark.write(b"its process has ended")
                mark.flush()
            else:
                faulthandler.enable(mark, all_threads=False)
            try:
                yield
            finally:
                if not elsewhere:
                    faulthandler.disable()

    def check(self, bits: str, outputs: Callable[[], Tensor], reference: Callable[[], Tensor]) -> None:
        """Compare outputs with the reference, and cache the verdict. Raises Unfit if they differ too much.

        bits: a hash of a sample output. If an earlier start accepted the same hash, the comparison is skipped.
        """
        if self._kept.get("bits") == bits:
            return
        found = deviation(outputs(), reference())
        figures = (
            f"its output differs from PyTorch's in float32 by {found.relative_error:.2g} of its size "
            f"(cosine {found.cosine:.5f}), and at most {self._bound:.2g} is allowed"
        )
        if not found.relative_error <= self._bound:
            self._keep(self._precision, {"refused": figures})
            raise Unfit(f"{self.name}: {figures}")
        self._kept = {"bits": bits} | asdict(found)
        self._keep(self._precision, self._kept)
        log.info("%s: %s", self.name, figures)

    def _keep(self, precisions: str, found: Mapping[str, Any]) -> None:
        self._cache.write({**(self._cache.read() or {}), precisions: found})

    def _fatal_signal(self) -> str | None:
        """Return the signal that killed the process during an earlier attempt, if any. Delete its marker file."""
        found, file = None, self._cache.file
        for mark in file.parent.glob(f"{file.stem}-*{MARK}") if file is not None else ():
            with suppress(OSError), mark.open("r+b") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises OSError if that process is still running
                mark.unlink()
                found = opened.readline().decode(errors="replace").strip() or found
        return found
