"""The client for asyncio: the calls of client.py, which says more of each, to be awaited."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from service.client import calls, following, watching
from service.client.async_line import AsyncLine
from service.client.effects import Call
from service.client.messages import Event, Message
from service.client.parameters import Parameters, Preview, Sampling, Shown
from service.client.results import JobState, MediaType, Noised, Sampled
from service.client.transport import http_address, ws_address

T = TypeVar("T")


class AsyncClient:
    """A tminus server, as Client."""

    def __init__(
        self,
        url: str,
        *,
        patience_s: float = 0,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        address = http_address(url)
        self._ws_address = ws_address(address)
        self._patience_s, self._headers = patience_s, dict(headers or {})
        self._http = httpx.AsyncClient(base_url=address, headers=self._headers, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def sample(self, *, accept: MediaType = "image/png", **parameters: Unpack[Sampling]) -> Sampled:
        """Sample and wait."""
        return await self._run(calls.sample(parameters, accept, self._patience_s))

    def watch(self, **parameters: Unpack[Shown]) -> "AsyncWatching":
        """Sample and look on; nothing to await, but to iterate over with `async for`."""
        return AsyncWatching(self._line(), watching.watch(parameters, self._patience_s))

    async def submit(self, *, idempotency_key: str | None = None, **parameters: Unpack[Parameters]) -> "AsyncJob":
        """Ask for a durable job."""
        state = await self._run(calls.submit(parameters, idempotency_key, self._patience_s))
        return AsyncJob(self, state.id, state)

    def job(self, job_id: str) -> "AsyncJob":
        """A job by its id. Nothing is asked yet."""
        return AsyncJob(self, job_id)

    def jobs(self, *, state: str | Sequence[str] | None = None) -> AsyncIterator[JobState]:
        """Iterate over all jobs, or those in a state or several, the newest first."""
        return self._line().iterate(calls.jobs(state, self._patience_s))

    async def noise(self, image: bytes | Path, t: int, seed: int | None = None) -> Noised:
        """The forward process."""
        return await self._run(calls.noise(image, t, seed, self._patience_s))

    async def model(self) -> dict[str, Any]:
        """What is loaded, and the limits."""
        return await self._run(calls.model(self._patience_s))

    def _line(self) -> AsyncLine:
        return AsyncLine(self._http, self._ws_address, self._headers)

    async def _run(self, call: Call[T]) -> T:
        return await self._line().run(call)


class AsyncJob:
    """A durable job, as Job."""

    def __init__(self, client: AsyncClient, job_id: str, latest: JobState | None = None) -> None:
        self.id, self.latest = job_id, latest
        self._run, self._line, self._patience_s = client._run, client._line, client._patience_s

    async def state(self) -> JobState:
        """Ask how it stands."""
        self.latest = await self._run(calls.state(self.id, self._patience_s))
        return self.latest

    async def wait(self, timeout_s: float | None = None) -> JobState:
        """Wait until it has ended. Raises TimeoutError."""
        self.latest = await self._run(calls.wait(self.id, timeout_s, self._patience_s))
        return self.latest

    def events(self, *, last_id: str = "", **preview: Unpack[Preview]) -> AsyncIterator[Event]:
        """Iterate over what happens to its end."""
        return self._line().iterate(following.follow(self.id, preview, last_id, self._patience_s))

    async def image(self, accept: MediaType = "image/png") -> Sampled:
        """The images of a job that is done."""
        return await self._run(calls.image(self.id, accept, self._patience_s))

    async def cancel(self) -> JobState:
        """Cancel it if it has not ended; the job as it ended."""
        return await self._run(calls.cancel(self.id, self._patience_s))

    async def delete(self) -> None:
        """Cancel it if it has not ended, and forget it."""
        await self._run(calls.delete(self.id, self._patience_s))


class AsyncWatching:
    """A job that is watched, as Watching."""

    def __init__(self, line: AsyncLine, call: Call[None]) -> None:
        self._line, self._call = line, call

    async def __aiter__(self) -> AsyncIterator[Message]:
        async with aclosing(self._line.iterate(self._call)) as messages:
            async for message in messages:
                yield message

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._line.close()

    async def cancel(self) -> None:
        """Cancel the job."""
        await self._line.say(watching.CANCEL)
