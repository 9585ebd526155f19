"""Chooses the executor by measuring candidates on this machine, and caches the choice.

An exact candidate is measured at several pass sizes. Only sizes whose outputs agree bit for bit are combined. An
executor is rejected if its output differs from eager float32 by more than its precision allows.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint
from tminus.model.files import first_line
from tminus.model.machine import OtherPrograms, is_idle, threads_left
from tminus.service.engine import openvino_executor
from tminus.service.engine.accuracy import Unfit, Verdict
from tminus.service.engine.choice_cache import NOISE_KEY, ChoiceCache
from tminus.service.engine.devices import multiplying
from tminus.service.engine.executors import (
    CPU_SIZES,
    MAX_GRAPHS,
    PRECISIONS,
    CompiledExecutor,
    EagerExecutor,
    Executor,
    probe_bits,
)

log = logging.getLogger(__name__)

EXECUTORS = ("eager", "compile", "openvino")
NAMES = "executor %s in %s"  # how the log names a way, (executor, precision)
REFERENCE = ("eager", "float32")  # (executor, precision) that all others are compared with
WORTH = 0.97  # a time counts as shorter only if it is below this share of the other, because measurements vary
SLOW_PASS_S = 1.0  # a larger size is not tried if its passes would probably take longer
TRIAL_S = 0.1  # a call is repeated until the total time reaches this
LONG_S = 0.5  # a longer call is timed only once
# What was measured with more `Builder.noise`, or while other programs used more of the cores, is measured again by a
# start on an idle machine.
NOISY, CROWDED = 1.5, 0.2
BUDGET_S = 30.0  # after this time, no further size is tried: on a busy machine, trying all would take minutes
LARGE_BYTES = 64 * 2**20  # a network with more weights is large; each pass size keeps its own copy of them
WORTH_LARGE = 0.85  # used instead of WORTH for a large network
FEW_THREADS = 4  # with at most this many threads, a large network runs as fast in one stream as in several
# Skip the remaining measurements of a candidate whose score is worse than the best score by this factor.
HOPELESS = 8.0
AGREE_ROWS, MAX_AGREE_ROWS = 8, 512  # minimum and maximum number of rows for comparing two executors
AGREE_VALUES = 2**18  # below float32, enough rows are compared for the first layer to output this many values


@dataclass(frozen=True, slots=True)
class Choice:
    """All parameters that are needed to build an executor. Cached between starts."""

    executor: str
    precision: str
    channels_last: bool = True
    sizes: tuple[int, ...] | None = None  # pass sizes; None: a batch of any size is one pass
    wide: int = 0  # at most this many places run in wide passes, on all threads; see `split_wide` and `EagerExecutor`
    streams: int | None = None  # None: one stream per thread; 1: one stream on all threads
    # Number of torch threads if there is only one stream; None means `Wish.threads`. It is lower if other programs were
    # using cores.
    threads: int | None = None

    @property
    def way(self) -> tuple[str, str]:
        return self.executor, self.precision


@dataclass(frozen=True, slots=True)
class Wish:
    """The executor that the settings request. Whatever is "auto" is decided by measurement."""

    executor: str = "auto"
    precision: str = "auto"
    exact: bool = True
    max_batch: int = 16  # places in the largest batch
    threads: int = 1


def find_candidates(checkpoint: Checkpoint, device: torch.device, wish: Wish) -> list[Choice]:
    """Return the candidates that the wish allows, the likely fastest first. Their pass sizes are chosen later.

    A precision below float32 must be approved or requested. Raises ValueError if the wish cannot be met.
    """
    if wish.executor not in ("auto", *EXECUTORS):
        raise ValueError(f"executor must be auto, {', '.join(EXECUTORS)}, got {wish.executor!r}")
    if wish.precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision must be auto, {', '.join(PRECISIONS)}, got {wish.precision!r}")
    if wish.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision tf32 needs a CUDA device, got {device}")
    if wish.executor == "openvino":
        if not openvino_executor.available():
            raise ValueError("executor openvino is not installed: pip install '.[openvino]' in a checkout")
        if device.type != "cpu":
            raise ValueError(f"executor openvino runs on a CPU, got device {device}")
    names: tuple[str, ...] = (wish.executor,)
    if wish.executor == "auto":
        # On a CPU, torch.compile needs a compiler, takes a minute, and was never the fastest, so it must be requested.
        # Eager was never the fastest either, but it can run a network that OpenVINO cannot, see `_fastest`.
        names = ("compile", "eager") if device.type == "cuda" else ("openvino", "eager")
    candidates = []
    for name in names:
        for precision in _precisions(checkpoint, device, wish, name):
            layouts = (True, False) if name == "eager" and device.type == "cpu" else (True,)
            candidates += [Choice(name, precision, channels_last) for channels_last in layouts]
    if not candidates:
        raise ValueError(f"precision {wish.precision} cannot be computed by this processor with openvino")
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
    """Parse a cached choice. Return None if it is not valid for this wish; the file may be damaged or edited."""
    try:
        sizes = tuple((fields or {})["sizes"] or ()) or None
        choice = Choice(**{**(fields or {}), "sizes": sizes})
    except (TypeError, KeyError):
        return None
    numbers = sizes or (1,)
    if not all(type(size) is int and 1 <= size <= wish.max_batch for size in numbers):
        return None
    ascending = list(numbers) == sorted(set(numbers)) and len(numbers) <= MAX_GRAPHS
    possible = type(choice.wide) is int and 0 <= choice.wide < wish.threads and choice.streams in (None, 1)
    possible &= choice.threads in (None, *range(1, wish.threads))
    candidate = replace(choice, sizes=None, wide=0, streams=None, threads=None)
    return choice if ascending and possible and candidate in candidates else None


@dataclass(frozen=True, slots=True)
class TimedChoice:
    """A choice and its measured times in seconds: for a single row, and per row of a full batch."""

    choice: Choice
    lone_s: float
    row_s: float
    bits: bytes = b""  # output bytes; empty if sizes are not grouped by their output

    @property
    def score(self) -> float:
        """The product of both times. Smaller is better."""
        return self.lone_s * self.row_s


class Builder:
    """Builds executors for one checkpoint. The network is converted to OpenVINO's graph only once.

    Do not use the checkpoint's network elsewhere: an executor may convert it or free its weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        threads: int,
        cache: Path | None = None,
        tell: Callable[[float], None] = lambda _pass_s: None,
        *,
        shares_cores: bool = False,
    ) -> None:
        """cache: the folder for the converted graph. tell: called with the duration of a one-row pass, in seconds.

        shares_cores: on a CPU, use only as many torch threads as there are free cores, because a thread on a busy core
        would delay all others.
        """
        self.checkpoint, self.device, self._threads, self._cache, self.tell = checkpoint, device, threads, cache, tell
        self.is_large = sum(4 * parameter.numel() for parameter in checkpoint.net.parameters()) >= LARGE_BYTES
        self.worth = WORTH_LARGE if self.is_large else WORTH
        self._shape = checkpoint.row_shape
        self._graph: openvino_executor.Graph | None = None
        self._compiled: openvino_executor.Compiled = {}  # compiled passes, reused by later executors
        self._spreads: list[float] = []  # median time / shortest time of each measurement
        self.others = OtherPrograms()
        self._shares_cores = shares_cores and device.type == "cpu"

    @cached_property
    def torch_threads(self) -> int | None:
        """The number of torch threads, or None if other programs leave enough cores for the requested number."""
        threads = threads_left(self._threads) if self._shares_cores else self._threads
        return threads if threads < self._threads else None

    @property
    def noise(self) -> float:
        """How much measured times vary: 1.0 to 1.1 on an idle machine.

        The median, over all measurements, of the median time divided by the shortest time.
        """
        return median(self._spreads) if self._spreads else 1.0

    def time(self, call: Callable[[], object]) -> float:
        """Return the shortest time of several calls, in seconds. The first call is a warm-up and is not counted.

        The shortest time excludes delays by other programs. A slow call is timed only once.
        """

        def timed() -> float:
            started = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.perf_counter() - started

        times: list[float] = []
        if timed() > LONG_S:
            with self.others.measured():
                return timed()
        with self.others.measured():  # not around the first call, in which other processes of ours may compile
            while len(times) < 3 or (sum(times) < TRIAL_S and len(times) < 100):
                times.append(timed())
        self._spreads.append(median(times) / max(min(times), 1e-9))
        return min(times)

    def build(self, choice: Choice) -> Executor:
        net, device, precision = self.checkpoint.net, self.device, choice.precision
        sizes = choice.sizes or (1,)
        if choice.executor == "openvino":
            # OpenVINO has its own threads. Torch's threads would compete with them for the cores.
            torch.set_num_threads(1)
            if self._graph is None:
                num_timesteps = self.checkpoint.noise.num_train_timesteps
                kept = openvino_executor.kept_graph(self._cache, self.checkpoint, "network")
                self._graph = openvino_executor.Graph(net, self._shape, num_timesteps, kept)
            return openvino_executor.OpenVINOExecutor(
                self._graph,
                precision=precision,
                sizes=sizes,
                threads=self._threads,
                streams=choice.streams,
                wide=choice.wide,
                compiled=self._compiled,
            )
        torch.set_num_threads(choice.threads or self._threads)
        if choice.executor == "compile":
            return CompiledExecutor(net, device, self._shape, precision=precision, sizes=sizes)
        streams = 1 if device.type == "cuda" else choice.streams or self._threads
        if streams > 1:  # streams have threads of their own, so torch gets one thread in the caller
            torch.set_num_threads(1)
        return EagerExecutor(
            net,
            device,
            precision=precision,
            channels_last=choice.channels_last,
            sizes=choice.sizes,
            threads=streams,
            wide=choice.wide,
        )

    def build_checked(self, choice: Choice) -> Executor:
        """Build the executor of a choice, and compare its outputs with the reference. Raises ValueError if it is unfit.

        After the comparison, free the network's weights if the executor holds its own copy.
        """
        if choice.way == REFERENCE:
            return self.build(choice)
        checkpoint, device = self.checkpoint, self.device
        inputs = compared_inputs(checkpoint, device)
        rows = [rows_of(inputs, k, k + 1) for k in range(AGREE_ROWS)]

        def outputs() -> Tensor:  # outputs of all rows in one batch, then of each row alone
            return torch.cat([executor(*inputs), *(executor(*row) for row in rows)])

        def reference() -> Tensor:
            before = torch.get_num_threads()
            # On a busy machine, threads wait for each other, so a small network uses one thread.
            torch.set_num_threads(self._threads if self.is_large else 1)
            try:
                with torch.inference_mode(), multiplying(device, tf32=False):
                    return torch.cat([checkpoint.net(*row) for row in rows] * 2)
            finally:
                torch.set_num_threads(before)

        verdict = self.verdict(choice)
        try:
            with verdict.attempt():
                executor = self.build(choice)
                verdict.check(probe_bits(executor, rows[0]), outputs, reference)
        except Unfit:
            raise
        except Exception as error:
            raise ValueError(f"{verdict.name} does not run here: {first_line(error)}") from error
        if self._graph is not None:
            self._graph.free_network()
        return executor

    def verdict(self, choice: Choice) -> Verdict:
        return Verdict(self.checkpoint, self.device, *choice.way, self._cache)

    def forget_compiled(self) -> None:
        """Forget the compiled passes, and free those that no executor uses. They are compiled again when needed."""
        self._compiled.clear()


