"""The limits: float32 peak, the U-Net's FLOPs a row, and the bare loop `net(x, t, labels)`. A process of its own.

Prints one JSON object. The loop runs as the server's eager executor does: float32, channels last, inference mode.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.pace import Pace
from model.checkpoint import Checkpoint, load_checkpoint

MATMUL_SIZE = 2048
CONV_CHANNELS, CONV_SIZE, CONV_BATCH = 256, 32, 4
SLICES = 4  # each batch size runs in so many slices, taking turns, so that drift falls on all alike


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.bare", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="seconds a batch size")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    checkpoint = load_checkpoint(args.checkpoint)
    with torch.inference_mode():
        flops = flops_per_row(checkpoint)
        peak_s = min(2.0, args.seconds)
        result = {
            "machine": describe_machine(),
            "flops_per_row": flops,
            "matmul_flops": matmul_peak(peak_s),
            "conv_flops": conv_peak(peak_s),
            "bare": {batch: asdict(pace) for batch, pace in bare_loop(checkpoint, args.batches, args.seconds).items()},
        }
    print(json.dumps(result))


def describe_machine() -> dict[str, str | int]:
    """What the figures belong to."""
    return {
        "cpu": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def flops_per_row(checkpoint: Checkpoint) -> int:
    """Count one forward pass of one row; a multiply-add is two."""
    # The counter knows no formula for the CPU's fused attention, so attention is counted as the matmuls it stands for.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        checkpoint.net(*_inputs(checkpoint, 1))
    return int(counter.get_total_flops())


def matmul_peak(seconds: float) -> float:
    """FLOP/s of the best square float32 matmul seen."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    out = torch.empty_like(a)
    best_s = min(_timed(lambda: torch.mm(a, b, out=out), seconds))
    return 2 * MATMUL_SIZE**3 / best_s


def conv_peak(seconds: float) -> float:
    """FLOP/s of the best wide 3x3 float32 convolution seen, channels last.

    Another library does convolutions than does matmuls, and on some processors it is the faster by far.
    """
    c, size, batch = CONV_CHANNELS, CONV_SIZE, CONV_BATCH
    x = torch.randn(batch, c, size, size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c, c, 3, 3).contiguous(memory_format=torch.channels_last)
    best_s = min(_timed(lambda: F.conv2d(x, weight, padding=1), seconds))
    return 2 * 9 * c * c * size * size * batch / best_s


def bare_loop(checkpoint: Checkpoint, batches: Sequence[int], seconds: float) -> dict[int, Pace]:
    """The pace of the network alone, by batch size."""
    net = checkpoint.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = {batch: _inputs(checkpoint, batch) for batch in batches}
    for x, t, labels in inputs.values():
        net(x, t, labels)
    rows, spent_s, cpu_s = dict.fromkeys(batches, 0), dict.fromkeys(batches, 0.0), dict.fromkeys(batches, 0.0)
    for _ in range(SLICES):
        for batch, (x, t, labels) in inputs.items():
            cpu_before_s = time.process_time()
            passes_s = _timed(partial(net, x, t, labels), seconds / SLICES)
            cpu_s[batch] += time.process_time() - cpu_before_s
            spent_s[batch] += sum(passes_s)
            rows[batch] += batch * len(passes_s)
    return {batch: Pace(rows[batch] / spent_s[batch], cpu_s[batch] / rows[batch]) for batch in batches}


def _inputs(checkpoint: Checkpoint, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [B, C, H, W] channels last, t [B], labels [B]: rows at mixed timesteps and classes, as in the server."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, checkpoint.net.config.in_channels, *checkpoint.size_px, generator=generator)
    t = torch.randint(checkpoint.noise.num_train_timesteps, (batch,), generator=generator)
    embeds = checkpoint.net.config.num_class_embeds
    labels = torch.randint(embeds, (batch,), generator=generator) if embeds is not None else None
    return x.contiguous(memory_format=torch.channels_last), t, labels


def _timed(call: Callable[[], object], seconds: float) -> list[float]:
    """Call over and over, at least twice, until the time is up; the seconds of each call."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
