"""Row state on the device, and one tick: a forward pass over rows at mixed timesteps, then the update rule.

Rows in, uint8 arrays out; no tensor leaves. Which rows step is decided elsewhere.
"""

import hashlib
import json
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.data import to_uint8
from model.rng import image_noise, row_noise, split_seed
from model.samplers import NUM_COEFFICIENTS, SAMPLERS, Plan, compile_plan, denoise, guide
from service.executors import EagerExecutor, Executor
from service.job import Batch, Images, ModelInfo, SampleSpec

LATENT_BUDGET_BYTES = 512 * 2**20
MAX_DEFAULT_ROWS = 4096


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu, cuda or cuda:N into a device. Raises ValueError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def default_max_rows(checkpoint: Checkpoint) -> int:
    """How many rows' state (x and x0, float32) fits the latent budget."""
    row_bytes = 2 * 4 * checkpoint.net.config.in_channels * checkpoint.size_px[0] * checkpoint.size_px[1]
    return max(4, min(MAX_DEFAULT_ROWS, LATENT_BUDGET_BYTES // row_bytes))


class Engine:
    """Owns the latents. Every row has a slot in tensors on the device; what differs by row is gathered by index."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, *, max_rows: int, max_jobs: int) -> None:
        self.info = describe(checkpoint, device, EagerExecutor.name)
        self._device = device
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # float32 means float32: the fingerprint says so
        self._noise = checkpoint.noise
        self._schedule = checkpoint.noise.schedule()
        self._null_class = checkpoint.labels.null_class
        self._forward: Executor = EagerExecutor(checkpoint.net, device)
        self._shape = (checkpoint.net.config.in_channels, *checkpoint.size_px)
        num_timesteps = self._schedule.num_timesteps

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # A slot a row.
        self._x = zeros(max_rows, *self._shape, dtype=torch.float32)
        self._x0 = zeros(max_rows, *self._shape, dtype=torch.float32)
        self._seed_words = zeros(max_rows, 2)
        self._index = zeros(max_rows)
        self._label = zeros(max_rows)
        self._guidance = zeros(max_rows, dtype=torch.float32)
        self._first_line = zeros(max_rows)  # where the row's plan begins in the two tables below
        self._free_rows = list(range(max_rows - 1, -1, -1))
        # A region of T lines a job.
        self._lines = zeros(max_jobs * num_timesteps, NUM_COEFFICIENTS, dtype=torch.float32)
        self._timesteps = zeros(max_jobs * num_timesteps)
        self._free_plans = list(range(max_jobs - 1, -1, -1))
        self._plan_of: dict[int, int] = {}  # first row of a job -> its region

    def compile(self, spec: SampleSpec) -> Plan:
        """Compile a spec's sampler. Raises ValueError for what this model's schedule cannot do."""
        return compile_plan(self._noise, self._schedule, spec.sampler, spec.steps, eta=spec.eta, clip=spec.clip)

    @torch.inference_mode()
    def add(self, spec: SampleSpec) -> tuple[int, ...]:
        """Give a job's rows their slots and their x_T; returns the row ids. Raises ValueError as `compile` does."""
        # First all that can fail, then the slots: a job that cannot be added takes nothing away.
        plan = self.compile(spec)
        indices = range(spec.index, spec.index + spec.n)
        x_T = image_noise(spec.seed, indices, 0, self._shape, self._device)
        index = torch.tensor(indices, device=self._device)
        seed_words = torch.tensor(split_seed(spec.seed), device=self._device)
        labels = [self._null_class if label is None else label for label in spec.class_labels or ()]
        label = torch.tensor(labels or [0], device=self._device)

        assert len(self._free_rows) >= spec.n
        assert self._free_plans
        rows = tuple(self._free_rows.pop() for _ in range(spec.n))
        region = self._plan_of[rows[0]] = self._free_plans.pop()
        start = region * self._schedule.num_timesteps
        self._lines[start : start + len(plan)] = plan.lines.to(torch.float32)
        self._timesteps[start : start + len(plan)] = plan.timesteps
        at = torch.tensor(rows, device=self._device)
        self._x[at] = x_T
        self._x0[at] = 0
        self._seed_words[at] = seed_words
        self._index[at] = index
        self._label[at] = label
        self._guidance[at] = spec.guidance
        self._first_line[at] = start
        return rows

    @torch.inference_mode()
    def step(self, batch: Batch) -> None:
        """Run one tick. The batch crosses to the device in one transfer; nothing here loops over rows or waits."""
        num_rows = len(batch.rows)
        packed = torch.tensor(batch.rows + batch.steps + batch.guided, dtype=torch.int64)
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        rows, steps, guided = packed[:num_rows], packed[num_rows : 2 * num_rows], packed[2 * num_rows :]

        at = self._first_line[rows] + steps
        x, t, labels = self._x[rows], self._timesteps[at], None
        if self.info.conditional:
            labels = self._label[rows]
        if batch.guided:
            null = torch.full_like(guided, self._null_class or 0)
            out = self._forward(
                torch.cat([x, x[guided]]), torch.cat([t, t[guided]]), torch.cat([self._label[rows], null])
            )
            out, out_u = out[:num_rows], out[num_rows:]
            strength = self._guidance[rows[guided]].reshape(-1, 1, 1, 1)
            out = out.index_copy(0, guided, guide(out_u, out[guided], strength))
        else:
            out = self._forward(x, t, labels)

        z = row_noise(self._seed_words[rows], self._index[rows], steps + 1, self._shape)
        x, x0 = denoise(x, out, self._x0[rows], z, self._lines[at])
        self._x[rows], self._x0[rows] = x, x0

    @torch.inference_mode()
    def images(self, rows: Sequence[int]) -> Images:
        """Read rows out as uint8 [n, H, W, C]. Waits for the device."""
        x = self._x[torch.tensor(rows, device=self._device)]
        pixels: Images = to_uint8(x).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return pixels

    def remove(self, rows: Sequence[int]) -> None:
        """Free the slots of one job, as `add` returned them."""
        self._free_plans.append(self._plan_of.pop(rows[0]))
        self._free_rows.extend(reversed(rows))

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def memory_bytes(self) -> int | None:
        """Memory that tensors take on the GPU; None on a CPU, where it is the process's own."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None


def describe(checkpoint: Checkpoint, device: torch.device, executor: str) -> ModelInfo:
    """Gather what the edge and the users are told about a model, with the fingerprint of this build."""
    net, noise, labels = checkpoint.net, checkpoint.noise, checkpoint.labels
    return ModelInfo(
        name=checkpoint.name,
        architecture="UNet2DModel",
        num_parameters=sum(p.numel() for p in net.parameters()),
        height_px=checkpoint.size_px[0],
        width_px=checkpoint.size_px[1],
        channels=net.config.in_channels,
        num_timesteps=noise.num_train_timesteps,
        beta_schedule=noise.beta_schedule if noise.trained_betas is None else "trained_betas",
        prediction_type=noise.prediction_type,
        variance_type=noise.variance_type,
        timestep_spacing=noise.timestep_spacing,
        clip=noise.clip_sample,
        samplers=SAMPLERS,
        default_sampler=noise.default_sampler,
        conditional=net.class_embedding is not None,
        class_names=labels.class_names,
        null_class=labels.null_class,
        weights_hash=checkpoint.weights_hash,
        fingerprint=fingerprint(device, executor),
        device=device_name(device),
    )


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def fingerprint(device: torch.device, executor: str) -> str:
    """Hash what can move a bit beside spec and weights: versions, device, precision, threads, executor."""
    parts = {
        "torch": torch.__version__,
        "device": device_name(device),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "dtype": "float32",
        "executor": executor,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
