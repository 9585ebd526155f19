"""The cost of jobs, the contents of ticks, and the status shown to clients.

Frozen dataclasses; imports neither torch nor asyncio.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.timesteps import make_timesteps, timesteps_of_passes
from tminus.model.trajectory import Selection
from tminus.service.errors import InvalidField
from tminus.service.model_info import ModelInfo
from tminus.service.spec import Pixels, SampleSpec


@dataclass(frozen=True, slots=True)
class Work:
    """The cost of a job, in places. A place is one row's share of a forward pass; a guided row takes two."""

    rows: int
    steps: int  # number of the last pass, plus 1; a row takes the passes from `start` to `steps` - 1
    guided: range
    start: int = 0
    autoencoder_s: float = 0.0  # for a latent model: seconds to encode and decode the job's images, set by admission
    model: int = 0  # the model's number in this process

    def places_per_row(self, step: int) -> int:
        return 2 if step in self.guided else 1

    def places_left(self, step: int) -> int:
        """Return the places that one row takes from pass `step` to the end."""
        return self.steps - step + max(0, self.guided.stop - max(step, self.guided.start))

    def ending_at(self, until: int | None) -> "Work":
        """Return a copy with only the first `until` passes, at least one. None keeps all passes."""
        if until is None:
            return self
        end = min(self.steps, self.start + max(1, until))
        return replace(self, steps=end, guided=range(self.guided.start, min(end, self.guided.stop)))

    @property
    def places(self) -> int:
        """Return the places that all rows take in all passes."""
        return self.rows * self.places_left(self.start)


class JobRows(NamedTuple):
    """The rows of one job in a tick. A tuple is fast to create, and each tick creates several."""

    job_id: str
    steps: tuple[tuple[int, int], ...]  # (step, index in the job) of each row
    places: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one tick: their ids, their steps, and the positions of the guided rows in the batch.

    `jobs` has the same rows, grouped by job. The engine ignores `jobs`, so it does not affect equality.
    """

    rows: tuple[int, ...]
    steps: tuple[int, ...]
    guided: tuple[int, ...]
    jobs: tuple[JobRows, ...] = field(default=(), compare=False)  # in the order of their first rows

    @property
    def places(self) -> int:
        """Return the size of the forward pass."""
        return len(self.rows) + len(self.guided)


@dataclass(frozen=True, slots=True)
class JobResult:
    """The images of a finished job, and the duration of each phase in seconds."""

    read: Callable[[], Pixels]  # waits for the copy from a GPU; raises NotFinite
    queue_s: float
    first_step_s: float  # from acceptance to the end of the first step
    denoise_s: float
    decode_s: float = 0.0  # for latent models: from the last step until the images were decoded


@dataclass(frozen=True, slots=True)
class Outlook:
    """The forecast for a job, as shown to the client."""

    position: int  # number of jobs ahead in the queue; 0 when all rows of this job are running
    eta_s: float


@dataclass(frozen=True, slots=True)
class Ticket:
    """An accepted job: a future with its result, and the forecast at acceptance."""

    future: "Future[JobResult]"
    outlook: Outlook


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A waiting or running job, as shown to clients."""

    id: str
    state: str  # "waiting" until the first step, then "running"
    position: int  # number of jobs ahead in the queue
    eta_s: float
    step: int  # mean number of passes that the rows have taken, out of spec.num_passes
    spec: SampleSpec
    durable: bool
    owner: str  # name of the API key that submitted the job
    age_s: float
    created_us: int  # Unix time of acceptance, in microseconds
    model: int  # the model's number in this process
    model_name: str


def work_of(spec: SampleSpec, model: ModelInfo, number: int = 0) -> Work:
    """Return the cost of a spec. number: the model's number in this process."""
    start, end = spec.start, spec.end
    if spec.guidance == 1.0:
        return Work(spec.n, end, range(0), start, model=number)
    if spec.guidance_interval is None:
        return Work(spec.n, end, range(start, end), start, model=number)
    low, high = spec.guidance_interval
    timesteps = timesteps_of(spec, model)
    guided = [step for step, t in enumerate(timesteps, start) if low <= t <= high]  # contiguous: timesteps decrease
    return Work(spec.n, end, range(guided[0], guided[-1] + 1) if guided else range(0), start, model=number)


def check_table(spec: SampleSpec, model: ModelInfo) -> None:
    """Raise InvalidField if the spec names a table that the checkpoint no longer has.

    This can happen to a spec that was stored by an earlier process.
    """
    if spec.table is not None and not model.has_table(spec.table):
        raise InvalidField.of("table", "that of one in the checkpoint's samplers/", spec.table)


def timesteps_of(spec: SampleSpec, model: ModelInfo) -> Sequence[float]:
    """Return the timestep of each pass of a spec, in decreasing order."""
    if spec.table is not None:
        return model.table(spec.table).timesteps[spec.start :]
    timesteps = make_timesteps(
        spec.sampler,
        spec.timestep_spacing,
        spec.steps,
        model.num_timesteps,
        model.steps_offset,
        model.log_sigmas,
        fractional=model.fractional,
        continuous=model.continuous,
    )
    return timesteps_of_passes(spec.sampler, timesteps[spec.start :])


def noisy_passes(spec: SampleSpec, model: ModelInfo) -> Sequence[int]:
    """Return the numbers, from 0, of the passes that add fresh noise to a row. The last pass never does."""
    if spec.table is not None:
        return [k for k, line in enumerate(model.table(spec.table).started(spec.start)) if line[-1] > 0]
    noise = SAMPLER_FACTS[spec.sampler].noise
    return range(spec.num_passes - 1 if noise == "always" or (noise == "eta" and spec.eta > 0) else 0)


def select_passes(keep: Sequence[int] | None, spec: SampleSpec, model: ModelInfo) -> Selection:
    """Select passes of a trajectory, and the earlier passes that their means depend on.

    None selects all passes. Raises ValueError if no selected pass adds noise, and for the reasons of Selection.of.
    """
    if keep is None:
        return Selection.whole(spec.num_passes)
    if spec.table is not None:
        _, _, c, d, _ = zip(*model.table(spec.table).started(spec.start), strict=True)
        looks_back = 2 if any(d) else 1 if any(c) else 0
    else:
        looks_back = SAMPLER_FACTS[spec.sampler].looks_back
    selection = Selection.of(keep, spec.num_passes, looks_back)
    if not {*noisy_passes(spec, model)}.intersection(keep):
        raise ValueError("numbers of passes of which one or more add noise; the others have no log p")
    return selection
