"""A PostgreSQL of the tests' own: Debian's, in a folder that goes with it."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.tools import needs

PATIENCE_S = 60.0


def programs() -> Path:
    """Where initdb and postgres are. Debian keeps them out of the path."""
    return needs("postgresql").resolve().parent


class Postgres:
    """A server that can be stopped, killed and started again."""

    def __init__(self, superuser: str = "tminus") -> None:
        self._superuser = superuser
        self.folder = Path(tempfile.mkdtemp(prefix="tminus-postgres-"))  # pytest's folders are for their user only
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user: dict[str, Any] = {}
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._run("initdb", "-D", str(self.folder / "data"), "-U", superuser, "-A", "trust", "-E", "UTF8", "--no-sync")

    def url(self, database: str = "postgres", user: str = "") -> str:
        """Of one of its databases."""
        return f"postgresql://{user or self._superuser}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "port": self.port}
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [programs() / "postgres", "-D", self.folder / "data", *flags],
                stdout=log, stderr=log, cwd="/", **self._as_user,
            )  # fmt: skip
        until_s = time.monotonic() + PATIENCE_S
        while subprocess.run([programs() / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode:
            assert time.monotonic() < until_s, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def stop(self, signal: str = "INT") -> None:
        """Stop it: INT ends connections at once, KILL is a crash."""
        if self._process is not None:
            self._run("pg_ctl", "kill", signal, str(self._process.pid)) if signal != "KILL" else self._process.kill()
            self._process.wait(PATIENCE_S)
            self._process = None

    def sql(self, statement: str, database: str = "postgres") -> None:
        """Run one statement."""
        self._run("psql", "-q", "-v", "ON_ERROR_STOP=1", "-d", self.url(database), "-c", statement)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [programs() / program, *arguments], capture_output=True, text=True, cwd="/", **self._as_user
        )
        assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running(superuser: str = "tminus") -> Iterator[Postgres]:
    """A server that is stopped in the end."""
    postgres = Postgres(superuser)
    try:
        postgres.start()
        yield postgres
    finally:
        postgres.stop()
        shutil.rmtree(postgres.folder)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
