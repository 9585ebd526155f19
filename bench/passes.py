"""Passes of a network: tminus' executor beside diffusers' U-Net, in turns. A process of bench/gpu.py's.

    python -m bench.passes --checkpoint FOLDER [--device cpu] [--executor eager] [--precision float32] [--rows 1,4]

The executor is eager or compile. diffusers runs eagerly, in both memory layouts, or compiled where ours is.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from bench.bare import DTYPES, flops_per_row, make_peaks
from bench.measures import Measure, rates_in_turns, tell
from bench.peers.denoiser import load_autoencoder
from bench.servers import CHECKPOINT, options_of
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.service.engine.autotune import example_inputs
from tminus.service.engine.devices import choose_device, multiplying
from tminus.service.engine.executors import CompiledExecutor, EagerExecutor, Executor
from tminus.service.engine.pictures import LatentPictures

Inputs = tuple[Tensor, Tensor, Tensor | None]
Pass = Callable[[Inputs], object]


def main() -> None:
    """Measure and print."""
    args = options_of(
        __doc__, checkpoint=CHECKPOINT, device="cpu", executor="eager", precision="float32", rows="1,4", seconds=2.0
    )
    device = choose_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    flops = flops_per_row(checkpoint)
    tell(Measure("a pass of one row", "the network", flops / 1e9, "GFLOP"))
    rows = [int(count) for count in args.rows.split(",")]
    before = reserved_bytes(device)
    executor = build(checkpoint, device, args.executor, args.precision, rows)
    ours = f"tminus {executor.name}"
    if args.executor == "compile" and device.type == "cuda":
        taken = (reserved_bytes(device) - before) / 2**20
        tell(Measure("memory to build all sizes", ours, taken, "MiB", args.precision))
    passes: dict[str, Pass] = {ours: lambda inputs: executor(*inputs)}
    passes |= peers(args.checkpoint, device, args.precision, compiled=args.executor == "compile")
    peaks, flops_of = make_peaks(device, args.precision)
    best: dict[str, float] = {}
    for count in rows:
        inputs = example_inputs(checkpoint, device, count)
        leave_out_what_does_not_fit(passes, inputs, device, args.precision)
        rates = rates_in_turns({of: partial(call, inputs) for of, call in passes.items()} | peaks, device, args.seconds)
        best = {of: max(best.get(of, 0.0), flops_of[of] * rates.pop(of)) for of in peaks}
        tell_rates(rates, ours, args.precision, count)
        if ours in rates:
            share = 100 * count * rates[ours] * flops / max(best.values())
            tell(Measure("share of the faster peak", ours, share, "%", args.precision, count))
    tell(*(Measure("peak", of, each / 1e12, "TFLOP/s", args.precision) for of, each in best.items()))
    if checkpoint.autoencoder is not None and args.executor != "compile" and args.precision == "float32":
        decode(checkpoint, args.checkpoint, device, args.seconds)


def build(checkpoint: Checkpoint, device: torch.device, name: str, precision: str, rows: Sequence[int]) -> Executor:
    """Build an executor by its name."""
    if name == "compile":
        return CompiledExecutor(checkpoint.net, device, checkpoint.row_shape, precision=precision, sizes=rows)
    return EagerExecutor(checkpoint.net, device, precision=precision)


def peers(checkpoint: Path, device: torch.device, precision: str, *, compiled: bool) -> Mapping[str, Pass]:
    """Make diffusers' passes in a precision. Only the eager ones differ by layout: a compiler chooses its own."""
    dtype = DTYPES[precision]
    loaded: Any = UNet2DModel.from_pretrained(checkpoint, subfolder="unet", torch_dtype=dtype)  # type: ignore[no-untyped-call]
    loaded = loaded.eval().to(device)

    def run(net: Any, inputs: Inputs) -> object:
        x, t, labels = inputs
        with torch.inference_mode(), multiplying(device, tf32=precision == "tf32"):
            return net(x.to(dtype), t, class_labels=labels, return_dict=False)[0]

    if compiled:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        return {"diffusers compile": partial(run, torch.compile(loaded, mode=mode))}
    nets = {"contiguous": loaded, "channels last": copy.deepcopy(loaded).to(memory_format=torch.channels_last)}
    return {f"diffusers eager, {name}": partial(run, net) for name, net in nets.items()}


def leave_out_what_does_not_fit(passes: dict[str, Pass], inputs: Inputs, device: torch.device, precision: str) -> None:
    """Tell what a pass of each takes, and take out of `passes` those that a GPU has no memory for."""
    rows = len(inputs[0])
    for name, call in list(passes.items()):
        try:
            taken = pass_bytes(partial(call, inputs), device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            tell(f"{name}, {precision}: a pass of {rows} rows does not fit on the card")
            del passes[name]
            continue
        if taken is not None and "compile" not in name:  # the graphs of compiled ones have memory of their own
            tell(Measure("memory of a pass", name, taken / 2**20, "MiB", precision, rows))


def tell_rates(rates: Mapping[str, float], ours: str, precision: str, rows: int) -> None:
    """Tell passes a second as row-steps, and how many times as many ours makes."""
    for name, rate in rates.items():
        tell(Measure("passes", name, rows * rate, "row-steps/s", precision, rows))
    others = [rate for name, rate in rates.items() if name != ours]
    if ours in rates and others:
        tell(Measure("passes, ratio", f"{ours} / diffusers", rates[ours] / max(others), "", precision, rows))


def pass_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return what a pass takes on a GPU beside what lies there; None on a CPU, where nobody tells that."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def reserved_bytes(device: torch.device) -> int:
    """Return how much of a GPU's memory torch has taken."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def decode(checkpoint: Checkpoint, folder: Path, device: torch.device, seconds: float) -> None:
    """Time the decoder: ours makes one image at a time beside the ticks, on a CPU in one thread."""
    latents = torch.randn(1, *checkpoint.row_shape, device=device)
    autoencoder = load_autoencoder(folder).to(device)

    @torch.inference_mode()
    def theirs() -> object:
        with multiplying(device, tf32=False):
            return autoencoder.decode(latents, return_dict=False)[0]

    rates = rates_in_turns({"diffusers eager": theirs}, device, seconds)
    rates["tminus"] = 1 / LatentPictures(checkpoint, device, None).seconds_per_image()[0]
    tell(*(Measure("decoding", name, rate, "images/s", "float32", 1) for name, rate in rates.items()))


if __name__ == "__main__":
    main()
