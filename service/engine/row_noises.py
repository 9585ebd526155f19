"""Which noise each row draws: that of its seed and index, or for a mix, one between those of two seeds."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
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
        self._of_mixes: tuple[Tensor, Tensor] | None = None  # other seeds, weights; made for the first such row

    def put(self, at: Tensor, rows: Sequence[int], spec: SampleSpec) -> None:
        """Write one job's rows; `at` are the same on the device."""
        self._seed_words[at] = torch.tensor(split_seed(spec.seed), device=self._device)
        self._index[at] = torch.tensor(range(spec.index, spec.index + spec.n), device=self._device)
        self._mixed[list(rows)] = spec.to_seed is not None
        if spec.to_seed is None or spec.mix is None:
            return
        if self._of_mixes is None:
            self._of_mixes = torch.zeros_like(self._seed_words), torch.zeros_like(self._seed_words, dtype=torch.float32)
        other_words, weights = self._of_mixes
        other_words[at] = torch.tensor(split_seed(spec.to_seed), device=self._device)
        weights[at] = torch.tensor(arc_weights(spec.mix), device=self._device)

    def mixes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where among these rows those are whose noise is a mix."""
        return np.flatnonzero(self._mixed[rows]) if self._of_mixes is not None else np.zeros(0, np.int64)

    def draw(self, rows: Tensor, draws: Tensor, mixes: Tensor) -> Tensor:
        """Draw `row_noise` of rows, [B, *shape]; mixes, int64 [<= B]: see `mixes`."""
        noise = row_noise(self._seed_words[rows], self._index[rows], draws, self._shape)
        if self._of_mixes is None or not len(mixes):
            return noise
        at = rows[mixes]
        other_words, weights = (each[at] for each in self._of_mixes)
        here, there = weights.reshape(-1, 2, *([1] * len(self._shape))).unbind(1)
        other = row_noise(other_words, self._index[at], draws[mixes], self._shape)
        return noise.index_copy(0, mixes, here * noise[mixes] + there * other)
