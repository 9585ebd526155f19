"""The engine as the worker and the tests before serving see it. No torch: numpy arrays in and out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tminus.model.trajectory import PlanNumbers
from tminus.service.model_info import ModelInfo
from tminus.service.preview import Show
from tminus.service.spec import Floats, Images, Inputs, Point, SampleSpec, Snapshot
from tminus.service.work import Batch


class RowEngine(Protocol):
    """An engine of rows. Not for two threads at once."""

    info: ModelInfo

    @property
    def runs_ahead(self) -> bool:
        """Whether a tick may still run when `step` and `wait` have returned, as on a GPU."""

    def add(self, spec: SampleSpec, snapshot: Snapshot | None = None, inputs: Inputs | None = None) -> tuple[int, ...]:
        """Give a job's rows slots, and x_T, x_t of its image, or the state in the snapshot; returns the row ids.

        Raises ValueError for a spec that the model cannot run, and for inputs or a snapshot that do not fit it.
        """

    def step(self, batch: Batch) -> None:
        """Run one tick."""

    def wait(self) -> None:
        """Let the device catch up, so that the host is never far ahead of it."""

    def broken(self, rows: Sequence[int]) -> tuple[int, ...]:
        """The rows among these whose latent is no longer finite."""

    def images(self, rows: Sequence[int]) -> Callable[[], Images]:
        """Read finished rows; the function returned may wait, and raises NotFinite."""

    def encoder(self, inputs: Inputs) -> Callable[[], Inputs]:
        """Prepare inputs for `add`; the function returned, called in another thread, may take long."""

    def preview(self, rows: Sequence[int], show: Sequence[Show]) -> Callable[[], Mapping[Show, Images]]:
        """Read running rows as pictures; the function returned may wait."""

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
