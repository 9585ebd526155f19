"""What the rows of a job start from: noise, a picture under noise, or a snapshot; checked before it is used."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tminus.model.pixels import to_model_range
from tminus.model.samplers import Plan
from tminus.service.engine.row_noises import first_noise
from tminus.service.spec import Inputs, SampleSpec, Snapshot


def check_inputs(inputs: Inputs | None, spec: SampleSpec, shape: Sequence[int]) -> None:
    """Raise ValueError unless image and mask are those that the spec names, in the size of shape [H, W, C]."""
    hashes = (inputs.image_sha256, inputs.mask_sha256) if inputs is not None else (None, None)
    if hashes != (spec.image_sha256, spec.mask_sha256):
        raise ValueError("the image and mask are not those of the spec")
    if inputs is not None and inputs.image.shape != tuple(shape):
        raise ValueError(f"an image must be {tuple(shape)}, got {inputs.image.shape}")
    if inputs is not None and inputs.mask is not None and inputs.mask.shape != tuple(shape[:2]):
        raise ValueError(f"a mask must be {tuple(shape[:2])}, got {inputs.mask.shape}")


def initial_latents(
    spec: SampleSpec,
    plan: Plan,
    origin: Tensor | None,
    shape: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Make the first x [n, *shape]: x_T, or with strength x_t of the image, with x_T as eps (Meng et al. 2022).

    origin: the image as the network sees it [*shape], where it is one of pixels uint8.
    """
    eps = first_noise(spec, shape, device)
    if spec.strength is None:
        return eps
    assert origin is not None
    return plan.q_sample((to_model_range(origin) if origin.dtype == torch.uint8 else origin)[None], eps)


def latents_of(
    snapshot: Snapshot, n: int, num_registers: int, shape: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Take x and x0_previous [n, *shape], and registers [n, R, *shape], from a snapshot.

    Raises ValueError for another shape or type.
    """
    tensors = []
    for name, expected in (("x", (n,)), ("x0_previous", (n,)), ("registers", (n, num_registers))):
        values = getattr(snapshot, name)
        if values.shape != (*expected, *shape) or values.dtype != np.float32:
            wanted = f"float32 {(*expected, *shape)}"
            raise ValueError(f"a snapshot's {name} must be {wanted}, got {values.dtype} {values.shape}")
        tensors.append(torch.tensor(values, device=device))
    x, x0_previous, registers = tensors
    return x, x0_previous, registers