def choose_executor(
    checkpoint: Checkpoint,
    device: torch.device,
    wish: Wish,
    cache: Path | None,
    tell: Callable[[float], None] = lambda _pass_s: None,
    *,
    busy: bool = False,
    shares_cores: bool = False,
    on_record: Callable[[ChoiceCache], object] = lambda _record: None,
) -> Executor:
    """Measure the candidates that the wish allows, and build the fastest. Raises ValueError if none can run.

    cache: the folder for the choice and the converted graph; None disables the cache. The number of threads is cached
    with the choice, because bits depend on it. tell: called with the duration of a one-row pass in seconds, as soon as
    it is known. busy: True if a server is already running. A choice that was made on a busy machine is then used again,
    because a reloaded model must give the same bytes. shares_cores: see Builder. on_record: called with the file of the
    choice, so that a running server can mark it.
    """
    builder = Builder(checkpoint, device, wish.threads, cache, tell, shares_cores=shares_cores and not busy)
    candidates = _allowed(builder, find_candidates(checkpoint, device, wish))
    while True:
        record = _cache_of(checkpoint, device, wish, cache, candidates)
        choice = _choose(builder, wish, candidates, record, busy=busy)
        try:
            executor = builder.build_checked(choice)
        except ValueError as error:
            candidates = [candidate for candidate in candidates if candidate.way != choice.way]
            if not candidates:
                raise
            log.warning("%s", error)
            continue
        on_record(record)
        return executor


