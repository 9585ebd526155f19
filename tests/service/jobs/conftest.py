import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests import postgres as postgres_server
from tests import s3 as s3_server
from tests.postgres import Postgres
from tests.s3 import BUCKET, S3
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.objects import S3Objects
from tminus.service.jobs.store.postgres_store import PostgresStore, open_postgres
from tminus.service.jobs.store.sqlite_store import SqliteStore

WEIGHTS = "ab" * 32


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One for each worker; what a test keeps, it keeps in a namespace of its own."""
    with postgres_server.running() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """One for each worker; what a test keeps, it keeps below a prefix of its own."""
    with s3_server.running() as server:
        yield server


class Bucket:
    """What is below one prefix, in an object store to which the AWS_ variables lead."""

    def __init__(self, s3: S3) -> None:
        self.s3, self.prefix = s3, uuid.uuid4().hex
        self.url = f"s3://{BUCKET}/{self.prefix}"

    def objects(self) -> S3Objects:
        return S3Objects(self.url, "")

    def keys(self) -> list[str]:
        return self.s3.keys(self.prefix)

    def get(self, key: str) -> bytes:
        return self.s3.get(f"{self.prefix}/{key}")

    def put(self, key: str, data: bytes) -> None:
        self.s3.put(f"{self.prefix}/{key}", data)

    def delete(self, key: str) -> None:
        self.s3.delete(f"{self.prefix}/{key}")


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return Bucket(s3)


class FileShelf:
    """Where stores keep one set of jobs, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened: list[JobStore] = []

    def open(self) -> SqliteStore:
        """As a new process does; it is closed at the end."""
        store = SqliteStore(self.path)
        self.opened.append(store)
        return store

    def change(self, statement: str, **values: object) -> int:
        """Change what is kept behind the stores' back; how many rows that are."""
        return _on(sa.create_engine(f"sqlite:///{self.path}"), statement, values)

    def read(self, query: str) -> list[tuple[object, ...]]:
        return _rows(sa.create_engine(f"sqlite:///{self.path}"), query)


class DatabaseShelf:
    """The same in a namespace of a database."""

    def __init__(self, url: str, lease_s: float = 15.0) -> None:
        self.url, self.namespace, self.lease_s = url, f"test_{uuid.uuid4().hex[:12]}", lease_s
        self.opened: list[JobStore] = []

    def opener(self) -> Callable[[str], PostgresStore]:
        """That of a new replica."""
        return open_postgres(self.url, self.namespace, self.lease_s)

    def open(self, weights_hash: str = WEIGHTS) -> PostgresStore:
        store = self.opener()(weights_hash)
        self.opened.append(store)
        return store

    def change(self, statement: str, **values: object) -> int:
        return _on(self._engine(), statement, values)

    def read(self, query: str) -> list[tuple[object, ...]]:
        return _rows(self._engine(), query)

    def expire(self) -> None:
        """Let every lease end, and every wait after it, as time does."""
        self.change("UPDATE jobs SET lease_until = now() - interval '1 day' WHERE lease_until IS NOT NULL")

    def _engine(self) -> sa.Engine:
        url = sa.make_url(self.url).set(drivername="postgresql+psycopg")
        return sa.create_engine(url, connect_args={"options": f"-c search_path={self.namespace}"})


Shelf = FileShelf | DatabaseShelf


def _on(engine: sa.Engine, statement: str, values: dict[str, object]) -> int:
    try:
        with engine.begin() as connection:
            return connection.execute(sa.text(statement), values).rowcount
    finally:
        engine.dispose()


def _rows(engine: sa.Engine, query: str) -> list[tuple[object, ...]]:
    try:
        with engine.begin() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]
    finally:
        engine.dispose()


@pytest.fixture
def database(postgres: Postgres) -> Iterator[DatabaseShelf]:
    """A namespace of its own in PostgreSQL."""
    shelf = DatabaseShelf(postgres.url())
    yield shelf
    for store in shelf.opened:
        store.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[FileShelf]:
    """A file of SQLite's."""
    shelf = FileShelf(tmp_path / "jobs.sqlite3")
    yield shelf
    for store in shelf.opened:
        store.close()


@pytest.fixture(params=["file", "database"])
def shelf(request: pytest.FixtureRequest) -> Shelf:
    """Of each kind."""
    made: Shelf = request.getfixturevalue(request.param)
    return made
