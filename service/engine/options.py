"""Options for loading a model. No torch here: settings and the command line build it before torch is imported."""

from dataclasses import dataclass
from pathlib import Path

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
    short_batch: int | None = None
    max_rows: int | None = None
    max_jobs: int = 1
    cache_dir: Path | None = None
