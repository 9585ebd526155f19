"""What decoding costs a latent model: row-steps per second with the decoding of every job, over without, in turns.

    python -m bench.latent [--checkpoint FOLDER] [--steps 50] [--rounds 5] [--window 10]

In this process, on the engine and the worker that serve. Without means that finished latents are thrown away. Beside
the ratio stands how much longer the slowest tick was than the median one.
"""

import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from bench.servers import ROOT, options_of
from bench.streams import show
from tminus.service.engine.loading import Loaded, load_engine
from tminus.service.engine.protocol import LoadOptions
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.scheduler import Scheduler, Sharing, TickTimes
from tminus.service.spec import Inputs, Pixels, trial_spec
from tminus.service.work import Batch, JobResult, work_of
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.running_job import NewJob
from tminus.service.worker.worker import Worker

JOBS, ROWS = 12, 4
WARM_UP_S = 2.0


def main() -> None:
    """Measure and print."""
    checkpoint = ROOT / "checkpoints" / "avatars-64"
    args = options_of(__doc__, checkpoint=checkpoint, sampler="dpmpp_2m", steps=50, guidance=1.0, rounds=5, window=10.0)
    loaded = load_engine(LoadOptions(checkpoint=args.checkpoint))
    if loaded.engine.info.latent is None:
        sys.exit(f"{args.checkpoint} is no latent model")
    bench = Bench(loaded, args.sampler, args.steps, args.guidance)
    with_, without, slowest = [], [], []
    try:
        for _ in range(args.rounds):
            without.append(bench.window(args.window, decodes=False)[0])
            rate, ticks = bench.window(args.window, decodes=True)
            with_.append(rate)
            slowest.append(max(ticks) / statistics.median(ticks) - 1)
    finally:
        bench.close()
    print(f"{JOBS} jobs of {ROWS} images, {args.steps} steps of {args.sampler}, guidance {args.guidance:g}")
    print(f"decoding an image alone takes {1e3 * loaded.coding_s[0]:.2f} ms\n\n| what | | range |\n|---|---|---|")
    show("row-steps/s, with decoding / without", [a / b for a, b in zip(with_, without, strict=True)])
    show("row-steps/s, with decoding", with_)
    show("the slowest tick beside decoding, ticks longer than the median", slowest)


class Bench:
    """Keeps JOBS jobs running on a worker, and times its ticks."""

    def __init__(self, loaded: Loaded, sampler: str, steps: int, guidance: float) -> None:
        self._engine = loaded.engine
        limits = Limits(ROWS, loaded.max_batch, JOBS * ROWS, JOBS, 1e9, 4096)
        times = TickTimes(loaded.tick_times)
        sharing = Sharing.of(loaded.max_batch, short_batch=loaded.short_batch, times=times)
        admission = Admission(limits)
        admission.put(0, Speed(sharing, limits.max_rows, *loaded.coding_s))
        self._spec = trial_spec(loaded.engine.info, ROWS, steps, sampler=sampler, guidance=guidance)
        self._ticks: list[tuple[float, int]] = []  # seconds, rows
        self._decodes = True
        self._read = loaded.engine._pictures.read
        loaded.engine._pictures.read = self._read_or_skip  # type: ignore[method-assign]
        self._step = loaded.engine.step
        loaded.engine.step = self._timed  # type: ignore[method-assign]
        self.worker = Worker([LoadedModel(0, loaded.engine, Scheduler(sharing))], admission, Metrics())
        self.worker.start()
        while not self.worker.ready:
            time.sleep(0.01)
        self._count, self._closed = 0, threading.Event()
        for _ in range(JOBS):
            self._submit()

    def window(self, seconds: float, *, decodes: bool) -> tuple[float, Sequence[float]]:
        """Row-steps per second, and how long each tick took."""
        self._decodes = decodes
        time.sleep(WARM_UP_S)
        self._ticks.clear()
        time.sleep(seconds)
        ticks = list(self._ticks)
        return sum(rows for _, rows in ticks) / seconds, [took for took, _ in ticks]

    def close(self) -> None:
        """End the jobs and the worker."""
        self._closed.set()
        self.worker.close()

    def _submit(self, _: "Future[JobResult] | None" = None) -> None:
        if not self._closed.is_set():
            self._count += 1
            ticket = self.worker.submit(NewJob(str(self._count), self._spec, work_of(self._spec, self._engine.info)))
            ticket.future.add_done_callback(lambda done: threading.Thread(target=self._submit, args=(done,)).start())

    def _read_or_skip(self, x: Any, known: Sequence[Inputs | None], bit_depth: int) -> Callable[[], Pixels]:
        return self._read(x, known, bit_depth) if self._decodes else lambda: np.zeros((len(x), 1, 1, 1), np.uint8)

    def _timed(self, batch: Batch) -> None:
        began_s = time.perf_counter()
        self._step(batch)
        self._ticks.append((time.perf_counter() - began_s, len(batch.rows)))


if __name__ == "__main__":
    main()
