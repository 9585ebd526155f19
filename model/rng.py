"""Noise as a pure function of (seed, image index, draw): Philox4x32-10 counters, then Box-Muller.

Counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so there is no generator state: the
noise of a row depends on nothing that ran before it or runs beside it, and is the same integers on every device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MAX_SEED = 2**64 - 1
MAX_INDEX = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words -> four random words.

    Words are int64 tensors of values below 2^32, of shapes that broadcast. (64-bit products wrap to the right bits.)
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & WORD, (k1 + _KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def row_noise(seed_words: Tensor, index: Tensor, draw: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw standard normals [B, *shape] in float32, on the device of the arguments.

    seed_words [B, 2] int64, see `split_seed`; index [B] int64, the image's place in its request; draw [B] int64: 0 is
    x_T, k + 1 the z of step k.
    """
    size = math.prod(shape)
    block = torch.arange((size + 3) // 4, device=index.device)[None, :]
    zero = torch.zeros_like(index)[:, None]
    words = philox(
        (block, draw[:, None], index[:, None], zero),
        (seed_words[:, 0:1], seed_words[:, 1:2]),
    )
    # 24 bits make a float32 in (0, 1) that is never 0, so its logarithm is finite: |z| < 5.9.
    u = [((word >> 8).to(torch.float32) + 0.5) * 2.0**-24 for word in words]
    normals = []
    for radius_u, angle_u in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = torch.sqrt(-2 * torch.log(radius_u)), 2 * math.pi * angle_u
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.cat(normals, dim=1)[:, :size].reshape(-1, *shape)


def split_seed(seed: int) -> tuple[int, int]:
    """Split a 64-bit seed into the two words of a key."""
    return seed & WORD, seed >> 32


def image_noise(seed: int, indices: Sequence[int], draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """`row_noise` for images of one seed that stand at the same draw, [len(indices), *shape]."""
    index = torch.tensor(indices, device=device)
    words = torch.tensor(split_seed(seed), device=device).expand(len(indices), 2)
    return row_noise(words, index, torch.full_like(index, draw), shape)
