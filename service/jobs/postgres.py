"""Opens the job store in PostgreSQL, for one replica."""

import uuid
from collections.abc import Callable

from tminus.service.jobs.postgres_schema import prepare_schema
from tminus.service.jobs.postgres_store import PostgresStore, connect


def open_postgres(url: str, namespace: str, lease_s: float) -> Callable[[str], PostgresStore]:
    """Bring the database to this version, and return what opens the store of some weights, by their hash.

    Raises ValueError for a database that cannot be reached or used, without the password of the URL.
    """
    engine = connect(url, namespace)
    try:
        prepare_schema(engine, namespace)
    finally:
        engine.dispose()
    replica = uuid.uuid4().hex

    def open_store(weights_hash: str) -> PostgresStore:
        return PostgresStore(connect(url, namespace), namespace, weights_hash, replica, lease_s)

    return open_store
