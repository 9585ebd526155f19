"""Choose the executor that runs the network by measuring the candidates on this machine; the answer is cached.

An exact candidate is tried at several pass sizes, and keeps those whose outputs agree to the bit.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from service.engine import openvino_executor
from service.engine.autotune_cache import ChoiceCache
from service.engine.executors import MAX_GRAPHS, PRECISIONS, CompiledExecutor, EagerExecutor, Executor

log = logging.getLogger(__name__)

EXECUTORS = ("eager", "compile", "openvino")
CPU_SIZES = (1, 2, 4)
WORTH = 0.97  # a larger size is kept if a row takes less than this share of its time at the size before
SLOW_PASS_S = 1.0  # after a pass that takes this long no larger one is tried
TRIAL_S = 0.1  # how long one size is measured
AGREE_ROWS, MAX_AGREE_ROWS = 8, 512  # that two ways of running a pass are compared on
AGREE_VALUES = 2**18  # below float32: compare at least this many values of the first layer


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


class Builder:
    """Builds executors of one checkpoint, whose network they take over. OpenVINO's graph is converted once for all."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, threads: int) -> None:
        self.checkpoint, self.device, self._threads = checkpoint, device, threads
        self._shape = (checkpoint.net.config.in_channels, *checkpoint.size_px)
        self._graph: openvino_executor.Graph | None = None

    def build(self, choice: Choice) -> Executor:
        """Build the executor of a choice."""
        net, device, precision = self.checkpoint.net, self.device, choice.precision
        sizes = choice.sizes or (1,)
        if choice.executor == "openvino":
            # OpenVINO has threads of its own; torch's would compete with them for the cores.
            torch.set_num_threads(1)
            if self._graph is None:
                num_timesteps = self.checkpoint.noise.num_train_timesteps
                self._graph = openvino_executor.Graph(net, self._shape, num_timesteps)
            return openvino_executor.OpenVINOExecutor(
                self._graph, precision=precision, sizes=sizes, streams=self._threads, wide=choice.wide
            )
        torch.set_num_threads(self._threads)
        if choice.executor == "compile":
            return CompiledExecutor(net, device, self._shape, precision=precision, sizes=sizes)
        return EagerExecutor(net, device, precision=precision, channels_last=choice.channels_last, sizes=choice.sizes)


def choose_executor(checkpoint: Checkpoint, device: torch.device, wish: Wish, cache: Path | None) -> Executor:
    """Measure the candidates that the wish allows, and build the fastest. Raises ValueError where none can run.

    `cache` is the folder where the answer is kept, by machine, model and versions; None keeps none.
    """
    candidates = _candidates(checkpoint, device, wish)
    kept = ChoiceCache(cache, checkpoint, device, asdict(wish), [asdict(candidate) for candidate in candidates])
    choice = _valid(kept.read(), candidates, wish)
    builder = Builder(checkpoint, device, wish.threads)
    if choice is None:
        choice = _fastest(builder, wish, candidates)
        kept.write(asdict(choice))
    else:
        log.info("executor %s %s, as measured before (%s)", choice.executor, choice.precision, kept.file)
    return builder.build(choice)


def _valid(fields: Mapping[str, Any] | None, candidates: Sequence[Choice], wish: Wish) -> Choice | None:
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


def _candidates(checkpoint: Checkpoint, device: torch.device, wish: Wish) -> list[Choice]:
    """What may be chosen, without sizes. A precision below float32 must be approved, or asked for."""
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
        names = ("eager", "compile") if device.type == "cuda" else ("eager", "openvino")
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
    return [name for name in wanted if name in able]


def _fastest(builder: Builder, wish: Wish, candidates: Sequence[Choice]) -> Choice:
    found: list[tuple[float, Choice]] = []
    for candidate in candidates:
        try:
            choice, lone_s, row_s = _with_sizes(builder, wish, candidate)
        except Exception:
            if len(candidates) == 1:
                raise
            log.warning("executor %s %s does not run here", candidate.executor, candidate.precision, exc_info=True)
            continue
        log.info("executor %s: a lone row %.2f ms, a row of a full batch %.2f ms", choice, 1e3 * lone_s, 1e3 * row_s)
        found.append((lone_s * row_s, choice))  # both count: the geometric mean decides
    if not found:
        raise ValueError("no executor runs here; the log says why")
    return min(found, key=lambda pair: pair[0])[1]


@dataclass(frozen=True, slots=True)
class _Trial:
    size: int | None
    lone_s: float
    row_s: float
    bits: bytes  # empty where they are not compared


