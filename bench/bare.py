"""The limits: peaks of the processor, the U-Net's FLOPs a row, and the bare executor loop. A process of its own.

The loop calls the same executor that the server chose, on full batches, with no server, scheduler or update around it.
Prints one JSON object; with --peaks, only the peaks.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.records import Pace
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.service.engine.autotune import Wish, choose_executor
from tminus.service.engine.choice_cache import default_cache
from tminus.service.engine.devices import multiplying
from tminus.service.engine.executors import Executor
from tminus.service.engine.loading import LARGEST_BATCH

CPU = torch.device("cpu")
PEAK_SIZES = {"cpu": (2048, 256, 32, 4), "cuda": (8192, 512, 64, 64)}  # of the matmul; channels, side, batch
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.bare", description=__doc__)
    parser.add_argument("--peaks", action="store_true", help="only what the processor can do at most, in GFLOP/s")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--executor")
    parser.add_argument("--precision")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, required=True, help="seconds a batch size")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.peaks:
        found = {precision: find_peaks(precision, args.seconds) for precision in ("float32", "bfloat16")}
        print(json.dumps({precision: max(peaks.values()) / 1e9 for precision, peaks in found.items()}))
        return
    paces = {
        batch: run_bare(args.checkpoint, args.executor, args.precision, batch, args.seconds) for batch in args.batches
    }
    result = {
        "flops_per_row": flops_per_row(load_checkpoint(args.checkpoint)),
        "details": build(args.checkpoint, args.executor, args.precision).details,
        "bare": {batch: asdict(pace) for batch, pace in paces.items()},
    }
    print(json.dumps(result))


def run_bare(checkpoint: Path, executor_name: str, precision: str, batch: int, seconds: float) -> Pace:
    """Measure the pace of the executor alone, on batches of one size."""
    executor = build(checkpoint, executor_name, precision)
    x, t, labels = _inputs(load_checkpoint(checkpoint), batch)
    with torch.inference_mode():
        executor(x, t, labels)
        cpu_before_s = time.process_time()
        passes_s = _timed(lambda: executor(x, t, labels), seconds)
        cpu_s = time.process_time() - cpu_before_s
    rows = batch * len(passes_s)
    return Pace(rows / sum(passes_s), cpu_s / rows)


@lru_cache(maxsize=1)
def build(checkpoint: Path, executor_name: str, precision: str) -> Executor:
    """Build the executor as the server did: its answer to the same wish is in the cache, sizes of a pass and all."""
    device, threads, largest = torch.device("cpu"), torch.get_num_threads(), LARGEST_BATCH["cpu"]
    for name, kind in (("auto", "auto"), (executor_name, precision)):
        wish = Wish(name, kind, exact=True, max_batch=largest, threads=threads)
        executor = choose_executor(load_checkpoint(checkpoint), device, wish, default_cache())
        if (executor.name, executor.precision) == (executor_name, precision):
            return executor
    raise ValueError(f"no executor {executor_name} {precision} here")


def flops_per_row(checkpoint: Checkpoint) -> int:
    """Count one forward pass of one row; a multiply-add is two."""
    # The counter knows no formula for the CPU's fused attention, so attention is counted as the matmuls it stands for.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        checkpoint.net(*_inputs(checkpoint, 1))
    return int(counter.get_total_flops())


def make_peaks(device: torch.device, precision: str) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Make a large matmul and a wide 3x3 convolution, channels last; returns them, and the FLOPs of each.

    Another library does convolutions than does matmuls, and on some processors it is the faster by far.
    """
    dtype, (size, channels, side, batch) = DTYPES[precision], PEAK_SIZES[device.type]

    def limited(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode(), multiplying(device, tf32=precision == "tf32"):
                return call()

        return run

    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    x = torch.randn(batch, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    calls = {
        "a matmul": limited(lambda: torch.mm(a, b, out=out)),
        "a convolution": limited(lambda: F.conv2d(x, weight, padding=1)),
    }
    return calls, {"a matmul": 2 * size**3, "a convolution": 2 * 9 * channels**2 * side**2 * batch}


def find_peaks(precision: str, seconds: float) -> dict[str, float]:
    """Measure FLOP/s of the best large matmul and of the best wide convolution seen, for so many seconds each."""
    calls, flops = make_peaks(CPU, precision)
    return {name: flops[name] / min(_timed(call, seconds)) for name, call in calls.items()}


def _inputs(checkpoint: Checkpoint, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [B, C, H, W] channels last, t [B], labels [B]: rows at mixed timesteps and classes, as in the server."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *checkpoint.row_shape, generator=generator)
    t = torch.randint(checkpoint.noise.num_train_timesteps, (batch,), generator=generator)
    embeds = checkpoint.net.config.num_class_embeds
    labels = torch.randint(embeds, (batch,), generator=generator) if embeds is not None else None
    return x.contiguous(memory_format=torch.channels_last), t, labels


def _timed(call: Callable[[], object], seconds: float) -> list[float]:
    """Call over and over, at least twice, until the time is up; return the seconds of each call."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
