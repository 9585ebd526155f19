"""A network that strangers trained: the terrain model of PyPI's adaptive-terrain-diffusion, an ONNX file."""

from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

CLASSES = 100  # difficulties 1..100
SIGMA_MAX = 80.0
NORM_OF = {"in_layers.2": "in_layers.0", "out_layers.3": "out_layers.0", "qkv": "norm", "2": "0"}


def onnx_file() -> Path:
    file = resources.files("terrain_diffusion") / "weights" / "terrain_consistency_unet_difficulty100.onnx"
    return Path(str(file))


def state_dict() -> dict[str, Tensor]:
    """Its weights under the names of OpenAI's consistency_models, which it was trained with.

    The affine parts of the norms have lost their names; each comes before the convolution that follows the norm. The
    label, a number, goes through an MLP: tabulated, it is an embedding of 100 classes.
    """
    graph = onnx.load(str(onnx_file())).graph
    weights = {each.name: torch.from_numpy(np.array(numpy_helper.to_array(each))) for each in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def then(node: onnx.NodeProto, kind: str) -> onnx.NodeProto:
        return next(user for user in users[node.output[0]] if user.op_type == kind)

    def constant(node: onnx.NodeProto) -> Tensor:
        return next(weights[name] for name in node.input if name in weights and name not in made_by).flatten()

    state = {key.removeprefix("network."): value for key, value in weights.items() if key.startswith("network.")}
    norm: tuple[Tensor, Tensor] | None = None
    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            scaled = then(then(node, "Reshape"), "Mul")
            norm = constant(scaled), constant(then(scaled, "Add"))
        elif node.op_type == "Conv" and norm is not None:
            place = node.input[1].removeprefix("network.").removesuffix(".weight")
            for suffix, ours in NORM_OF.items():
                if place.endswith(f".{suffix}"):
                    stem = place.removesuffix(suffix)
                    state[f"{stem}{ours}.weight"], state[f"{stem}{ours}.bias"] = norm
                    norm = None
                    break
    difficulty = torch.arange(CLASSES)[:, None] / (CLASSES - 1)
    first = torch.nn.functional.silu(difficulty @ state.pop("label_emb.0.weight").T + state.pop("label_emb.0.bias"))
    state["label_emb.weight"] = first @ state.pop("label_emb.2.weight").T + state.pop("label_emb.2.bias")
    return state


def denoised(x: npt.NDArray[np.float32], sigma: float, labels: list[int]) -> npt.NDArray[np.float32]:
    """Run the ONNX file: x [N, 1, 128, 128] of standard deviation about sigma, labels 0..99."""
    session = onnxruntime.InferenceSession(str(onnx_file()), providers=["CPUExecutionProvider"])
    feeds = {"noisy": x, "sigma": np.full(len(x), sigma, np.float32), "difficulty": np.float32(labels) / (CLASSES - 1)}
    out: npt.NDArray[np.float32] = session.run(["denoised"], feeds)[0]
    return out
