"""Which ways of running the network a request for an executor allows, before any is measured."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tminus.model.checkpoint import Checkpoint
from tminus.service.engine import openvino_executor
from tminus.service.engine.executors import MAX_GRAPHS, PRECISIONS

log = logging.getLogger(__name__)

EXECUTORS = ("eager", "compile", "openvino")


@dataclass(frozen=True, slots=True)
class Choice:
    """An executor and all its parameters; can be built from, and kept between starts."""

    executor: str
    precision: str
    channels_last: bool = True
    sizes: tuple[int, ...] | None = None  # of a pass; None runs any batch as one pass
    wide: int = 0  # openvino: up to so many places beyond even shares run in wide passes, on all threads


@dataclass(frozen=True, slots=True)
class Wish:
    """What the settings ask for; auto leaves the choice to measurement."""

    executor: str = "auto"
    precision: str = "auto"
    exact: bool = True
    max_batch: int = 16  # the largest batch that will be run
    threads: int = 1


def find_candidates(checkpoint: Checkpoint, device: torch.device, wish: Wish) -> list[Choice]:
    """What may be chosen, without sizes, the likely fastest first.

    A precision below float32 must be approved, or asked for.
    """
    if wish.executor not in ("auto", *EXECUTORS):
        raise ValueError(f"executor must be auto, {', '.join(EXECUTORS)}, got {wish.executor!r}")
    if wish.precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision must be auto, {', '.join(PRECISIONS)}, got {wish.precision!r}")
    if wish.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision tf32 needs a CUDA device, got {device}")
    if wish.executor == "openvino":
        if not openvino_executor.available():
            raise ValueError("executor openvino is not installed: pip install 'tminus[openvino]'")
        if device.type != "cpu":
            raise ValueError(f"executor openvino runs on a CPU, got device {device}")
    names: tuple[str, ...] = (wish.executor,)
    if wish.executor == "auto":
        # On a CPU torch.compile needs a compiler and a minute, and was never the fastest: only when asked for.
        names = ("compile", "eager") if device.type == "cuda" else ("openvino", "eager")
        if device.type == "cpu" and not openvino_executor.available():
            log.warning(
                "openvino is not installed; on a CPU it is some three times faster: pip install 'tminus[openvino]'"
            )
    candidates = []
    for name in names:
        for precision in _precisions(checkpoint, device, wish, name):
            layouts = (True, False) if name == "eager" and device.type == "cpu" else (True,)
            candidates += [Choice(name, precision, channels_last) for channels_last in layouts]
    if not candidates:
        raise ValueError(f"precision {wish.precision} is not something this processor computes in with openvino")
    return candidates


def _precisions(checkpoint: Checkpoint, device: torch.device, wish: Wish, executor: str) -> list[str]:
    wanted = [wish.precision]
    if wish.precision == "auto":
        wanted = [name for name in PRECISIONS if name == "float32" or (executor, name) in checkpoint.approved]
    able: Sequence[str] = PRECISIONS if device.type == "cuda" else ("float32", "bfloat16")
    if executor == "openvino":
        able = openvino_executor.precisions() if openvino_executor.available() else ()
    return [name for name in reversed(wanted) if name in able]


def valid_choice(fields: Mapping[str, Any] | None, candidates: Sequence[Choice], wish: Wish) -> Choice | None:
    """The choice read from the cache, or None where it could not be made now: the file may be damaged or edited."""
    try:
        sizes = tuple((fields or {})["sizes"] or ()) or None
        choice = Choice(**{**(fields or {}), "sizes": sizes})
    except (TypeError, KeyError):
        return None
    numbers = sizes or (1,)
    if not all(type(size) is int and 1 <= size <= wish.max_batch for size in numbers):
        return None
    ascending = list(numbers) == sorted(set(numbers)) and len(numbers) <= MAX_GRAPHS
    possible = type(choice.wide) is int and 0 <= choice.wide < wish.threads
    return choice if ascending and possible and replace(choice, sizes=None, wide=0) in candidates else None
