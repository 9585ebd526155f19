"""Builds an engine from a checkpoint: chooses an executor, measures ticks, and runs the self-test."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.checkpoint import Checkpoint, load_checkpoint, needs_of
from tminus.model.files import CheckpointError
from tminus.model.machine import GIB, OtherPrograms, free_memory_bytes, is_idle
from tminus.service.engine import openvino_executor
from tminus.service.engine.approval import approve_later, with_kept_approvals
from tminus.service.engine.autotune import (
    CROWDED,
    NAMES,
    Wish,
    choose_executor,
    example_inputs,
    kept_executor,
    plain_executor,
)
from tminus.service.engine.choice_cache import NOISE_KEY, ChoiceCache, default_cache
from tminus.service.engine.devices import check_memory, choose_device, default_max_rows
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor, Executor, probe_bits
from tminus.service.engine.fingerprint import make_model_info
from tminus.service.engine.protocol import LoadOptions, RowEngine
from tminus.service.engine.selftest import SPARE_JOBS, SPARE_ROWS, Proof, probe_rows
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.scheduler import BatchPolicy, TickTimes
from tminus.service.spec import trial_spec
from tminus.service.work import Batch

log = logging.getLogger(__name__)

Result = TypeVar("Result")
# Called with the current activity and a rough estimate of the seconds left, or None if unknown.
Progress = Callable[[str, float | None], None]

# Maximum number of places in a batch if --max-batch is not set. On a CPU, longer ticks only make new jobs wait.
LARGEST_BATCH = {"cpu": 16, "cuda": 256}
PLACES_PER_THREAD = 4  # raises LARGEST_BATCH on a CPU with many cores, where each core runs its own pass
MIN_QUEUED_BATCH = 8  # on a busy machine, smaller ticks spend too much of their time in Python
MIN_BATCH = 4  # two guided rows fit: one from the oldest job, one from the shortest
FULL_SHARE = 0.95  # a full tick must reach this share of the best throughput
QUEUED_SHARE = 0.85  # used instead of FULL_SHARE if two ticks may be in flight
SHORT_SHARE = 0.6  # used instead of FULL_SHARE for a tick in which a short job runs with much longer ones
CORES = torch.get_num_threads()  # read now, because executors change this number
MAX_PLAN_LINES = 20_000_000  # 44 bytes per line, and 160 more after the first sampler with registers
LITTLE_S = 5.0  # on one core; for a job that takes less time, measuring does not pay off
TRIAL_PASSES = 12  # rough time from the first timed pass until the model serves, in one-row passes
LONG_TRIAL_S = 5.0  # a shorter estimate is not reported, because compilation takes longer than the passes
TEST_S = 5.0  # time for the self-test before a model serves; the remaining tests run while there is no job
BUSY_TEST_S = 0.5  # used instead of TEST_S while other models serve
ROUNDS = 4  # every round measures every size; the fastest round counts, because other programs may delay some
TICKS = 6  # ticks per size in a round
WARM_UP = 2  # ticks not counted: the first may compile; on a GPU, the second is too short because the host runs ahead
BUDGET_S = 2.0  # no further round begins after this time
GUESSED_TICK_S = 0.02  # guess for a network that has never run
SLOW_TICK_S = 2.0  # after a longer tick, no larger size is measured
SLOW_TICKS_S = 0.5  # if the ticks of one size take longer in total, one counted tick is enough
LONG_FULL_TICK_S = 0.1  # for longer ticks, the few milliseconds spent in Python do not matter
LONG_TICK_S = 0.01  # if one-place ticks take longer, all tick times are cached for later starts


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of a network on this machine. They are also valid for other weights."""

    way: Mapping[str, Any]  # describes the network and its executor
    policy: BatchPolicy


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that is ready to serve, and its speed."""

    engine: Engine
    speed: Speed
    measured: Measured | None = None
    spare_work: Iterator[None] | None = None  # remaining tests and an approval, to be run while there are no jobs
    measure_again: Callable[[], None] | None = None  # has the next start on an idle machine measure again


@dataclass(frozen=True, slots=True)
class ReadModel:
    """A checkpoint in memory, and the name of its model on this server."""

    name: str
    folder: Path
    checkpoint: Checkpoint

    @property
    def weights_hash(self) -> str:
        return self.checkpoint.weights_hash


def describe(checkpoint: Checkpoint, options: LoadOptions) -> tuple[ModelInfo, Speed]:
    """Describe a checkpoint before it is measured. The info's executor, precision and fingerprint are empty.

    The speed is a guess. Replicas, the servers on the same job store, use it to share out the model's first jobs.
    """
    device = choose_device(options.device)
    wish, max_rows = wish_of(options, device), options.max_rows or default_max_rows(checkpoint)

    def make() -> ModelInfo:
        executor = EagerExecutor(checkpoint.net, torch.device("cpu"))  # a placeholder, whose fields are cleared below
        return make_model_info(checkpoint, device, executor, exact=wish.exact)

    info = replace(_in_thread(make), fingerprint="", executor="", precision="", executor_details="")
    policy = BatchPolicy.of(wish.max_batch, times=TickTimes(((1, GUESSED_TICK_S),)))
    return info, Speed(policy, max_rows)


def load_engine(
    options: LoadOptions, places_of: Callable[[ModelInfo], int] | None = None, fingerprint: str | None = None
) -> Loaded:
    """Load a checkpoint, choose an executor, and measure and test it.

    Raises CheckpointError, or ValueError if the options cannot be met.

    places_of: set if the engine will run a single job; returns the job's number of places. For a small job, nothing is
    measured or tested: the executor is an earlier start's choice, or eager if the options allow it. fingerprint: the
    fingerprint that the engine should have. If eager or an earlier start's choice has it, that executor is used.
    Otherwise, everything is measured.
    """
    checkpoint = read_checkpoint(options)

    def prepare() -> Loaded:
        if places_of is None:
            return prepare_engine(checkpoint, options)
        unmeasured = _load_unmeasured(checkpoint, options, places_of, fingerprint)
        # Read the checkpoint again: an executor may have taken over its network.
        return unmeasured or prepare_engine(_read_checkpoint(options), options)

    return _in_thread(prepare)


def recommend_openvino(executor: str, device: str) -> None:
    """Log how to install OpenVINO if it is missing and would help. Raises ValueError if the device does not exist."""
    if executor == "auto" and choose_device(device).type == "cpu" and not openvino_executor.available():
        log.warning(
            "OpenVINO is missing, which runs networks some three times as fast on this processor: "
            "pip install '.[openvino]' in a checkout"
        )


def serving_bytes(folder: Path) -> int:
    """Estimate from its configuration how many bytes of memory a served model takes. Raises CheckpointError."""
    return needs_of(folder).serving_bytes


def memory_lacking(folder: Path) -> str | None:
    """Return why there is too little memory to load a model; None if there is enough. Raises CheckpointError."""
    need, free = needs_of(folder).loading_bytes, free_memory_bytes()
    if free is None or need <= free:
        return None
    return f"takes about {need / GIB:.2f} GiB to load, and {free / GIB:.2f} GiB of memory are free"


def read_checkpoint(options: LoadOptions) -> Checkpoint:
    """Read a checkpoint: the first, quick half of a load.

    Raises CheckpointError, or ValueError if the device is missing or has too little memory.
    """
    return _in_thread(lambda: _read_checkpoint(options))


def _in_thread(act: Callable[[], Result]) -> Result:
    """Call a function in a new thread that ends afterwards.

    Each thread that runs torch keeps a team of OpenMP threads. If two teams share the cores, the team that runs ticks
    sleeps while it waits, instead of spinning. On two cores, a one-row tick then takes 11.3 ms instead of 5.7 ms.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(act).result()


