"""Durable jobs in one SQLite file with a WAL (write-ahead log). A commit is on the disk when its call returns."""

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
SPARE_PAGES = 256  # number of free pages that the file keeps for reuse
WAL_BYTES = HEADER + 1000 * (FRAME + 4096)  # a WAL longer than this is copied into the file, and a new WAL begins
SPARE_BYTES = 8 * 2**20  # the WAL is also copied if it and the file have more unused bytes than this


class SqliteStore(JobStore):
    """Stores jobs in a file. Owns the file's only connection, which locks out other processes.

    Raises ValueError if the file cannot be used.
    """

    def __init__(self, file: Path | None) -> None:
        """file: None to keep the jobs in memory."""
        super().__init__(make_sqlite_tables())
        self._file, self._name = file, f"the job store {file}"
        self._wal = None if file is None else beside(file, "wal")
        self._most_wal_bytes = WAL_BYTES
        self._begun_at, self._swept_at = 0, 0  # total_changes when the WAL began, and at the last sweep
        self._identity: tuple[int, int] | None = None  # device and inode of the open file
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
                "synchronous = FULL",  # accepted jobs survive a power failure
                "wal_autocheckpoint = 0",  # see _begin_wal
                f"journal_size_limit = {WAL_BYTES}",  # size to which a WAL is truncated when a new one begins
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
            with self._transaction() as run:  # no other process is attempting deliveries
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

        If a later start finds fewer jobs in the database, it logs a warning.
        """
        if self._file is None:
            return
        with suppress(OSError):  # harmless: the jobs themselves are in the database
            descriptor = os.open(kept(self._file), os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(descriptor, b"%-20d" % number_of_jobs(self._driver), 0)
            finally:
                os.close(descriptor)

    def claim_all(self) -> Claimed:
        """Claim all unfinished jobs, because no other server has the file open.

        Jobs with damaged records end as failed.
        """
        return self._claimed(self._unended())

    def _unended(self) -> Sequence[Any]:
        jobs = self._tables.jobs
        query = sa.select(*self._record_columns).where(jobs.c.outcome.is_(None)).order_by(jobs.c.arrival)
        with self._transaction() as run:
            rows: Sequence[Any] = run(query).all()
        return rows

    def left_behind(self, served: Collection[str]) -> Mapping[str, list[str]]:
        """Return the unfinished jobs in the folder's other files, except in files that a server has open."""
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
        """Return some of the file's free pages to the disk. Return True if the caller should call again."""
        try:
            (free,) = self._pragma("freelist_count")
            if free > SPARE_PAGES:
                # `execute` would step a statement without rows only once, which frees a single page.
                self._driver.executescript(f"PRAGMA incremental_vacuum({SWEEP_PAGES})")
                return bool(self._pragma("freelist_count")[0] < free)
            if self._file is not None:
                self._shorten(self._file)
        except (OSError, sqlite3.Error) as error:  # harmless: new jobs will use the free pages
            log.warning("the job store %s does not shrink: %s", self._file, error)
        return False

    def _shorten(self, file: Path) -> None:
        """Copy the WAL into the file if both take much more space than their content, or if the store is idle.

        Without the copy, a vacuum does not shorten the file. Data that are only in the WAL can be destroyed by one bad
        byte, so an idle store copies them.
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
        """Copy the WAL into the file, and begin a new WAL.

        Before the copy, a row is written that means "a WAL follows". The first transaction of the new WAL deletes this
        row. If the row still exists at a start, the WAL was lost.
        """
        try:
            self._driver.execute("INSERT OR IGNORE INTO wal_follows VALUES (1)")
            self._pragma("wal_checkpoint(RESTART)")
            self._driver.execute("DELETE FROM wal_follows")
            self._most_wal_bytes = WAL_BYTES
        except sqlite3.Error as error:  # harmless: the old WAL keeps all data, and grows
            log.warning("the WAL of the job store %s cannot be copied into it: %s", self._file, error)
            self._most_wal_bytes = self._wal_bytes() + WAL_BYTES
        self._begun_at = self._driver.total_changes

    def check(self, *, write: bool) -> None:
        self._check_there()
        if write:
            with self._transaction() as run:
                # The value stays the same, but the statement writes one page to the disk.
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
            with suppress(sqlite3.Error):  # the row exists only if the disk had no space for a new WAL
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
    """Lock out other processes, so that no other server runs the same jobs. Disable implicit transactions."""
    connection.isolation_level = None
    connection.text_factory = lambda data: data.decode(errors="replace")  # one bad byte must not fail a whole list
    connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def open_store(state_dir: str, weights_hash: str) -> JobStore:
    """Open the file with the jobs of these weights. Each set of weights has its own file.

    state_dir: a folder, "" for the default folder in the user's home, or ":memory:" for no file. If the disk is full,
    returns a store that tries to open the file at each call. Raises ValueError if the folder or file cannot be used;
    the message says what to do.
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
    """Create the state folder and return its path, or None for ":memory:". Raises ValueError as open_store does."""
    if state_dir == IN_MEMORY:
        return None
    try:
        # The default follows the XDG base directory specification. Path.home raises RuntimeError for a user without a
        # home.
        state_home = os.environ.get("XDG_STATE_HOME")
        folder = Path(state_dir or Path(state_home or Path.home() / ".local" / "state") / "tminus")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no folder for durable jobs can be made: {error}. Name one, or {IN_MEMORY} for none"
        ) from None
    return folder


class LateStore:
    """A JobStore whose file could not be opened, because the disk was full.

    Until the file is open, each call tries to open it, and raises StorageFailed if that fails.
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
