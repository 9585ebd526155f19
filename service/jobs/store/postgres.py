"""Opens the job store in PostgreSQL, for one replica."""

import socket
import uuid
from collections.abc import Callable
from ipaddress import ip_address

import sqlalchemy as sa

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store.postgres_engine import connect
from tminus.service.jobs.store.postgres_schema import prepare_schema
from tminus.service.jobs.store.postgres_store import PostgresStore


def open_postgres(
    url: str, namespace: str, lease_s: float, address: str | None = None
) -> Callable[[str], PostgresStore]:
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
        store = PostgresStore(connect(url, namespace), namespace, weights_hash, replica, lease_s, address)
        try:
            store.read_clock()
        except StorageFailed as error:
            store.close()
            raise ValueError(error.detail) from None
        return store

    return open_store


def own_address(url: str, host: str, port: int) -> str | None:
    """The URL by which other replicas reach a server that listens here; None where that cannot be found out.

    One that listens on every address is reached by the one that its packets to the database have; one that listens on
    this machine only, by replicas beside it, if the database is there too.
    """
    try:
        towards = _towards(sa.make_url(url).host or "localhost")
        if ip_address(host).is_unspecified:
            host = towards
    except (OSError, ValueError, sa.exc.ArgumentError):
        return None
    if ip_address(host).is_loopback and not ip_address(towards).is_loopback:
        return None
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _towards(host: str) -> str:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])