def _read_checkpoint(options: LoadOptions) -> Checkpoint:
    device = choose_device(options.device)
    if device.index:
        raise ValueError(
            f"one GPU is served, the first that is visible: CUDA_VISIBLE_DEVICES={device.index}, not {device}"
        )
    needs = needs_of(options.checkpoint)
    weights = needs.weights_bytes if device.type == "cuda" else 0
    check_memory(needs.pass_bytes + weights, "network", needs.row_px, device)
    check_memory(needs.coding_bytes, "autoencoder", needs.size_px, device)
    free = free_memory_bytes()
    if free is not None and needs.loading_bytes > free:
        raise CheckpointError(
            f"{options.checkpoint}: a network of {needs.num_parameters / 1e6:.1f} M parameters takes about "
            f"{needs.loading_bytes / GIB:.1f} GiB to load, and {free / GIB:.1f} GiB of memory are free"
        )
    cache = options.cache_dir or default_cache()
    return with_kept_approvals(load_checkpoint(options.checkpoint), device, cache)


def prepare_engine(
    checkpoint: Checkpoint,
    options: LoadOptions,
    known: Collection[Measured] = (),
    *,
    busy: bool = False,
    progress: Progress = lambda *_: None,
) -> Loaded:
    """Choose an executor, measure and test it: the second half of a load.

    Call this in a thread that ends afterwards, see `_in_thread`. known: measurements of models that were loaded in this
    process. They are reused for the same network in the same executor. busy: True if other models are being served. The
    batch sizes are then not cached for later starts. progress: called with the current activity and a rough estimate of
    the seconds left.
    """
    device = choose_device(options.device)
    max_rows = options.max_rows or default_max_rows(checkpoint)
    plan_lines = options.max_jobs * checkpoint.noise.num_train_timesteps
    if plan_lines > MAX_PLAN_LINES:
        raise ValueError(
            f"num_train_timesteps must be at most {MAX_PLAN_LINES // options.max_jobs} to serve a checkpoint, got "
            f"{checkpoint.noise.num_train_timesteps}: the plans of {options.max_jobs} jobs are held"
        )
    wish = wish_of(options, device)
    largest, exact = wish.max_batch, wish.exact
    cache = options.cache_dir or default_cache()
    progress("reading how the network runs fastest here, or measuring it", None)

    def tell(pass_s: float) -> None:
        left_s = TRIAL_PASSES * pass_s
        progress("measuring how it runs fastest", left_s if left_s > LONG_TRIAL_S else None)

    records: list[ChoiceCache] = []
    executor = choose_executor(
        checkpoint, device, wish, cache, tell, busy=busy, shares_cores=options.threads is None, on_record=records.append
    )
    # Batch sizes depend on `exact`: an exact engine on a GPU pads each pass to the largest size.
    how = {
        "executor": executor.name, "precision": executor.precision, "largest": largest, "exact": exact,
        "threads": (wish.threads, torch.get_num_threads()),
    }  # fmt: skip
    proof = Proof(checkpoint, device, executor, how, cache) if exact else None
    engine = _build(checkpoint, executor, device, options, wish, proof.bits if proof is not None else None)
    network = {"unet": checkpoint.net.config.to_dict(), "shape": checkpoint.row_shape, "device": str(device)}
    way = how | network | {"details": executor.details}
    again = next((each for each in known if each.way == way), None)
    records.append(ChoiceCache(None if busy else cache, checkpoint, device, how, ()))
    if again is None:
        progress("measuring how long ticks take", None)
        again = _measure(engine, way, largest, records[-1])
    times = again.policy.times
    policy = BatchPolicy.of(options.max_batch or again.policy.max_batch, again.policy.short_batch, times)
    spare_work: Iterator[None] = iter(())
    if proof is not None:
        if not proof.begun:
            progress("testing that a row has the same bits alone and among others", TEST_S)
        inexact = make_model_info(checkpoint, device, executor, exact=False, autoencoder_bits=engine.autoencoder_bits)
        spare_work = proof.test(engine, policy.full_batch, inexact, BUSY_TEST_S if busy else TEST_S)
    log.info(
        "ticks of %s places take %s ms",
        ", ".join(str(places) for places, _ in times.points),
        ", ".join(f"{1e3 * seconds:.2f}" for _, seconds in times.points),
    )
    log.info(NAMES + ", at most %d places a tick", executor.name, executor.precision, policy.max_batch)
    log.debug(
        "%s; a full tick takes %s times as long while another one is in flight; %d places where a short job shares a "
        "tick with much longer ones", executor.details, times.overlapped, policy.short_batch,
    )  # fmt: skip
    coding_s = engine.coding_seconds()
    if engine.info.latent is not None:
        log.info("beside the ticks an image is decoded in %.2f ms, encoded in %.2f ms", *(1e3 * s for s in coding_s))
    spare_work = chain(spare_work, approve_later(checkpoint, executor, device, wish, options, cache))

    def measure_again() -> None:
        for record in records:
            record.mark_noisy()

    return Loaded(engine, Speed(policy, max_rows, *coding_s), again, spare_work, measure_again)


