"""Make an engine that is ready to serve of a checkpoint: choose the executor, test its bits, measure ticks.

The test is the same bits alone and beside other jobs; what is measured is how long ticks of each size take.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.service.engine.approval import approve_later, with_kept_approvals
from tminus.service.engine.autotune import (
    AGREE_ROWS,
    ChoiceCache,
    Wish,
    agree_rows,
    choose_executor,
    default_cache,
    example_inputs,
    kept_executor,
    plain_executor,
)
from tminus.service.engine.devices import check_memory, choose_device, default_max_rows
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import Executor, probe_bits
from tminus.service.engine.protocol import LoadOptions, RowEngine
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import Scheduler, Sharing
from tminus.service.spec import Floats, SampleSpec, trial_spec
from tminus.service.work import Batch, work_of

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# No batch is larger unless --max-batch asks for it: on a CPU a longer tick only makes newcomers wait.
LARGEST_BATCH = {"cpu": 16, "cuda": 256}
PLACES_PER_THREAD = 4  # on a CPU of many cores, each of which runs a pass of its own
MIN_BATCH = 4  # two guided rows: one of the oldest job and one of the shortest
SHORT_SHARE = 0.85  # of the best throughput, for a tick that short and much longer jobs share
CORES = torch.get_num_threads()  # before any executor was built, which sets this
PROBE_ROWS = 2  # that the fingerprint hashes, unless a small network needs more, see _probe_rows
MAX_PLAN_LINES = 20_000_000  # 44 bytes each, and 112 more once a sampler with registers has come
FEW_JOBS = 3  # on which bits are tested where the same network runs in the same way already
LITTLE_S = 5.0  # of one core: for a job of less work it takes longer to measure what is fastest than to run it
SPARE_ROWS, SPARE_JOBS = 64, 16  # the least that the self-test and the measurement need
# The test before serving: jobs of every sampler, of STEPS steps; so many samplers run guided too.
STEPS, ROWS, GUIDED = 4, 2, 3
ROUNDS = 4  # each measures every size; the fastest counts, since other programs may run too
TICKS = 6  # of one size in a round
WARM_UP = 2  # ticks that do not count: the first may compile; on a GPU the host runs ahead, so the second is too short
BUDGET_S = 2.0  # after this no further round begins
SLOW_TICK_S = 2.0  # after a tick that takes this long no larger size is measured


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found out about running a network here: it holds for other weights too."""

    way: Mapping[str, Any]  # the network, and how it is run
    max_batch: int
    short_batch: int
    tick_times: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that is ready to serve, and what was measured on it."""

    engine: Engine
    max_rows: int
    max_batch: int
    short_batch: int
    tick_times: tuple[tuple[int, float], ...]
    coding_s: tuple[float, float] = (0.0, 0.0)  # to decode an image and to encode one, for a latent model
    measured: Measured | None = None
    spare_work: Iterator[None] | None = None  # what is left to do while no job runs


@dataclass(frozen=True, slots=True)
class ReadModel:
    """A checkpoint that was read, and the name that its model has here."""

    name: str
    folder: Path
    checkpoint: Checkpoint


def load_engine(
    options: LoadOptions, places_of: Callable[[ModelInfo], int] | None = None, fingerprint: str | None = None
) -> Loaded:
    """Load, choose, test and measure. Raises CheckpointError, or ValueError for options that cannot be met.

    places_of: of the one job that the engine is for, how many places it takes on a model. For little work nothing is
    measured or tested: what an earlier start chose is taken, or eager, unless the options name another executor.
    fingerprint: that of the engine that is wanted; then whichever of these two has it is taken, and where neither has,
    all is measured.
    """
    checkpoint = read_checkpoint(options)

    def prepare() -> Loaded:
        unmeasured = _load_unmeasured(checkpoint, options, places_of, fingerprint) if places_of is not None else None
        return unmeasured or prepare_engine(checkpoint, options)

    return _in_thread(prepare)


def read_checkpoint(options: LoadOptions) -> Checkpoint:
    """The first, quick half of it: whatever is wrong with the folder or the device is found out here."""
    return _in_thread(lambda: _read_checkpoint(options))


def _in_thread(act: Callable[[], Result]) -> Result:
    """Do something in a thread that ends.

    Each thread that runs torch keeps an OpenMP team, and when two teams share the cores the worker's waits by sleeping
    instead of spinning. Measured on two cores: 11.3 ms a tick of one row, against 5.7.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(act).result()