def _allowed(builder: Builder, candidates: Sequence[Choice]) -> list[Choice]:
    """Return the candidates that no earlier start has rejected. Raises Unfit if none is left."""
    ways = dict.fromkeys(choice.way for choice in candidates if choice.way != REFERENCE)
    refusals = {way: refusal for way in ways if (refusal := builder.verdict(Choice(*way)).refusal) is not None}
    left = [choice for choice in candidates if choice.way not in refusals]
    if not left:
        raise Unfit("; ".join(refusals.values()))
    for refusal in dict.fromkeys(refusals.values()):
        log.warning("%s", refusal)
    return left


def _choose(builder: Builder, wish: Wish, candidates: Sequence[Choice], record: ChoiceCache, *, busy: bool) -> Choice:
    if (choice := _kept_choice(record, candidates, wish, busy=busy)) is not None:
        return choice
    with record.measuring():
        # Another start may have measured the same meanwhile.
        if (choice := _kept_choice(record, candidates, wish, busy=busy)) is not None:
            return choice
        choice = _fastest(builder, wish, candidates)
        noisy = builder.noise > NOISY or builder.others.share > CROWDED
        if noisy:
            log.warning(
                "the machine was busy while executors were measured: other programs used %.0f %% of the cores, and "
                "half of the calls took %.1f times as long as the fastest. A start on an idle machine measures again",
                100 * builder.others.share, builder.noise,
            )  # fmt: skip
        record.write(asdict(choice) | ({NOISE_KEY: True} if noisy else {}))
    return choice


