"""Durable jobs in one SQLite file. WAL; every commit is on the disk before it is answered."""

import logging
import os
import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from service.errors import StorageFailed
from service.job import Images, Inputs, SampleSpec, Snapshot
from service.store import JobRecord, Key, Outcome, Place

log = logging.getLogger(__name__)

VERSION = 1  # of the tables below
APPLICATION_ID = 0x746D696E  # "tmin", as SQLite's header keeps it: what file(1) and we know our own by
RECORD_BYTES = 1024  # what a job takes beside its images, roughly
IN_MEMORY = ":memory:"
BUSY_S = 2.0  # a server that was killed lets go at once; one that is there does not

metadata = sa.MetaData()
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("arrival", sa.Integer, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("created_us", sa.BigInteger, nullable=False),
    sa.Column("deadline_us", sa.BigInteger),
    sa.Column("outcome", sa.Text),
    sa.Column("finished_us", sa.BigInteger),
    sa.Column("fingerprint", sa.Text),
    sa.Column("problem", sa.JSON(none_as_null=True)),
    sa.Column("crashes", sa.Integer, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("key", sa.Text, unique=True),
    sa.Column("request_hash", sa.Text),
    sa.Index("jobs_by_outcome", "outcome", "created_us", "id"),
    sqlite_autoincrement=True,
)
snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
images_of = sa.Table(
    "images",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
inputs_of = sa.Table(
    "inputs",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
RECORD_COLUMNS = [column for column in jobs.c if column.name in JobRecord.__dataclass_fields__]


class SqliteStore:
    """Owns one connection, which keeps every other process out. Raises ValueError for a file that cannot be used."""

    def __init__(self, file: Path | None) -> None:
        """file None keeps everything in memory: it lives no longer than the process."""
        self._file = file
        if file is not None:
            _check_header(file)
        url = sa.URL.create("sqlite", database=None if file is None else str(file))
        arguments = {"check_same_thread": False, "timeout": BUSY_S}
        self._engine = sa.create_engine(url, poolclass=StaticPool, connect_args=arguments)
        sa.event.listen(self._engine, "connect", _on_connect)
        sa.event.listen(self._engine, "begin", _begin)
        try:
            self._connection = self._engine.connect()
            is_new = self._check()
            for pragma in (
                "auto_vacuum = INCREMENTAL",
                "journal_mode = WAL",
                "synchronous = FULL",  # an accepted job outlives a power cut too
            ):
                self._pragma(pragma)
            if is_new:
                with self._connection.begin():
                    self._pragma(f"application_id = {APPLICATION_ID}")
                    self._pragma(f"user_version = {VERSION}")
                    metadata.create_all(self._connection)
        except sa.exc.DBAPIError as error:
            self._engine.dispose()
            raise ValueError(_why_not(file, str(error.orig))) from None
        except sqlite3.Error as error:
            self.close()
            raise ValueError(_why_not(file, str(error))) from None
        except ValueError:
            self.close()
            raise

    def _check(self) -> bool:
        """Whether the file is a new one. Changes nothing; raises ValueError for one that is damaged, or not ours.

        In no transaction: BEGIN IMMEDIATE gives a new file its form, and auto_vacuum could not be set any more.
        """
        (version,) = self._pragma("user_version")
        if version == 0 and not self._pragma("schema_version")[0]:
            return True
        if version != VERSION:
            raise ValueError(_of_another_version(self._file, version))
        (found,) = self._pragma("quick_check(1)")
        if found != "ok":
            raise ValueError(_why_not(self._file, f"malformed: {found}"))
        return False

    def _pragma(self, text: str) -> Sequence[Any]:
        """Run a pragma; the first row it gives."""
        rows = self._driver.execute(f"PRAGMA {text}").fetchall()
        return rows[0] if rows else ()

    @property
    def _driver(self) -> sqlite3.Connection:
        connection = self._connection.connection.driver_connection
        assert isinstance(connection, sqlite3.Connection)
        return connection

    # --- JobStore ---

    def add(self, job: JobRecord, key: Key | None = None, inputs: Inputs | None = None) -> JobRecord | None:
        """See JobStore."""
        data = _pack_inputs(inputs) if inputs is not None else None
        values = asdict(job) | {"spec": job.spec.to_json(), "bytes": RECORD_BYTES + len(data or b"")}
        if key is not None:
            values |= {"key": key.name, "request_hash": key.request_hash}
        with self._transaction() as run:
            if key is not None and run(sa.select(jobs.c.id).where(jobs.c.key == key.name)).first():
                return None
            run(sa.insert(jobs).values(**values))
            if data is not None:
                run(sa.insert(inputs_of).values(job_id=job.id, data=data))
        return job

    def find(self, key: Key) -> tuple[JobRecord, bool] | None:
        """See JobStore."""
        with self._transaction() as run:
            row = run(sa.select(jobs).where(jobs.c.key == key.name)).one_or_none()
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
            return [_record(row) for row in run(query)]

    def finished(self, before: Place | None, outcomes: Collection[Outcome], limit: int) -> list[JobRecord]:
        """See JobStore."""
        query = sa.select(*RECORD_COLUMNS).where(jobs.c.outcome.in_(outcomes))
        if before is not None:
            query = query.where(sa.tuple_(jobs.c.created_us, jobs.c.id) < before)
        query = query.order_by(jobs.c.created_us.desc(), jobs.c.id.desc()).limit(limit)
        with self._transaction() as run:
            return [_record(row) for row in run(query)]

    def save(self, snapshots_by_job: Mapping[str, Snapshot], fingerprint: str) -> None:
        """See JobStore."""
        packed = {job_id: _pack_snapshot(snapshot) for job_id, snapshot in snapshots_by_job.items()}
        with self._transaction() as run:
            living = run(sa.select(jobs.c.id).where(jobs.c.id.in_(packed), jobs.c.outcome.is_(None))).scalars().all()
            run(sa.delete(snapshots).where(snapshots.c.job_id.in_(living)))
            if living:
                rows = [{"job_id": each, "fingerprint": fingerprint, "data": packed[each]} for each in living]
                run(sa.insert(snapshots), rows)

    def snapshot(self, job_id: str, fingerprint: str) -> Snapshot | None:
        """See JobStore."""
        query = sa.select(snapshots.c.data).where(snapshots.c.job_id == job_id, snapshots.c.fingerprint == fingerprint)
        with self._transaction() as run:
            data = run(query).scalar_one_or_none()
        return _unpack_snapshot(data) if data is not None else None

    def inputs(self, job_id: str) -> Inputs | None:
        """See JobStore."""
        with self._transaction() as run:
            data = run(sa.select(inputs_of.c.data).where(inputs_of.c.job_id == job_id)).scalar_one_or_none()
        return _unpack_inputs(data) if data is not None else None

    def crashed(self, job_id: str) -> None:
        """See JobStore."""
        with self._transaction() as run:
            run(sa.update(jobs).where(jobs.c.id == job_id).values(crashes=jobs.c.crashes + 1))

    def finish(self, job: JobRecord, images: Images | None = None) -> None:
        """See JobStore."""
        data = _pack_images(images) if images is not None else None
        ending = {name: getattr(job, name) for name in ("outcome", "finished_us", "fingerprint", "problem")}
        ending["bytes"] = RECORD_BYTES + len(data or b"")
        with self._transaction() as run:
            run(sa.update(jobs).where(jobs.c.id == job.id).values(**ending))
            run(sa.delete(snapshots).where(snapshots.c.job_id == job.id))
            run(sa.delete(inputs_of).where(inputs_of.c.job_id == job.id))
            if data is not None:
                run(sa.insert(images_of).values(job_id=job.id, data=data))

    def images(self, job_id: str) -> Images | None:
        """See JobStore."""
        with self._transaction() as run:
            data = run(sa.select(images_of.c.data).where(images_of.c.job_id == job_id)).scalar_one_or_none()
        return _unpack_images(data) if data is not None else None

    def delete(self, job_id: str) -> bool:
        """See JobStore."""
        with self._transaction() as run:
            return self._delete(run, [job_id]) > 0

    def sweep(self, before_us: int, max_bytes: int) -> int:
        """See JobStore."""
        ended = sa.select(jobs.c.id, jobs.c.finished_us, jobs.c.bytes).where(jobs.c.outcome.is_not(None))
        newer = sa.func.sum(jobs.c.bytes).over(order_by=(jobs.c.finished_us.desc(), jobs.c.arrival.desc()))
        ranked = ended.add_columns(newer.label("with_newer")).subquery()
        too_old = ranked.c.finished_us < before_us
        too_much = sa.and_(ranked.c.with_newer > max_bytes, ranked.c.with_newer > ranked.c.bytes)
        with self._transaction() as run:
            count = self._delete(run, run(sa.select(ranked.c.id).where(too_old | too_much)).scalars().all())
        if count:
            try:  # as a script, since a statement that gives no rows is stepped once, and frees one page
                self._driver.executescript("PRAGMA incremental_vacuum")
            except sqlite3.Error as error:  # the room is used again anyhow
                log.warning("the job store %s does not shrink: %s", self._file, error)
        return count

    def _delete(self, run: Callable[..., Any], job_ids: Sequence[str]) -> int:
        for table in (snapshots, inputs_of, images_of):
            run(sa.delete(table).where(table.c.job_id.in_(job_ids)))
        count: int = run(sa.delete(jobs).where(jobs.c.id.in_(job_ids))).rowcount
        return count

    def close(self) -> None:
        """See JobStore."""
        self._connection.close()
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., Any]]:
        """One transaction, in which statements are run; all of them, or none."""
        try:
            with self._connection.begin():
                yield self._connection.execute
        except sa.exc.DBAPIError as error:
            log.error("the job store %s: %s", self._file, error.orig)
            raise StorageFailed(f"the job store cannot do it: {error.orig}") from None


def open_store(state_dir: str, weights_hash: str) -> SqliteStore:
    """Open the jobs of these weights, in a file of their own: no other weights can finish them.

    state_dir: a folder; empty, one of the user's own; ":memory:", none. Raises ValueError for a folder or file that
    cannot be used, with what to do about it.
    """
    if state_dir == IN_MEMORY:
        return SqliteStore(None)
    try:
        folder = Path(state_dir) if state_dir else _home_state_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no folder for durable jobs can be made: {error}. Name one, or {IN_MEMORY} for none"
        ) from None
    return SqliteStore(folder / f"jobs-{weights_hash[:16]}.sqlite3")


