"""Ticks of one network as eps, v, EDM and flow matching have it, in turns: row-steps/s. A process of its own.

    python -m bench.predictions --checkpoint FOLDER [--executor auto] [--precision float32] [--rows 1,16] [--seconds 60]

The weights are those of the checkpoint, whatever it was trained to predict: what a tick takes does not depend on them.
All four share one executor, the one that a server would choose, and each has an engine of its own. In a round each
takes one tick, so that other programs slow all of them alike, and ratios are medians over the rounds. Those of CPU
seconds hold on a busy machine too. Of each, jobs of every sampler, of different numbers of steps, and guided where
there are classes, are put in shared ticks: how many passes a tick has, and how many operations beside them.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

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
PEAK = "peak"
LEAST_ROUNDS, ROUNDS_OF_A_PEAK = 5, 10
MIXED_ROWS = 64  # of the shared ticks, at most


def main() -> None:
    """Measure and print."""
    args = options_of(
        __doc__, checkpoint=CHECKPOINT, device="cpu", executor="auto", precision="float32", rows="1,16", seconds=60.0
    )
    device, checkpoint = choose_device(args.device), load_checkpoint(args.checkpoint)
    flops, models = flops_per_row(checkpoint), as_predicting(checkpoint)
    rows = [int(count) for count in args.rows.split(",")]
    executor = build(checkpoint, device, args.executor, args.precision, rows)
    for name, model in models.items():
        for what, most in passes_and_operations(model, device).items():
            tell(Measure(f"most {what} of a tick of every sampler", name, most))
    peaks, flops_of = make_peaks(device, args.precision)
    own = args.precision
    for count in rows:
        ticks = {
            name: Ticks(Engine(model, executor, device, max_rows=count, max_jobs=1), count, STEPS, watched=False)
            for name, model in models.items()
        }
        calls: dict[str, Callable[[], object]] = {name: each.tick for name, each in ticks.items()}
        calls |= {f"{PEAK}: {of}": call for of, call in peaks.items()}
        times = times_in_rounds(calls, device, args.seconds / len(rows))
        peak = max(each / min(wall_s for wall_s, _ in times[f"{PEAK}: {of}"]) for of, each in flops_of.items())
        for name in ticks:
            rate = count / statistics.median(wall_s for wall_s, _ in times[name])
            tell(Measure("ticks", name, rate, "row-steps/s", own, count))
            tell(Measure("ticks, share of the faster peak", name, 100 * rate * flops / peak, "%", own, count))
            for k, of in enumerate(("", " of CPU seconds")[: 1 + (device.type == "cpu")] if name != "eps" else ()):
                ratios = [eps[k] / its[k] for eps, its in zip(times["eps"], times[name], strict=True)]
                tell(Measure(f"ticks, ratio to eps{of}", name, statistics.median(ratios), "", own, count))
        tell(Measure("rounds", "all", len(times["eps"]), "", own, count))
        tell(Measure("peak", "the faster of a matmul and a convolution", peak / 1e12, "TFLOP/s", own, count))
        for each in ticks.values():
            each.end()


def as_predicting(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """Return the checkpoint with the noise schedule of each kind of model, and without what belongs to its own."""
    bare = replace(checkpoint, tables=(), recommended=None)
    noise = NoiseConfig(num_train_timesteps=checkpoint.noise.num_train_timesteps, default_sampler="euler")
    return {name: replace(bare, noise=replace(noise, prediction_type=kind)) for name, kind in PREDICTIONS.items()}


def times_in_rounds(
    calls: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Make one call of each in a round, the first of a round last in the next; returns the seconds of each call.

    The second number is the CPU seconds of all threads. Peaks are called in some of the rounds.
    """
    order, times = list(calls), {name: list[tuple[float, float]]() for name in calls}
    for _ in range(STEPS):  # so that what a plan makes once is made
        for name, call in calls.items():
            if not name.startswith(PEAK):
                call()
    until_s = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < until_s:
        for name in order:
            if name.startswith(PEAK) and rounds % ROUNDS_OF_A_PEAK:
                continue
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif rounds % ROUNDS_OF_A_PEAK == 0:  # threads of another library spin for a while after their work
                time.sleep(PAUSE_S)
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            calls[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append((time.perf_counter() - began_s, time.process_time() - began_cpu_s))
        order.append(order.pop(0))
        rounds += 1
    return times


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
        super().__init__()
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
