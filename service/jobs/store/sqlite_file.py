"""Checks a file before the job store opens it. A rejected file stays unchanged.

The error says in one line why the file was rejected.
"""

import errno
import logging
import os
import re
import shlex
import shutil
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tminus.service.jobs.store.records import listed

log = logging.getLogger(__name__)

VERSION = 5  # version of the tables in tables.py
# Statements that upgrade the tables from each version to the next.
UPGRADES: Mapping[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE jobs ADD COLUMN owner TEXT DEFAULT '' NOT NULL",
        "CREATE INDEX jobs_by_owner ON jobs (owner, outcome, created_us, id)",
    ),
    2: (
        "CREATE TABLE objects (key TEXT NOT NULL, job_id TEXT NOT NULL, state TEXT NOT NULL, since_us BIGINT NOT NULL, "
        "bytes BIGINT NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (key))",
        "CREATE INDEX objects_by_job ON objects (job_id)",
        "CREATE INDEX objects_by_state ON objects (state, since_us)",
    ),
    3: (
        "ALTER TABLE jobs ADD COLUMN webhook TEXT",
        "CREATE TABLE deliveries (id TEXT NOT NULL, job_id TEXT NOT NULL, event TEXT NOT NULL, receiver TEXT NOT NULL, "
        "state TEXT NOT NULL, attempts INTEGER NOT NULL, since_us BIGINT NOT NULL, due_us BIGINT NOT NULL, "
        "held_until_us BIGINT, error TEXT, PRIMARY KEY (id), UNIQUE (job_id, event))",
        "CREATE INDEX deliveries_by_due ON deliveries (state, due_us)",
        "CREATE INDEX deliveries_by_receiver ON deliveries (state, receiver)",
    ),
    4: ("ALTER TABLE jobs ADD COLUMN background BOOLEAN DEFAULT 0 NOT NULL",),
}
# A row in this table means that a WAL (write-ahead log) must be beside the file. The first transaction in that WAL
# deletes the row, so a row that can still be read means that the WAL is missing. Earlier versions can ignore the table,
# so VERSION did not change.
FOLLOWS = "CREATE TABLE IF NOT EXISTS wal_follows (yes INTEGER PRIMARY KEY)"
HEADER, FRAME = 32, 24  # bytes of the WAL's header, and of each frame's header, which a page follows
WAL_MAGIC = 0x377F0683  # the lowest bit is the byte order of the checksums
JOB_ID = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
APPLICATION_ID = 0x746D696E  # "tmin" in SQLite's header marks the file as ours, also for file(1)
IN_MEMORY = ":memory:"
BUSY_S = 2.0  # seconds to wait for another process's lock; the lock of a killed server is released at once
UNTOUCHED = "; nothing was changed"
LEAST_FREE_BYTES = 2**20  # enough for a WAL and its index
CHECK_S = 10.0  # seconds for the damage check; 1 GiB takes 0.2 s from memory, 2.3 s from a disk at 450 MB/s


def prepare(file: Path) -> None:
    """Create the file if it does not exist; otherwise, check it.

    Raises ValueError if the file is damaged, in use, of a newer version, or not a job store.
    """
    _check_header(file)
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # SQLite gives the WAL the same mode
    except FileExistsError:
        pass
    except OSError as error:
        raise cannot_be_used(file, error) from None
    wal = beside(file, "wal")
    wal_bytes = wal.stat().st_size if wal.exists() else 0  # a missing WAL counts as empty
    try:
        with _reading(file, BUSY_S) as connection:
            new = is_new(file, connection)  # also True if all content is in a WAL that SQLite ignores
            tells = _check_wal(file, connection)
            lost = _kept_before(file)
            if not new:
                _check_pages(file, connection)
                lost -= number_of_jobs(connection)
                if wal_bytes <= HEADER and _lacks_wal(connection):
                    tells.append(f"the last server left {wal}, and it is gone: jobs that were only in it are missing")
            if lost > 0:
                tells.append(f"{file} lacks jobs that were accepted, the last {lost}")
            if tells:
                log.warning("%s", "; ".join(tells))
    except sqlite3.Error as error:
        # SQLITE_READONLY_ROLLBACK means that a first start was interrupted. The store's own connection can write, so it
        # will roll the file back.
        if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_READONLY_ROLLBACK:
            if isinstance(cannot := cannot_be_used(file, error), DiskFull):
                raise cannot from None
            raise ValueError(why_not(file, str(error), UNTOUCHED)) from None