def _read_checkpoint(options: LoadOptions) -> Checkpoint:
    device = choose_device(options.device)
    if device.index:
        raise ValueError(
            f"one GPU is served, the first that is visible: CUDA_VISIBLE_DEVICES={device.index}, not {device}"
        )
    cache = options.cache_dir or default_cache()
    checkpoint = with_kept_approvals(load_checkpoint(options.checkpoint), device, cache)
    weights = sum(4 * parameter.numel() for parameter in checkpoint.net.parameters()) if device.type == "cuda" else 0
    size_px = checkpoint.row_shape[1:]
    check_memory(checkpoint.net.config.pass_bytes(size_px) + weights, "network", size_px, device)
    if checkpoint.autoencoder is not None:
        size_px = checkpoint.size_px
        check_memory(checkpoint.autoencoder.config.pass_bytes(size_px), "autoencoder", size_px, device)
    return checkpoint


def prepare_engine(
    checkpoint: Checkpoint, options: LoadOptions, known: Measured | None = None, *, busy: bool = False
) -> Loaded:
    """The second half: choose, test and measure. Call it in a thread that ends, see `_in_thread`.

    busy: whether other models are being served: then the batch sizes found are not kept for later starts. known: of a
    model that is running; if this is the same network, run in the same way, it is not measured again, and its bits are
    tested on fewer jobs. So loading takes little from that model's ticks.
    """
    device = choose_device(options.device)
    max_rows = options.max_rows or default_max_rows(checkpoint)
    plan_lines = options.max_jobs * checkpoint.noise.num_train_timesteps
    if plan_lines > MAX_PLAN_LINES:
        raise ValueError(
            f"max_jobs must be at most {MAX_PLAN_LINES // checkpoint.noise.num_train_timesteps} with "
            f"T={checkpoint.noise.num_train_timesteps}, got {options.max_jobs}: each job's plan is held"
        )
    wish = wish_of(options, device)
    largest, exact, threads = wish.max_batch, wish.exact, wish.threads
    cache = options.cache_dir or default_cache()
    executor = choose_executor(checkpoint, device, wish, cache)
    engine = _build(checkpoint, executor, device, options, wish)
    # An exact engine on a GPU pads each pass to the largest, so its batch sizes are others.
    how = {
        "executor": executor.name, "precision": executor.precision, "threads": threads, "largest": largest,
        "exact": exact,
    }  # fmt: skip
    network = {"unet": checkpoint.net.config.to_dict(), "shape": checkpoint.row_shape, "device": str(device)}
    way = how | network | {"details": executor.details}
    again = known if known is not None and known.way == way else None
    if exact and not same_alone_and_together(engine, largest, most=None if again is None else FEW_JOBS):
        raise ValueError(
            f"executor {executor.name} {executor.precision} ({executor.details}) does not give the same bits alone and "
            "among others here; --no-exact serves without that promise"
        )
    engine.free_registers()  # those of the test: they are made for all rows, and most servers are never asked for any
    if again is None:
        again = _measure(engine, way, largest, ChoiceCache(None if busy else cache, checkpoint, device, how, ()))
    tick_times = again.tick_times
    max_batch = options.max_batch or again.max_batch
    short_batch = min(options.short_batch or again.short_batch, max_batch)
    for places, seconds in tick_times:
        log.info("a tick of %d places takes %.2f ms", places, 1e3 * seconds)
    log.info(
        "executor %s %s (%s), at most %d places a tick, %d where a short job shares it with much longer ones",
        executor.name, executor.precision, executor.details, max_batch, short_batch,
    )  # fmt: skip
    coding_s = engine.coding_seconds()
    if engine.info.latent is not None:
        log.info("beside the ticks an image is decoded in %.2f ms, encoded in %.2f ms", *(1e3 * s for s in coding_s))
    spare_work = approve_later(checkpoint, executor, device, wish, options, cache)
    return Loaded(engine, max_rows, max_batch, short_batch, tick_times, coding_s, again, spare_work)


