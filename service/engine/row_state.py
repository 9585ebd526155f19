"""Row state on the device other than x and x_0: noise seeds, known values, registers, and the lines of plans.

This module also makes a job's first x from noise, an image or a snapshot, and checks inputs and snapshots.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tminus.model.noise import NoiseConfig
from tminus.model.pixels import to_model_range
from tminus.model.rng import arc_weights, image_noise, row_noise, split_seed
from tminus.model.samplers import NUM_COEFFICIENTS, Plan, combine, compile_plan, keep_known, table_plan
from tminus.model.solvers import MAX_REGISTERS, NUM_INPUTS
from tminus.service.engine.devices import row_slots
from tminus.service.model_info import ModelInfo
from tminus.service.spec import Inputs, SampleSpec, Snapshot


def first_noise(spec: SampleSpec, shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw x_T for a job's rows, [n, *shape]."""
    indices = range(spec.index, spec.index + spec.n)
    noise = image_noise(spec.seed, indices, 0, shape, device)
    if spec.to_seed is None or spec.mix is None:
        return noise
    here, there = arc_weights(spec.mix)
    return here * noise + there * image_noise(spec.to_seed, indices, 0, shape, device)


class RowNoises:
    """Holds the seeds and image indices of rows, and draws their noise."""

    def __init__(self, max_rows: int, shape: Sequence[int], device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._seed_words = torch.zeros(max_rows, 2, dtype=torch.int64, device=device)
        self._index = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._mixed = np.zeros(max_rows, bool)  # on the host: True if the row mixes the noise of two seeds
        self._of_mixes: tuple[Tensor, Tensor] | None = None  # (second seeds, weights), from the first mixed row on

    def put(self, at: Tensor, rows: Sequence[int], spec: SampleSpec) -> None:
        """Store the seeds of one job's rows. at: the rows' slots, as a tensor on the device."""
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
        """Return the positions in `rows` of those rows that mix the noise of two seeds."""
        return np.flatnonzero(self._mixed[rows]) if self._of_mixes is not None else np.zeros(0, np.int64)

    def draw(self, rows: Tensor, draws: Tensor, mixes: Tensor) -> Tensor:
        """Draw noise for rows, [B, *shape]. mixes: the result of `mixes` for the same rows, int64 [<= B]."""
        noise = row_noise(self._seed_words[rows], self._index[rows], draws, self._shape)
        if self._of_mixes is None or not len(mixes):
            return noise
        at = rows[mixes]
        other_words, weights = (each[at] for each in self._of_mixes)
        here, there = weights.reshape(-1, 2, *([1] * len(self._shape))).unbind(1)
        other = row_noise(other_words, self._index[at], draws[mixes], self._shape)
        return noise.index_copy(0, mixes, here * noise[mixes] + there * other)


def check_inputs(inputs: Inputs | None, spec: SampleSpec, shape: Sequence[int]) -> None:
    """Raise ValueError unless image and mask match the spec's hashes and the shape [H, W, C]."""
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
    """Make the first x [n, *shape]. With a strength, this is x_t of the image with eps = x_T (Meng et al. 2022).

    Without a strength, it is x_T. origin: the image as uint8 pixels, or as latents, [*shape].
    """
    eps = first_noise(spec, shape, device)
    if spec.strength is None:
        return eps
    assert origin is not None
    return plan.q_sample((to_model_range(origin) if origin.dtype == torch.uint8 else origin)[None], eps)


def latents_of(
    snapshot: Snapshot, n: int, num_registers: int, shape: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a snapshot's x and x0_previous, both [n, *shape], and its registers [n, R, *shape].

    Raises ValueError if a shape or a dtype is wrong.
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


class KnownValues:
    """Owns x_0 and masks of rows. Created for the first mask, so servers without masks need no memory for it."""

    def __init__(self, max_rows: int, shape: Sequence[int], device: torch.device, latent: bool) -> None:
        """shape: [C, H, W] of one row."""
        channels, height, width = shape
        self._latent = latent
        # Pixels are stored as uint8, which is exact and takes a quarter of the memory of float32.
        dtype: type[np.generic] = np.float32 if latent else np.uint8
        self._x_0 = row_slots(max_rows, channels, height, width, device=device, dtype=dtype)
        self._new = row_slots(max_rows, 1, height, width, device=device, dtype=np.bool_)

    def put(self, rows: Tensor, x_0: Tensor, mask: Tensor) -> None:
        """Store one job's x_0 [C, H, W] and its mask.

        For a pixel model, x_0 is uint8. A latent is regenerated if any of its pixels is masked.
        """
        height, width = x_0.shape[1:]
        squares = mask.reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
        self._x_0[rows] = x_0
        self._new[rows] = squares.any(3).any(1)

    def restore(self, x: Tensor, rows: Tensor, levels: Tensor, eps: Tensor) -> Tensor:
        """Return x [B, C, H, W] with the known values restored, at noise levels [B, 2] as in `Plan.known`."""
        x_0 = self._x_0[rows]
        return keep_known(x, self._new[rows], x_0 if self._latent else to_model_range(x_0), eps, levels)


class Registers:
    """Owns the registers: tensors that some samplers keep between passes. Created for the first row with registers."""

    def __init__(self, max_rows: int, shape: Sequence[int], device: torch.device) -> None:
        """shape: [C, H, W] of one row."""
        self._values = torch.zeros(max_rows, 0, *shape, device=device)

    def put(self, rows: Tensor, values: Tensor) -> None:
        """Set the registers of one job's rows. values: [n, R, C, H, W]."""
        missing = values.shape[1] - self._values.shape[1]
        if missing > 0:
            old, count = self._values, self._values.shape[1]
            self._values = row_slots(len(old), count + missing, *old.shape[2:], device=old.device)
            self._values[:, :count] = old
        self._values[rows] = 0  # clear the values of an earlier row, because 0 times infinity is NaN
        self._values[rows, : values.shape[1]] = values

    def read(self, rows: Tensor, count: int) -> Tensor:
        """Return the first `count` registers of each row, [n, count, C, H, W]."""
        return self._values[rows, :count]

    def combine(self, rows: Tensor, matrices: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Return the next x of rows [B], and store their registers.

        matrices: [B, 5, 8]. state: x, x0, x0_previous, z.
        """
        held = self._values[rows]
        count = held.shape[1]
        new = combine(matrices[:, : 1 + count, : len(state) + count], [*state, *held.unbind(1)])
        self._values[rows] = new[:, 1:]
        return new[:, 0]


MAX_PLANS = 64  # number of cached plans; a plan of 1000 steps takes 0.1 MB, or 0.3 MB with registers
FIRST_LINES = 1024  # initial capacity of the store, which at least doubles when full


class PlanCompiler:
    """Compiles samplers to plans. Recent plans are cached, because most specs use the same few samplers."""

    def __init__(self, model: ModelInfo, noise: NoiseConfig) -> None:
        self._model, self._noise, self._schedule = model, noise, noise.schedule()
        self._kept = lru_cache(MAX_PLANS)(self._compile)

    def plan(self, spec: SampleSpec) -> Plan:
        """Compile a spec's sampler. Raises ValueError if the model's noise schedule does not allow the spec."""
        return self._kept(spec.sampler, spec.steps, spec.start, spec.table, spec.eta, spec.clip, spec.timestep_spacing)

    def _compile(
        self, sampler: str, steps: int, start: int, table: str | None, eta: float, clip: bool, spacing: str
    ) -> Plan:
        noise, schedule = self._noise, self._schedule
        if table is not None:
            return table_plan(noise, schedule, self._model.table(table), clip=clip, start=start)
        fractional = self._model.fractional
        return compile_plan(
            noise, schedule, sampler, steps, eta=eta, clip=clip, spacing=spacing, start=start, fractional=fractional
        )


class PlanStore:
    """Owns the plans of all jobs. A plan has one line per pass, and is freed when its job ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.timesteps = torch.zeros(FIRST_LINES, device=device)  # the network's input t
        self.scales: Tensor | None = None  # factors on the network's input; None until a plan needs them
        self.lines = torch.zeros(FIRST_LINES, NUM_COEFFICIENTS, device=device)
        self.known = torch.zeros(FIRST_LINES, 2, device=device)  # see `Plan.known`
        self.matrices: Tensor | None = None  # [lines, 5, 8]; None until a plan uses registers
        self._free = [(0, FIRST_LINES)]  # free ranges (start, length), ascending and never adjacent

    def put(self, plan: Plan) -> int:
        """Store a plan, and return its first line."""
        start = self._take(len(plan))
        try:
            self._write(plan, slice(start, start + len(plan)))
        except BaseException:
            self.free(start, len(plan))
            raise
        return start

    def _write(self, plan: Plan, at: slice) -> None:
        self.timesteps[at] = (plan.timesteps if plan.inputs is None else plan.inputs[:, 1]).to(torch.float32)
        if plan.inputs is not None and self.scales is None:
            self.scales = torch.ones(len(self.lines), device=self._device)
        if self.scales is not None:
            self.scales[at] = 1 if plan.inputs is None else plan.inputs[:, 0].to(self.scales)
        self.lines[at] = plan.lines.to(torch.float32)
        self.known[at] = plan.known.to(torch.float32)
        if plan.matrices is not None:
            if self.matrices is None:
                self.matrices = torch.zeros(len(self.lines), 1 + MAX_REGISTERS, NUM_INPUTS, device=self._device)
            self.matrices[at] = 0
            rows, columns = plan.matrices.shape[1:]
            self.matrices[at, :rows, :columns] = plan.matrices.to(device=self._device, dtype=torch.float32)

    def free(self, start: int, length: int) -> None:
        """Mark a range of lines as free, and merge it with adjacent free ranges."""
        stretches: list[tuple[int, int]] = []
        for begin, size in sorted([*self._free, (start, length)]):
            if stretches and sum(stretches[-1]) == begin:
                stretches[-1] = (stretches[-1][0], stretches[-1][1] + size)
            else:
                stretches.append((begin, size))
        self._free = stretches

    def _take(self, length: int) -> int:
        """Take lines from the first free range that is long enough. Grow the store if there is none."""
        for k, (start, size) in enumerate(self._free):
            if size >= length:
                self._free[k : k + 1] = [(start + length, size - length)] if size > length else []
                return start
        had = len(self.lines)
        more = max(had, length)
        for name in ("timesteps", "scales", "lines", "known", "matrices"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])]))
        self.free(had, more)
        return self._take(length)
