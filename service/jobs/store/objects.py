"""Objects in S3, or in what answers as S3 does: MinIO, Ceph, R2 and the like. Needs the extra `s3`.

Where it is, and by which credentials, is said by the AWS_ variables that obstore reads. HTTP without TLS is spoken only
to an endpoint whose URL says http.
"""

import asyncio
import html
import os
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tminus.service.errors import StorageFailed

if TYPE_CHECKING:
    from obstore.store import BackoffConfig, ClientConfig, RetryConfig

CALL_S = 60.0  # a call that takes longer is given up, with the wait for its turn
BYTES_PER_S = 1e6  # what a line must do: for the bytes of an object a call has this much longer
START_S = 15.0  # a call at the start that takes longer is given up
CONNECT_S = 5.0
RETRIES, RETRY_S = 3, 20.0  # after which time no request is tried again
AT_ONCE = 4  # downloads: each is in memory as a whole
URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9_][A-Za-z0-9_.=-]*)*)/?")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")  # the first that is set is taken
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
REGION = re.compile(r"[A-Za-z0-9-]+")
METADATA = "169.254.169.254"  # where a machine of Amazon's is asked for credentials, when no variable has any


class S3Objects:
    """The objects below a prefix of a bucket. Each call is bounded in time, and raises StorageFailed."""

    def __init__(self, url: str, folder: str) -> None:
        """url: s3://bucket/prefix. folder: below it. Raises ValueError for what cannot be an address."""
        match = URL.fullmatch(url)
        if match is None:
            got = "what has an @, as credentials have" if "@" in url else repr(url)
            raise ValueError(f"it must be s3://bucket or s3://bucket/prefix, got {got}")
        bucket, prefix = match.groups()
        client: ClientConfig = {
            "allow_http": _endpoint().startswith("http://"),
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "timeout": timedelta(days=1),  # see _asking, which knows how much there is to send
        }
        backoff: BackoffConfig = {
            "init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2), "base": 2,
        }  # fmt: skip
        retries: RetryConfig = {
            "max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S), "backoff": backoff,
        }  # fmt: skip
        where = f"{prefix}/{folder}".strip("/")
        try:
            self._store = S3Store(bucket, prefix=where, client_options=client, retry_config=retries)
        except BaseError as error:
            raise ValueError(_reason(error)) from None
        self._gets = asyncio.Semaphore(AT_ONCE)
        self._check_key = f"check-{uuid.uuid4().hex}"  # one, in case that it cannot be deleted

    async def put(self, key: str, data: bytes) -> None:
        """Write an object. What it replaces is the same bytes."""
        async with _asking("write", len(data)):
            # In one request: what is left of several, if they break off, stays in the bucket unseen.
            await obstore.put_async(self._store, key, data, use_multipart=False)

    async def get(self, key: str, size: int) -> bytes | None:
        """Read an object of this size; None if it does not exist, b"" if it has another size."""
        async with _asking("read", size), self._gets:
            try:
                found = await obstore.get_async(self._store, key)
            except FileNotFoundError as error:  # of the bucket, too
                if _code(error) == "NoSuchKey":
                    return None
                raise
            return bytes(await found.bytes_async()) if found.meta["size"] == size else b""

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; it is no error where one is not there."""
        async with _asking("delete"):
            await obstore.delete_async(self._store, list(keys))

    async def check(self) -> None:
        """Write something small, read it, and delete it."""
        key, data = self._check_key, b"tminus"
        await self.put(key, data)
        if await self.get(key, len(data)) != data:
            raise StorageFailed("the object store does not keep what is written")
        await self.delete([key])


def open_objects(url: str, folder: str) -> S3Objects:
    """Open an object store in which objects can be written, read and deleted. Raises ValueError where they cannot."""
    objects = S3Objects(url, folder)

    try:
        asyncio.run(asyncio.wait_for(objects.check(), START_S))
    except TimeoutError:
        raise ValueError(f"it has not answered for {START_S:g} s") from None
    except StorageFailed as error:
        raise ValueError(error.detail) from None
    return objects


def _endpoint() -> str:
    """The URL of the endpoint, from the environment; empty for Amazon's. Raises ValueError for text that is no URL."""
    for name in REGIONS:
        if (region := os.environ.get(name)) and not REGION.fullmatch(region):
            raise ValueError(f"{name} must be a region such as eu-central-1, got {region!r}")
    for name in ENDPOINTS:
        if endpoint := os.environ.get(name):
            break
    else:
        return ""
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_url = False
    if not is_url or parts.username is not None or parts.query or parts.fragment or re.search(r"\s", endpoint):
        # It is not shown: a password may be in it.
        raise ValueError(f"{name} must be a URL such as http://minio:9000, without a password")
    return endpoint


@asynccontextmanager
async def _asking(verb: str, size: int = 0) -> AsyncIterator[None]:
    """Give up in time, and raise StorageFailed for whatever goes wrong. size: in bytes, of what is sent."""
    limit_s = CALL_S + size / BYTES_PER_S
    try:
        async with asyncio.timeout(limit_s):
            yield
    except Exception as error:
        reason = f"it has not answered for {limit_s:.1f} s" if isinstance(error, TimeoutError) else _reason(error)
        raise StorageFailed(f"the object store cannot {verb}: {reason}") from None


def _code(error: Exception) -> str:
    """The code of an answer of S3's that says no."""
    found = re.search(r"<Code>([^<]*)</Code>", str(error))
    return found[1] if found is not None else ""


def _reason(error: Exception) -> str:
    """What the library says, in a line: the answer's code and message, or why there was none.

    Its own text has the whole answer, in which the request is told that was signed.
    """
    text = str(error)
    if code := _code(error):
        message = re.search(r"<Message>([^<]*)</Message>", text)
        return html.unescape(f"{code}: {message[1]}" if message is not None else code)
    if METADATA in text:
        return (
            "no credentials: neither AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are set, nor is there another source"
        )
    said, _, details = text.partition("\n\nDebug source")
    causes = re.findall(r'(?:message|error): "([^"]*)"', details) or re.findall(r"TimedOut|InvalidCertificate", details)
    cause = f": {causes[-1]}" if causes else ""
    if (asked := re.search(r"error performing \w+ (https?://[^/\s]+)", said, re.IGNORECASE)) and "HTTP error" in said:
        return f"{asked[1]} cannot be reached{cause}"
    return " ".join(f"{said or type(error).__name__}{cause}".split())