@contextmanager
def _reading(file: Path, patience_s: float) -> Iterator[sqlite3.Connection]:
    """Open a read-only connection that leaves the file and its WAL unchanged.

    A connection that can write would, on closing, copy a killed server's WAL into the file, even if the file was just
    rejected.
    """
    index, wal = beside(file, "shm"), beside(file, "wal")
    was_there, had_wal = index.exists(), wal.exists()
    try:
        uri = f"{file.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=patience_s, isolation_level=None)) as connection:
            try:
                yield connection
            finally:
                if not had_wal:  # this connection made the WAL; while it reads, no server can make its own
                    with suppress(OSError, sqlite3.Error):  # sqlite3.Error: a server has the file open
                        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
                        if mode == "wal" and not wal.stat().st_size:
                            wal.unlink()
    finally:
        if not was_there:
            with suppress(OSError):  # no index was created in a read-only folder
                index.unlink(missing_ok=True)


def number_of_jobs(connection: sqlite3.Connection) -> int:
    """Return the number of jobs that were ever added to a file."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchone()
    return int(row[0]) if row is not None else 0


def kept(file: Path) -> Path:
    """Return the path of the small file with the number of accepted jobs.

    It exists while the database is open, and after a crash.
    """
    return file.with_name(f"kept-{file.stem}")


def _kept_before(file: Path) -> int:
    try:
        return int(kept(file).read_text("ascii"))
    except (OSError, ValueError):
        return 0


def unended(file: Path) -> list[str]:
    """Return the ids of a file's unfinished jobs. Empty if a server has the file open or it cannot be read."""
    try:
        with _reading(file, 0) as connection:
            query = "SELECT id FROM jobs WHERE outcome IS NULL ORDER BY created_us"
            return [job_id for (job_id,) in connection.execute(query)]
    except sqlite3.Error:
        return []


def is_new(file: Path | None, connection: sqlite3.Connection) -> bool:
    """Return True if the file has no tables yet. Raises ValueError if their version is unknown."""
    # Do not use a transaction: BEGIN IMMEDIATE writes a new file's header, and auto_vacuum must be set before that.
    version, schema_version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "schema_version")
    )
    if version not in (VERSION, *UPGRADES) and (version or schema_version):
        raise ValueError(_of_another_version(file, version))
    return not version


