"""What crosses between the parts of the service: specs, batches, results. Pure frozen values; no torch, no asyncio."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]  # [n, height, width, channels]


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
    clip: bool

    @property
    def guided(self) -> bool:
        """Whether its rows take two places in a batch."""
        return self.guidance != 1.0

    @property
    def places_per_row(self) -> int:
        """How many forward passes a step of one row costs."""
        return 2 if self.guided else 1

    @property
    def work(self) -> int:
        """The job's cost, in forward passes of one place."""
        return self.n * self.steps * self.places_per_row


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

    images: Images
    queue_s: float
    denoise_s: float


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
    timestep_spacing: str
    clip: bool
    samplers: tuple[str, ...]
    default_sampler: str
    conditional: bool
    class_names: tuple[str, ...]
    null_class: int | None
    weights_hash: str
    fingerprint: str
    device: str


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds a request is held to."""

    max_n: int
    max_batch: int
    max_rows: int
    max_jobs: int
    max_backlog_s: float
    max_body_bytes: int
