"""Durable jobs in one SQLite file, in WAL mode: a commit is on the disk when its call returns."""

import json
import logging
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from tminus.service.errors import StorageFailed
from tminus.service.jobs import arrays
from tminus.service.jobs.sqlite_file import APPLICATION_ID, BUSY_S, VERSION, cannot_be_used, is_new, prepare, upgrade
from tminus.service.jobs.sqlite_tables import images_of, inputs_of, jobs, metadata, snapshots
from tminus.service.jobs.store import JobRecord, Key, Outcome, Place, now_us
from tminus.service.spec import Images, Inputs, SampleSpec, Snapshot

log = logging.getLogger(__name__)

RECORD_BYTES = 1024  # roughly what a job takes without its images
# The most that one sweep does: other calls wait some 30 ms for it, 0.2 s or more where a slow disk must catch up.
SWEEP_JOBS, SWEEP_BYTES, SWEEP_PAGES = 500, 16 * 2**20, 512
SPARE_PAGES = 256  # free pages that stay in the file, to be used again
WAL_BYTES = 8 * 2**20  # a larger WAL is copied into the file and truncated
RECORD_COLUMNS = [column for column in jobs.c if column.name in JobRecord.__dataclass_fields__]


class SqliteStore:
    """Owns one connection, which locks out all other processes. Raises ValueError for a file that cannot be used."""

    def __init__(self, file: Path | None) -> None:
        """file: None keeps everything in memory, no longer than the process lives."""
        self._file = file
        self._wal_bytes = 0  # at the last sweep
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
                "synchronous = FULL",  # an accepted job survives a power cut too
                "secure_delete = FAST",  # Debian's SQLite would overwrite deleted pages with zeros
            ):
                self._pragma(pragma)
            if new:
                with self._connection.begin():
                    self._pragma(f"application_id = {APPLICATION_ID}")
                    self._pragma(f"user_version = {VERSION}")
                    metadata.create_all(self._connection)
            upgrade(file, self._driver)
            self.unfinished()  # what the server reads first: if this fails it must not start
            made = os.stat(file) if file is not None else None
            self._identity = (made.st_dev, made.st_ino) if made is not None else None
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
        """Run a pragma, and return its first row."""
        rows = self._driver.execute(f"PRAGMA {text}").fetchall()
        return rows[0] if rows else ()

    @property
    def _driver(self) -> sqlite3.Connection:
        connection = self._connection.connection.driver_connection
        assert isinstance(connection, sqlite3.Connection)
        return connection

    # --- JobStore ---

    def add(self, job: JobRecord, key: Key | None = None, inputs: Inputs | None = None) -> bool:
        """See JobStore."""
        data = arrays.pack_inputs(inputs) if inputs is not None else None
        values = asdict(job) | {"spec": _json(job.spec.to_json()), "problem": _json(job.problem)}
        values["bytes"] = RECORD_BYTES + len(data or b"")
        if key is not None:
            values |= {"key": key.kept_as, "request_hash": key.request_hash}
        self._check_there()
        with self._transaction() as run:
            if key is not None and run(sa.select(jobs.c.id).where(jobs.c.key == key.kept_as)).first():
                return False
            run(sa.insert(jobs).values(**values))
            if data is not None:
                run(sa.insert(inputs_of).values(job_id=job.id, data=data))
        return True

    def find(self, key: Key) -> tuple[JobRecord, bool] | None:
        """See JobStore."""
        with self._transaction() as run:
            row = run(sa.select(jobs).where(jobs.c.key == key.kept_as)).one_or_none()
        return (_record(row), row.request_hash == key.request_hash) if row is not None else None

    def get(self, job_id: str) -> JobRecord | None:
        """See JobStore."""
        with self._transaction() as run:
            row = run(sa.select(*RECORD_COLUMNS).where(jobs.c.id == job_id)).one_or_none()
        return _record(row) if row is not None else None

    def unfinished(self) -> list[JobRecord]:
        """See JobStore."""
        query = sa.select(*RECORD_COLUMNS).where(jobs.c.outcome.is_(None)).order_by(jobs.c.arrival)
        with self._transaction() as run:
            rows = run(query).all()
        records = []
        for row in rows:
            try:
                records.append(_record(row))
            except StorageFailed as error:
                ending = {"outcome": "failed", "finished_us": now_us(), "problem": error.problem()}
                with suppress(StorageFailed):  # the next start tries again
                    self._finish(row.id, ending)
        return records

    def finished(
        self, before: Place | None, outcomes: Collection[Outcome], limit: int, owner: str | None = None
    ) -> list[JobRecord]:
        """See JobStore."""
        of_owner = [jobs.c.owner == owner] if owner is not None else []
        query = sa.select(*RECORD_COLUMNS).where(jobs.c.outcome.in_(outcomes), *of_owner)
        query = query.order_by(jobs.c.created_us.desc(), jobs.c.id.desc())
        records: list[JobRecord] = []
        while (missing := limit - len(records)) > 0:
            older = query if before is None else query.where(sa.tuple_(jobs.c.created_us, jobs.c.id) < before)
            with self._transaction() as run:
                rows = run(older.limit(missing)).all()
            for row in rows:
                with suppress(StorageFailed):
                    records.append(_record(row))
            if len(rows) < missing:
                break
            before = rows[-1].created_us, rows[-1].id
        return records

    def save(self, snapshots_by_job: Mapping[str, Snapshot], fingerprint: str) -> None:
        """See JobStore."""
        packed = {job_id: arrays.pack_snapshot(snapshot) for job_id, snapshot in snapshots_by_job.items()}
        with self._transaction() as run:
            # SQLite takes 32,766 variables in a statement; --max-jobs is at most 10,000.
            live = run(sa.select(jobs.c.id).where(jobs.c.id.in_(packed), jobs.c.outcome.is_(None))).scalars().all()
            run(sa.delete(snapshots).where(snapshots.c.job_id.in_(live)))
            if live:
                rows = [{"job_id": each, "fingerprint": fingerprint, "data": packed[each]} for each in live]
                run(sa.insert(snapshots), rows)

    def snapshot(self, job_id: str, fingerprint: str) -> Snapshot | None:
        """See JobStore."""
        query = sa.select(snapshots.c.data).where(snapshots.c.job_id == job_id, snapshots.c.fingerprint == fingerprint)
        with self._transaction() as run:
            data = run(query).scalar_one_or_none()
        with suppress(StorageFailed), _reading(f"the snapshot of job {job_id}, which begins anew,"):
            return arrays.unpack_snapshot(data) if data is not None else None
        return None

    def inputs(self, job_id: str) -> Inputs | None:
        """See JobStore."""
        with self._transaction() as run:
            data = run(sa.select(inputs_of.c.data).where(inputs_of.c.job_id == job_id)).scalar_one_or_none()
        with _reading(f"the inputs of job {job_id}"):
            return arrays.unpack_inputs(data) if data is not None else None

    def crashed(self, job_id: str) -> None:
        """See JobStore."""
        with self._transaction() as run:
            run(sa.update(jobs).where(jobs.c.id == job_id).values(crashes=jobs.c.crashes + 1))

    def finish(self, job: JobRecord, images: Images | None = None) -> None:
        """See JobStore."""
        ending = {name: getattr(job, name) for name in ("outcome", "finished_us", "fingerprint", "problem")}
        self._finish(job.id, ending, arrays.pack_images(images) if images is not None else None)

    def _finish(self, job_id: str, ending: dict[str, Any], images: bytes | None = None) -> None:
        ending |= {"problem": _json(ending["problem"]), "bytes": RECORD_BYTES + len(images or b"")}
        with self._transaction() as run:
            run(sa.update(jobs).where(jobs.c.id == job_id).values(**ending))
            run(sa.delete(snapshots).where(snapshots.c.job_id == job_id))
            run(sa.delete(inputs_of).where(inputs_of.c.job_id == job_id))
            if images is not None:
                run(sa.insert(images_of).values(job_id=job_id, data=images))

    def images(self, job_id: str) -> Images | None:
        """See JobStore."""
        with self._transaction() as run:
            data = run(sa.select(images_of.c.data).where(images_of.c.job_id == job_id)).scalar_one_or_none()
        with _reading(f"the images of job {job_id}"):
            return arrays.unpack_images(data) if data is not None else None

    def delete(self, job_id: str, owner: str | None = None) -> bool:
        """See JobStore."""
        mine = [jobs.c.id == job_id, *([jobs.c.owner == owner] if owner is not None else [])]
        with self._transaction() as run:
            return self._delete(run, run(sa.select(jobs.c.id).where(*mine)).scalars().all()) > 0

    def sweep(self, before_us: int, max_bytes: int) -> bool:
        """See JobStore."""
        ended = jobs.c.finished_us.is_not(None)
        oldest = sa.select(jobs.c.id, jobs.c.finished_us, jobs.c.bytes).where(ended)
        oldest = oldest.order_by(jobs.c.finished_us, jobs.c.arrival).limit(SWEEP_JOBS)
        chosen: list[str] = []
        with self._transaction() as run:
            total = left = run(sa.select(sa.func.total(jobs.c.bytes)).where(ended)).scalar_one()
            for row in run(oldest).all():
                too_much = left > max_bytes and left > row.bytes
                if not (row.finished_us < before_us or too_much) or total - left >= SWEEP_BYTES:
                    break
                chosen.append(row.id)
                left -= row.bytes
            if chosen:
                self._delete(run, chosen)
        if chosen:
            log.info("%d jobs that had ended were deleted", len(chosen))
        return bool(chosen) or self._shrink()

    def _shrink(self) -> bool:
        """Give some of the file's free pages back to the disk; returns whether there are more."""
        try:
            (free,) = self._pragma("freelist_count")
            if free > SPARE_PAGES:
                # As a script, since the driver steps a statement without rows once, which frees one page.
                self._driver.executescript(f"PRAGMA incremental_vacuum({SWEEP_PAGES})")
                return bool(self._pragma("freelist_count")[0] < free)
            if self._file is not None:
                self._checkpoint(self._file, Path(f"{self._file.resolve()}-wal").stat().st_size)
        except (OSError, sqlite3.Error) as error:  # no harm: new jobs use the free pages
            log.warning("the job store %s does not shrink: %s", self._file, error)
        return False

    def _checkpoint(self, file: Path, wal_bytes: int) -> None:
        """Copy the WAL into the file and empty it, where both are large or the store is idle.

        A vacuum alone does not shorten the file; and what is in the WAL only, one bad byte may lose.
        """
        idle = wal_bytes == self._wal_bytes
        spare = file.stat().st_size + wal_bytes - self._pragma("page_count")[0] * self._pragma("page_size")[0]
        if wal_bytes and (idle or spare > WAL_BYTES):
            self._pragma("wal_checkpoint(TRUNCATE)")
            wal_bytes = 0
        self._wal_bytes = wal_bytes

    def _delete(self, run: Callable[..., Any], job_ids: Sequence[str]) -> int:
        for table in (snapshots, inputs_of, images_of):
            run(sa.delete(table).where(table.c.job_id.in_(job_ids)))
        return int(run(sa.delete(jobs).where(jobs.c.id.in_(job_ids))).rowcount)

    def check(self, *, write: bool) -> None:
        """See JobStore."""
        self._check_there()
        if write:
            with self._transaction() as run:
                run(sa.text(f"PRAGMA application_id = {APPLICATION_ID}"))  # as it is: one page to the disk

    def _check_there(self) -> None:
        """Raise StorageFailed if the file has been deleted, or replaced: what is written would be lost with it."""
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
        """See JobStore."""
        self._connection.close()
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., Any]]:
        """Run statements in one transaction. Raises StorageFailed when one of them fails, which undoes all."""
        try:
            with self._connection.begin():
                yield self._connection.execute
        except sa.exc.DBAPIError as error:
            log.error("the job store %s: %s", self._file, error.orig)
            raise StorageFailed(f"the job store cannot do it: {error.orig}") from None


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    """Lock out other processes, since two servers would both run the same jobs; let no transaction begin by itself."""
    connection.isolation_level = None
    connection.text_factory = lambda data: data.decode(errors="replace")  # one bad byte must not fail a whole list
    connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _json(value: Mapping[str, Any] | None) -> str | None:
    return json.dumps(value) if value is not None else None


def _record(row: Any) -> JobRecord:
    """Make a record of a row. Raises StorageFailed where that is damaged."""
    fields = {column.name: getattr(row, column.name) for column in RECORD_COLUMNS}
    with _reading(f"the record of job {row.id}"):
        fields["spec"] = SampleSpec.from_json(json.loads(row.spec))
        fields["problem"] = json.loads(row.problem) if row.problem is not None else None
        return JobRecord(**fields)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Raise StorageFailed for data that cannot be decoded: SQLite itself does not notice a flipped byte."""
    try:
        yield
    except arrays.UNREADABLE as error:
        log.error("%s cannot be read: %r", what, error)
        raise StorageFailed(f"{what} cannot be read") from None
