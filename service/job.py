"""What crosses between the parts of the service: specs, batches, results. Pure frozen values; no torch, no asyncio."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.timesteps import make_timesteps

Images = npt.NDArray[np.uint8]  # [n, height, width, channels]
Floats = npt.NDArray[np.float32]
EDIT_FIELDS = ("strength", "image_sha256", "mask_sha256")  # of a spec; what is no edit is written down without them


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """One request, checked and complete: with it, the weights and the fingerprint, the images can be made again."""

    n: int
    steps: int
    sampler: str
    eta: float
    seed: int
    index: int  # of the first image; image k of the request has noise (seed, index + k)
    class_labels: tuple[int | None, ...] | None  # one an image, None for no class; None for an unconditional model
    guidance: float  # 1 is off
    guidance_interval: tuple[int, int] | None  # timesteps, both ends included; None: guided at all of them
    timestep_spacing: str
    clip: bool
    strength: float | None = None  # how much of the plan is run, from the image on; None: all of it, from x_T
    image_sha256: str | None = None  # of its pixels, which travel beside it, see Inputs
    mask_sha256: str | None = None

    @property
    def start(self) -> int:
        """The step that its rows begin with: the last `strength` of the steps are taken, at least one.

        diffusers cuts steps * strength off (img2img's get_timesteps). Here it is rounded at the ninth place first, so
        that 0.29 of 100 steps, 28.999999999999996 in floats, are 29.
        """
        if self.strength is None:
            return 0
        return self.steps - min(self.steps, max(1, int(round(self.steps * self.strength, 9))))

    @property
    def num_steps(self) -> int:
        """How many steps each row takes."""
        return self.steps - self.start

    def to_json(self) -> dict[str, Any]:
        """Its fields. What it has none of in EDIT_FIELDS is left out: a plain spec reads as it always did."""
        return {name: value for name, value in asdict(self).items() if name not in EDIT_FIELDS or value is not None}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "SampleSpec":
        """Make a spec of its fields as JSON has them. Raises TypeError where they are not its fields."""
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in fields.items()}
        return cls(**values)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The pixels that an edit starts from; its spec has their hashes."""

    image: Images  # [height, width, channels], for all rows of the job
    mask: npt.NDArray[np.bool_] | None = None  # [height, width]: true is made new, false is kept

    @property
    def image_sha256(self) -> str:
        """Of the image's bytes, row by row."""
        return hashlib.sha256(self.image.tobytes()).hexdigest()

    @property
    def mask_sha256(self) -> str | None:
        """Of the mask's bytes, row by row: 1 for new, 0 for known."""
        return hashlib.sha256(self.mask.tobytes()).hexdigest() if self.mask is not None else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job between two ticks: all that its rows need to go on, beside their spec and inputs."""

    steps: tuple[int, ...]  # of the plan, that each row is to take next
    x: Floats  # [n, C, H, W]
    x0_previous: Floats


@dataclass(frozen=True, slots=True)
class Work:
    """What a job costs, in places: forward passes of one row. At the steps in `guided` a row takes two."""

    rows: int
    steps: int  # of the plan
    guided: range
    start: int = 0  # the first step that is taken

    def places_per_row(self, step: int) -> int:
        """How many places a row takes at a step."""
        return 2 if step in self.guided else 1

    def places_left(self, step: int) -> int:
        """How many places one row takes from this step to its end."""
        return self.steps - step + max(0, self.guided.stop - max(step, self.guided.start))

    @property
    def places(self) -> int:
        """The whole job's cost."""
        return self.rows * self.places_left(self.start)


@dataclass(frozen=True, slots=True)
class Batch:
    """One tick: row ids, the step each is at, and the positions in the batch of the rows that are guided."""

    rows: tuple[int, ...]
    steps: tuple[int, ...]
    guided: tuple[int, ...]

    @property
    def places(self) -> int:
        """The size of the forward pass."""
        return len(self.rows) + len(self.guided)


@dataclass(frozen=True, slots=True)
class JobResult:
    """A finished job: its images and where its time went, in seconds."""

    read: Callable[[], Images]  # waits for the copy from a GPU; raises NotFinite
    queue_s: float
    first_step_s: float  # from acceptance to the end of the first step
    denoise_s: float


@dataclass(frozen=True, slots=True)
class Ticket:
    """What an accepted job gets: its result to come, and what was foreseen of it."""

    future: "Future[JobResult]"
    position: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job that waits or runs, as told to clients."""

    id: str
    state: str  # waiting until its first step, then running
    position: int  # jobs that go before it
    eta_s: float
    step: int  # how many its rows have taken, on average, of spec.num_steps
    spec: SampleSpec
    durable: bool
    age_s: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is loaded, as the edge needs to know it."""

    name: str
    architecture: str
    num_parameters: int
    height_px: int
    width_px: int
    channels: int
    num_timesteps: int
    beta_schedule: str
    prediction_type: str
    variance_type: str
    timestep_spacings: Mapping[str, str]  # by sampler, what a request gets that names none
    steps_offset: int
    log_sigmas: tuple[float, ...]  # of the noise schedule, by timestep
    clip: bool
    samplers: tuple[str, ...]
    default_sampler: str
    conditional: bool
    class_names: tuple[str, ...]
    null_class: int | None
    weights_hash: str
    fingerprint: str
    device: str
    executor: str
    precision: str
    executor_details: str
    exact: bool  # whether the same spec gives the same bytes whatever else runs

    def alpha_bar(self, t: int) -> float:
        """alpha_bar_t = 1 / (1 + sigma_t^2)."""
        log_sigma = self.log_sigmas[t]
        return 1 / (1 + math.exp(2 * log_sigma)) if log_sigma < 300 else 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds a request is held to."""

    max_n: int
    max_batch: int  # places in one forward pass
    max_rows: int
    max_jobs: int
    max_backlog_s: float
    max_body_bytes: int
    max_image_bytes: int = 8 * 2**20
    result_cache_bytes: int = 0
    keep_jobs_s: float = 86_400.0  # how long a durable job is kept that has ended
    keep_jobs_bytes: int = 2**30  # and what all of them may take
    max_streams: int = 2048
    max_streams_per_address: int = 64

    @property
    def max_edit_bytes(self) -> int:
        """Of a body with an image and a mask in base64, which is four bytes for three."""
        return self.max_body_bytes + 2 * 4 * (self.max_image_bytes // 3 + 1)


def work_of(spec: SampleSpec, model: ModelInfo) -> Work:
    """Count what a spec costs."""
    start = spec.start
    if spec.guidance == 1.0:
        return Work(spec.n, spec.steps, range(0), start)
    if spec.guidance_interval is None:
        return Work(spec.n, spec.steps, range(start, spec.steps), start)
    low, high = spec.guidance_interval
    timesteps = timesteps_of(spec, model)
    guided = [step for step, t in enumerate(timesteps, start) if low <= t <= high]  # neighbours: t falls
    return Work(spec.n, spec.steps, range(guided[0], guided[-1] + 1) if guided else range(0), start)


def timesteps_of(spec: SampleSpec, model: ModelInfo) -> Sequence[int]:
    """The timesteps that its steps start from, those that are taken, falling."""
    timesteps = make_timesteps(
        spec.sampler, spec.timestep_spacing, spec.steps, model.num_timesteps, model.steps_offset, model.log_sigmas
    )
    return timesteps[spec.start :]


def trial_spec(
    model: ModelInfo, n: int, steps: int, *, sampler: str | None = None, seed: int = 0, guidance: float = 1.0
) -> SampleSpec:
    """A job that the model can do, for warming up, measuring and testing."""
    sampler = sampler or model.default_sampler
    return SampleSpec(
        n=n,
        steps=steps,
        sampler=sampler,
        eta=0.0,
        seed=seed,
        index=0,
        class_labels=(0,) * n if model.conditional else None,
        guidance=guidance,
        guidance_interval=None,
        timestep_spacing=model.timestep_spacings[sampler],
        clip=model.clip,
    )
