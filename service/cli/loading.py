"""Loading a model for a command. torch is imported when the functions run."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from tminus.service.cli.output import fail
from tminus.service.engine.options import LoadOptions

if TYPE_CHECKING:
    from tminus.model.checkpoint import Checkpoint
    from tminus.service.engine.loading import Loaded

Result = TypeVar("Result")


def load(options: LoadOptions) -> "Loaded":
    """Load an engine; one clear line and exit code 1 where that fails."""
    from tminus.service.engine.loading import load_engine

    return _or_fail(lambda: load_engine(options))


def read(options: LoadOptions) -> "Checkpoint":
    """Read a checkpoint folder; one clear line and exit code 1 where that fails."""
    from tminus.service.engine.loading import read_checkpoint

    return _or_fail(lambda: read_checkpoint(options))


def _or_fail(act: Callable[[], Result]) -> Result:
    from tminus.model.files import CheckpointError

    try:
        return act()
    except (CheckpointError, ValueError) as error:
        fail(str(error))