def _load_unmeasured(
    checkpoint: Checkpoint, options: LoadOptions, places_of: Callable[[ModelInfo], int], fingerprint: str | None
) -> Loaded | None:
    """Build an engine without measuring what runs fastest; None where that pays, or another fingerprint is wanted."""
    device = choose_device(options.device)
    wish, max_rows = wish_of(options, device), options.max_rows or default_max_rows(checkpoint)
    plain = plain_executor(checkpoint, device, wish)
    engine = _build(checkpoint, plain, device, options, wish)
    if fingerprint is None and places_of(engine.info) * _pass_s(plain, checkpoint, device) > LITTLE_S:
        return None
    plain_will_do = wish.executor in ("auto", "eager")
    if not plain_will_do or engine.info.fingerprint != fingerprint:
        kept = kept_executor(checkpoint, device, wish, options.cache_dir or default_cache())
        if kept is not None:  # it has taken the network over: the plain one must not run again
            engine = _build(checkpoint, kept, device, options, wish)
        elif not plain_will_do:
            return None
    if fingerprint in (None, engine.info.fingerprint):
        return Loaded(engine, max_rows, wish.max_batch, wish.max_batch, ())
    return None


def _pass_s(executor: Executor, checkpoint: Checkpoint, device: torch.device) -> float:
    """Time a pass of one row: on a CPU in seconds of one core, which other programs do not lengthen."""
    inputs = example_inputs(checkpoint, device, 1)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    executor(*inputs).cpu()  # warms up
    started_s = clock()
    executor(*inputs).cpu()
    return clock() - started_s


def wish_of(options: LoadOptions, device: torch.device) -> Wish:
    """Return what these options ask for on this device."""
    threads = options.threads or CORES
    largest = options.max_batch or LARGEST_BATCH[device.type]
    if device.type == "cpu" and options.max_batch is None:
        largest = max(largest, PLACES_PER_THREAD * threads)
    exact = device.type == "cpu" if options.exact is None else options.exact
    return Wish(options.executor, options.precision, exact, largest, threads)


def _build(
    checkpoint: Checkpoint, executor: Executor, device: torch.device, options: LoadOptions, wish: Wish
) -> Engine:
    bits = None
    if wish.exact:
        bits = probe_bits(executor, example_inputs(checkpoint, device, _probe_rows(checkpoint, executor.precision)))
    return Engine(
        checkpoint,
        executor,
        device,
        max_rows=max(options.max_rows or default_max_rows(checkpoint), SPARE_ROWS, wish.max_batch),
        max_jobs=max(options.max_jobs, SPARE_JOBS),
        exact=wish.exact,
        bits=bits,
    )


def _measure(engine: Engine, way: Mapping[str, Any], largest: int, cache: ChoiceCache) -> Measured:
    """How long ticks take, and what batch sizes follow from that; those of an earlier start are kept."""
    sizes = _kept_sizes(cache, largest)
    # Where the sizes are known one round is enough: admission corrects the times by what ticks really take.
    tick_times = measure_ticks(engine, largest, rounds=ROUNDS if sizes is None else 1)
    if sizes is not None and tick_times[-1][0] < min(sizes["max_batch"], largest):
        # A tick that was slow, by chance or not, has ended the round before the size that will be used.
        tick_times = measure_ticks(engine, largest, rounds=ROUNDS)
    if sizes is None:
        sizes = _batch_sizes(tick_times)
        cache.write(sizes)
    return Measured(way, sizes["max_batch"], sizes["short_batch"], tick_times)


def _probe_rows(checkpoint: Checkpoint, precision: str) -> int:
    """How many rows the fingerprint hashes: 2, or as many as autotune compares where those are more than usual.

    Below float32 two builds with other bits may agree on two rows of a small network by chance, see `agree_rows`.
    For larger networks two rows are enough, and more would give every build another fingerprint.
    """
    rows = agree_rows(checkpoint, precision)
    return rows if rows > AGREE_ROWS else PROBE_ROWS


