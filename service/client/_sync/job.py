# Generated from service/client/_async/job.py by tests/unasync.py. Change that file and run `make client`.
"""Durable jobs: their state, events and images."""

import time
from collections.abc import Iterator
from typing import Any, Unpack
from urllib.parse import quote

from ..errors import ClientError, Problem, Unreachable
from ..messages import Event
from ..parameters import Preview
from ..patience import Patience, Polling
from ..reading import EVENTS_QUIET_S, NO_CONTENT, Expected, Following
from ..results import MAX_IMAGES, JobState, MediaType, Sampled, object_of
from ..transport import QUIET_S, timeouts
from .connection import Connection


class Job:
    """A durable job. `latest` is the state that was read last; None before that."""

    def __init__(self, connection: Connection, job_id: str, latest: JobState | None = None) -> None:
        assert job_id, "a job has an id"
        self.id, self.latest = job_id, latest
        self._connection, self._path = connection, f"/jobs/{quote(job_id, safe='')}"

    def state(self) -> JobState:
        """Read its state."""
        self.latest = JobState.of(object_of(self._connection.request("GET", self._path)))
        return self.latest

    def wait(self, timeout_s: float | None = None) -> JobState:
        """Wait until it is done, failed or cancelled. A restart of the server may take up to a minute.

        Raises TimeoutError after timeout_s, or a second or two later if the server is silent; the job goes on.
        """
        patience, polling = self._patience(), Polling(self.id, timeout_s)
        while True:
            # One attempt at a time, since timeout_s may be over before the patience.
            once, limits = Patience(0), timeouts(polling.look_s(QUIET_S))
            try:
                job = JobState.of(object_of(self._connection.request("GET", self._path, once, timeout=limits)))
            except ClientError as error:
                time.sleep(polling.pause_after_s(error, patience))
                continue
            patience.renew()
            if job.ended:
                self.latest = job
                return job
            time.sleep(polling.pause_s(job))

    def events(self, *, last_id: str = "", **preview: Unpack[Preview]) -> Iterator[Event]:
        """Iterate over the job's events: Waiting, Progress or, with `show`, Frames, and at last Ended.

        A broken connection is opened again, and a restart of the server may take up to a minute; with layout `images`
        some frames may come twice then.
        """
        patience, path = self._patience(), f"{self._path}/events"
        following = Following(last_id, patience, Expected.of(preview | self._known(), show=None))
        while True:
            headers = following.begin_connection()
            try:
                with self._connection.stream(path, preview, headers, EVENTS_QUIET_S) as response:
                    if response.status_code == NO_CONTENT:  # the end was known already
                        return
                    for chunk in response.iter_bytes():
                        for event in following.read(chunk):
                            yield event
                        if following.ended:
                            return
                raise Unreachable(f"the events of job {self.id} ended before it did", reached=True)
            except ClientError as error:
                time.sleep(patience.pause_s(error))

    def image(self, accept: MediaType = "image/png", *, clip_output: bool = True) -> Sampled:
        """Read the images of a job that is done. Raises Problem: job_not_done, no_images, job_not_found.

        clip_output: whether the floats of a job with bit_depth=32 are clipped to the model's range.
        """
        limit = Expected.of(self._known()).answer_bytes(accept)
        options: dict[str, Any] = {"headers": {"Accept": accept}, "max_bytes": limit}
        path = f"{self._path}/image{'' if clip_output else '?clip_output=false'}"
        return Sampled.of(self._connection.request("GET", path, **options), accept)

    def cancel(self) -> JobState:
        """Cancel it if it has not ended, and return its last state."""
        return JobState.of(object_of(self._connection.request("POST", f"{self._path}/cancel")))

    def delete(self) -> None:
        """Delete it, and cancel it if it has not ended. A missing job is no error."""
        try:
            self._connection.request("DELETE", self._path, Patience(self._connection.patience_s))
        except Problem as problem:
            if problem.code != "job_not_found":
                raise

    def _known(self) -> dict[str, Any]:
        """The parameters that bound its images and frames, as far as they are known."""
        return {"n": MAX_IMAGES} if self.latest is None else {"n": self.latest.n, "steps": self.latest.steps}

    def _patience(self) -> Patience:
        return Patience(self._connection.patience_s, durable=True, known=True)