def _kept_choice(record: ChoiceCache, candidates: Sequence[Choice], wish: Wish, *, busy: bool) -> Choice | None:
    """Return the choice of an earlier start; None if there is none, or if it should be measured again."""
    fields = dict(record.read() or {})
    noisy = fields.pop(NOISE_KEY, False)
    choice = valid_choice(fields, candidates, wish)
    if choice is None:
        return None
    if noisy and not busy and is_idle():
        log.info("what an earlier start measured is in doubt: measuring again")
        return None
    log.info("%s, as an earlier start measured (%s)", NAMES % choice.way, record.found)
    return choice


def kept_executor(checkpoint: Checkpoint, device: torch.device, wish: Wish, cache: Path | None) -> Executor | None:
    """Build the executor that an earlier start chose, without measuring. Return None if there is none or it is unfit.

    A choice that was made on a busy machine is used too.
    """
    builder = Builder(checkpoint, device, wish.threads, cache)
    try:
        candidates = _allowed(builder, find_candidates(checkpoint, device, wish))
        fields = dict(_cache_of(checkpoint, device, wish, cache, candidates).read() or {})
        fields.pop(NOISE_KEY, None)
        choice = valid_choice(fields, candidates, wish)
        return builder.build_checked(choice) if choice is not None else None
    except ValueError as error:
        log.warning("%s", error)
        return None


