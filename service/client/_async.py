"""All network I/O of the client, for asyncio; `make client` generates _sync.py from it."""

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack
from urllib.parse import quote

import httpx

from . import checks
from .errors import ClientError, Problem, Unreachable, error_of
from .parameters import JSON_BODY, Parameters, Preview, Sampling, Shown, bytes_of, text_of, webhook_members
from .patience import Patience, Polling
from .reading import CANCEL, DOCUMENT_BYTES, EVENTS_QUIET_S, IMAGE_BYTES, NO_CONTENT, Expected, Following, Reading
from .results import (
    MAX_IMAGES,
    PNG,
    Cancelled,
    Done,
    Event,
    JobState,
    MediaType,
    Message,
    ModelState,
    Noised,
    Sampled,
    models_of,
    object_of,
    page_of,
)
from .transport import (
    CLOSE_S,
    CONNECT_S,
    HEADERS,
    PONG_S,
    QUIET_S,
    UNBOUNDED,
    KeyAuth,
    check_coding,
    closed,
    http_address,
    lost,
    model_address,
    refused,
    timeouts,
    too_large,
    warn_of_deprecation,
    with_key,
)

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

MESSAGES_AHEAD = 2  # maximum number of buffered WebSocket messages, each up to the maximum size
# Options for TCP keep-alive. If the server is gone for 90 seconds, they end a request that has no timeout.
# Values are in seconds, except TCP_USER_TIMEOUT (milliseconds), which limits how long data may be unacknowledged.
# macOS has TCP_KEEPALIVE instead of TCP_KEEPIDLE, and only Linux has TCP_USER_TIMEOUT.
KEEP_ALIVE = {
    "TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 90_000
}  # fmt: skip


async def _keep_alive(event: str, info: Mapping[str, Any]) -> None:
    """Turn on TCP keep-alive for each new connection. httpx calls this function as its `trace` extension.

    An httpx transport also accepts socket options. But with a custom transport, the client would ignore HTTP_PROXY.
    """
    opened = info["return_value"].get_extra_info("socket") if event.endswith(".connect_tcp.complete") else None
    if opened is None:
        return
    with suppress(OSError):  # the operating system may not know an option
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


TRACED = {"trace": _keep_alive}