def _load_unmeasured(
    checkpoint: Checkpoint, options: LoadOptions, places_of: Callable[[ModelInfo], int], fingerprint: str | None
) -> Loaded | None:
    """Build an engine without measuring.

    Return None if the job is large enough to be worth measuring, or if no unmeasured executor is suitable.
    """
    device = choose_device(options.device)
    wish, max_rows = wish_of(options, device), options.max_rows or default_max_rows(checkpoint)
    cache = options.cache_dir or default_cache()
    plain = plain_executor(checkpoint, device, wish, cache)
    engine = _build(checkpoint, plain, device, options, wish, _bits(checkpoint, plain, device, wish))
    if fingerprint is None and places_of(engine.info) * _pass_s(plain, checkpoint, device) > LITTLE_S:
        return None
    plain_will_do = wish.executor in ("auto", "eager")
    if not plain_will_do or engine.info.fingerprint != fingerprint:
        kept = kept_executor(checkpoint, device, wish, cache)
        if kept is not None:  # building `kept` has taken over the network, so `plain` cannot run
            engine = _build(checkpoint, kept, device, options, wish, _bits(checkpoint, kept, device, wish))
        elif not plain_will_do:
            return None
    if fingerprint in (None, engine.info.fingerprint):
        return Loaded(engine, Speed(BatchPolicy.of(wish.max_batch), max_rows))
    return None