def plain_executor(checkpoint: Checkpoint, device: torch.device, wish: Wish, cache: Path | None) -> Executor:
    """Build the eager executor without measuring, even if the wish names another. Use float32 if the wish allows it.

    On a CPU, the executor runs one row per pass, on one thread. So its bits depend neither on measurements nor on the
    number of cores, and no thread has to wait for a delayed one. Raises ValueError if the executor is unfit.
    """
    candidates = find_candidates(checkpoint, device, replace(wish, executor="eager"))
    choice = next((each for each in candidates if each.precision == "float32"), candidates[0])
    sizes: tuple[int, ...] | None = (1,)
    if device.type == "cuda":
        sizes = (wish.max_batch,) if wish.exact else None
    return Builder(checkpoint, device, 1, cache).build_checked(replace(choice, sizes=sizes, streams=1))


def _cache_of(
    checkpoint: Checkpoint, device: torch.device, wish: Wish, cache: Path | None, candidates: Sequence[Choice]
) -> ChoiceCache:
    wanted = {**asdict(wish), "sizes": CPU_SIZES}  # do not reuse a choice that was made from other sizes
    return ChoiceCache(cache, checkpoint, device, wanted, [asdict(candidate) for candidate in candidates])


def _fastest(builder: Builder, wish: Wish, candidates: Sequence[Choice]) -> Choice:
    best: TimedChoice | None = None
    until_s = time.monotonic() + BUDGET_S
    for candidate in candidates:
        if best is not None and best.choice.executor == "openvino" != candidate.executor:
            break
        eager_in_streams = candidate.executor == "eager" and wish.exact and builder.device.type == "cpu"
        if candidate.executor != "openvino" and not eager_in_streams:
            candidate = replace(candidate, streams=1, threads=builder.torch_threads)
        try:
            with builder.verdict(candidate).attempt() if candidate.way != REFERENCE else nullcontext():
                measured = _with_sizes(builder, wish, candidate, best, until_s)
        except Exception as error:
            reason = f"executor {candidate.executor} {candidate.precision} does not run here: {first_line(error)}"
            if len(candidates) == 1:
                raise ValueError(reason) from error
            log.warning("%s", reason)
            continue
        log.debug("measured: %s", measured.choice)
        if best is not None and measured.score > HOPELESS * best.score:
            log.info("%s: a row alone takes %.2f ms, far too slow", NAMES % candidate.way, 1e3 * measured.lone_s)
        else:
            log.info(
                "%s: a row alone takes %.2f ms, a row of a full batch %.2f ms",
                NAMES % candidate.way, 1e3 * measured.lone_s, 1e3 * measured.row_s,
            )  # fmt: skip
        if best is None or measured.score < best.score:
            best = measured
    if best is None:
        raise ValueError("no executor runs here; the log says why")
    return best.choice


