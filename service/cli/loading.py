"""Loading a model for a command. torch is imported when the function runs."""

from typing import TYPE_CHECKING

from tminus.service.cli.output import fail
from tminus.service.engine.options import LoadOptions

if TYPE_CHECKING:
    from tminus.service.engine.loading import Loaded


def load(options: LoadOptions) -> "Loaded":
    """Load an engine; one clear line and exit code 1 where that fails."""
    from tminus.model.files import CheckpointError
    from tminus.service.engine.loading import load_engine

    try:
        return load_engine(options)
    except (CheckpointError, ValueError) as error:
        fail(str(error))
