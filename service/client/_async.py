"""All I/O of the client, written for asyncio; `make client` generates _sync.py from it."""

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

MESSAGES_AHEAD = 2  # messages of a WebSocket that are buffered; each may be as large as is allowed
# A request without a time limit finds by these, after a minute and a half, that the server is silently gone. Systems
# differ: macOS calls the first TCP_KEEPALIVE, and only Linux has the last, for a request that is not confirmed.
KEEP_ALIVE = {
    "TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 90_000
}  # fmt: skip


async def _keep_alive(event: str, info: Mapping[str, Any]) -> None:
    """Turn on TCP's keep-alive for each new connection, through httpx's `trace`.

    httpx's transports take socket options too, but a client with its own transport ignores the environment's proxies.
    """
    opened = info["return_value"].get_extra_info("socket") if event.endswith(".connect_tcp.complete") else None
    if opened is None:
        return
    with suppress(OSError):  # a system may refuse one
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


TRACED = {"trace": _keep_alive}


class AsyncConnection:
    """Connects to one server, and turns the errors of httpx and websockets into ClientErrors.

    Paths are relative to the address of `model`, or of the server if it is None. patience_s: of the client. Raises
    ValueError for an invalid url or model.
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
        """Close the connections."""
        await self._http.aclose()

    async def request(
        self,
        method: str,
        path: str,
        patience: Patience | None = None,
        max_bytes: int = DOCUMENT_BYTES,
        **options: Any,
    ) -> httpx.Response:
        """Send a request until the response is 2xx; `options` are those of httpx. Raises ClientError.

        path: or a whole URL. max_bytes: of the content; a longer answer is not read.
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
        """Open a 2xx response that is read while it arrives. Raises ClientError, also if it breaks off later."""
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
        """Open a WebSocket, with messages of at most max_bytes.

        Raises ClientError, also if the server closes it while it is in use; ImportError without websockets.
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
                    await ws.close()  # with 1000; after an exception `with` would send 1011
        except ConnectionClosed as error:
            raise closed(error, max_bytes) from None
        except InvalidStatus as error:
            raise refused(error) from None
        except (OSError, WebSocketException) as error:
            raise lost(error) from None


async def _whole(response: httpx.Response, max_bytes: int) -> httpx.Response:
    """Read a response to its end. Raises ClientError if it is not 2xx or too long, and httpx.HTTPError."""
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
    """A watched job. Iterate over it, once; use `with` where the loop may be left by another way than `break`."""

    def __init__(self, connection: AsyncConnection, parameters: Mapping[str, Any]) -> None:
        self._connection, self._parameters = connection, parameters
        self._ws: ClientConnection | None = None
        self._begun = False

    async def __aiter__(self) -> AsyncIterator[Message]:
        if self._begun:  # a second loop would make a second job
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
                if accepted:  # trying again would make another job
                    raise
                await asyncio.sleep(patience.pause_s(error))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._ws is not None:
            await self._ws.close()

    async def cancel(self) -> None:
        """Cancel the job once there is one, from any task; the loop ends with Cancelled, or Done if it was done."""
        if self._ws is not None:
            from websockets.exceptions import ConnectionClosed

            with suppress(ConnectionClosed):  # then it is not wanted any more
                await self._ws.send(CANCEL)


class AsyncJob:
    """A durable job. `latest` is the state that was read last; None before that."""

    def __init__(self, connection: AsyncConnection, job_id: str, latest: JobState | None = None) -> None:
        assert job_id, "a job has an id"
        self.id, self.latest = job_id, latest
        self._connection, self._path = connection, f"/jobs/{quote(job_id, safe='')}"

    async def state(self) -> JobState:
        """Read its state."""
        self.latest = JobState.of(object_of(await self._connection.request("GET", self._path)))
        return self.latest

    async def wait(self, timeout_s: float | None = None) -> JobState:
        """Wait until it is done, failed or cancelled. A restart of the server may take up to a minute.

        Raises TimeoutError after timeout_s, or a second or two later if the server is silent; the job goes on.
        """
        patience, polling = self._patience(), Polling(self.id, timeout_s)
        while True:
            # One attempt at a time, since timeout_s may be over before the patience.
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
        """Iterate over the job's events: Waiting, Progress or, with `show`, Frames, and at last Ended.

        A broken connection is opened again, and a restart of the server may take up to a minute; with layout `images`
        some frames may come twice then.
        """
        patience, path = self._patience(), f"{self._path}/events"
        following = Following(last_id, patience, Expected.of(preview | self._known(), show=None))
        while True:
            headers = following.begin_connection()
            try:
                async with self._connection.stream(path, preview, headers, EVENTS_QUIET_S) as response:
                    if response.status_code == NO_CONTENT:  # the end was known already
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
        """Read the images of a job that is done. Raises Problem: job_not_done, no_images, job_not_found.

        clip_output: whether the floats of a job with bit_depth=32 are clipped to the model's range.
        """
        limit = Expected.of(self._known()).answer_bytes(accept)
        options: dict[str, Any] = {"headers": {"Accept": accept}, "max_bytes": limit}
        path = f"{self._path}/image{'' if clip_output else '?clip_output=false'}"
        return Sampled.of(await self._connection.request("GET", path, **options), accept)

    async def cancel(self) -> JobState:
        """Cancel it if it has not ended, and return its last state."""
        return JobState.of(object_of(await self._connection.request("POST", f"{self._path}/cancel")))

    async def delete(self) -> None:
        """Delete it, and cancel it if it has not ended. A missing job is no error."""
        try:
            await self._connection.request("DELETE", self._path, Patience(self._connection.patience_s))
        except Problem as problem:
            if problem.code != "job_not_found":
                raise

    def _known(self) -> dict[str, Any]:
        """The parameters that bound its images and frames, as far as they are known."""
        return {"n": MAX_IMAGES} if self.latest is None else {"n": self.latest.n, "steps": self.latest.steps}

    def _patience(self) -> Patience:
        return Patience(self._connection.patience_s, durable=True, known=True)


PAGE = 200  # jobs a request, the most that the server lists at once


class AsyncClient:
    """A client of one tminus server. Tasks may share it.

    url: `http://host:port`, and a path if a proxy serves it under one. model: the name of the model to use; None: the
    server's default. patience_s: seconds in all that a call may wait if the server answers 429, 503 or 507 with a
    Retry-After, or cannot be reached; 0 raises such an error at once. key: sent with every request and WebSocket; no
    error shows it. headers: sent with them too, for a proxy that needs them. transport: replaces httpx's own.

    Calls raise Problem if the server refuses or fails, Unreachable, and UnexpectedAnswer. Raises ValueError for an
    invalid url, model or key.
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
        """Sample and wait: the images as a PNG sheet, a zip or JSON of PNGs, or floats; an animation; a trajectory."""
        # The server drops a job whose connection breaks, so a second attempt does no harm.
        options: dict[str, Any] = {
            "content": text_of(parameters),
            "headers": JSON_BODY | {"Accept": accept},
            "timeout": timeouts(None),
            "max_bytes": Expected.of(parameters).answer_bytes(accept),
        }
        return Sampled.of(await self._connection.request("POST", "/sample", **options), accept)

    def watch(self, **parameters: Unpack[Shown]) -> AsyncWatching:
        """Sample and watch: iterate over the result for Accepted, Frames, and Done or Cancelled.

        A slow reader gets the newest frame; the server ends the job of one that reads nothing for a minute. Leaving
        the loop cancels the job.
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
        """Submit a durable job, which is finished whatever happens to client and server.

        A broken connection is retried for a minute. An Idempotency-Key makes that safe; without one the client draws
        it. Give your own if your process may be restarted: the same key and parameters are the same job.

        webhook: a URL that gets the job when it starts (start), when its images are ready (output), and when it has
        ended (completed). webhook_events: only these events.
        """
        key = uuid.uuid4().hex if idempotency_key is None else idempotency_key
        headers = JSON_BODY | {"Idempotency-Key": key}
        patience = Patience(self._connection.patience_s, durable=True)
        body = text_of(parameters | webhook_members(webhook, webhook_events))
        response = await self._connection.request("POST", "/jobs", patience, content=body, headers=headers)
        state = JobState.of(object_of(response))
        return AsyncJob(self._connection, state.id, state)

    def job(self, job_id: str) -> AsyncJob:
        """Return the handle of a job of any model, by its id. Sends nothing."""
        return AsyncJob(self._connection, job_id)

    async def jobs(self, *, state: str | Sequence[str] | None = None) -> AsyncIterator[JobState]:
        """Iterate over the jobs, the newest first: those of the client's model, if it has one.

        state: one state or several; None: all.
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
        """Run the forward process: an image, its bytes or Path, at timestep t."""
        options: dict[str, Any] = {
            "params": {"t": t} if seed is None else {"t": t, "seed": seed},
            "headers": {"Content-Type": "application/octet-stream", "Accept": PNG},
            "content": bytes_of(image),
            "max_bytes": IMAGE_BYTES,
        }
        return Noised.of(await self._connection.request("POST", "/noise", **options))

    async def model(self) -> dict[str, Any]:
        """Read the description of the model and its limits, as GET /model has it."""
        return object_of(await self._connection.request("GET", "/model"))

    # --- all models of the server ---

    async def models(self) -> list[ModelState]:
        """List the models that are served, and those that can be loaded."""
        return models_of(await self._connection.request("GET", f"{self._connection.server}/models"))

    async def load_model(self, name: str, admin_key: str | None = None) -> ModelState:
        """Load a model. Returns when it is served, which may take minutes.

        admin_key: a key of the role admin for this request, in place of the client's own. Raises Problem: unauthorized,
        forbidden, admin_off, model_not_found, model_busy, checkpoint_refused; ValueError for an invalid name or key.
        """
        return ModelState.of(object_of(await self._change(name, "load", admin_key)))

    async def reload_model(self, name: str, admin_key: str | None = None) -> ModelState:
        """Read a loaded model's folder again. Returns when its new content is served. Otherwise like load_model."""
        return ModelState.of(object_of(await self._change(name, "reload", admin_key)))

    async def unload_model(self, name: str, admin_key: str | None = None) -> None:
        """Unload a model. Its accepted jobs still finish. Raises like load_model."""
        await self._change(name, "unload", admin_key)

    async def _change(self, name: str, change: str, admin_key: str | None) -> httpx.Response:
        url = f"{self._connection.server}/models/{checks.model_name(name)}/{change}"
        # A second load would be refused, though the first may have done it.
        patience = Patience(self._connection.patience_s, once=True)
        auth: dict[str, Any] = {} if admin_key is None else {"auth": KeyAuth(admin_key)}
        return await self._connection.request("POST", url, patience, timeout=timeouts(None), **auth)
