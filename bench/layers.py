"""Where the time of a pass goes with OpenVINO on a CPU: by kind of layer, with the share of the peak.

    python -m bench.layers --checkpoint FOLDER [--precision float32] [--threads 1] [--decoder 1] [--passes 8]

--decoder 1 takes the autoencoder's decoder instead, which the server runs in float32 and one thread. Each layer counts
with the fastest of the passes, since other programs may run. The peak is the faster of a large matmul and a wide
convolution, by torch on as many threads.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.bare import find_peaks
from bench.servers import CHECKPOINT, options_of
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.files import CheckpointError
from tminus.service.engine.openvino_executor import PRECISION_HINTS, Graph, core, precisions
from tminus.service.engine.openvino_graph import convert, transpose_narrow

PEAK_S = 2.0
# OpenVINO's kinds of layers that only move numbers, and those that go over a map without multiplying matrices.
MOVES = {"Reorder": "changes of layout", "Transpose": "changes of layout", "Concatenation": "concatenation, enlarging"}
MOVES |= {"Interpolate": "concatenation, enlarging", "TopK": "the nearest code"}
ELEMENTWISE = "norms, activations, sums"


class Decoder(nn.Module):
    """The decoder as a module, which is what can be converted."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        if checkpoint.autoencoder is None:
            raise SystemExit(f"--decoder 1: {checkpoint.name} has no autoencoder")
        self.autoencoder = checkpoint.autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)


def main() -> None:
    """Measure, and print a table."""
    args = options_of(__doc__, checkpoint=CHECKPOINT, precision="float32", threads=1, decoder=0, passes=8)
    if args.precision not in precisions():
        raise SystemExit(f"--precision must be of {', '.join(precisions())} on this processor, got {args.precision!r}")
    torch.set_num_threads(args.threads)
    try:
        checkpoint = load_checkpoint(args.checkpoint)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error
    compiled = compile_network(checkpoint, args.precision, args.threads, decoder=bool(args.decoder))
    peak = max(find_peaks(args.precision, PEAK_S).values())
    print(table(fastest(compiled, args.passes), layers_of(compiled), peak))


def compile_network(checkpoint: Checkpoint, precision: str, threads: int, *, decoder: bool = False) -> Any:
    """Compile a pass of one row as the server does, with a clock for each layer."""
    import openvino  # after tminus, which keeps it from reporting over the network

    shape = (1, *checkpoint.row_shape)
    if decoder:
        model = convert(Decoder(checkpoint).eval(), torch.zeros(*shape), [openvino.PartialShape(list(shape))])
        transpose_narrow(model)
    else:
        graph = Graph(checkpoint.net, checkpoint.row_shape, checkpoint.noise.num_train_timesteps)
        model = graph.of_size(1, precision)
    config = {"INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision], "INFERENCE_NUM_THREADS": threads}
    return core().compile_model(model, "CPU", config | {"NUM_STREAMS": 1, "PERF_COUNT": True})


def fastest(compiled: Any, passes: int) -> dict[str, float]:
    """Return the milliseconds that each layer takes at best."""
    request = compiled.create_infer_request()
    generator = np.random.default_rng(0)
    for given in compiled.inputs:
        request.get_tensor(given).data[:] = generator.standard_normal(list(given.shape))
    best: dict[str, float] = defaultdict(lambda: math.inf)
    for _ in range(passes):
        request.infer()
        for layer in request.get_profiling_info():
            best[layer.node_name] = min(best[layer.node_name], layer.real_time.total_seconds() * 1e3)
    return best


def layers_of(compiled: Any) -> dict[str, tuple[str, float]]:
    """Tell each layer's kind and its FLOPs, 0 where it multiplies no matrices."""
    return {layer.get_friendly_name(): kind_of(layer) for layer in compiled.get_runtime_model().get_ordered_ops()}


def kind_of(layer: Any) -> tuple[str, float]:
    """Tell a layer's kind and its FLOPs."""
    kind, made_of = (layer.get_rt_info()[name].astype(str) for name in ("layerType", "originalLayersNames"))
    inputs = [list(each.get_shape()) for each in layer.input_values()]
    out = list(layer.output(0).get_shape()) if layer.get_output_size() else []
    if kind == "Convolution":
        side = inputs[1][-1]
        return f"{side}x{side} convolutions", 2 * math.prod(out) * math.prod(inputs[1][1:])
    if kind == "Deconvolution":
        return "transposed convolutions", 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if kind == "FullyConnected":
        return "linear layers", 2 * math.prod(out) * inputs[1][-1]
    if "scaled_dot_product" in made_of:  # of q, k transposed, v
        return "attention", 4 * math.prod(out) * inputs[1][-1]
    return MOVES.get(kind, ELEMENTWISE), 0.0


def table(times: Mapping[str, float], layers: Mapping[str, tuple[str, float]], peak: float) -> str:
    """Add up layers by kind, the longest first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, spent_ms in times.items():
        if name in layers:
            kind, flops = layers[name]
            sums[kind][0] += spent_ms
            sums[kind][1] += flops
    all_ms, all_flops = (sum(each[k] for each in sums.values()) for k in (0, 1))
    lines = [f"peak {peak / 1e9:.0f} GFLOP/s, a pass {all_ms:.1f} ms of {all_flops / 1e9:.1f} GFLOP", ""]
    lines += ["| layers | time | share of time | share of the peak |", "|---|---|---|---|"]
    for kind, (spent_ms, flops) in [*sorted(sums.items(), key=lambda each: -each[1][0]), ("all", (all_ms, all_flops))]:
        share = f"{100 * flops / spent_ms * 1e3 / peak:.0f} %" if flops else ""
        lines.append(f"| {kind} | {spent_ms:.2f} ms | {100 * spent_ms / all_ms:.1f} % | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
