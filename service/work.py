"""What a job costs, what one tick steps, and what clients are told. Pure frozen values; no torch, no asyncio."""

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
    """What a job costs, in places: forward passes of one row. At the steps in `guided` a row takes two."""

    rows: int
    steps: int  # passes of the plan: the rows take those from `start` on
    guided: range
    start: int = 0
    autoencoder_s: float = 0.0  # seconds to encode and decode a latent model's pictures, set by admission
    model: int = 0  # the number of the model whose places they are

    def places_per_row(self, step: int) -> int:
        """How many places a row takes at a step."""
        return 2 if step in self.guided else 1

    def places_left(self, step: int) -> int:
        """How many places one row takes from this step to its last one."""
        return self.steps - step + max(0, self.guided.stop - max(step, self.guided.start))

    def ending_at(self, until: int | None) -> "Work":
        """Return this work with only some passes, at least one; None means all of them."""
        if until is None:
            return self
        end = min(self.steps, self.start + max(1, until))
        return replace(self, steps=end, guided=range(self.guided.start, min(end, self.guided.stop)))

    @property
    def places(self) -> int:
        """What all its rows take in ticks."""
        return self.rows * self.places_left(self.start)


class JobRows(NamedTuple):
    """The rows of one job in a tick. Several are made every tick, and a tuple is made fastest."""

    job_id: str
    steps: tuple[tuple[int, int], ...]  # of each row, the step that it takes and its index in the job
    places: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One tick: row ids, the step each is at, and the positions in the batch of the rows that are guided.

    The scheduler adds the same rows by job. The engine has no use for that, and for two ticks to be equal it does not
    matter which jobs the rows belong to.
    """

    rows: tuple[int, ...]
    steps: tuple[int, ...]
    guided: tuple[int, ...]
    jobs: tuple[JobRows, ...] = field(default=(), compare=False)  # in the order of their first rows

    @property
    def places(self) -> int:
        """The size of the forward pass."""
        return len(self.rows) + len(self.guided)


@dataclass(frozen=True, slots=True)
class JobResult:
    """A finished job: its images, and what its time was spent on."""

    read: Callable[[], Pixels]  # waits for the copy from a GPU; raises NotFinite
    queue_s: float
    first_step_s: float  # from acceptance to the end of the first step
    denoise_s: float
    decode_s: float = 0.0  # of a latent model, from the last step until its images were decoded


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the client of a job is told: how many jobs go before it, and when it will be done."""

    position: int  # 0 when all its rows run
    eta_s: float


@dataclass(frozen=True, slots=True)
class Ticket:
    """What an accepted job gets: its result to come, and its outlook when it was accepted."""

    future: "Future[JobResult]"
    outlook: Outlook


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job that waits or runs, as told to clients."""

    id: str
    state: str  # waiting until its first step, then running
    position: int  # jobs that go before it
    eta_s: float
    step: int  # steps that its rows have taken, on average, out of spec.num_passes
    spec: SampleSpec
    durable: bool
    owner: str  # the name of the key that it came with
    age_s: float
    created_us: int  # when it was accepted, Unix time
    model: int  # its number
    model_name: str


def work_of(spec: SampleSpec, model: ModelInfo, number: int = 0) -> Work:
    """Count the work of a spec. number: of the model in this process."""
    start, end = spec.start, spec.end
    if spec.guidance == 1.0:
        return Work(spec.n, end, range(0), start, model=number)
    if spec.guidance_interval is None:
        return Work(spec.n, end, range(start, end), start, model=number)
    low, high = spec.guidance_interval
    timesteps = timesteps_of(spec, model)
    guided = [step for step, t in enumerate(timesteps, start) if low <= t <= high]  # contiguous, since t falls
    return Work(spec.n, end, range(guided[0], guided[-1] + 1) if guided else range(0), start, model=number)


def check_table(spec: SampleSpec, model: ModelInfo) -> None:
    """Raise InvalidField for a spec of an earlier process whose table the checkpoint has no more."""
    if spec.table is not None and not model.has_table(spec.table):
        raise InvalidField.of("table", "that of one in the checkpoint's samplers/", spec.table)


def timesteps_of(spec: SampleSpec, model: ModelInfo) -> Sequence[float]:
    """The timestep of each pass that a spec takes, falling."""
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
    """Return the numbers, from 0, of the passes of a row that draw fresh noise. The last never does."""
    if spec.table is not None:
        return [k for k, line in enumerate(model.table(spec.table).started(spec.start)) if line[-1] > 0]
    noise = SAMPLER_FACTS[spec.sampler].noise
    return range(spec.num_passes - 1 if noise == "always" or (noise == "eta" and spec.eta > 0) else 0)


def select_passes(keep: Sequence[int] | None, spec: SampleSpec, model: ModelInfo) -> Selection:
    """Select passes of a trajectory, with what their means look back to; None: all. Raises ValueError as Selection.of.

    At least one has to add noise.
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
