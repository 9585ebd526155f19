"""What a tick costs on a GPU: against the serial eager loop, the bf16 matmul peak, and a bare pass of the executor.

    python -m bench.gpu [--checkpoint FOLDER] [--max-batch 256] [--seconds 10] [--precision bfloat16]

Ticks run with synchronising calls forbidden: one in a tick ends the run with an error. Prints a table. Needs CUDA.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.bare import flops_per_row
from bench.servers import CHECKPOINT, options_of
from tminus.model.checkpoint import load_checkpoint
from tminus.model.rng import image_noise
from tminus.model.samplers import compile_plan, sample
from tminus.service.engine.autotune import Wish, choose_executor, default_cache, example_inputs
from tminus.service.engine.engine import Engine
from tminus.service.engine.loading import LARGEST_BATCH
from tminus.service.scheduling.scheduler import Scheduler, Sharing
from tminus.service.spec import trial_spec
from tminus.service.work import work_of

MATMUL_SIZE = 8192
SERIAL_STEPS = 50
WARM_UP_TICKS = 10


def main() -> None:
    """Measure and print."""
    args = options_of(__doc__, checkpoint=CHECKPOINT, max_batch=LARGEST_BATCH["cuda"], seconds=10.0, precision="auto")
    if not torch.cuda.is_available():
        sys.exit("python -m bench.gpu: torch sees no CUDA device")
    device = torch.device("cuda")
    flops = flops_per_row(load_checkpoint(args.checkpoint))
    peak = matmul_peak(device, args.seconds / 4)
    serial = serial_eager(args.checkpoint, device, args.seconds)
    ticks, bare, name = engine_and_bare(args.checkpoint, device, args)
    rows = [
        ("card", torch.cuda.get_device_name(device)),
        ("versions", f"torch {torch.__version__}, CUDA {torch.version.cuda}"),
        ("executor", name),
        ("bf16 matmul peak", f"{peak / 1e12:.1f} TFLOP/s"),
        ("serial eager loop, float32, one row", f"{serial:.0f} row-steps/s"),
        (f"engine, {args.max_batch} rows a tick", f"{ticks:.0f} row-steps/s"),
        ("engine / serial eager loop", f"{ticks / serial:.1f}"),
        ("share of the matmul peak", f"{100 * ticks * flops / peak:.1f} %"),
        ("tick / bare pass of the executor", f"{bare / ticks:.3f}"),
        ("synchronising calls in a tick", "0"),
    ]
    print("| what | |\n|---|---|")
    for what, value in rows:
        print(f"| {what} | {value} |")


def matmul_peak(device: torch.device, seconds: float) -> float:
    """FLOP/s of a large bfloat16 matmul."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16)
    return 2 * MATMUL_SIZE**3 * _calls_per_s(lambda: torch.mm(a, b), seconds)


def serial_eager(checkpoint: Path, device: torch.device, seconds: float) -> float:
    """Row-steps/s of one row at a time, as a plain loop in PyTorch does it."""
    loaded = load_checkpoint(checkpoint)
    net = loaded.net.to(device)
    shape = (net.config.in_channels, *loaded.size_px)
    plan = compile_plan(loaded.noise, loaded.noise.schedule(), "ddpm", SERIAL_STEPS)
    labels = torch.zeros(1, dtype=torch.int64, device=device) if net.class_embedding is not None else None

    def run() -> None:
        x_T = image_noise(0, [0], 0, shape, device)
        sample(net, plan, x_T, lambda k: image_noise(0, [0], k + 1, shape, device), class_labels=labels)

    return SERIAL_STEPS * _calls_per_s(run, seconds)


def engine_and_bare(checkpoint: Path, device: torch.device, args: argparse.Namespace) -> tuple[float, float, str]:
    """Row-steps/s of full ticks of the engine, rows/s of bare passes of its executor, and the executor's name."""
    loaded = load_checkpoint(checkpoint)
    wish = Wish("auto", args.precision, exact=False, max_batch=args.max_batch, threads=torch.get_num_threads())
    executor = choose_executor(loaded, device, wish, default_cache())
    engine = Engine(loaded, executor, device, max_rows=args.max_batch, max_jobs=1, exact=False)
    spec = trial_spec(engine.info, args.max_batch, loaded.noise.num_train_timesteps)
    scheduler, rows = Scheduler(Sharing.of(args.max_batch)), engine.add(spec)
    scheduler.add("bench", rows, work_of(spec, engine.info))

    def tick() -> None:
        batch = scheduler.next_batch()
        assert batch is not None, "the job ended: give fewer --seconds"
        engine.step(batch)
        engine.wait()
        engine.broken(batch.rows)
        scheduler.advance(batch)

    for _ in range(WARM_UP_TICKS):
        tick()
    torch.cuda.set_sync_debug_mode("error")
    ticks, started = 0, time.perf_counter()
    while time.perf_counter() < started + args.seconds and ticks < spec.steps - 2 * WARM_UP_TICKS:
        tick()
        ticks += 1
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    ticks_per_s = ticks / (time.perf_counter() - started)

    inputs = example_inputs(loaded, device, args.max_batch)
    bare_per_s = _calls_per_s(lambda: executor(*inputs), args.seconds)
    name = f"{executor.name} {executor.precision}, {executor.details}"
    return args.max_batch * ticks_per_s, args.max_batch * bare_per_s, name


def _calls_per_s(call: Callable[[], object], seconds: float) -> float:
    """How often a call that only launches work can be made, over a time."""
    with torch.inference_mode():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        calls, started = 0, time.perf_counter()
        while time.perf_counter() < started + seconds:
            call()
            calls += 1
            if calls % 16 == 0:  # or the queue of launches grows without bound
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        return calls / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