def _pass_s(executor: Executor, checkpoint: Checkpoint, device: torch.device) -> float:
    """Return the duration of a one-row pass in seconds.

    On a CPU, the thread's CPU time is measured, because other programs do not add to it.
    """
    inputs = example_inputs(checkpoint, device, 1)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    executor(*inputs).cpu()  # warm-up
    started_s = clock()
    executor(*inputs).cpu()
    return clock() - started_s


def wish_of(options: LoadOptions, device: torch.device) -> Wish:
    """Turn the options into a wish, with defaults for this device."""
    threads = options.threads or CORES
    largest = options.max_batch or LARGEST_BATCH[device.type]
    if device.type == "cpu" and options.max_batch is None:
        largest = max(largest, PLACES_PER_THREAD * threads)
    exact = device.type == "cpu" if options.exact is None else options.exact
    return Wish(options.executor, options.precision, exact, largest, threads)


def _build(
    checkpoint: Checkpoint,
    executor: Executor,
    device: torch.device,
    options: LoadOptions,
    wish: Wish,
    bits: str | None,
) -> Engine:
    max_rows = options.max_rows or default_max_rows(checkpoint)
    return Engine(
        checkpoint,
        executor,
        device,
        max_rows=max(max_rows, SPARE_ROWS, 2 * wish.max_batch),
        max_jobs=max(options.max_jobs, SPARE_JOBS),
        exact=wish.exact,
        bits=bits,
        cache=options.cache_dir or default_cache(),
    )