class AsyncConnection:
    """Connects to one server, and converts errors of httpx and websockets to ClientErrors.

    Paths are relative to the URL of `model`, or to the server's URL if `model` is None. patience_s: see AsyncClient.
    Raises ValueError for an invalid url or model.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        patience_s: float,
        headers: Mapping[str, str] | None,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self.server, self.patience_s = http_address(url), patience_s
        address, self._headers = model_address(self.server, model), dict(headers or {})
        scheme, _, rest = address.partition(":")
        self._ws_address = f"{scheme.lower().replace('http', 'ws')}:{rest}"
        self._http = httpx.AsyncClient(
            base_url=address,
            headers=HEADERS | self._headers,
            timeout=timeouts(),
            limits=UNBOUNDED,
            transport=transport,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def request(
        self,
        method: str,
        path: str,
        patience: Patience | None = None,
        max_bytes: int = DOCUMENT_BYTES,
        **options: Any,
    ) -> httpx.Response:
        """Send a request, retry it as long as `patience` allows, and return the 2xx response. Raises ClientError.

        path: a relative path, or a complete URL. max_bytes: the maximum size of the response; a longer response raises
        UnexpectedAnswer. options: keyword arguments for httpx's `stream`.
        """
        patience = patience or Patience(self.patience_s)
        while True:
            try:
                return await self._send(method, path, max_bytes, options)
            except ClientError as error:
                await asyncio.sleep(patience.pause_s(error))

    async def _send(self, method: str, path: str, max_bytes: int, options: Mapping[str, Any]) -> httpx.Response:
        try:
            async with self._http.stream(method, path, extensions=TRACED, **options) as response:
                warn_of_deprecation(method, response)
                return await _whole(response, max_bytes)
        except httpx.HTTPError as error:
            raise lost(error) from None

    @asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, Any], headers: Mapping[str, str], quiet_s: float
    ) -> AsyncIterator[httpx.Response]:
        """Open a streaming 2xx response. Raises ClientError, even for a lost connection in the `with` block."""
        options: dict[str, Any] = {"params": dict(params), "headers": headers, "timeout": timeouts(quiet_s)}
        try:
            async with self._http.stream("GET", path, extensions=TRACED, **options) as response:
                if not response.is_success:
                    await _whole(response, DOCUMENT_BYTES)
                check_coding(response)
                yield response
        except httpx.HTTPError as error:
            raise lost(error) from None

    @asynccontextmanager
    async def websocket(self, path: str, max_bytes: int) -> AsyncIterator["ClientConnection"]:
        """Open a WebSocket for messages of up to max_bytes.

        Raises ClientError, even if the connection closes in the `with` block. Raises ImportError without websockets.
        """
        try:
            from websockets.asyncio.client import connect
            from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
        except ModuleNotFoundError as error:
            needed = f"watch needs {error.name}: pip install './client[watch]' in a checkout of tminus"
            raise ImportError(needed, name=error.name) from None
        try:
            async with connect(
                self._ws_address + path,
                additional_headers=self._headers,
                open_timeout=CONNECT_S,
                close_timeout=CLOSE_S,
                ping_timeout=PONG_S,
                compression=None,
                max_size=max_bytes,
                max_queue=MESSAGES_AHEAD,
            ) as ws:
                try:
                    yield ws
                finally:
                    await ws.close()  # send code 1000; after an exception, `connect` itself would send 1011
        except ConnectionClosed as error:
            raise closed(error, max_bytes) from None
        except InvalidStatus as error:
            raise refused(error) from None
        except (OSError, WebSocketException) as error:
            raise lost(error) from None


async def _whole(response: httpx.Response, max_bytes: int) -> httpx.Response:
    """Read a whole response. Raises httpx.HTTPError; ClientError if not 2xx, compressed or too long."""
    check_coding(response)
    limit = max_bytes if response.is_success else DOCUMENT_BYTES
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > limit:
            raise too_large(response.status_code, limit)
    if not response.is_success:
        raise error_of(response.status_code, response.headers, bytes(content))
    return httpx.Response(response.status_code, headers=response.headers, content=bytes(content))


class AsyncWatching:
    """A watched job. You can iterate over it only once.

    Use a `with` block if the loop can end in any way other than `break`.
    """

    def __init__(self, connection: AsyncConnection, parameters: Mapping[str, Any]) -> None:
        self._connection, self._parameters = connection, parameters
        self._ws: ClientConnection | None = None
        self._begun = False

    async def __aiter__(self) -> AsyncIterator[Message]:
        if self._begun:  # a second loop would start a second job
            return
        self._begun = True
        accepted, text, expected = False, text_of(self._parameters), Expected.of(self._parameters)
        patience = Patience(self._connection.patience_s)
        while True:
            try:
                async with self._connection.websocket("/sample/stream", expected.picture_bytes) as ws:
                    await ws.send(text)
                    self._ws, reading = ws, Reading(expected)
                    while True:
                        images = reading.begin(await ws.recv())
                        message = reading.end([await ws.recv() for _ in range(images)])
                        accepted = True
                        yield message
                        if isinstance(message, Done | Cancelled):
                            return
            except ClientError as error:
                if accepted:  # a retry would start a second job
                    raise
                await asyncio.sleep(patience.pause_s(error))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._ws is not None:
            await self._ws.close()

    async def cancel(self) -> None:
        """Cancel the job. Any task may call this.

        The loop then ends with Cancelled, or with Done if the job was already done. Does nothing if the job has not
        been sent to the server yet.
        """
        if self._ws is not None:
            from websockets.exceptions import ConnectionClosed

            with suppress(ConnectionClosed):  # if the connection is closed, the server cancels the job anyway
                await self._ws.send(CANCEL)


class AsyncJob:
    """A durable job.

    `latest` is its state at the last `submit`, `state` or `wait`; None before the first of these calls.
    """

    def __init__(self, connection: AsyncConnection, job_id: str, latest: JobState | None = None) -> None:
        assert job_id, "a job has an id"
        self.id, self.latest = job_id, latest
        self._connection, self._path = connection, f"/jobs/{quote(job_id, safe='')}"

    async def state(self) -> JobState:
        """Read the job's state from the server."""
        self.latest = JobState.of(object_of(await self._connection.request("GET", self._path)))
        return self.latest

    async def wait(self, timeout_s: float | None = None) -> JobState:
        """Wait until the job is done, failed or cancelled. Tolerates a server restart of up to a minute.

        Raises TimeoutError after timeout_s, or up to two seconds later if the server is silent. The job then continues.
        """
        patience, polling = self._patience(), Polling(self.id, timeout_s)
        while True:
            # Disable retries in `request`, because timeout_s may end earlier than they do. This loop retries instead.
            once, limits = Patience(0), timeouts(polling.look_s(QUIET_S))
            try:
                job = JobState.of(object_of(await self._connection.request("GET", self._path, once, timeout=limits)))
            except ClientError as error:
                await asyncio.sleep(polling.pause_after_s(error, patience))
                continue
            patience.renew()
            if job.ended:
                self.latest = job
                return job
            await asyncio.sleep(polling.pause_s(job))

    async def events(self, *, last_id: str = "", **preview: Unpack[Preview]) -> AsyncIterator[Event]:
        """Iterate over the job's events: Waiting, Progress (or Frame, if `show` is set), and finally Ended.

        Reopens a broken connection, and tolerates a server restart of up to a minute. With layout `images`, some frames
        may arrive twice after that.
        """
        patience, path = self._patience(), f"{self._path}/events"
        following = Following(last_id, patience, Expected.of(preview | self._known(), show=None))
        while True:
            headers = following.begin_connection()
            try:
                async with self._connection.stream(path, preview, headers, EVENTS_QUIET_S) as response:
                    if response.status_code == NO_CONTENT:  # there are no events after last_id
                        return
                    async for chunk in response.aiter_bytes():
                        for event in following.read(chunk):
                            yield event
                        if following.ended:
                            return
                raise Unreachable(f"the events of job {self.id} ended before it did", reached=True)
            except ClientError as error:
                await asyncio.sleep(patience.pause_s(error))

    async def image(self, accept: MediaType = "image/png", *, clip_output: bool = True) -> Sampled:
        """Return the images of a finished job. Raises Problem: job_not_done, no_images, job_not_found.

        clip_output: clip the floats of a job with bit_depth=32 to the range of the model.
        """
        limit = Expected.of(self._known()).answer_bytes(accept)
        options: dict[str, Any] = {"headers": {"Accept": accept}, "max_bytes": limit}
        path = f"{self._path}/image{'' if clip_output else '?clip_output=false'}"
        return Sampled.of(await self._connection.request("GET", path, **options), accept)

    async def cancel(self) -> JobState:
        """Cancel the job unless it has ended, and return its state."""
        return JobState.of(object_of(await self._connection.request("POST", f"{self._path}/cancel")))

    async def delete(self) -> None:
        """Delete the job. The server first cancels the job if it has not ended. A missing job is not an error."""
        try:
            await self._connection.request("DELETE", self._path, Patience(self._connection.patience_s))
        except Problem as problem:
            if problem.code != "job_not_found":
                raise

    def _known(self) -> dict[str, Any]:
        """Return the parameters that limit the responses: n, or its maximum if unknown; steps, if known."""
        return {"n": MAX_IMAGES} if self.latest is None else {"n": self.latest.n, "steps": self.latest.steps}

    def _patience(self) -> Patience:
        return Patience(self._connection.patience_s, durable=True, known=True)