def _batch_sizes(tick_times: tuple[tuple[int, float], ...]) -> dict[str, int]:
    """The smallest batches with 95 % (max_batch) and 85 % (short_batch) of the best throughput."""
    return {
        "max_batch": max(MIN_BATCH, smallest_batch_at(tick_times)),
        "short_batch": max(MIN_BATCH, smallest_batch_at(tick_times, SHORT_SHARE)),
    }


def smallest_batch_at(points: Sequence[tuple[int, float]], share: float = 0.95) -> int:
    """Find the smallest measured batch whose throughput is at least this share of the best one."""
    best = max(places / seconds for places, seconds in points)
    return min(places for places, seconds in points if places / seconds >= share * best)


def _kept_sizes(cache: ChoiceCache, largest: int) -> Mapping[str, int] | None:
    """An earlier start's batch sizes, if they can be taken: where the curve is flat, noise gives others each time."""
    sizes = cache.read() or {}
    possible = all(type(size) is int and MIN_BATCH <= size <= max(MIN_BATCH, largest) for size in sizes.values())
    return sizes if possible and sizes.keys() == {"max_batch", "short_batch"} else None


def same_alone_and_together(engine: RowEngine, max_batch: int, most: int | None = None) -> bool:
    """Run a job of every sampler, each alone and then all in shared ticks; True if every latent agrees to the bit.

    most: run no more than so many jobs.
    """
    specs = _possible(engine, _specs(engine.info))[:most]
    alone = [_run(engine, [spec], max_batch)[0] for spec in specs]
    together = _run(engine, specs, max_batch)
    return all(a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=True))


def _specs(model: ModelInfo) -> list[SampleSpec]:
    """Jobs of every sampler with different step counts, the first ones of several rows, and guided where that is so."""
    specs = []
    for k, sampler in enumerate(model.samplers):
        steps = min(STEPS, SAMPLER_FACTS[sampler].max_steps(model.num_timesteps))
        first = k < GUIDED
        specs.append(
            trial_spec(model, n=ROWS + k if first else 1, steps=max(1, steps - k % 3), sampler=sampler, seed=k)
        )
        if first and model.null_class is not None:
            specs.append(trial_spec(model, n=1 + k, steps=steps, sampler=sampler, seed=k + 100, guidance=2.0))
    return specs


def _possible(engine: RowEngine, specs: Sequence[SampleSpec]) -> list[SampleSpec]:
    """Keep the jobs that the model's schedule allows: some samplers cannot start where there is no signal."""
    possible = []
    for spec in specs:
        with suppress(ValueError):
            engine.plan(spec)
            possible.append(spec)
    return possible


def _run(engine: RowEngine, specs: list[SampleSpec], max_batch: int) -> list[Floats]:
    scheduler = Scheduler(Sharing.of(max(2, max_batch)))
    rows = [engine.add(spec) for spec in specs]
    for k, spec in enumerate(specs):
        scheduler.add(str(k), rows[k], work_of(spec, engine.info))
    while (batch := scheduler.next_batch()) is not None:
        engine.step(batch)
        engine.wait()
        scheduler.advance(batch)
    latents = [engine.latents(each) for each in rows]
    for each in rows:
        engine.remove(each)
    return latents


def measure_ticks(
    engine: RowEngine, max_batch: int, clock: Callable[[], float] = time.perf_counter, *, rounds: int = ROUNDS
) -> tuple[tuple[int, float], ...]:
    """Run a few ticks of 1, 2, 4, … up to max_batch places; returns (places, seconds) of each size."""
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


def _run_ticks(engine: RowEngine, places: int, clock: Callable[[], float]) -> list[float]:
    """Time a few ticks of one size; stops after a slow one."""
    most = SAMPLER_FACTS[engine.info.default_sampler].max_steps(engine.info.num_timesteps)
    spec = trial_spec(engine.info, places, min(TICKS, most))
    rows = engine.add(spec)
    seconds: list[float] = []
    for step in range(spec.steps):
        started_s = clock()
        engine.step(Batch(rows, (step,) * places, ()))
        engine.wait()
        if spec.steps <= WARM_UP:
            engine.latents(rows)  # waits for the device, since no later tick will tell
        seconds.append(clock() - started_s)
        if seconds[-1] > SLOW_TICK_S:
            break
    engine.latents(rows)  # waits for the device
    engine.remove(rows)
    return seconds