def _bits(checkpoint: Checkpoint, executor: Executor, device: torch.device, wish: Wish) -> str | None:
    """Return a hash of the executor's outputs, for the fingerprint; None if the wish is not exact."""
    if not wish.exact:
        return None
    return probe_bits(executor, example_inputs(checkpoint, device, probe_rows(checkpoint, executor.precision)))


def _measure(engine: Engine, way: Mapping[str, Any], largest: int, cache: ChoiceCache) -> Measured:
    """Measure tick durations, and derive batch sizes from them. Batch sizes from an earlier start are reused.

    The durations of long ticks are cached too. Admission corrects them later by the durations of real ticks.
    """
    kept = cache.read() or {}
    sizes, tick_times = _kept_sizes(kept, largest), _kept_times(kept, largest)
    if sizes is not None and kept.get(NOISE_KEY) and is_idle():
        sizes = None
    if sizes is None:
        with cache.measuring():
            others = OtherPrograms()
            with others.measured():
                tick_times = measure_ticks(engine, largest, rounds=ROUNDS)
            sizes = _batch_sizes(tick_times, queues=engine.queues)
            full_tick_s = TickTimes(tick_times).seconds(sizes["max_batch"])
            sizes["overlapped"] = measure_overlap(engine, sizes["max_batch"], full_tick_s)
            if sizes["overlapped"] is None:
                sizes |= _batch_sizes(tick_times, queues=False)
            noisy = {NOISE_KEY: True} if others.share > CROWDED else {}
            kept_times = {"tick_times": tick_times} if tick_times[0][1] > LONG_TICK_S else {}
            cache.write(sizes | kept_times | noisy)
    elif tick_times is None:
        tick_times = measure_ticks(engine, largest, rounds=1)  # the sizes are known, so one round is enough
        if tick_times[-1][0] < min(sizes["max_batch"], largest):
            # A slow tick ended the round before it reached max_batch.
            tick_times = measure_ticks(engine, largest, rounds=ROUNDS)
    times = TickTimes(tick_times, sizes["overlapped"])
    return Measured(way, BatchPolicy.of(sizes["max_batch"], sizes["short_batch"], times))


def _batch_sizes(tick_times: tuple[tuple[int, float], ...], *, queues: bool) -> dict[str, Any]:
    """Return the smallest batch sizes that reach a given share of the best throughput.

    If two ticks may be in flight, the share is lower, so that new jobs wait less. The scheduler may then enlarge ticks
    while many rows wait, see `BatchPolicy.full_batch`.
    """
    share, least = (QUEUED_SHARE, MIN_QUEUED_BATCH) if queues else (FULL_SHARE, MIN_BATCH)
    return {
        "max_batch": max(MIN_BATCH, min(least, tick_times[-1][0]), smallest_batch_at(tick_times, share)),
        "short_batch": smallest_batch_at(tick_times, SHORT_SHARE),
    }


def smallest_batch_at(points: Sequence[tuple[int, float]], share: float) -> int:
    """Return the smallest measured batch whose throughput is at least this share of the best throughput."""
    best = max(places / seconds for places, seconds in points)
    return min(places for places, seconds in points if places / seconds >= share * best)


def _kept_sizes(kept: Mapping[str, Any], largest: int) -> Mapping[str, Any] | None:
    """Return an earlier start's batch sizes; None if missing or invalid.

    They are reused, because noise would give each start different sizes.
    """
    sizes: dict[str, Any] = {name: kept.get(name) for name in ("max_batch", "short_batch")}
    leasts = {"max_batch": MIN_BATCH, "short_batch": 1}
    possible = all(
        type(size) is int and leasts[name] <= size <= max(MIN_BATCH, largest) for name, size in sizes.items()
    )
    overlapped = kept.get("overlapped", 0)  # None: ticks do not overlap
    possible = possible and (overlapped is None or (isinstance(overlapped, float) and 0 < overlapped <= 1))
    return sizes | {"overlapped": overlapped} if possible else None