def upgrade(file: Path | None, connection: sqlite3.Connection) -> None:
    """Upgrade tables of an earlier version to VERSION, in one transaction."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == VERSION:
        return
    statements = [statement for earlier in range(version, VERSION) for statement in UPGRADES[earlier]]
    for statement in ("BEGIN IMMEDIATE", *statements, f"PRAGMA user_version = {VERSION}", "COMMIT"):
        connection.execute(statement)
    log.info("%s was of version %d and is of version %d now", file, version, VERSION)


class DiskFull(ValueError):
    """Raised if the disk is full. There may be space again later."""


def cannot_be_used(file: Path | None, error: BaseException | None) -> ValueError:
    """Return an error that says why a file cannot be used. error: raised by SQLite or the operating system."""
    full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or "disk is full" in str(error)
    full |= getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if not full and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_IOERR and file is not None:
        # SQLite reports an I/O error if the disk has no space for the WAL's index.
        full = shutil.disk_usage(file.parent).free < LEAST_FREE_BYTES
    return (DiskFull if full else ValueError)(why_not(file, str(error)))


def why_not(file: Path | None, reason: str, done: str = "") -> str:
    """Return a message that says why a file cannot be used, and what the user can do.

    done: what was done to a damaged file.
    """
    reason = " ".join(reason.split())
    if "locked" in reason:
        return f"{file} is in use by another server; give this one a --state-dir of its own"
    if "malformed" in reason or "not a database" in reason:
        return f"{file} is damaged ({reason}){done}. Move it away to begin anew"
    return f"{file} cannot be used ({reason}); name another --state-dir, or {IN_MEMORY} for none"


def _check_header(file: Path) -> None:
    """Raise ValueError if the file is of a newer version, damaged, or not a job store.

    An empty file with a WAL also counts as damaged, because SQLite would treat it as a new database and delete the WAL.
    The first 100 bytes contain the version and the application id (sqlite.org/fileformat.html, section 1.3).
    """
    try:
        with file.open("rb") as opened:
            header = opened.read(100)
    except FileNotFoundError:
        header = b""
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    if not header:  # a first start, or an earlier start that wrote nothing
        wal = beside(file, "wal")
        if wal.exists() and wal.stat().st_size:  # SQLite would delete the WAL
            raise ValueError(why_not(file, f"malformed: it is empty, but {wal.name} is not", UNTOUCHED))
        return
    if not header.startswith(b"SQLite format 3\0") or len(header) < 100:
        raise ValueError(f"{file} is not a database, or is damaged{UNTOUCHED}. Move it away to begin anew")
    version, application = (int.from_bytes(header[at : at + 4], "big") for at in (60, 68))
    if application == APPLICATION_ID and version > VERSION:
        raise ValueError(_of_another_version(file, version))
    if (version, application) != (0, 0) and application != APPLICATION_ID:  # 0: the first commit is still in the WAL
        raise ValueError(f"{file} is the database of another program{UNTOUCHED}. Name another --state-dir")


def _check_wal(file: Path, connection: sqlite3.Connection) -> list[str]:
    """Raise ValueError if more than the WAL's last transaction is damaged.

    Return warnings about a truncated WAL. connection: must already have read from the file.

    SQLite silently ignores everything from the first frame with a wrong checksum. A crash can damage only the last
    transaction, which was being written. If more transactions follow the wrong frame, the file was damaged in another
    way, and accepted jobs would be lost silently. If the WAL ends inside a frame, it does not show whether a crash or
    something else truncated it.

    Formats: sqlite.org/fileformat.html, section 4; sqlite.org/walformat.html, section 2.1.
    """
    wal, index = beside(file, "wal"), beside(file, "shm")
    data = wal.read_bytes() if wal.exists() else b""
    if len(data) < HEADER or not index.exists():  # SQLite has not read a WAL
        return []
    size = FRAME + int(connection.execute("PRAGMA page_size").fetchone()[0])
    # The index contains the number of valid frames, up to the last commit.
    sound = HEADER + int.from_bytes(index.read_bytes()[16:20], sys.byteorder) * size
    header_verifies = _wal_header_verifies(data)
    salts = data[16:24] if header_verifies else data[HEADER + 8 : HEADER + 16]
    # Frames with other salts are left from an earlier WAL. They come after all frames of this WAL.
    starts = range(sound, len(data) - size + 1, size)
    frames = [data[at : at + size] for at in starts if data[at + 8 : at + 16] == salts]
    commits = sum(frame[4:8] != bytes(4) for frame in frames)
    if commits >= 2:
        ids = sorted({name.decode() for frame in frames for name in JOB_ID.findall(frame)})
        raise ValueError(
            f"{wal} is damaged: {commits} transactions cannot be read{UNTOUCHED}. Jobs in doubt: "
            f"{listed(ids) or 'none'}. To go on with what came before: "
            f"truncate -s {sound if header_verifies else 0} {shlex.quote(str(wal))}"
        )
    if header_verifies and (len(data) - HEADER) % size and len(frames) == len(starts):
        return [f"{wal} ends inside a frame: its last {len(data) - sound} bytes are ignored"]
    return []


def _wal_header_verifies(data: bytes) -> bool:
    magic, *words = struct.unpack(">8I", data[:HEADER])
    one = two = 0
    for first, second in struct.iter_unpack(">2I" if magic & 1 else "<2I", data[: HEADER - 8]):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return magic | 1 == WAL_MAGIC and [one, two] == words[-2:]


def _lacks_wal(connection: sqlite3.Connection) -> bool:
    """Return True if the WAL is missing: the row that its first transaction deletes still exists."""
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'wal_follows'").fetchone():
        return False
    return connection.execute("SELECT 1 FROM wal_follows").fetchone() is not None


def _check_pages(file: Path, connection: sqlite3.Connection) -> None:
    """Raise ValueError if the file is damaged. The check stops after CHECK_S seconds, and the file is then accepted."""
    until_s = time.monotonic() + CHECK_S
    connection.set_progress_handler(lambda: time.monotonic() > until_s, 1000)
    try:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        log.warning("%s is large: not all of it was checked for damage", file)
        return
    if found != "ok":
        raise ValueError(why_not(file, f"malformed: {found}", UNTOUCHED))


def beside(file: Path, what: str) -> Path:
    """Return the path of a file's WAL ("wal") or of the WAL's index ("shm")."""
    return Path(f"{file.resolve()}-{what}")


def _of_another_version(file: Path | None, version: int) -> str:
    return (
        f"{file} is of version {version}, this tminus knows version {VERSION}{UNTOUCHED}. "
        "Serve it with the tminus that made it, or name another --state-dir"
    )
