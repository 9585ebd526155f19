"""An object store of the tests' own, moto's server: it answers over HTTP as S3 does, in a process of its own."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.postgres import PATIENCE_S, free_port

BUCKET = "tminus-tests"
# Of anybody: it is not checked, unless a test says so.
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, Signature=none"}


class S3:
    """A server that can be stopped and started again; what it holds is in memory, and lost by then."""

    def __init__(self) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="tminus-s3-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """The variables by which it is found."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key-of-the-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it with an empty bucket, and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                if httpx.put(headers=SIGNED, url=f"{self.url}/{BUCKET}").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < until_s, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_S)
            self._process = None

    # Behind the backs of those who keep objects here.

    def keys(self, prefix: str) -> list[str]:
        """What is there, without the prefix."""
        answer = httpx.get(headers=SIGNED, url=f"{self.url}/{BUCKET}", params={"list-type": "2", "prefix": prefix})
        found = [part.partition("</Key>")[0] for part in answer.text.split("<Key>")[1:]]
        return [key.removeprefix(prefix).lstrip("/") for key in found]

    def put(self, key: str, data: bytes) -> None:
        """Replace an object."""
        assert httpx.put(headers=SIGNED, url=f"{self.url}/{BUCKET}/{key}", content=data).status_code == 200

    def get(self, key: str) -> bytes:
        """Read an object."""
        return httpx.get(headers=SIGNED, url=f"{self.url}/{BUCKET}/{key}").content

    def delete(self, key: str) -> None:
        """Delete an object."""
        assert httpx.delete(headers=SIGNED, url=f"{self.url}/{BUCKET}/{key}").status_code == 204

    def ask_who_they_are(self, count: int) -> None:
        """Check credentials after so many further requests."""
        assert httpx.post(f"{self.url}/moto-api/reset-auth", content=str(count)).status_code == 200


@contextmanager
def running() -> Iterator[S3]:
    """A server that is stopped in the end."""
    s3 = S3()
    try:
        s3.start()
        yield s3
    finally:
        s3.stop()
        (s3.folder / "log").unlink(missing_ok=True)
        s3.folder.rmdir()
