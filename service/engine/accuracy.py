"""Checks that a library computes what PyTorch computes in float32 on this processor, and that it runs here at all.

Libraries give wrong numbers on some processors, and end the process on others. So each executor is compared with
PyTorch before it serves, once for each combination of weights, versions and processor.
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

# The largest relative error. Measured: 5e-7 in float32, 0.007 in bfloat16, for each bundled network and every timestep.
BOUNDS = {"float32": 0.001, "tf32": 0.02, "bfloat16": 0.04}
SLACK = 3.0  # factor on the error at approval, for processors that round differently
MARK = ".attempt"  # suffix of a file that remains if a signal ends the process
ALL = "all"  # stands for all precisions


class Unfit(ValueError):
    """An executor is unfit for a part of a model."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far outputs are from those of PyTorch in float32, for the worst row."""

    relative_error: float  # |out - reference| / |reference|; inf if an output is not finite
    cosine: float


def deviation(outputs: Tensor, reference: Tensor) -> Deviation:
    """Compare outputs [B, ...] with a reference [B, ...] by row. A row whose reference is not finite does not count."""
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
    """Whether an executor may run a part of a checkpoint here, as found now or at an earlier start."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        executor: str,
        precision: str,
        cache: Path | None,
        part: str = "network",
    ) -> None:
        """cache: the folder of verdicts; None keeps none."""
        about = {
            "verdict": part, "executor": executor, "weights": checkpoint.weights_hash,
            # A library may fail on some sets of cores only.
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
        """The reason why it must not serve, found at an earlier start."""
        reason = self._kept.get("refused")
        return f"{self._refused}: {reason}; delete {self._cache.found} to have it tried again" if reason else None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Mark the first attempt in a file. If a signal ends the process, the next start finds it. Raises Unfit."""
        if (refusal := self.refusal) is not None:
            raise Unfit(refusal)
        file = self._cache.file
        if self._kept or file is None:
            yield
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            mark = NamedTemporaryFile(prefix=f"{file.stem}-", suffix=MARK, dir=file.parent)  # noqa: SIM115  closed below
        except OSError:  # for example in a read-only folder
            yield
            return
        with mark:
            fcntl.flock(mark, fcntl.LOCK_EX)  # held until the process ends
            elsewhere = faulthandler.is_enabled()
            if elsewhere:  # signals are written to another file, so any end of the process counts
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
        """Compare outputs with the reference, and keep the verdict. Raises Unfit if they differ too much.

        bits: a hash of some output. If it is the same as at an earlier start, no comparison is needed.
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
        """Return the signal that ended an attempt, and delete the marks of processes that have ended."""
        found, file = None, self._cache.file
        for mark in file.parent.glob(f"{file.stem}-*{MARK}") if file is not None else ():
            with suppress(OSError), mark.open("r+b") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its process lives
                mark.unlink()
                found = opened.readline().decode(errors="replace").strip() or found
        return found
