import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
import sqlalchemy as sa

from tests import postgres as postgres_server
from tests.postgres import Postgres
from tminus.service.jobs.postgres import open_postgres
from tminus.service.jobs.sql_store import SqlStore
from tminus.service.jobs.sqlite_store import SqliteStore

WEIGHTS = "ab" * 32


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One for each worker; what a test keeps, it keeps in a namespace of its own."""
    with postgres_server.running() as server:
        yield server


class Shelf(Protocol):
    """Where stores of one kind keep one set of jobs."""

    def open(self) -> SqlStore:
        """As a new process does; it is closed at the end."""

    def change(self, statement: str, **values: object) -> int:
        """Change what is kept behind the stores' back; how many rows that are."""

    def read(self, query: str) -> list[tuple[object, ...]]:
        """Read what is kept behind the stores' back."""


class FileShelf:
    def __init__(self, file: Path) -> None:
        self._file = file
        self.opened: list[SqlStore] = []

    def open(self) -> SqliteStore:
        store = SqliteStore(self._file)
        self.opened.append(store)
        return store

    def change(self, statement: str, **values: object) -> int:
        return _on(sa.create_engine(f"sqlite:///{self._file}"), statement, values)

    def read(self, query: str) -> list[tuple[object, ...]]:
        return _rows(sa.create_engine(f"sqlite:///{self._file}"), query)


class DatabaseShelf:
    def __init__(self, url: str, lease_s: float = 15.0) -> None:
        self.url, self.namespace, self.lease_s = url, f"test_{uuid.uuid4().hex[:12]}", lease_s
        self.opened: list[SqlStore] = []

    def opener(self) -> Callable[[str], SqlStore]:
        """That of a new replica."""
        return open_postgres(self.url, self.namespace, self.lease_s)

    def open(self, weights_hash: str = WEIGHTS) -> SqlStore:
        store = self.opener()(weights_hash)
        self.opened.append(store)
        return store

    def change(self, statement: str, **values: object) -> int:
        return _on(self._engine(), statement, values)

    def read(self, query: str) -> list[tuple[object, ...]]:
        return _rows(self._engine(), query)

    def _engine(self) -> sa.Engine:
        url = sa.make_url(self.url).set(drivername="postgresql+psycopg")
        return sa.create_engine(url, connect_args={"options": f"-c search_path={self.namespace}"})


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


@pytest.fixture(params=["sqlite", "postgres"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shelf]:
    """Of each kind."""
    if request.param == "postgres":
        yield request.getfixturevalue("database")
        return
    made = FileShelf(tmp_path / "jobs.sqlite3")
    yield made
    for store in made.opened:
        store.close()