def _with_sizes(
    builder: Builder, wish: Wish, candidate: Choice, best: TimedChoice | None = None, until_s: float = math.inf
) -> TimedChoice:
    """Measure a candidate and choose its pass sizes. Stop early if the best candidate so far is much faster."""
    hopeless = HOPELESS * best.score if best is not None else math.inf

    def tried(sizes: tuple[int, ...] | None) -> TimedChoice:
        return _try(builder, wish, replace(candidate, sizes=sizes), hopeless)

    if candidate.executor == "eager" and not wish.exact:
        return tried(None)
    if builder.device.type == "cuda":
        return tried((wish.max_batch,) if wish.exact else _graph_sizes(wish.max_batch))
    if candidate.executor == "openvino" and builder.is_large:
        in_one_stream = _in_one_stream(builder, wish, candidate)
        if in_one_stream is not None:
            return in_one_stream

    trials: list[TimedChoice] = []
    for size in CPU_SIZES:
        if size > wish.max_batch or (trials and trials[-1].row_s * size > SLOW_PASS_S):
            break
        if trials and time.monotonic() > until_s:
            break
        trials.append(tried((size,)))
        if trials[0].score > hopeless:
            break
    groups: dict[bytes, list[TimedChoice]] = {}
    for trial in trials:
        groups.setdefault(trial.bits if wish.exact else b"", []).append(trial)

    found: list[TimedChoice] = []
    for group in groups.values():
        kept = [group[0]]
        for trial in group[1:]:
            # For a small network, keep a larger size that is not slower: in Python, one large pass costs less than
            # several small ones.
            if trial.row_s < (builder.worth if builder.is_large else 1 / WORTH) * min(each.row_s for each in kept):
                kept.append(trial)
        sizes = tuple(size for trial in kept for size in trial.choice.sizes or ())
        found.append(TimedChoice(replace(candidate, sizes=sizes), group[0].lone_s, min(each.row_s for each in kept)))
    fastest = min(found, key=attrgetter("score"))
    if 1 in (candidate.streams, wish.threads) or fastest.score > hopeless:
        return fastest
    fastest = _with_wide(builder, wish, fastest)
    if candidate.executor == "openvino" or fastest.choice.wide or not builder.is_large:
        return fastest
    # Without wide passes, a single row of a large network runs on one thread. So also try a single stream that uses
    # all threads.
    together = _with_sizes(builder, wish, replace(candidate, streams=1, threads=builder.torch_threads), best, until_s)
    return min(fastest, together, key=attrgetter("score"))


def _in_one_stream(builder: Builder, wish: Wish, candidate: Choice) -> TimedChoice | None:
    """Measure one-row passes in a single stream on all threads, which needs only one copy of the weights.

    Return None if one-thread streams are much faster. They are then worth a second copy of the weights, which wide
    passes need. With at most FEW_THREADS threads, one-thread streams are not measured.
    """
    rows = wish.threads
    inputs = example_inputs(builder.checkpoint, builder.device, rows)
    alone = replace(candidate, sizes=(1,), streams=1)
    alone_s = builder.time(partial(builder.build(alone), *rows_of(inputs, 0, 1)))
    builder.tell(alone_s)
    found = TimedChoice(alone, alone_s, alone_s)
    if wish.threads <= FEW_THREADS:
        return found
    builder.forget_compiled()
    row_s = builder.time(partial(builder.build(replace(candidate, sizes=(1,))), *inputs)) / rows
    log.info(
        "executor %s %s: a row takes %.2f ms on all threads, %.2f ms in streams of one thread",
        candidate.executor, candidate.precision, 1e3 * alone_s, 1e3 * row_s,
    )  # fmt: skip
    if row_s < builder.worth * alone_s:
        return None
    builder.forget_compiled()
    return found


def _with_wide(builder: Builder, wish: Wish, measured: TimedChoice) -> TimedChoice:
    """Double `wide` as long as wide passes are faster and, if the wish is exact, give the same bits."""
    choice, lone_s = measured.choice, measured.lone_s
    rows = max(agree_rows(builder.checkpoint, choice.precision), wish.threads)
    inputs = example_inputs(builder.checkpoint, builder.device, rows)
    narrow = builder.build(choice)
    expected, places = narrow(*inputs), 1
    while places < wish.threads:
        wider = replace(choice, wide=places)
        executor = builder.build(wider)
        parts = [rows_of(inputs, start, start + places) for start in range(0, rows - places + 1, places)]
        outs = torch.cat([executor(*part) for part in parts])
        seconds = builder.time(partial(executor, *parts[0]))
        narrow_s = builder.time(partial(narrow, *parts[0]))
        if seconds > builder.worth * narrow_s or (wish.exact and not outs.equal(expected[: len(outs)])):
            break
        choice, lone_s = wider, seconds if places == 1 else lone_s
        places *= 2
    return TimedChoice(choice, lone_s, measured.row_s)


