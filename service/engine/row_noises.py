"""Which noise each row draws: that of its seed and index, or for a mix, one between those of two seeds."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tminus.model.rng import arc_weights, image_noise, row_noise, split_seed
from tminus.service.spec import SampleSpec


def first_noise(spec: SampleSpec, shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw x_T of a job's images, [n, *shape]."""
    indices = range(spec.index, spec.index + spec.n)
    noise = image_noise(spec.seed, indices, 0, shape, device)
    if spec.to_seed is None or spec.mix is None:
        return noise
    here, there = arc_weights(spec.mix)
    return here * noise + there * image_noise(spec.to_seed, indices, 0, shape, device)


class RowNoises:
    """The seeds and indices of rows, by slot."""

    def __init__(self, max_rows: int, shape: Sequence[int], device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._seed_words = torch.zeros(max_rows, 2, dtype=torch.int64, device=device)
        self._index = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._mixed = np.zeros(max_rows, bool)  # on the host: whether the row's noise is a mix
        # Of mixes only; made when the first such row comes.
        self._on_device: tuple[Tensor, Tensor, Tensor] | None = None  # whether it is one, the other seed, the weights

    def put(self, rows: Sequence[int], spec: SampleSpec) -> None:
        """Write one job's rows."""
        at = torch.tensor(rows, device=self._device)
        self._seed_words[at] = torch.tensor(split_seed(spec.seed), device=self._device)
        self._index[at] = torch.tensor(range(spec.index, spec.index + spec.n), device=self._device)
        self._mixed[list(rows)] = spec.to_seed is not None
        if spec.to_seed is not None and self._on_device is None:
            words = torch.zeros_like(self._seed_words)
            self._on_device = torch.zeros_like(self._index, dtype=torch.bool), words, words.to(torch.float32)
        if self._on_device is not None:
            is_mix, other_words, weights = self._on_device
            is_mix[at] = spec.to_seed is not None
            if spec.to_seed is not None and spec.mix is not None:
                other_words[at] = torch.tensor(split_seed(spec.to_seed), device=self._device)
                weights[at] = torch.tensor(arc_weights(spec.mix), device=self._device)

    def draw(self, slots: np.typing.NDArray[np.int64], rows: Tensor, draws: Tensor) -> Tensor:
        """Draw `row_noise` of rows, [B, *shape]; slots are the same rows on the host."""
        noise = row_noise(self._seed_words[rows], self._index[rows], draws, self._shape)
        if self._on_device is None or not self._mixed[slots].any():
            return noise
        is_mix, other_words, weights = (each[rows] for each in self._on_device)
        here, there = weights.reshape(-1, 2, *([1] * len(self._shape))).unbind(1)
        other = row_noise(other_words, self._index[rows], draws, self._shape)
        return torch.where(is_mix.reshape(here.shape), here * noise + there * other, noise)
