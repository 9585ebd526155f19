"""Objects in S3 or a compatible service, such as MinIO, Ceph or R2. Needs the extra `s3`.

obstore reads the address and the credentials from the AWS_ environment variables. Plain HTTP is used only if the
endpoint's URL begins with http://.
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

CALL_S = 60.0  # timeout of a call, including the wait for other downloads
BYTES_PER_S = 1e6  # slowest acceptable transfer; an object's timeout is extended by its size divided by this
START_S = 15.0  # timeout of the check at startup
CONNECT_S = 5.0
RETRIES, RETRY_S = 3, 20.0  # no retry begins after RETRY_S seconds
AT_ONCE = 4  # maximum number of concurrent downloads, because each holds its whole object in memory
URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9_][A-Za-z0-9_.=-]*)*)/?")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")  # in order of precedence
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
REGION = re.compile(r"[A-Za-z0-9-]+")
METADATA = "169.254.169.254"  # Amazon's metadata service, which provides credentials if no variable does


class S3Objects:
    """The objects with a common prefix in a bucket. Each call has a timeout, and raises StorageFailed for any error."""

    def __init__(self, url: str, folder: str) -> None:
        """url: s3://bucket/prefix. folder: appended to the prefix. Raises ValueError for an invalid URL or endpoint."""
        match = URL.fullmatch(url)
        if match is None:
            got = "what has an @, as credentials have" if "@" in url else repr(url)
            raise ValueError(f"it must be s3://bucket or s3://bucket/prefix, got {got}")
        bucket, prefix = match.groups()
        client: ClientConfig = {
            "allow_http": _endpoint().startswith("http://"),
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "timeout": timedelta(days=1),  # unused: _asking sets a timeout that depends on the size
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
        self._check_key = f"check-{uuid.uuid4().hex}"  # one key for all checks, in case an object cannot be deleted

    async def put(self, key: str, data: bytes) -> None:
        """Write an object. An existing object must have the same bytes."""
        async with _asking("write", len(data)):
            # Use a single request, because an interrupted multipart upload would leave invisible parts in the bucket.
            await obstore.put_async(self._store, key, data, use_multipart=False)

    async def get(self, key: str, size: int) -> bytes | None:
        """Read an object of this size. Return None if it does not exist, and b"" if it has another size."""
        async with _asking("read", size), self._gets:
            try:
                found = await obstore.get_async(self._store, key)
            except FileNotFoundError as error:  # a missing bucket raises it too
                if _code(error) == "NoSuchKey":
                    return None
                raise
            return bytes(await found.bytes_async()) if found.meta["size"] == size else b""

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects. Ignores missing objects."""
        async with _asking("delete"):
            await obstore.delete_async(self._store, list(keys))

    async def check(self) -> None:
        """Write a small object, read it, and delete it."""
        key, data = self._check_key, b"tminus"
        await self.put(key, data)
        if await self.get(key, len(data)) != data:
            raise StorageFailed("the object store does not keep what is written")
        await self.delete([key])


def open_objects(url: str, folder: str) -> S3Objects:
    """Open an object store. Raises ValueError if objects cannot be written, read and deleted."""
    objects = S3Objects(url, folder)

    try:
        asyncio.run(asyncio.wait_for(objects.check(), START_S))
    except TimeoutError:
        raise ValueError(f"it has not answered for {START_S:g} s") from None
    except StorageFailed as error:
        raise ValueError(error.detail) from None
    return objects


def _endpoint() -> str:
    """Return the endpoint's URL from the environment, or "" for Amazon's own endpoint.

    Raises ValueError for an invalid variable.
    """
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
        # Do not show the URL, because it may contain a password.
        raise ValueError(f"{name} must be a URL such as http://minio:9000, without a password")
    return endpoint


@asynccontextmanager
async def _asking(verb: str, size: int = 0) -> AsyncIterator[None]:
    """Apply a timeout to the block, and turn any error into StorageFailed. size: bytes of the object."""
    limit_s = CALL_S + size / BYTES_PER_S
    try:
        async with asyncio.timeout(limit_s):
            yield
    except Exception as error:
        reason = f"it has not answered for {limit_s:.1f} s" if isinstance(error, TimeoutError) else _reason(error)
        raise StorageFailed(f"the object store cannot {verb}: {reason}") from None


def _code(error: Exception) -> str:
    """Return the error code from an S3 response, or "" if it has none."""
    found = re.search(r"<Code>([^<]*)</Code>", str(error))
    return found[1] if found is not None else ""


def _reason(error: Exception) -> str:
    """Describe an obstore error in one line: the code and message of the response, or why there was none.

    The error's own text contains the whole response, which may repeat parts of the signed request.
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
