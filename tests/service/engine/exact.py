"""What an executor must give: what the network gives, and the same bits for a place in any batch."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint
from tminus.service.engine import openvino_executor
from tminus.service.engine.autotune import example_inputs
from tminus.service.engine.executors import Executor

CPU = torch.device("cpu")
SIZES = ((1,), (1, 2), (1, 2, 4))
Inputs = tuple[Tensor, Tensor, Tensor | None]
needs_openvino = pytest.mark.skipif(not openvino_executor.available(), reason="openvino, an extra, is not installed")


def able_to_bfloat16() -> bool:
    return openvino_executor.available() and "bfloat16" in openvino_executor.precisions()


needs_bfloat16 = pytest.mark.skipif(not able_to_bfloat16(), reason="this processor has no bfloat16 instructions")

MODELS: dict[str, dict[str, object]] = {
    "tiny": {},
    "unconditional": {"classes": False},
    "colour": {"in_channels": 3, "out_channels": 3},
    "wide": {"sample_size": (4, 10)},
    "learned variance": {"out_channels": 2},
    "learned variance in colour": {"in_channels": 3, "out_channels": 6, "classes": False},
    "NCSN++": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64),
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "norm_num_groups": None,
        "time_embedding_type": "fourier",
    },
}


def bare(checkpoint: Checkpoint, inputs: Inputs) -> Tensor:
    """The network itself, in float32, as it was loaded."""
    with torch.inference_mode():
        out: Tensor = checkpoint.net(*inputs)
    return out


def rows_of(inputs: Inputs, rows: Sequence[int]) -> Inputs:
    at = torch.tensor(rows)
    x, t, labels = inputs
    return x[at], t[at], labels[at] if labels is not None else None


def assert_exact(executor: Executor, checkpoint: Checkpoint) -> None:
    """Each place alone, at any position, beside any neighbours, in a batch of any size: the same bits."""
    inputs = example_inputs(checkpoint, CPU, 13)
    alone = [executor(*rows_of(inputs, [row])) for row in range(13)]
    assert all(bool(out.isfinite().all()) for out in alone)
    generator = torch.Generator().manual_seed(1)
    for size in (2, 3, 4, 5, 7, 8, 13, 13, 13):
        rows = torch.randperm(13, generator=generator)[:size].tolist()
        out = executor(*rows_of(inputs, rows))
        assert len(out) == size
        for position, row in enumerate(rows):
            assert out[position].equal(alone[row][0]), f"row {row} at {position} of {size}"
    # The wildest neighbours there are.
    x, t, labels = rows_of(inputs, [3] * 6)
    x[1:] = torch.tensor([1e30, -1e30, float("nan"), float("inf"), 0.0]).reshape(5, 1, 1, 1)
    out = executor(x, t, labels)
    assert out[0].equal(alone[3][0])
