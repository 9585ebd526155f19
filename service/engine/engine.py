"""The engine: row state on the device, and the ticks that update it.

A row is the state of one image. A tick is a forward pass over rows at mixed timesteps, followed by the update rule.
Callers pass specs and row ids, and get NumPy arrays, never tensors. The scheduler chooses the rows of each tick.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint
from tminus.model.guidance import guide, rescale
from tminus.model.samplers import denoise
from tminus.model.trajectory import PlanNumbers
from tminus.service.engine.devices import LaunchedTicks, copy_out, index_of, is_lost, row_slots, send, to_device
from tminus.service.engine.executors import Executor
from tminus.service.engine.fingerprint import make_model_info
from tminus.service.engine.pictures import LatentPictures, PixelPictures
from tminus.service.engine.row_state import (
    KnownValues,
    PlanCompiler,
    PlanStore,
    Registers,
    RowNoises,
    check_inputs,
    initial_latents,
    latents_of,
)
from tminus.service.preview import Show
from tminus.service.spec import Floats, Images, Inputs, Pixels, Point, SampleSpec, Snapshot
from tminus.service.work import Batch

FIRST_KNOWN_DRAW = 2**31  # number of the first draw for a row's known pixels; x_T and z use draws 0 to T
NONE = np.zeros(0, np.int64)


class Engine:
    """Implements `RowEngine` and owns the latents. A row's id is its slot: its index in the tensors on the device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        executor: Executor,
        device: torch.device,
        *,
        max_rows: int,
        max_jobs: int,
        exact: bool = True,
        bits: str | None = None,
        cache: Path | None = None,
    ) -> None:
        """Allocate slots for max_rows rows.

        bits: a hash of the executor's outputs, see `fingerprint`. cache: the folder for converted graphs.
        """
        kind = PixelPictures if checkpoint.autoencoder is None else LatentPictures
        self._pictures = kind(checkpoint, device, cache)
        self.autoencoder_bits = self._pictures.bits
        self.info = make_model_info(
            checkpoint, device, executor, exact=exact, bits=bits, autoencoder_bits=self.autoencoder_bits
        )
        self._device, self._max_jobs = device, max_jobs
        self._torch_threads = torch.get_num_threads()  # set by the executor
        self._forward = executor
        self._noise = checkpoint.noise
        self._compiler = PlanCompiler(self.info, checkpoint.noise)
        self._null_class = checkpoint.labels.null_class
        self._shape = checkpoint.row_shape

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # These tensors and arrays have one slot per row.
        self._x = row_slots(max_rows, *self._shape, device=device)
        self._x0 = row_slots(max_rows, *self._shape, device=device)
        self._v: Tensor | None = None  # the network's v for a learned variance; allocated by the first call of `point`
        self._noises = RowNoises(max_rows, self._shape, device)
        self._label = zeros(max_rows)
        self._guidance = zeros(max_rows, dtype=torch.float32)
        self._rescale = zeros(max_rows, dtype=torch.float32)
        self._first_line = zeros(max_rows)  # line of step 0 in `_plans`, even if an edit skips this step
        # On the host: how many ticks had been launched when the row was added.
        self._added_at = np.zeros(max_rows, np.int64)
        self._adds_noise = np.zeros(max_rows, bool)  # on the host: true if the row's sampler draws z
        self._masked = np.zeros(max_rows, bool)  # on the host: true if the row has a mask
        self._rescales = np.zeros(max_rows, bool)  # on the host: true if the row's guidance is rescaled
        self._known: KnownValues | None = None  # allocated for the first masked row
        self._num_registers = np.zeros(max_rows, np.int64)  # on the host: number of registers of the row's sampler
        self._registers: Registers | None = None  # allocated for the first row with registers
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._plans = PlanStore(device)
        self._plan_of: dict[int, tuple[int, int]] = {}  # first row of a job -> (first line, length) of its plan
        self._inputs: dict[int, Inputs] = {}  # row -> its image and mask; only for masked rows of a latent model
        # On a GPU, the host launches ticks ahead, and checks later whether the rows are finite.
        self._ticks = LaunchedTicks() if device.type == "cuda" else None
        self._finite = torch.ones(max_rows, dtype=torch.bool, device=device)

    @torch.inference_mode()
    def add(self, spec: SampleSpec, snapshot: Snapshot | None = None, inputs: Inputs | None = None) -> tuple[int, ...]:
        # Take slots last, so that a refused job takes none.
        plan = self._compiler.plan(spec)
        check_inputs(inputs, spec, (self.info.height_px, self.info.width_px, self.info.channels))
        origin = None
        if inputs is not None and (snapshot is None or inputs.mask is not None):
            origin = self._pictures.x_0(inputs)
        if snapshot is not None:
            x, x0, registers = latents_of(snapshot, spec.n, plan.num_registers, self._shape, self._device)
        else:
            x = initial_latents(spec, plan, origin, self._shape, self._device)
            x0, registers = torch.zeros_like(x), x.new_zeros(spec.n, plan.num_registers, *self._shape)
        assert len(self._free_rows) >= spec.n
        assert len(self._plan_of) < self._max_jobs
        if plan.num_registers and self._registers is None:
            self._registers = Registers(len(self._masked), self._shape, self._device)
        if spec.mask_sha256 is not None and self._known is None:
            self._known = KnownValues(len(self._masked), self._shape, self._device, self.info.latent is not None)
        rows, start = tuple(reversed(self._free_rows[-spec.n :])), self._plans.put(plan)
        try:
            self._fill(rows, spec, start, (x, x0, registers))
            if inputs is not None and inputs.mask is not None and origin is not None and self._known is not None:
                self._known.put(index_of(rows, self._device), origin, to_device(inputs.mask, self._device))
                if self.info.latent is not None:  # a latent model copies known pixels into the decoded image
                    self._inputs |= dict.fromkeys(rows, inputs)
        except BaseException:
            self._plans.free(start, len(plan))
            raise
        self._adds_noise[list(rows)] = plan.adds_noise
        self._masked[list(rows)] = spec.mask_sha256 is not None
        self._rescales[list(rows)] = bool(spec.guidance_rescale)
        self._num_registers[list(rows)] = plan.num_registers
        self._added_at[list(rows)] = self._ticks.num_launched if self._ticks is not None else 0
        del self._free_rows[-spec.n :]
        self._plan_of[rows[0]] = (start, len(plan))
        return rows

    def _fill(self, rows: Sequence[int], spec: SampleSpec, start: int, state: Sequence[Tensor]) -> None:
        """Write a job's rows into their slots. state: (x, x0, registers). start: the first line of the job's plan."""
        labels = [self._null_class if label is None else label for label in spec.class_labels or ()]
        at, (x, x0, registers) = torch.tensor(rows, device=self._device), state
        if registers.shape[1] and self._registers is not None:
            self._registers.put(at, registers)
        self._x[at] = x
        self._x0[at] = x0
        self._noises.put(at, rows, spec)
        self._label[at] = torch.tensor(labels or [0], device=self._device)
        self._guidance[at] = spec.guidance
        self._rescale[at] = spec.guidance_rescale or 0.0
        self._first_line[at] = start - spec.start
        self._finite[at] = True

    def step(self, batch: Batch) -> None:
        self.begin(batch)()

    @torch.inference_mode()
    def begin(self, batch: Batch) -> Callable[[], None]:
        """Begin a tick. The returned function waits for the network and updates the rows.

        A batch reaches the device in one transfer, and tensor operations handle all its rows at once.
        """
        # The number of threads is global to the process, and another model may have changed it.
        if torch.get_num_threads() != self._torch_threads:
            torch.set_num_threads(self._torch_threads)
        num_rows, num_guided = len(batch.rows), len(batch.guided)
        slots = np.array(batch.rows)
        noisy = np.flatnonzero(self._adds_noise[slots])
        masked = np.flatnonzero(self._masked[slots]) if self._known is not None else NONE
        keeping = np.flatnonzero(self._num_registers[slots]) if self._registers is not None else NONE
        rescaled = np.flatnonzero(self._rescales[slots[list(batch.guided)]]) if num_guided else NONE
        mixed = [self._noises.mixes(slots[each]) if len(each) else NONE for each in (noisy, masked)]
        chosen = [each.tolist() for each in (noisy, masked, keeping, rescaled, *mixed)]
        parts = (batch.rows, batch.steps, batch.guided, *chosen)
        packed = send(torch.tensor([number for part in parts for number in part]), self._device)
        lengths = [len(part) for part in parts]
        rows, steps, guided, noisy_at, masked_at, keeping_at, rescaled_at, *mixed_at = torch.split(packed, lengths)

        at = self._first_line[rows] + steps
        x, t, labels = self._x[rows], self._plans.timesteps[at], None
        seen = x if self._plans.scales is None else self._plans.scales[at].reshape(-1, 1, 1, 1) * x
        if self.info.conditional:
            labels = self._label[rows]
        if num_guided:
            assert labels is not None
            null = torch.full_like(guided, self._null_class or 0)
            output = self._forward.start(
                torch.cat([seen, seen[guided]]), torch.cat([t, t[guided]]), torch.cat([labels, null])
            )
        else:
            output = self._forward.start(seen, t, labels)

        try:
            # While the network runs, compute everything that does not need its output.
            z = torch.zeros_like(x)
            if len(noisy):
                drawn = self._noises.draw(rows[noisy_at], steps[noisy_at] + 1, mixed_at[0])
                z = drawn if len(noisy) == num_rows else z.index_copy(0, noisy_at, drawn)
            x0_previous, lines, matrices = self._x0[rows], self._plans.lines[at], None
            if len(keeping) and self._plans.matrices is not None:
                matrices = self._plans.matrices[at[keeping_at]]
            if len(masked):
                masked_rows, levels = rows[masked_at], self._plans.known[at[masked_at]]
                eps = self._noises.draw(masked_rows, FIRST_KNOWN_DRAW + steps[masked_at], mixed_at[1])
        except BaseException:
            with suppress(Exception):
                output()  # wait for these passes before the executor starts others
            raise

        @torch.inference_mode()
        def finish() -> None:
            out = output()
            if num_guided:
                out, out_u = out[:num_rows], out[num_rows:]
                strength, out_c = self._guidance[rows[guided]].reshape(-1, 1, 1, 1), out[guided]
                out_g = guide(out_u, out_c, strength, self._shape[0])
                if len(rescaled):
                    share = self._rescale[rows[guided[rescaled_at]]].reshape(-1, 1, 1, 1)
                    again = rescale(out_g[rescaled_at], out_c[rescaled_at], share, self._shape[0])
                    out_g = out_g.index_copy(0, rescaled_at, again)
                out = out.index_copy(0, guided, out_g)
            new, x0 = denoise(x, out, x0_previous, z, lines)
            if self._registers is not None and matrices is not None and len(keeping):
                state = [each[keeping_at] for each in (x, x0, x0_previous, z)]
                combined = self._registers.combine(rows[keeping_at], matrices, state)
                new = new.index_copy(0, keeping_at, combined)
            if self._known is not None and len(masked):
                restored = self._known.restore(new[masked_at], masked_rows, levels, eps)
                new = new.index_copy(0, masked_at, restored)
            self._x[rows], self._x0[rows] = new, x0
            if self._v is not None:
                self._v[rows] = out[:, self._shape[0] :]
            self._finite[rows] = new.sum(dim=(1, 2, 3)).isfinite()  # a sum that includes NaN or infinity is not finite
            if self._ticks is not None:
                self._ticks.add(self._finite)

        return finish

    def wait(self) -> None:
        if self._ticks is not None:
            self._ticks.wait()

    def broken(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Return the rows that are not finite. On a GPU, ticks that `wait` has not waited for are not considered."""
        slots = list(rows)
        if self._ticks is None:
            finite = self._finite.numpy()[slots]
        elif self._ticks.finite is None:
            return ()
        else:  # ignore flags from before the row was added
            finite = self._ticks.finite.numpy()[slots] | (self._added_at[slots] >= self._ticks.num_ended)
        return () if finite.all() else tuple(row for row, fine in zip(rows, finite, strict=True) if not fine)

    @torch.inference_mode()
    def images(self, rows: Sequence[int], bit_depth: int = 8) -> Callable[[], Pixels]:
        x = self._x[index_of(rows, self._device)]
        return self._pictures.read(x, [self._inputs.get(row) for row in rows], bit_depth)

    def encoder(self, inputs: Inputs) -> Callable[[], Inputs]:
        return self._pictures.encoder(inputs)

    def coding_seconds(self) -> tuple[float, float]:
        """Return how many seconds it takes to decode an image and to encode one; 0 for a pixel model."""
        return self._pictures.seconds_per_image()

    @torch.inference_mode()
    def preview(self, rows: Sequence[int], show: Sequence[Show]) -> Callable[[], Mapping[Show, Images]]:
        at, source = index_of(rows, self._device), {"x_t": self._x, "x_0": self._x0}
        read = copy_out(self._device, *(self._pictures.shown(source[name][at]) for name in show))
        return lambda: {name: pixels.numpy() for name, pixels in zip(show, read(), strict=True)}

    @torch.inference_mode()
    def snapshot(self, rows: Sequence[int], steps: tuple[int, ...]) -> Callable[[], Snapshot]:
        at = index_of(rows, self._device)
        x, count = self._x[at], int(self._num_registers[rows[0]])
        registers = x.new_zeros(len(rows), 0, *self._shape)
        if self._registers is not None and count:
            registers = self._registers.read(at, count)
        read = copy_out(self._device, x, self._x0[at], registers)
        return lambda: Snapshot(steps, *(each.numpy() for each in read()))

    def plan(self, spec: SampleSpec) -> PlanNumbers:
        return self._compiler.plan(spec).numbers()

    @torch.inference_mode()
    def point(self, rows: Sequence[int]) -> Callable[[], Point]:
        if self._v is None and self._noise.variance_type == "learned_range":
            self._v = torch.zeros_like(self._x)
        at, parts = index_of(rows, self._device), [self._x, self._x0, *([] if self._v is None else [self._v])]
        read = copy_out(self._device, *(part[at] for part in parts))
        return lambda: Point(*(each.numpy() for each in read()))

    def noised(self, images: Images, t: int, seed: int) -> Callable[[], Images]:
        return self._pictures.noised(images, t, seed)

    def latents(self, rows: Sequence[int]) -> Floats:
        x: Floats = self._x[torch.tensor(rows, device=self._device)].cpu().numpy()
        return x

    def remove(self, rows: Sequence[int]) -> None:
        self._plans.free(*self._plan_of.pop(rows[0]))
        self._free_rows.extend(reversed(rows))
        for row in rows if self._inputs else ():
            self._inputs.pop(row, None)

    @property
    def queues(self) -> bool:
        return self._forward.queues

    @property
    def runs_ahead(self) -> bool:
        return self._ticks is not None

    def is_lost(self) -> bool:
        return is_lost(self._device)

    def memory_bytes(self) -> int | None:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None