def _graph_sizes(max_batch: int) -> tuple[int, ...]:
    """Return up to MAX_GRAPHS pass sizes between 1 and max_batch, in geometric steps."""
    factor = max(2.0, max_batch ** (1 / (MAX_GRAPHS - 1)))
    sizes = {max_batch} | {round(max_batch / factor**k) for k in range(MAX_GRAPHS - 1)} | {1}
    return tuple(sorted(size for size in sizes if size >= 1))[-MAX_GRAPHS:]


def _try(builder: Builder, wish: Wish, choice: Choice, hopeless: float = math.inf) -> TimedChoice:
    """Time a single row and a full batch. Skip the full batch if the score would exceed `hopeless` anyway."""
    executor, checkpoint, device = builder.build(choice), builder.checkpoint, builder.device
    size = choice.sizes[0] if choice.sizes and len(choice.sizes) == 1 else None
    rows = size * (choice.streams or wish.threads) if size else wish.max_batch  # one pass per stream
    full = example_inputs(checkpoint, device, max(AGREE_ROWS, rows))
    lone_s = builder.time(lambda: executor(*rows_of(full, 0, 1)))
    builder.tell(lone_s)
    if lone_s > LONG_S:
        full = rows_of(full, 0, wish.threads * (size or 1))
    # The best possible score: in a full batch, each thread runs a pass as fast as a single row.
    at_best = TimedChoice(choice, lone_s, lone_s / wish.threads)
    if size == 1 and at_best.score > hopeless:
        return at_best
    bits = b""
    if wish.exact and device.type == "cpu":  # in other cases, sizes are not grouped by their output
        bits = executor(*example_inputs(checkpoint, device, agree_rows(checkpoint, choice.precision))).numpy().tobytes()
    return TimedChoice(choice, lone_s, builder.time(lambda: executor(*full)) / len(full[0]), bits)


def agree_rows(checkpoint: Checkpoint, precision: str) -> int:
    """Return how many rows to compare in order to find out whether two executors give the same bits.

    In float32, a different order of summation changes almost every value. In bfloat16, it changes about one value in
    10,000, so a small network needs many rows. On a CPU with AMX, 16 rows of 8x8 pixels and 8 channels once agreed by
    chance.
    """
    if precision == "float32":
        return AGREE_ROWS
    _, height, width = checkpoint.row_shape
    values = height * width * checkpoint.net.config.widths[0]
    return min(max(AGREE_ROWS, -(-AGREE_VALUES // values)), MAX_AGREE_ROWS)


def example_inputs(checkpoint: Checkpoint, device: torch.device, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return example rows with random timesteps and classes. The same arguments give the same rows.

    The rows are x [B, C, H, W], t [B] and class_labels [B] or None.
    """
    generator = torch.Generator().manual_seed(0)
    config = checkpoint.net.config
    x = torch.randn(rows, *checkpoint.row_shape, generator=generator)
    t = torch.randint(checkpoint.noise.num_train_timesteps, (rows,), generator=generator).float()
    labels = None
    if config.num_class_embeds is not None:
        labels = torch.randint(config.num_class_embeds, (rows,), generator=generator).to(device)
    return x.to(device), t.to(device), labels


def compared_inputs(checkpoint: Checkpoint, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return rows for comparing executors: like `example_inputs`, but with evenly spaced timesteps, first to last."""
    x, _, labels = example_inputs(checkpoint, device, AGREE_ROWS)
    return x, torch.linspace(0, checkpoint.noise.num_train_timesteps - 1, AGREE_ROWS, device=device).round(), labels


def rows_of(inputs: tuple[Tensor, Tensor, Tensor | None], start: int, end: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the rows from `start` up to, but not including, `end`."""
    x, t, labels = inputs
    return x[start:end], t[start:end], labels[start:end] if labels is not None else None