def _home_state_dir() -> Path:
    """Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tminus"


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    """Keep others out, as two servers would both finish the same jobs; and let the driver begin no transaction."""
    connection.isolation_level = None
    connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _check_header(file: Path) -> None:
    """Refuse a file that is not ours or of a newer version, before anything is opened that might write to it.

    SQLite keeps both numbers in the file's first 100 bytes (sqlite.org/fileformat.html, section 1.3).
    """
    try:
        with file.open("rb") as opened:
            header = opened.read(100)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    if not header:  # a start that was cut off before it wrote anything
        return
    if not header.startswith(b"SQLite format 3\0") or len(header) < 100:
        raise ValueError(f"{file} is not a database, or is damaged; nothing was changed. Move it away to begin anew")
    version, application = (int.from_bytes(header[at : at + 4], "big") for at in (60, 68))
    if application == APPLICATION_ID and version > VERSION:
        raise ValueError(_of_another_version(file, version))
    if (version, application) != (0, 0) and application != APPLICATION_ID:  # zero: its first commit is in the WAL still
        raise ValueError(f"{file} is a database of something else; nothing was changed. Name another --state-dir")


def _of_another_version(file: Path | None, version: int) -> str:
    return (
        f"{file} is of version {version}, this tminus knows version {VERSION}; nothing was changed. "
        "Serve it with the tminus that made it, or name another --state-dir"
    )


def _why_not(file: Path | None, reason: str) -> str:
    reason = " ".join(reason.split())
    if "locked" in reason:
        return f"{file} is in use by another server; give this one a --state-dir of its own"
    if "malformed" in reason or "not a database" in reason:
        return f"{file} is damaged ({reason}); nothing was changed. Move it away to begin anew"
    return f"{file} cannot be used ({reason}); name another --state-dir, or {IN_MEMORY} for none"


def _record(row: Any) -> JobRecord:
    fields = {column.name: getattr(row, column.name) for column in RECORD_COLUMNS}
    return JobRecord(**fields | {"spec": SampleSpec.from_json(fields["spec"])})


# --- arrays as bytes: safetensors, which needs no trust ---


def _pack_snapshot(snapshot: Snapshot) -> bytes:
    arrays = {"steps": np.array(snapshot.steps), "x": snapshot.x, "x0_previous": snapshot.x0_previous}
    return safetensors.numpy.save({name: np.ascontiguousarray(each) for name, each in arrays.items()})


def _unpack_snapshot(data: bytes) -> Snapshot:
    arrays = safetensors.numpy.load(data)
    return Snapshot(tuple(map(int, arrays["steps"])), arrays["x"], arrays["x0_previous"])


def _pack_inputs(inputs: Inputs) -> bytes:
    arrays = {"image": inputs.image} | ({"mask": inputs.mask} if inputs.mask is not None else {})
    return zlib.compress(safetensors.numpy.save({name: np.ascontiguousarray(each) for name, each in arrays.items()}), 1)


def _unpack_inputs(data: bytes) -> Inputs:
    arrays = safetensors.numpy.load(zlib.decompress(data))
    return Inputs(arrays["image"], arrays.get("mask"))


def _pack_images(images: Images) -> bytes:
    return zlib.compress(safetensors.numpy.save({"images": np.ascontiguousarray(images)}), level=1)


def _unpack_images(data: bytes) -> Images:
    return safetensors.numpy.load(zlib.decompress(data))["images"]