def _with_sizes(builder: Builder, wish: Wish, candidate: Choice) -> tuple[Choice, float, float]:
    """Complete a candidate with pass sizes; returns also the seconds of a lone row and of a row in a full batch."""

    def tried(sizes: tuple[int, ...] | None) -> _Trial:
        choice = Choice(candidate.executor, candidate.precision, candidate.channels_last, sizes)
        return _try(builder, wish, choice)

    if builder.device.type == "cuda":
        trial_sizes = (wish.max_batch,) if wish.exact else _graph_sizes(wish.max_batch)
        sizes = None if candidate.executor == "eager" and not wish.exact else trial_sizes
        trial = tried(sizes)
        return Choice(candidate.executor, candidate.precision, True, sizes), trial.lone_s, trial.row_s
    if candidate.executor == "eager" and not wish.exact:
        trial = tried(None)
        return Choice("eager", candidate.precision, candidate.channels_last), trial.lone_s, trial.row_s

    trials: list[_Trial] = []
    for size in CPU_SIZES:
        if size > wish.max_batch or (trials and trials[-1].row_s * size > SLOW_PASS_S):
            break
        trials.append(tried((size,)))
    groups: dict[bytes, list[_Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.bits if wish.exact else b"", []).append(trial)

    best: tuple[float, Choice, float, float] | None = None
    for group in groups.values():
        kept = [group[0]]
        for trial in group[1:]:
            if trial.row_s < WORTH * kept[-1].row_s:
                kept.append(trial)
        lone_s, row_s = group[0].lone_s, kept[-1].row_s
        sizes = tuple(trial.size for trial in kept if trial.size is not None)
        choice = Choice(candidate.executor, candidate.precision, candidate.channels_last, sizes)
        if best is None or lone_s * row_s < best[0]:
            best = (lone_s * row_s, choice, lone_s, row_s)
    assert best is not None
    return _with_wide(builder, wish, *best[1:]) if candidate.executor == "openvino" else best[1:]


def _with_wide(
    builder: Builder, wish: Wish, choice: Choice, lone_s: float, row_s: float
) -> tuple[Choice, float, float]:
    """Raise `wide` for as long as wide passes are faster, and give the same bits."""
    rows = max(agree_rows(builder.checkpoint, choice.precision), wish.threads)
    inputs = example_inputs(builder.checkpoint, builder.device, rows)
    narrow = builder.build(choice)
    expected, places = narrow(*inputs), 1
    while places < wish.threads:
        wider = replace(choice, wide=places)
        executor = builder.build(wider)
        parts = [_rows(inputs, start, start + places) for start in range(0, rows - places + 1, places)]
        outs = torch.cat([executor(*part) for part in parts])
        seconds = _seconds(partial(executor, *parts[0]), builder.device)
        narrow_s = _seconds(partial(narrow, *parts[0]), builder.device)
        if seconds > WORTH * narrow_s or (wish.exact and not outs.equal(expected[: len(outs)])):
            break
        choice, lone_s = wider, seconds if places == 1 else lone_s
        places *= 2
    return choice, lone_s, row_s


def _graph_sizes(max_batch: int) -> tuple[int, ...]:
    """At most MAX_GRAPHS pass sizes from 1 to max_batch, in geometric steps."""
    factor = max(2.0, max_batch ** (1 / (MAX_GRAPHS - 1)))
    sizes = {max_batch} | {round(max_batch / factor**k) for k in range(MAX_GRAPHS - 1)} | {1}
    return tuple(sorted(size for size in sizes if size >= 1))[-MAX_GRAPHS:]


def _try(builder: Builder, wish: Wish, choice: Choice) -> _Trial:
    executor, checkpoint, device = builder.build(choice), builder.checkpoint, builder.device
    size = choice.sizes[0] if choice.sizes and len(choice.sizes) == 1 else None
    full = example_inputs(checkpoint, device, max(AGREE_ROWS, size or wish.max_batch))
    bits = b""
    if wish.exact and device.type == "cpu":  # the only place where sizes are kept together by their bits
        bits = executor(*example_inputs(checkpoint, device, agree_rows(checkpoint, choice.precision))).numpy().tobytes()
    return _Trial(
        size,
        lone_s=_seconds(lambda: executor(*_rows(full, 0, 1)), device),
        row_s=_seconds(lambda: executor(*full), device) / len(full[0]),
        bits=bits,
    )


def agree_rows(checkpoint: Checkpoint, precision: str) -> int:
    """How many rows two ways of running a pass are compared on.

    In float32 another order of a sum shows in nearly every value. In bfloat16 it shows in about one of 10,000, so a
    small network needs many rows: on a CPU with AMX, 16 rows of 8x8 pixels and 8 channels had agreed by chance.
    """
    if precision == "float32":
        return AGREE_ROWS
    height, width = checkpoint.size_px
    values = height * width * checkpoint.net.config.block_out_channels[0]
    return min(max(AGREE_ROWS, -(-AGREE_VALUES // values)), MAX_AGREE_ROWS)


def example_inputs(checkpoint: Checkpoint, device: torch.device, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make the same rows each time, at mixed timesteps and classes: x [B, C, H, W], t [B], class_labels [B] or None."""
    generator = torch.Generator().manual_seed(0)
    config = checkpoint.net.config
    x = torch.randn(rows, config.in_channels, *checkpoint.size_px, generator=generator)
    t = torch.randint(checkpoint.noise.num_train_timesteps, (rows,), generator=generator)
    labels = None
    if config.num_class_embeds is not None:
        labels = torch.randint(config.num_class_embeds, (rows,), generator=generator).to(device)
    return x.to(device), t.to(device), labels


def _rows(inputs: tuple[Tensor, Tensor, Tensor | None], start: int, end: int) -> tuple[Tensor, Tensor, Tensor | None]:
    x, t, labels = inputs
    return x[start:end], t[start:end], labels[start:end] if labels is not None else None


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The least time of some calls, since other programs may run too; the first call warms up and does not count."""

    def timed() -> float:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    times: list[float] = []
    timed()
    while len(times) < 3 or (sum(times) < TRIAL_S and len(times) < 100):
        times.append(timed())
    return min(times)
