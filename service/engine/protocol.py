"""What runs rows, as the worker and the tests before serving need it. The engine with torch behind it is one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from service.model_info import ModelInfo
from service.preview import Show
from service.spec import Floats, Images, Inputs, SampleSpec, Snapshot
from service.work import Batch


class RowEngine(Protocol):
    """An engine of rows. Not for two threads at once."""

    info: ModelInfo

    def add(self, spec: SampleSpec, snapshot: Snapshot | None = None, inputs: Inputs | None = None) -> tuple[int, ...]:
        """Give a job's rows slots and x_T, or x_t of its image, or what the snapshot has.

        Raises ValueError for what the model cannot do.
        """

    def step(self, batch: Batch) -> None:
        """Run one tick."""

    def wait(self) -> None:
        """Let the device catch up."""

    def broken(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Those of the rows whose latent is no longer finite."""

    def images(self, rows: Sequence[int]) -> Callable[[], Images]:
        """Read finished rows; the function returned may wait, and raises NotFinite."""

    def preview(self, rows: Sequence[int], show: Sequence[Show]) -> Callable[[], Mapping[Show, Images]]:
        """Read rows that are under way as pictures; the function returned may wait."""

    def snapshot(self, rows: Sequence[int], steps: tuple[int, ...]) -> Callable[[], Snapshot]:
        """Read all that one job's rows, which take these steps next, need to go on; the function returned may wait."""

    def noised(self, images: Images, t: int, seed: int) -> Callable[[], Images]:
        """Make x_t of images by the forward process; the function returned may wait."""

    def latents(self, rows: Sequence[int]) -> Floats:
        """Read rows as they are. Waits for the device."""

    def remove(self, rows: Sequence[int]) -> None:
        """Free one job's slots."""

    def memory_bytes(self) -> int | None:
        """Memory on the device, where that is not the process's own."""
