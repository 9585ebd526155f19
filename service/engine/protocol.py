"""The engine's interface without torch, the options to load it, and a loop for one job without a server."""

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

BUNDLED = Path(__file__).parents[2] / "checkpoints" / "fashion-mnist-32"  # comes with tminus, installed or not


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a model; None and auto leave a choice to what is found on this machine."""

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
    """An engine of rows. Not for two threads at once."""

    info: ModelInfo

    @property
    def queues(self) -> bool:
        """Whether a second tick may begin while one is in flight: its passes wait in a queue."""

    @property
    def runs_ahead(self) -> bool:
        """Whether a tick may still run when `step` and `wait` have returned, as on a GPU."""

    def add(self, spec: SampleSpec, snapshot: Snapshot | None = None, inputs: Inputs | None = None) -> tuple[int, ...]:
        """Give a job's rows slots, and x_T, x_t of its image, or the state in the snapshot; returns the row ids.

        Raises ValueError for a spec that the model cannot run, and for inputs or a snapshot that do not fit it.
        """

    def begin(self, batch: Batch) -> Callable[[], None]:
        """Begin a tick. The function returned ends it. A tick of other rows may begin in between.

        Until its tick has ended, reads give a row as it was before, and the row may not be removed.
        """

    def step(self, batch: Batch) -> None:
        """Run one tick from its beginning to its end."""

    def wait(self) -> None:
        """Let the device catch up, so that the host is never far ahead of it."""

    def broken(self, rows: Sequence[int]) -> tuple[int, ...]:
        """The rows among these whose latent is no longer finite."""

    def images(self, rows: Sequence[int], bit_depth: int = 8) -> Callable[[], Pixels]:
        """Read finished rows; the function returned may wait, and raises NotFinite."""

    def encoder(self, inputs: Inputs) -> Callable[[], Inputs]:
        """Prepare inputs for `add`; the function returned, called in another thread, may take long."""

    def preview(self, rows: Sequence[int], show: Sequence[Show]) -> Callable[[], Mapping[Show, Images]]:
        """Read running rows as pictures. Returns a function that may wait for a GPU."""

    def snapshot(self, rows: Sequence[int], steps: tuple[int, ...]) -> Callable[[], Snapshot]:
        """Read what one job's rows need to go on with these next steps; the function returned may wait."""

    def plan(self, spec: SampleSpec) -> PlanNumbers:
        """The coefficients of each pass that a spec takes. Raises ValueError for one that the model cannot run."""

    def point(self, rows: Sequence[int]) -> Callable[[], Point]:
        """Read rows for a trajectory, from before their first pass on; the function returned may wait."""

    def noised(self, images: Images, t: int, seed: int) -> Callable[[], Images]:
        """Make x_t of images by the forward process; the function returned may wait."""

    def latents(self, rows: Sequence[int]) -> Floats:
        """Read the latents of rows. Waits for the device."""

    def remove(self, rows: Sequence[int]) -> None:
        """Free one job's slots."""

    def is_lost(self) -> bool:
        """Whether the device does nothing any more, whatever it is told: asked after an error. Waits for the device."""

    def memory_bytes(self) -> int | None:
        """Memory taken on the device; None where that is the process's own memory."""


# Takes the engine, the job's rows, and the rows that have stepped, by the steps they have taken and their index.
Record = Callable[[RowEngine, Sequence[int], Sequence[tuple[int, int]]], object]


def sample_locally(
    engine: RowEngine,
    spec: SampleSpec,
    max_batch: int,
    on_rows: Callable[[int], object],
    inputs: Inputs | None = None,
    record: Record | None = None,
) -> Pixels:
    """Run one job to its end; on_rows is called after each tick with the number of rows in it.

    record: is called before the first tick with all rows, and after each with those in it. Raises ValueError as
    Engine.add does, and NotFinite.
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
