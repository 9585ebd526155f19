"""Loading a model for a command. torch is imported when the function runs."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tminus.service.cli.output import fail
from tminus.service.engine.options import LoadOptions

if TYPE_CHECKING:
    from tminus.service.engine.loading import Loaded
    from tminus.service.model_info import ModelInfo


def load(options: LoadOptions, places_of: "Callable[[ModelInfo], int]", fingerprint: str | None) -> "Loaded":
    """Load an engine for one job, see `load_engine`; one clear line and exit code 1 where that fails."""
    from tminus.model.files import CheckpointError
    from tminus.service.engine.loading import load_engine
    from tminus.service.errors import ServiceError

    try:
        return load_engine(options, places_of, fingerprint)
    except (CheckpointError, ValueError, ServiceError) as error:
        fail(str(error))
