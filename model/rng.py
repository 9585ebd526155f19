"""Noise as a pure function of (seed, image index, draw), using Philox4x32-10 and Box-Muller.

The generator is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and has no state. The
noise of one image does not depend on other images or on earlier draws. The random integers are the same on every
device.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MAX_SEED = 2**64 - 1
MAX_INDEX = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run Philox4x32-10, which turns four counter words and two key words into four random words.

    Words are int64 tensors with values below 2^32 and at least one dimension. They are broadcast against each other.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    even, odd = _rounds(torch.stack((c0, c2), -2), torch.stack((c1, c3), -2), torch.stack(tuple(key), -2))
    return even.select(-2, 0), odd.select(-2, 0), even.select(-2, 1), odd.select(-2, 1)


def _rounds(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Run the rounds of Philox on words (c0, c2) and (c1, c3): each [..., 2, N], key [..., 2, 1 or N].

    For small images, most of the time goes into kernel launches, so both pairs of words share the same operations.
    int64 products are exact modulo 2^64. The upper bits of a word are masked off once per round, before they can affect
    a result.
    """
    multipliers, key_steps = _constants(even.device)
    for round_key in (key + key_steps.reshape(_ROUNDS, *([1] * (key.ndim - 2)), 2, 1)).unbind(0):
        product = (even * multipliers).flip(-2)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(WORD)
        odd = product
    return even, odd & WORD


@lru_cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    # Cached, because creating a tensor from Python numbers makes the CPU wait for the GPU.
    key_steps = [[r * step & WORD for step in _KEY_STEPS] for r in range(_ROUNDS)]
    return torch.tensor(_MULTIPLIERS, device=device)[:, None], torch.tensor(key_steps, device=device)


def row_noise(seed_words: Tensor, index: Tensor, draw: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw standard normals [B, *shape] in float32, on the arguments' device.

    seed_words [B, 2] int64: the seeds, see `split_seed`.
    index [B] int64: the index of each image in its request.
    draw [B] int64: 0 for x_T, k + 1 for the noise z of step k.
    """
    size, rows = math.prod(shape), len(index)
    blocks = (size + 3) // 4
    # The counter is (block, draw, index, 0). The block number counts groups of four values within an image.
    even = torch.empty((rows, 2, blocks), dtype=torch.int64, device=index.device)
    even[:, 0] = torch.arange(blocks, device=index.device)
    even[:, 1] = index[:, None]
    odd = torch.zeros((rows, 2, 1), dtype=torch.int64, device=index.device)
    odd[:, 0, 0] = draw
    radius_word, angle_word = _rounds(even, odd, seed_words[:, :, None])
    # 24 random bits plus one half, scaled to (0, 1] in float32. The logarithm is finite, and |z| < 5.9.
    radius = (radius_word >> 8).to(torch.float32).add_(0.5).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = (angle_word >> 8).to(torch.float32).add_(0.5).mul_(2 * math.pi * 2.0**-24)
    normals = torch.stack((angle.cos().mul_(radius), angle.sin().mul_(radius)), dim=2)  # [B, 2, 2, blocks]
    return normals.flatten(1)[:, :size].reshape(-1, *shape)


def split_seed(seed: int) -> tuple[int, int]:
    """Split a 64-bit seed into the low and the high word of a key."""
    return seed & WORD, seed >> 32


def arc_weights(mix: float) -> tuple[float, float]:
    """Return weights (a, b) that mix two independent standard normals into another, a z0 + b z1.

    The result is exactly z0 for mix = 0 and exactly z1 for mix = 1. The weights are the cosine and sine of mix * pi /
    2. This is close to the spherical interpolation of Song et al. 2021 (DDIM, D.5), because independent normals in many
    dimensions are almost orthogonal.
    """
    if mix == 1:
        return 0.0, 1.0
    return math.cos(mix * math.pi / 2), math.sin(mix * math.pi / 2)


def image_noise(seed: int, indices: Sequence[int], draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw `row_noise` for images that share a seed and a draw number: [len(indices), *shape]."""
    index = torch.tensor(indices, device=device)
    words = torch.tensor(split_seed(seed), device=device).expand(len(indices), 2)
    return row_noise(words, index, torch.full_like(index, draw), shape)
