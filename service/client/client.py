"""The client that waits in the caller's thread."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from service.client import calls, following, watching
from service.client.effects import Call
from service.client.line import Line
from service.client.messages import Event, Message
from service.client.parameters import Parameters, Preview, Sampling, Shown
from service.client.results import JobState, MediaType, Noised, Sampled
from service.client.transport import http_address, ws_address

T = TypeVar("T")


class Client:
    """A tminus server. One client may be used by many threads.

    url: where it is, `http://host:port`, with a path if it has one behind a proxy. patience_s: how long in all a call
    may wait where the server says 429 or 503 with a Retry-After, or is not there; 0: such an error is raised at once.
    headers: sent with everything, for a proxy that wants to know who asks. transport: httpx's, in place of its own.

    Calls raise Problem where the server refuses or fails, Unreachable, and UnexpectedAnswer. Raises ValueError for a
    url that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        patience_s: float = 0,
        headers: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        address = http_address(url)
        self._ws_address = ws_address(address)
        self._patience_s, self._headers = patience_s, dict(headers or {})
        self._http = httpx.Client(base_url=address, headers=self._headers, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def sample(self, *, accept: MediaType = "image/png", **parameters: Unpack[Sampling]) -> Sampled:
        """Sample and wait: the images as one PNG sheet, or a zip or JSON of PNGs."""
        return self._run(calls.sample(parameters, accept, self._patience_s))

    def watch(self, **parameters: Unpack[Shown]) -> "Watching":
        """Sample and look on: iterate over the result for Accepted, Frames, and Done or Cancelled.

        Who reads slowly gets the newest frame. The job is cancelled when the loop is left.
        """
        return Watching(self._line(), watching.watch(parameters, self._patience_s))

    def submit(self, *, idempotency_key: str | None = None, **parameters: Unpack[Parameters]) -> "Job":
        """Ask for a durable job, which is finished whatever happens to client and server.

        A connection that breaks is no error for a minute: an Idempotency-Key, drawn if none is given, makes it safe to
        ask again. Give your own where your process may be started again: the same key and parameters are the same job.
        """
        state = self._run(calls.submit(parameters, idempotency_key, self._patience_s))
        return Job(self, state.id, state)

    def job(self, job_id: str) -> "Job":
        """A job by its id. Nothing is asked yet."""
        return Job(self, job_id)

    def jobs(self, *, state: str | Sequence[str] | None = None) -> Iterator[JobState]:
        """Iterate over all jobs, or those in a state or several, the newest first."""
        return self._line().iterate(calls.jobs(state, self._patience_s))

    def noise(self, image: bytes | Path, t: int, seed: int | None = None) -> Noised:
        """The forward process: an image, its bytes or Path, at timestep t."""
        return self._run(calls.noise(image, t, seed, self._patience_s))

    def model(self) -> dict[str, Any]:
        """What is loaded, and the limits, as GET /model tells it."""
        return self._run(calls.model(self._patience_s))

    def _line(self) -> "Line":
        return Line(self._http, self._ws_address, self._headers)

    def _run(self, call: Call[T]) -> T:
        return self._line().run(call)


class Job:
    """A durable job. `latest` is its state as it was last heard of; None if it never was."""

    def __init__(self, client: Client, job_id: str, latest: JobState | None = None) -> None:
        self.id, self.latest = job_id, latest
        self._run, self._line, self._patience_s = client._run, client._line, client._patience_s

    def state(self) -> JobState:
        """Ask how it stands."""
        self.latest = self._run(calls.state(self.id, self._patience_s))
        return self.latest

    def wait(self, timeout_s: float | None = None) -> JobState:
        """Wait until it is done, failed or cancelled; a restart of the server of up to a minute too.

        Raises TimeoutError after timeout_s; the job goes on.
        """
        self.latest = self._run(calls.wait(self.id, timeout_s, self._patience_s))
        return self.latest

    def events(self, *, last_id: str = "", **preview: Unpack[Preview]) -> Iterator[Event]:
        """Iterate over what happens: Waiting, Progress or, with `show`, Frames, and Ended as the last.

        Where the connection breaks, or the server is
        started again within a minute, it goes on; of frames with layout `images` some may come twice then.
        """
        return self._line().iterate(following.follow(self.id, preview, last_id, self._patience_s))

    def image(self, accept: MediaType = "image/png") -> Sampled:
        """The images of a job that is done. Raises Problem: job_not_done, no_images, job_not_found."""
        return self._run(calls.image(self.id, accept, self._patience_s))

    def cancel(self) -> JobState:
        """Cancel it if it has not ended; the job as it ended."""
        return self._run(calls.cancel(self.id, self._patience_s))

    def delete(self) -> None:
        """Cancel it if it has not ended, and forget it; no error if it is not there."""
        self._run(calls.delete(self.id, self._patience_s))


class Watching:
    """A job that is watched. Iterate over it; use `with` where the loop may be left by another way than `break`."""

    def __init__(self, line: "Line", call: Call[None]) -> None:
        self._line, self._call = line, call

    def __iter__(self) -> Iterator[Message]:
        with closing(self._line.iterate(self._call)) as messages:
            yield from messages

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._line.close()

    def cancel(self) -> None:
        """Cancel the job once there is one, from any thread; the loop ends with Cancelled, or Done if it was done."""
        self._line.say(watching.CANCEL)
