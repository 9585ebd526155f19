"""Durable jobs in one SQLite file, in WAL mode.

A commit is on the disk when the call that made it returns.
"""

import logging
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import Claimed, JobRecord, Key, now_us
from tminus.service.jobs.store.sqlite_file import (
    APPLICATION_ID,
    BUSY_S,
    FOLLOWS,
    FRAME,
    HEADER,
    IN_MEMORY,
    VERSION,
    DiskFull,
    beside,
    cannot_be_used,
    is_new,
    kept,
    number_of_jobs,
    prepare,
    unended,
    upgrade,
)
from tminus.service.jobs.store.tables import make_sqlite_tables
from tminus.service.jobs.webhooks.delivery_store import Run
from tminus.service.spec import Inputs

log = logging.getLogger(__name__)

SWEEP_PAGES = 512  # maximum number of pages that one call returns to the disk
SPARE_PAGES = 256  # free pages that stay in the file for reuse
WAL_BYTES = HEADER + 1000 * (FRAME + 4096)  # a WAL above this size is copied into the file, and a new WAL begins
SPARE_BYTES = 8 * 2**20  # the WAL is also copied if the file and the WAL have more unused bytes than this


class SqliteStore(JobStore):
    """Stores jobs in a file. Owns the file's only connection, whose lock excludes other processes.

    Raises ValueError if the file cannot be used.
    """

    def __init__(self, file: Path | None) -> None:
        """file: None keeps the jobs in memory."""
        super().__init__(make_sqlite_tables())
        self._file, self._name = file, f"the job store {file}"
        self._wal = None if file is None else beside(file, "wal")
        self._most_wal_bytes = WAL_BYTES
        self._begun_at, self._swept_at = 0, 0  # number of changes when the WAL began and at the last sweep
        self._identity: tuple[int, int] | None = None  # device and inode; None until the file is open
        if file is not None:
            prepare(file)
        url = sa.URL.create("sqlite", database=None if file is None else str(file))
        arguments = {"check_same_thread": False, "timeout": BUSY_S}
        self._engine = sa.create_engine(url, poolclass=StaticPool, connect_args=arguments)
        sa.event.listen(self._engine, "connect", _on_connect)
        sa.event.listen(self._engine, "begin", _begin)
        try:
            self._connection = self._engine.connect()
            new = is_new(file, self._driver)
            for pragma in (
                "auto_vacuum = INCREMENTAL",
                "journal_mode = WAL",
                "synchronous = FULL",  # an accepted job survives even a power failure
                "wal_autocheckpoint = 0",  # see _begin_wal
                f"journal_size_limit = {WAL_BYTES}",  # a longer WAL is truncated to this size when a new WAL begins
                "secure_delete = FAST",  # by default, Debian's SQLite overwrites deleted pages with zeros
            ):
                self._pragma(pragma)
            if new:
                with self._connection.begin():
                    self._pragma(f"application_id = {APPLICATION_ID}")
                    self._pragma(f"user_version = {VERSION}")
                    self._tables.metadata.create_all(self._connection)
            upgrade(file, self._driver)
            self._driver.execute(FOLLOWS)
            self._unended()  # the first read; if it fails, the server must not start
            attempted = self._deliveries.c.held_until_us.is_not(None)
            with self._transaction() as run:  # no delivery attempt is running, because this is the only process
                run(sa.update(self._deliveries).where(attempted).values(held_until_us=None))
            self._begin_wal()
            if file is not None:
                made = os.stat(file)
                self._identity = made.st_dev, made.st_ino
            self._note_kept()
        except sa.exc.DBAPIError as error:
            self._engine.dispose()
            raise cannot_be_used(file, error.orig) from None
        except (sqlite3.Error, StorageFailed) as error:
            self.close()
            raise cannot_be_used(file, error) from None
        except ValueError:
            self.close()
            raise

    def _pragma(self, text: str) -> Sequence[Any]:
        rows = self._driver.execute(f"PRAGMA {text}").fetchall()
        return rows[0] if rows else ()

    @property
    def _driver(self) -> sqlite3.Connection:
        connection = self._connection.connection.driver_connection
        assert isinstance(connection, sqlite3.Connection)
        return connection

    def now_us(self) -> int:
        return now_us()

    def add(self, job: JobRecord, key: Key | None = None, inputs: Inputs | None = None, *, held: bool = True) -> bool:
        self._check_there()
        added = super().add(job, key, inputs, held=held)
        self._note_kept()
        return added

    def _note_kept(self) -> None:
        """Write the number of jobs so far to the file `kept`.

        The next start warns if the database has fewer jobs.
        """
        if self._file is None:
            return
        with suppress(OSError):  # harmless: the jobs are in the database
            descriptor = os.open(kept(self._file), os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(descriptor, b"%-20d" % number_of_jobs(self._driver), 0)
            finally:
                os.close(descriptor)

    def claim_all(self) -> Claimed:
        """Claim all unfinished jobs, because no other server has the file open.

        End jobs with damaged records as failed.
        """
        return self._claimed(self._unended())

    def _unended(self) -> Sequence[Any]:
        jobs = self._tables.jobs
        query = sa.select(*self._record_columns).where(jobs.c.outcome.is_(None)).order_by(jobs.c.arrival)
        with self._transaction() as run:
            rows: Sequence[Any] = run(query).all()
        return rows

    def left_behind(self, served: Collection[str]) -> Mapping[str, list[str]]:
        """Return the unfinished jobs of the folder's other files, except files that a server has open."""
        if self._file is None:
            return {}
        hashes = {each[:16] for each in served}
        files = {each.stem.removeprefix("jobs-"): each for each in self._file.parent.glob("jobs-*.sqlite3")}
        found = {weights: unended(each) for weights, each in files.items() if weights not in hashes}
        return {weights: job_ids for weights, job_ids in found.items() if job_ids}

    def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        with self._transaction() as run:
            swept = self._sweep(run, before_us, max_bytes, owed_after_us)
        return swept > 0 or self._shrink()

    def _shrink(self) -> bool:
        """If the file has many free pages, return some of them to the disk. Return True if this freed any."""
        try:
            (free,) = self._pragma("freelist_count")
            if free > SPARE_PAGES:
                # Do not use `execute`, which steps a statement without rows only once and so frees only one page.
                self._driver.executescript(f"PRAGMA incremental_vacuum({SWEEP_PAGES})")
                return bool(self._pragma("freelist_count")[0] < free)
            if self._file is not None:
                self._shorten(self._file)
        except (OSError, sqlite3.Error) as error:  # harmless: new jobs use the free pages
            log.warning("the job store %s does not shrink: %s", self._file, error)
        return False

    def _shorten(self, file: Path) -> None:
        """Copy the WAL into the file if the two waste much space, or if the store is idle.

        A vacuum alone does not shorten the file. As long as data is only in the WAL, one bad byte may destroy it.
        """
        changes = self._driver.total_changes
        spare = file.stat().st_size + self._wal_bytes() - self._pragma("page_count")[0] * self._pragma("page_size")[0]
        idle = changes == self._swept_at and changes != self._begun_at
        if idle or spare > SPARE_BYTES:
            self._begin_wal()
        self._swept_at = self._driver.total_changes

    def _wal_bytes(self) -> int:
        return self._wal.stat().st_size if self._wal is not None and self._wal.exists() else 0

    def _begin_wal(self) -> None:
        """Copy the WAL into the file and begin a new WAL.

        A row in `wal_follows` is written before the copy, and the first transaction of the new WAL deletes it. If a
        start still finds the row, the new WAL was lost.
        """
        try:
            self._driver.execute("INSERT OR IGNORE INTO wal_follows VALUES (1)")
            self._pragma("wal_checkpoint(RESTART)")
            self._driver.execute("DELETE FROM wal_follows")
            self._most_wal_bytes = WAL_BYTES
        except sqlite3.Error as error:  # harmless: the WAL keeps everything, but grows
            log.warning("the WAL of the job store %s cannot be copied into it: %s", self._file, error)
            self._most_wal_bytes = self._wal_bytes() + WAL_BYTES
        self._begun_at = self._driver.total_changes

    def check(self, *, write: bool) -> None:
        self._check_there()
        if write:
            with self._transaction() as run:
                # The value does not change, but the statement writes a page to the disk.
                run(sa.text(f"PRAGMA application_id = {APPLICATION_ID}"))

    def _check_there(self) -> None:
        """Raise StorageFailed if the file was deleted or replaced, because writes would be lost."""
        if self._file is None:
            return
        try:
            there = os.stat(self._file)
        except OSError as error:
            there = None
            reason = error.strerror
        if there is None or (there.st_dev, there.st_ino) != self._identity:
            reason = "another file is in its place" if there is not None else reason
            log.error("the job store %s is gone: %s", self._file, reason)
            raise StorageFailed(f"the job store's file is gone: {reason}. The server must be restarted")

    def close(self) -> None:
        if not self._connection.closed:
            with suppress(sqlite3.Error):  # the row still exists only if the disk had no space for a new WAL
                self._driver.execute("DELETE FROM wal_follows")
        self._connection.close()
        self._engine.dispose()
        if self._file is not None and self._identity is not None:
            with suppress(OSError):
                kept(self._file).unlink(missing_ok=True)

    @contextmanager
    def _transaction(self) -> Iterator[Run]:
        with super()._transaction() as run:
            yield run
        if self._wal_bytes() > self._most_wal_bytes:
            self._begin_wal()


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    """Lock out other processes, because two servers would run the same jobs.

    Disable implicit transactions.
    """
    connection.isolation_level = None
    connection.text_factory = lambda data: data.decode(errors="replace")  # one bad byte must not make a whole list fail
    connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def open_store(state_dir: str, weights_hash: str) -> JobStore:
    """Open the file that contains the jobs of these weights. Each set of weights has its own file.

    state_dir: a folder, "" for the default folder in the user's home, or ":memory:" for no file. If the disk is full,
    each call to the returned store tries to open the file again. Raises ValueError if the folder or the file cannot be
    used. The message says what to do.
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
    """Create the state folder and return its path, or None for ":memory:".

    Raises ValueError if that fails.
    """
    if state_dir == IN_MEMORY:
        return None
    try:
        # As in the XDG Base Directory Specification. Path.home raises RuntimeError if the user has no home.
        state_home = os.environ.get("XDG_STATE_HOME")
        folder = Path(state_dir or Path(state_home or Path.home() / ".local" / "state") / "tminus")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no folder for durable jobs can be made: {error}. Name one, or {IN_MEMORY} for none"
        ) from None
    return folder


class LateStore:
    """A JobStore whose file could not be opened because the disk was full.

    Each call tries to open the file, and raises StorageFailed if it still cannot be opened.
    """

    def __init__(self, open_file: Callable[[], JobStore]) -> None:
        self._open_file = open_file
        self._store: JobStore | None = None

    def now_us(self) -> int:
        return now_us()

    def close(self) -> None:
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