def _kept_times(kept: Mapping[str, Any], largest: int) -> tuple[tuple[int, float], ...] | None:
    """Return (places, seconds) for ticks that an earlier start measured; None if missing or invalid."""
    try:
        times = tuple((int(places), float(seconds)) for places, seconds in kept["tick_times"])
    except (KeyError, TypeError, ValueError):
        return None
    sizes = [places for places, _ in times]
    ascending = bool(times) and sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] <= largest
    return times if ascending and all(0 < seconds < math.inf for _, seconds in times) else None


def measure_ticks(
    engine: RowEngine, max_batch: int, clock: Callable[[], float] = time.perf_counter, *, rounds: int = ROUNDS
) -> tuple[tuple[int, float], ...]:
    """Run a few ticks of 1, 2, 4, … up to max_batch places. Return (places, seconds per tick) for each size."""
    begun_s = clock()
    sizes = sorted({min(2**k, max_batch) for k in range(max_batch.bit_length() + 1)})
    measured: dict[int, list[float]] = {places: [] for places in sizes}
    for round_number in range(rounds):
        if round_number and clock() - begun_s > BUDGET_S:
            break
        for places in sizes:
            seconds = _run_ticks(engine, places, clock)
            measured[places].append(median(seconds[WARM_UP:] or [min(seconds)]))
            if seconds[-1] > SLOW_TICK_S:
                sizes = sizes[: sizes.index(places) + 1]
                break
    return tuple((places, min(measured[places])) for places in sizes)


def measure_overlap(
    engine: RowEngine, places: int, tick_s: float, clock: Callable[[], float] = time.perf_counter
) -> float | None:
    """Measure how long a full tick takes while another one is in flight, relative to a full tick alone.

    tick_s: the duration of a full tick alone, in seconds. Return None if only one tick should be in flight. Either the
    executor has no queue, or ticks are so long that the time between them hardly matters. A second tick would then only
    delay new jobs.
    """
    if not engine.queues or tick_s > LONG_FULL_TICK_S:
        return None
    most = SAMPLER_FACTS[engine.info.default_sampler].max_steps(engine.info.num_timesteps)
    spec = trial_spec(engine.info, places, min(ROUNDS * TICKS, most))
    groups = [engine.add(spec), engine.add(spec)]
    ends_s: list[float] = []
    in_flight: deque[Callable[[], None]] = deque()
    for step in range(spec.steps):
        for rows in groups:
            in_flight.append(engine.begin(Batch(rows, (step,) * places, ())))
            if len(in_flight) > 1:
                in_flight.popleft()()
                ends_s.append(clock())
    while in_flight:
        in_flight.popleft()()
    for rows in groups:
        engine.remove(rows)
    took_s = [(ends_s[k + TICKS] - ends_s[k]) / TICKS for k in range(len(ends_s) - TICKS)]
    return round(min(1.0, min(took_s, default=tick_s) / tick_s), 3)


def _run_ticks(engine: RowEngine, places: int, clock: Callable[[], float]) -> list[float]:
    """Run a few ticks of one size, and return their durations in seconds. Stop after a slow tick."""
    most = SAMPLER_FACTS[engine.info.default_sampler].max_steps(engine.info.num_timesteps)
    spec = trial_spec(engine.info, places, min(TICKS, most))
    rows = engine.add(spec)
    seconds: list[float] = []
    for step in range(spec.steps):
        started_s = clock()
        engine.step(Batch(rows, (step,) * places, ()))
        engine.wait()
        if spec.steps <= WARM_UP:
            engine.latents(rows)  # no later tick waits for the device, so wait now
        seconds.append(clock() - started_s)
        if seconds[-1] > SLOW_TICK_S or (step >= WARM_UP and sum(seconds) > SLOW_TICKS_S):
            break
    engine.latents(rows)  # wait for the device
    engine.remove(rows)
    return seconds
