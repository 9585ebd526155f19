"""Ticks of the engine, exact and not, in turns, and what they cost beside their pass. A process of bench/gpu.py's.

    python -m bench.ticks --checkpoint FOLDER [--device cpu] [--precision float32] [--rows 1,4]

The executor is eager. An exact engine on a GPU pads every pass to the largest size, here that of the most rows. On a
GPU a call that synchronises within a tick ends the run with an error.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.measures import Measure, rates_in_turns, tell
from bench.servers import CHECKPOINT, options_of
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.service.engine.autotune import example_inputs
from tminus.service.engine.devices import choose_device
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor, Executor
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler
from tminus.service.spec import trial_spec
from tminus.service.work import work_of

ALONE = 8  # rows that are run alone: each pads a pass of all


def main() -> None:
    """Measure and print."""
    args = options_of(__doc__, checkpoint=CHECKPOINT, device="cpu", precision="float32", rows="1,4", seconds=2.0)
    device = choose_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    rows = fitting(checkpoint, device, args.precision, [int(count) for count in args.rows.split(",")])
    most = rows[-1]

    of = "tminus eager"
    executors: dict[str, Executor] = {
        name: EagerExecutor(checkpoint.net, device, precision=args.precision, sizes=sizes)
        for name, sizes in (("not exact", None), ("exact", [most]))
    }
    for name, executor in executors.items():
        for what, same in same_bits(executor, checkpoint, device, most).items():
            tell(Measure(f"rows of the same bits {what}", f"{of}, {name}", 100 * same, "%", args.precision, most))
    executors["instant"] = Instant(checkpoint, device, most)
    engines = {
        name: Engine(checkpoint, executor, device, max_rows=most, max_jobs=1, exact=name == "exact")
        for name, executor in executors.items()
    }
    for count in rows:
        steps = checkpoint.noise.num_train_timesteps
        ticks = {name: Ticks(engine, count, steps, watched=device.type == "cuda") for name, engine in engines.items()}
        calls: dict[str, Callable[[], object]] = {name: each.tick for name, each in ticks.items()}
        calls["bare pass"] = partial(executors["not exact"], *example_inputs(checkpoint, device, count))
        rates = rates_in_turns(calls, device, args.seconds)
        own = (args.precision, count)
        for name in ("not exact", "exact"):
            tell(Measure("ticks", f"{of}, {name}", count * rates[name], "row-steps/s", *own))
        tell(Measure("ticks, ratio", f"{of}: exact / not exact", rates["exact"] / rates["not exact"], "", *own))
        tell(Measure("ticks, ratio", f"{of}: tick / bare pass", rates["not exact"] / rates["bare pass"], "", *own))
        tell(Measure("a tick without its pass", "tminus", 1e6 / rates["instant"], "us", "", count))
        for each in ticks.values():
            each.end()


def fitting(checkpoint: Checkpoint, device: torch.device, precision: str, rows: list[int]) -> list[int]:
    """Leave out numbers of rows, ascending, of which a pass does not fit on the card."""
    executor = EagerExecutor(checkpoint.net, device, precision=precision)
    for k, count in enumerate(rows):
        try:
            executor(*example_inputs(checkpoint, device, count))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            tell(f"ticks of {count} rows and more do not fit on the card")
            return rows[:k]
    return rows


def same_bits(executor: Executor, checkpoint: Checkpoint, device: torch.device, rows: int) -> dict[str, float]:
    """Compare a pass of all rows with passes of one row, and with itself: which share of rows has the same bits."""
    x, t, labels = example_inputs(checkpoint, device, rows)
    together, again = (executor(x, t, labels).clone() for _ in range(2))
    some = range(min(rows, ALONE))
    alone = [executor(x[k : k + 1], t[k : k + 1], None if labels is None else labels[k : k + 1]) for k in some]
    return {
        "alone and among others": sum(map(torch.equal, torch.cat(alone), together)) / len(some),
        "when a pass is repeated": sum(map(torch.equal, again, together)) / rows,
    }


class Instant:
    """An executor whose pass takes no time: it gives the same values each time."""

    name, precision, details, queues = "instant", "float32", "", False

    def __init__(self, checkpoint: Checkpoint, device: torch.device, rows: int) -> None:
        config = checkpoint.net.config
        self._out = torch.zeros(rows, config.out_channels, *checkpoint.row_shape[1:], device=device)

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:  # noqa: ARG002
        return self._out[: len(x)]

    def start(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Callable[[], Tensor]:
        return lambda: self(x, t, class_labels)


class Ticks:
    """The ticks of an engine that always has one job of so many rows. With its scheduler, and nothing else."""

    def __init__(self, engine: Engine, rows: int, steps: int, *, watched: bool) -> None:
        """watched: whether a call that waits for the GPU is an error."""
        self._engine = engine
        self._spec = trial_spec(engine.info, rows, steps, sampler="ddpm")
        self._scheduler = Scheduler(BatchPolicy.of(max(2, rows)))
        self._watched = watched
        self._rows: tuple[int, ...] = ()

    def end(self) -> None:
        """Give the rows back."""
        self._engine.remove(self._rows)
        self._rows = ()

    def tick(self) -> None:
        """Take one tick, of a new job where the last one has ended."""
        watched = self._watched
        if (batch := self._scheduler.next_batch()) is None:
            watched = False  # what a first tick makes is made once
            if self._rows:
                self.end()
            self._rows = self._engine.add(self._spec)
            self._scheduler.add("bench", self._rows, work_of(self._spec, self._engine.info))
            batch = self._scheduler.next_batch()
            assert batch is not None
        if watched:
            torch.cuda.set_sync_debug_mode("error")
        try:
            self._engine.step(batch)
            self._engine.wait()
            self._engine.broken(batch.rows)
        finally:
            if watched:
                torch.cuda.set_sync_debug_mode("default")
        self._scheduler.advance(batch)


if __name__ == "__main__":
    main()
