"""Ticks of one network as eps, v, EDM and flow matching have it, in turns: row-steps/s. A process of its own.

    python -m bench.predictions --checkpoint FOLDER [--executor auto] [--precision float32] [--rows 1,16] [--threads 1]

The weights are those of the checkpoint, whatever it was trained to predict: what a tick takes does not depend on them.
All four share one executor, the one that a server would choose, and each has an engine of its own. In a round each
takes one tick, so that other programs slow all of them alike, and ratios are medians over the rounds. On a busy machine
take --threads 1 and the figures of CPU seconds: several threads spin while they wait for each other. Of each, jobs of
every sampler, of different numbers of steps, and guided where there are classes, are put in shared ticks: how many
passes a tick has, and how many operations beside them.
"""

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import truediv
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.bare import flops_per_row, make_peaks
from bench.measures import PAUSE_S, Measure, tell
from bench.passes import build
from bench.servers import CHECKPOINT, options_of
from bench.ticks import Instant, Ticks
from tminus.model.catalogue import SAMPLERS
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.noise import NoiseConfig
from tminus.service.engine.devices import choose_device
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import Executor
from tminus.service.scheduling.scheduler import Scheduler, Sharing
from tminus.service.spec import trial_spec
from tminus.service.work import work_of

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "EDM": "edm", "flow": "flow"}
STEPS = 50
LEAST_ROUNDS, ROUNDS_OF_A_PEAK = 5, 10
MIXED_ROWS = 64  # of the shared ticks, at most


def main() -> None:
    """Measure and print."""
    args = options_of(
        __doc__, checkpoint=CHECKPOINT, device="cpu", executor="auto", precision="float32", rows="1,16", seconds=60.0,
        threads=0,
    )  # fmt: skip
    if args.threads:
        torch.set_num_threads(args.threads)
    device, checkpoint = choose_device(args.device), load_checkpoint(args.checkpoint)
    flops, models = flops_per_row(checkpoint), as_predicting(checkpoint)
    rows = [int(count) for count in args.rows.split(",")]
    executor = build(checkpoint, device, args.executor, args.precision, rows)
    for name, model in models.items():
        for what, most in passes_and_operations(model, device).items():
            tell(Measure(f"most {what} of a tick of every sampler", name, most))
    peaks, flops_of = make_peaks(device, args.precision)
    for count in rows:
        ticks = {
            name: Ticks(Engine(model, executor, device, max_rows=count, max_jobs=1), count, STEPS, watched=False)
            for name, model in models.items()
        }
        calls: dict[str, Callable[[], object]] = {name: each.tick for name, each in ticks.items()}
        took = seconds_in_rounds(calls | peaks, peaks.keys(), device, args.seconds / len(rows))
        for each in ticks.values():
            each.end()
        tell(Measure("rounds", "all", len(took["eps"]), "", args.precision, count))
        for kind in ("wall", "CPU") if device.type == "cpu" else ("wall",):
            tell_rates(took, kind, flops * count, flops_of, count, args.precision)


def tell_rates(
    took: Mapping[str, Sequence["Seconds"]], kind: str, flops: float, flops_of: Mapping[str, float], rows: int, own: str
) -> None:
    """Tell what ticks of so many rows and FLOPs take, in seconds of a kind, beside eps and beside the faster peak."""
    seconds = {name: [each.cpu if kind == "CPU" else each.wall for each in its] for name, its in took.items()}
    peak = max(each / min(seconds[name]) for name, each in flops_of.items())
    tell(Measure("the faster peak", f"{kind} seconds", peak / 1e12, "TFLOP/s", own, rows))
    for name in PREDICTIONS:
        rate = 1 / statistics.median(seconds[name])
        tell(Measure("ticks", f"{name}, {kind} seconds", rows * rate, "row-steps/s", own, rows))
        tell(Measure("share of the peak", f"{name}, {kind} seconds", 100 * flops * rate / peak, "%", own, rows))
        if name != "eps":
            ratio = statistics.median(map(truediv, seconds["eps"], seconds[name]))
            tell(Measure("ticks, ratio to eps", f"{name}, {kind} seconds", ratio, "", own, rows))


def as_predicting(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """Return the checkpoint with the noise schedule of each kind of model, and without what belongs to its own."""
    bare = replace(checkpoint, tables=(), recommended=None)
    noise = NoiseConfig(num_train_timesteps=checkpoint.noise.num_train_timesteps, default_sampler="euler")
    return {name: replace(bare, noise=replace(noise, prediction_type=kind)) for name, kind in PREDICTIONS.items()}


class Seconds(NamedTuple):
    """What a call took."""

    wall: float
    cpu: float  # of all threads of this process


def seconds_in_rounds(
    calls: Mapping[str, Callable[[], object]], peaks: Collection[str], device: torch.device, seconds: float
) -> Mapping[str, Sequence[Seconds]]:
    """Make one call of each in a round, the first of a round last in the next; of peaks in some of the rounds."""
    order, took = list(calls), {name: list[Seconds]() for name in calls}
    for name in (name for name in calls for _ in range(STEPS) if name not in peaks):
        calls[name]()  # so that what a plan makes once is made
    until_s = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < until_s:
        with_peaks = rounds % ROUNDS_OF_A_PEAK == 0
        for name in order:
            if name in peaks and not with_peaks:
                continue
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif with_peaks:  # threads of another library spin for a while after their work
                time.sleep(PAUSE_S)
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            calls[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took[name].append(Seconds(time.perf_counter() - began_s, time.process_time() - began_cpu_s))
        order.append(order.pop(0))
        rounds += 1
    return took


class Counted:
    """An executor that counts its passes, and in whose passes no operations count."""

    name, precision, details = "counted", "float32", ""

    def __init__(self, inner: Executor) -> None:
        self._inner, self.passes, self.is_running = inner, 0, False

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        self.passes, self.is_running = self.passes + 1, True
        try:
            return self._inner(x, t, class_labels)
        finally:
            self.is_running = False

    def start(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Callable[[], Tensor]:
        out = self(x, t, class_labels)
        return lambda: out


class Operations(TorchDispatchMode):
    """Counts torch's operations, but for those of passes."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counted, self.count = counted, 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not self._counted.is_running
        return func(*args, **(kwargs or {}))


def passes_and_operations(checkpoint: Checkpoint, device: torch.device) -> dict[str, int]:
    """Put a job of every sampler, and a guided one, in shared ticks; the most passes and operations that a tick has."""
    executor = Counted(Instant(checkpoint, device, MIXED_ROWS))
    engine = Engine(checkpoint, executor, device, max_rows=MIXED_ROWS, max_jobs=MIXED_ROWS)
    scheduler, most = Scheduler(Sharing.of(MIXED_ROWS)), {"passes": 0, "operations": 0}
    for k, sampler in enumerate(name for name in engine.info.samplers if name in SAMPLERS):
        guidance = 2.0 if k == 0 and engine.info.null_class is not None else 1.0
        spec = trial_spec(engine.info, 1, 4 + k, sampler=sampler, seed=k, guidance=guidance)
        with suppress(ValueError):  # some cannot start where there is no signal
            scheduler.add(str(k), engine.add(spec), work_of(spec, engine.info))
    while (batch := scheduler.next_batch()) is not None:
        executor.passes = 0
        with Operations(executor) as operations:
            engine.step(batch)
        engine.wait()
        most = {"passes": max(most["passes"], executor.passes), "operations": max(most["operations"], operations.count)}
        scheduler.advance(batch)
    return most


if __name__ == "__main__":
    main()
