"""Where the store of durable jobs is, and what becomes of a start on a full disk."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import now_us
from tminus.service.jobs.store.sqlite_file import IN_MEMORY, DiskFull
from tminus.service.jobs.store.sqlite_store import SqliteStore

log = logging.getLogger(__name__)


def open_store(state_dir: str, weights_hash: str) -> JobStore:
    """Open the store of these weights' jobs, a file of their own: no other weights could finish the jobs.

    state_dir: a folder; "" for the default one in the user's home, ":memory:" for none. Where the disk is full, opening
    is tried again at each call. Raises ValueError for a folder or file that cannot be used, with what to do about it.
    """
    folder = state_folder(state_dir)
    if folder is None:
        return SqliteStore(None)
    file = folder / f"jobs-{weights_hash[:16]}.sqlite3"
    try:
        return SqliteStore(file)
    except DiskFull as error:
        log.error("%s; no durable job is accepted until there is room", error)
        return cast(JobStore, LateStore(lambda: SqliteStore(file)))


def state_folder(state_dir: str) -> Path | None:
    """Make the folder of what outlives the process; None for ":memory:". Raises ValueError as open_store does."""
    if state_dir == IN_MEMORY:
        return None
    try:
        folder = Path(state_dir) if state_dir else _home_state_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no folder for durable jobs can be made: {error}. Name one, or {IN_MEMORY} for none"
        ) from None
    return folder


class LateStore:
    """A JobStore whose file cannot be opened, as its disk is full. Each call tries again, and raises StorageFailed."""

    shared, lease_s = SqliteStore.shared, SqliteStore.lease_s

    def __init__(self, open_file: Callable[[], JobStore]) -> None:
        self._open_file = open_file
        self._store: JobStore | None = None

    def now_us(self) -> int:
        """See JobStore."""
        return now_us()

    def close(self) -> None:
        """See JobStore."""
        if self._store is not None:
            self._store.close()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._store is None:
                try:
                    self._store = self._open_file()
                except ValueError as error:
                    raise StorageFailed(f"the job store cannot be opened: {error}") from None
            return getattr(self._store, name)(*args, **kwargs)

        return call


def _home_state_dir() -> Path:
    """Follow the XDG base directory specification. Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tminus"
