"""Passes of a network: tminus' executor beside diffusers' U-Net, in turns. A process of its own, which prints measures.

    python -m bench.passes --checkpoint FOLDER [--device cpu] [--executor auto] [--precision float32] [--rows 1,4]

auto is the executor that the server would choose; eager and compile are built as they are. diffusers runs eagerly, in
both memory layouts, or compiled where ours is. With --float32-too 1 it also runs in float32 beside ours in bfloat16.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel, VQModel
from torch import Tensor

from bench.bare import DTYPES, flops_per_row, make_peaks
from bench.measures import Measure, rates_in_turns, tell
from bench.servers import CHECKPOINT, options_of
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.service.engine.autotune import Wish, choose_executor, default_cache, example_inputs
from tminus.service.engine.devices import choose_device, multiplying
from tminus.service.engine.executors import CompiledExecutor, EagerExecutor, Executor
from tminus.service.engine.loading import LARGEST_BATCH
from tminus.service.engine.pictures import LatentPictures

PEAK = "peak"
Inputs = tuple[Tensor, Tensor, Tensor | None]
Pass = Callable[[Inputs], object]
Contender = tuple[str, str]  # its name and precision


def main() -> None:
    """Measure and print."""
    args = options_of(
        __doc__, checkpoint=CHECKPOINT, device="cpu", executor="auto", precision="float32", rows="1,4", seconds=2.0,
        float32_too=0,
    )  # fmt: skip
    device = choose_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    flops = flops_per_row(checkpoint)
    tell(Measure("a pass of one row", "the network", flops / 1e9, "GFLOP"))
    rows = [int(count) for count in args.rows.split(",")]
    before = reserved_bytes(device)
    executor = build(checkpoint, device, args.executor, args.precision, rows)
    ours = (f"tminus {executor.name}", args.precision)
    if args.executor == "compile" and device.type == "cuda":
        tell(Measure("memory to build all sizes", ours[0], (reserved_bytes(device) - before) / 2**20, "MiB", ours[1]))
    passes: dict[Contender, Pass] = {ours: lambda inputs: executor(*inputs)}
    for precision in dict.fromkeys([args.precision, *(["float32"] if args.float32_too else [])]):
        passes |= peers(args.checkpoint, device, precision, compiled=args.executor == "compile")
    peaks, flops_of = make_peaks(device, args.precision)
    best: dict[str, float] = {}
    for count in rows:
        inputs = example_inputs(checkpoint, device, count)
        leave_out_what_does_not_fit(passes, inputs, device)
        calls: dict[Contender, Callable[[], object]] = {of: partial(call, inputs) for of, call in passes.items()}
        rates = rates_in_turns(calls | {(of, PEAK): call for of, call in peaks.items()}, device, args.seconds)
        best = {of: max(best.get(of, 0.0), flops_of[of] * rates.pop((of, PEAK))) for of in peaks}
        tell_rates(rates, ours, count)
        if ours in rates:
            share = 100 * count * rates[ours] * flops / max(best.values())
            tell(Measure("share of the faster peak", ours[0], share, "%", args.precision, count))
    tell(*(Measure("peak", of, each / 1e12, "TFLOP/s", args.precision) for of, each in best.items()))
    if checkpoint.autoencoder is not None and args.executor != "compile" and args.precision == "float32":
        decode(checkpoint, args.checkpoint, device, args.seconds)


def build(checkpoint: Checkpoint, device: torch.device, name: str, precision: str, rows: Sequence[int]) -> Executor:
    """Build an executor by its name, or choose one as the server does."""
    if name == "compile":
        return CompiledExecutor(checkpoint.net, device, checkpoint.row_shape, precision=precision, sizes=rows)
    if name == "eager":
        return EagerExecutor(checkpoint.net, device, precision=precision)
    threads = torch.get_num_threads()
    wish = Wish(name, precision, exact=device.type == "cpu", max_batch=LARGEST_BATCH[device.type], threads=threads)
    executor = choose_executor(checkpoint, device, wish, default_cache())
    torch.set_num_threads(threads)  # OpenVINO's has left one, and diffusers is to have its own
    return executor


def peers(checkpoint: Path, device: torch.device, precision: str, *, compiled: bool) -> Mapping[Contender, Pass]:
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
        return {("diffusers compile", precision): partial(run, torch.compile(loaded, mode=mode))}
    nets = {"contiguous": loaded, "channels last": copy.deepcopy(loaded).to(memory_format=torch.channels_last)}
    return {(f"diffusers eager, {name}", precision): partial(run, net) for name, net in nets.items()}


def leave_out_what_does_not_fit(passes: dict[Contender, Pass], inputs: Inputs, device: torch.device) -> None:
    """Tell what a pass of each takes, and take out of `passes` those that a GPU has no memory for."""
    rows = len(inputs[0])
    for (name, precision), call in list(passes.items()):
        try:
            taken = pass_bytes(partial(call, inputs), device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            tell(f"{name}, {precision}: a pass of {rows} rows does not fit on the card")
            del passes[name, precision]
            continue
        if taken is not None and "compile" not in name:  # the graphs of compiled ones have memory of their own
            tell(Measure("memory of a pass", name, taken / 2**20, "MiB", precision, rows))


def tell_rates(rates: Mapping[Contender, float], ours: Contender, rows: int) -> None:
    """Tell passes a second as row-steps, and how many times as many ours makes."""
    precision = ours[1]
    for (name, of), rate in rates.items():
        if of == precision:
            tell(Measure("passes", name, rows * rate, "row-steps/s", precision, rows))
    if ours not in rates:
        return
    for theirs in dict.fromkeys((precision, "float32")):
        if others := [rate for (name, of), rate in rates.items() if (name, of) != ours and of == theirs]:
            compared = f"{ours[0]} / diffusers in {theirs}"
            tell(Measure("passes, ratio", compared, rates[ours] / max(others), "", precision, rows))


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
    vqvae: Any = VQModel.from_pretrained(folder, subfolder="vqvae")  # type: ignore[no-untyped-call]
    vqvae = vqvae.eval().to(device)

    @torch.inference_mode()
    def theirs() -> object:
        with multiplying(device, tf32=False):
            return vqvae.decode(latents, return_dict=False)[0]

    rates = rates_in_turns({"diffusers eager": theirs}, device, seconds)
    rates["tminus"] = 1 / LatentPictures(checkpoint, device, None).seconds_per_image()[0]
    tell(*(Measure("decoding", name, rate, "images/s", "float32", 1) for name, rate in rates.items()))


if __name__ == "__main__":
    main()
