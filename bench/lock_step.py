"""The price of the lock step: two streams that wait for each other after each pass, beside two that do not.

    python -m bench.lock_step [--checkpoint FOLDER] [--precision bfloat16] [--rows 4] [--seconds 3]

A stream is one thread with OpenVINO's passes of one thread. A tick is a pass of each stream and some Python, as the
server's between two passes. *Joined* streams wait for each other, and then for the Python of the tick; *free* ones do
half of it after each pass of their own. Another process takes a share of one core, as a client or nginx does. Prints
row-steps/s as JSON. `python -m bench` runs it in each round.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from statistics import median

import torch

from bench.peers.denoiser import one_stream
from bench.result_file import ROOT
from bench.servers import CHECKPOINT, environment, options_of
from tminus.model.checkpoint import load_checkpoint
from tminus.service.engine.autotune import example_inputs
from tminus.service.engine.openvino_executor import precisions

SHARES = (0.0, 0.3)  # of a core, taken by another process
PYTHON_MS = (0.0, 0.8)  # a tick
TURNS = 4  # of joined streams and of free ones; the median counts
PERIOD_S = 0.01  # in which the other process computes and sleeps once
STUCK_S = 60.0  # a stream that is waited for so long has failed
Pass = Callable[[], object]


def main() -> None:
    """Measure and print."""
    args = options_of(__doc__, checkpoint=CHECKPOINT, precision=precisions()[-1], rows=4, seconds=3.0, take=0.0)
    if args.take:  # it is the other process
        take(args.take)
        return
    torch.set_num_threads(1)
    inputs = example_inputs(load_checkpoint(args.checkpoint), torch.device("cpu"), args.rows)
    streams = [partial(one_stream(args.checkpoint, args.precision), *inputs) for _ in range(2)]
    found = {}
    for share, python_ms in product(SHARES, PYTHON_MS):
        with taken(share) if share else nullcontext():
            rates = in_turns(streams, python_ms / 1000, args.seconds)
        of = f"{100 * share:.0f} % of a core taken, {python_ms:g} ms of Python a tick"
        found[of] = {name: args.rows * rate for name, rate in rates.items()}
    print(json.dumps(found))


def in_turns(streams: Sequence[Pass], python_s: float, seconds: float) -> dict[str, float]:
    """Measure joined and free streams in turns, for so many seconds each; returns passes a second."""
    rates: dict[str, list[float]] = {"joined": [], "free": []}
    for _ in range(TURNS):
        for name, some in rates.items():
            some.append(rate(streams, python_s, seconds / TURNS, joined=name == "joined"))
    return {name: median(some) for name, some in rates.items()}


def rate(streams: Sequence[Pass], python_s: float, seconds: float, *, joined: bool) -> float:
    """Run each stream in a thread; returns their passes a second, together."""
    began_s, over = time.perf_counter(), False

    def update(seconds_of_it: float) -> None:
        nonlocal over
        compute(seconds_of_it)
        over = time.perf_counter() >= began_s + seconds

    # One thread updates when all have come, and then all go on: they agree on whether it is over.
    barrier = threading.Barrier(len(streams), partial(update, python_s), STUCK_S)

    def run(stream: Pass) -> int:
        passes = 0
        while not over:
            stream()
            passes += 1
            barrier.wait() if joined else update(python_s / len(streams))
        return passes

    with ThreadPoolExecutor(len(streams)) as threads:
        passes = sum(threads.map(run, streams))
    return passes / (time.perf_counter() - began_s)


def compute(seconds: float) -> None:
    """Run Python for so much time of this thread on a core."""
    end_s = time.thread_time() + seconds
    while time.thread_time() < end_s:
        pass


@contextmanager
def taken(share: float) -> Iterator[int]:
    """Have another process, whose number is given, take a share of one core during the block."""
    command = [sys.executable, "-m", "bench.lock_step", "--take", str(share)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("the other process did not start")
            yield process.pid
        finally:
            process.kill()


def take(share: float) -> None:
    """Take a share of one core until the parent ends this process, or has ended itself."""
    parent = os.getppid()
    print("begun", flush=True)
    period_ends_s = time.monotonic()
    while os.getppid() == parent:
        compute(share * PERIOD_S)
        period_ends_s = max(time.monotonic(), period_ends_s + PERIOD_S)
        time.sleep(max(0.0, period_ends_s - time.monotonic()))


if __name__ == "__main__":
    main()