PAGE = 200  # jobs per request, which is the server's maximum


class AsyncClient:
    """A client of one tminus server. Tasks may share one client.

    url: `http://host:port`, plus a path if a proxy serves the server under a path.
    model: the name of the model; None: the server's default model.
    patience_s: how many seconds in total a call may wait while the server is unreachable, or responds 429, 503 or 507
    with a Retry-After. With 0, a call raises such an error at once.
    key: the API key to send with every request and WebSocket. The key does not appear in error messages.
    headers: additional headers for every request and WebSocket, for example for a proxy.
    transport: replaces the transport of httpx.

    Calls raise Problem if the server refuses or fails, Unreachable, and UnexpectedAnswer. The constructor raises
    ValueError for an invalid url, model or key.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        patience_s: float = 0,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connection = AsyncConnection(url, model, patience_s, with_key(url, headers, key), transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def sample(self, *, accept: MediaType = "image/png", **parameters: Unpack[Sampling]) -> Sampled:
        """Sample images, and wait for the result.

        accept: the format: a PNG sheet, a zip or JSON of PNGs, floats (npy), an animation (WebP) or a trajectory.
        """
        # Retries are safe, because the server drops the job when the connection breaks.
        options: dict[str, Any] = {
            "content": text_of(parameters),
            "headers": JSON_BODY | {"Accept": accept},
            "timeout": timeouts(None),
            "max_bytes": Expected.of(parameters).answer_bytes(accept),
        }
        return Sampled.of(await self._connection.request("POST", "/sample", **options), accept)

    def watch(self, **parameters: Unpack[Shown]) -> AsyncWatching:
        """Sample images, and watch the job. Iterate over the return value to get its messages.

        The messages are Accepted, Frames, and Done or Cancelled. A slow reader gets only the newest frame. If a client
        reads nothing for a minute, the server ends the job. Leaving the loop cancels the job.
        """
        return AsyncWatching(self._connection, parameters)

    async def submit(
        self,
        *,
        idempotency_key: str | None = None,
        webhook: str | None = None,
        webhook_events: Sequence[str] | None = None,
        **parameters: Unpack[Parameters],
    ) -> AsyncJob:
        """Submit a durable job. It runs to its end even if the client disconnects or the server restarts.

        If the connection breaks, the request is retried for a minute. The Idempotency-Key makes this safe: all requests
        with the same key and parameters create only one job. The default is a random key. Pass your own key if your
        process may restart.

        webhook: a URL that receives the job when it starts (start), when its images are ready (output), and when it
        ends (completed). webhook_events: the events to send; None: all.
        """
        key = uuid.uuid4().hex if idempotency_key is None else idempotency_key
        headers = JSON_BODY | {"Idempotency-Key": key}
        patience = Patience(self._connection.patience_s, durable=True)
        body = text_of(parameters | webhook_members(webhook, webhook_events))
        response = await self._connection.request("POST", "/jobs", patience, content=body, headers=headers)
        state = JobState.of(object_of(response))
        return AsyncJob(self._connection, state.id, state)

    def job(self, job_id: str) -> AsyncJob:
        """Return the job with this id. It may be a job of any model. Sends no request."""
        return AsyncJob(self._connection, job_id)

    async def jobs(self, *, state: str | Sequence[str] | None = None) -> AsyncIterator[JobState]:
        """Iterate over the jobs, newest first. A client with a model lists only the jobs of that model.

        state: list only jobs in this state, or in one of these states.
        """
        params: dict[str, Any] = {"limit": PAGE}
        if state is not None:
            params["state"] = state if isinstance(state, str) else ",".join(state)
        while True:
            page, before = page_of(await self._connection.request("GET", "/jobs", params=params))
            for job in page:
                yield job
            if before is None:
                return
            params["before"] = before

    async def noise(self, image: bytes | Path, t: int, seed: int | None = None) -> Noised:
        """Run the forward process on an image up to timestep t. image: an image file's content, or its Path."""
        options: dict[str, Any] = {
            "params": {"t": t} if seed is None else {"t": t, "seed": seed},
            "headers": {"Content-Type": "application/octet-stream", "Accept": PNG},
            "content": bytes_of(image),
            "max_bytes": IMAGE_BYTES,
        }
        return Noised.of(await self._connection.request("POST", "/noise", **options))

    async def model(self) -> dict[str, Any]:
        """Return the document of GET /model, which describes the model and its limits."""
        return object_of(await self._connection.request("GET", "/model"))

    # --- all models of the server ---

    async def models(self) -> list[ModelState]:
        """List the models that the server serves or can load."""
        return models_of(await self._connection.request("GET", f"{self._connection.server}/models"))

    async def load_model(self, name: str, admin_key: str | None = None) -> ModelState:
        """Load a model. Returns once the server serves the model, which can take minutes.

        admin_key: a key with the role admin, to send instead of the client's own key. Raises ValueError for an invalid
        name or key. Raises Problem: unauthorized, forbidden, admin_off, model_not_found, model_busy,
        checkpoint_refused.
        """
        return ModelState.of(object_of(await self._change(name, "load", admin_key)))

    async def reload_model(self, name: str, admin_key: str | None = None) -> ModelState:
        """Read a loaded model's folder again. Returns once the new content is served. Raises like load_model."""
        return ModelState.of(object_of(await self._change(name, "reload", admin_key)))

    async def unload_model(self, name: str, admin_key: str | None = None) -> None:
        """Unload a model. Jobs that the server has already accepted still finish. Raises like load_model."""
        await self._change(name, "unload", admin_key)

    async def _change(self, name: str, change: str, admin_key: str | None) -> httpx.Response:
        url = f"{self._connection.server}/models/{checks.model_name(name)}/{change}"
        # Do not repeat a request that may have succeeded: the server would refuse the second one.
        patience = Patience(self._connection.patience_s, once=True)
        auth: dict[str, Any] = {} if admin_key is None else {"auth": KeyAuth(admin_key)}
        return await self._connection.request("POST", url, patience, timeout=timeouts(None), **auth)
