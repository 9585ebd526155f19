"""The engine's interface without torch, the load options, and a loop that runs one job without a server."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tminus.model.trajectory import PlanNumbers
from tminus.service.model_info import ModelInfo
from tminus.service.preview import Show
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler
from tminus.service.spec import Floats, Images, Inputs, Pixels, Point, SampleSpec, Snapshot
from tminus.service.work import Batch, work_of

BUNDLED = Path(__file__).parents[2] / "checkpoints" / "fashion-mnist-32"  # the installed package contains it too


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options for loading a model. If an option is None or "auto", the loader chooses the best for this machine."""

    checkpoint: Path
    device: str = "auto"
    executor: str = "auto"
    precision: str = "auto"
    exact: bool | None = None
    threads: int | None = None
    max_batch: int | None = None
    max_rows: int | None = None
    max_jobs: int = 1
    cache_dir: Path | None = None
    approve_when_idle: bool = False


class RowEngine(Protocol):
    """Holds the state of rows, and updates it in ticks. Not thread-safe.

    Most methods that read rows return a function, which may wait for the device. Call that function in another thread.
    """

    info: ModelInfo

    @property
    def queues(self) -> bool:
        """True if a second tick may begin while one is in flight. The second tick's passes wait in a queue."""

    @property
    def runs_ahead(self) -> bool:
        """True if a tick may still be running when `step` and `wait` have returned, as on a GPU."""

    def add(self, spec: SampleSpec, snapshot: Snapshot | None = None, inputs: Inputs | None = None) -> tuple[int, ...]:
        """Assign slots to a job's rows, set their first x, and return the row ids.

        The first x is the snapshot's x, x_t of the image if the spec has a strength, or x_T. Raises ValueError if the
        model cannot run the spec, or if the inputs or the snapshot do not fit the spec.
        """

    def begin(self, batch: Batch) -> Callable[[], None]:
        """Begin a tick, and return a function that ends it. Call that function in the engine's thread.

        A tick of other rows may begin before that call. Until a row's tick ends, reads return the row's old values, and
        the row must not be removed.
        """

    def step(self, batch: Batch) -> None:
        """Run one tick from beginning to end."""

    def wait(self) -> None:
        """Wait until at most one tick is still running on a GPU. Does nothing on a CPU."""

    def broken(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Return those of the given rows whose latents are not finite."""

    def images(self, rows: Sequence[int], bit_depth: int = 8) -> Callable[[], Pixels]:
        """Read rows as images [n, H, W, C]. The returned function raises NotFinite if a row is not finite.

        bit_depth: 8 or 16 for integers; 32 for the rows' float32 values, which may lie outside [-1, 1]. The rows may be
        removed before the function is called. For a latent model, the function runs the decoder.
        """

    def encoder(self, inputs: Inputs) -> Callable[[], Inputs]:
        """Return a function that prepares inputs for `add`: for a latent model, it encodes the image."""

    def preview(self, rows: Sequence[int], show: Sequence[Show]) -> Callable[[], Mapping[Show, Images]]:
        """Read running rows as uint8 images [n, H, W, C]. x_0 is the network's latest prediction.

        The images of a latent model are rough: each latent becomes a square of one approximate colour.
        """

    def snapshot(self, rows: Sequence[int], steps: tuple[int, ...]) -> Callable[[], Snapshot]:
        """Read the state from which one job's rows can continue. steps: the next step of each row."""

    def plan(self, spec: SampleSpec) -> PlanNumbers:
        """Return the coefficients for each pass of a spec. Raises ValueError if the model cannot run the spec."""

    def point(self, rows: Sequence[int]) -> Callable[[], Point]:
        """Read the values that a trajectory records: x, x0 and, for a learned variance, the network's v.

        Call this once before the rows' first pass too, because v is stored only after the first call.
        """

    def noised(self, images: Images, t: int, seed: int) -> Callable[[], Images]:
        """Return a function that makes x_t from images x_0, uint8 [n, H, W, C], by the forward process.

        The noise is the x_T of a job with this seed.
        """

    def latents(self, rows: Sequence[int]) -> Floats:
        """Return x_t of the rows, float32 [n, C, H, W]. Waits for the device."""

    def remove(self, rows: Sequence[int]) -> None:
        """Free the slots of one job's rows."""

    def is_lost(self) -> bool:
        """Return whether the device has stopped working. Waits for the device. Call this after an error."""

    def memory_bytes(self) -> int | None:
        """Return how many bytes the tensors take on a GPU; None on a CPU."""


# Called with the engine, the ids of the job's rows, and (steps taken, index in the job) for each row that took a step.
Record = Callable[[RowEngine, Sequence[int], Sequence[tuple[int, int]]], object]


def sample_locally(
    engine: RowEngine,
    spec: SampleSpec,
    max_batch: int,
    on_rows: Callable[[int], object],
    inputs: Inputs | None = None,
    record: Record | None = None,
) -> Pixels:
    """Run one job to its end, and return its images. Raises NotFinite, or ValueError if `Engine.add` does.

    on_rows: called after each tick with the tick's number of rows. record: called before the first tick with all rows,
    and after each tick with the rows of that tick.
    """
    scheduler = Scheduler(BatchPolicy.of(max_batch))
    rows = engine.add(spec, inputs=inputs)
    scheduler.add("local", rows, work_of(spec, engine.info))
    if record is not None:
        record(engine, rows, [(0, index) for index in range(spec.n)])
    while (batch := scheduler.next_batch()) is not None:
        engine.step(batch)
        engine.wait()
        if record is not None:
            record(engine, rows, [(step + 1 - spec.start, index) for step, index in batch.jobs[0].steps])
        scheduler.advance(batch)
        on_rows(len(batch.rows))
    images = engine.images(rows, spec.depth)()
    engine.remove(rows)
    return images
