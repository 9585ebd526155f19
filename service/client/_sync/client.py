# Generated from service/client/_async/client.py by tests/unasync.py. Change that file and run `make client`.
"""The client itself: a method for each thing that a server does."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import httpx

from .. import checks
from ..parameters import JSON_BODY, Parameters, Sampling, Shown, bytes_of, text_of, webhook_members
from ..patience import Patience
from ..reading import IMAGE_BYTES, Expected
from ..results import PNG, JobState, MediaType, ModelState, Noised, Sampled, models_of, object_of, page_of
from ..transport import KeyAuth, timeouts, with_key
from .connection import Connection
from .job import Job
from .watching import Watching

PAGE = 200  # jobs a request, the most that the server lists at once


class Client:
    """A client of one tminus server. Threads may share it.

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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = Connection(url, model, patience_s, with_key(url, headers, key), transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def sample(self, *, accept: MediaType = "image/png", **parameters: Unpack[Sampling]) -> Sampled:
        """Sample and wait: the images as a PNG sheet, a zip or JSON of PNGs, or floats; an animation; a trajectory."""
        # The server drops a job whose connection breaks, so a second attempt does no harm.
        options: dict[str, Any] = {
            "content": text_of(parameters),
            "headers": JSON_BODY | {"Accept": accept},
            "timeout": timeouts(None),
            "max_bytes": Expected.of(parameters).answer_bytes(accept),
        }
        return Sampled.of(self._connection.request("POST", "/sample", **options), accept)

    def watch(self, **parameters: Unpack[Shown]) -> Watching:
        """Sample and watch: iterate over the result for Accepted, Frames, and Done or Cancelled.

        A slow reader gets the newest frame; the server ends the job of one that reads nothing for a minute. Leaving
        the loop cancels the job.
        """
        return Watching(self._connection, parameters)

    def submit(
        self,
        *,
        idempotency_key: str | None = None,
        webhook: str | None = None,
        webhook_events: Sequence[str] | None = None,
        **parameters: Unpack[Parameters],
    ) -> Job:
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
        response = self._connection.request("POST", "/jobs", patience, content=body, headers=headers)
        state = JobState.of(object_of(response))
        return Job(self._connection, state.id, state)

    def job(self, job_id: str) -> Job:
        """Return the handle of a job of any model, by its id. Sends nothing."""
        return Job(self._connection, job_id)

    def jobs(self, *, state: str | Sequence[str] | None = None) -> Iterator[JobState]:
        """Iterate over the jobs, the newest first: those of the client's model, if it has one.

        state: one state or several; None: all.
        """
        params: dict[str, Any] = {"limit": PAGE}
        if state is not None:
            params["state"] = state if isinstance(state, str) else ",".join(state)
        while True:
            page, before = page_of(self._connection.request("GET", "/jobs", params=params))
            for job in page:
                yield job
            if before is None:
                return
            params["before"] = before

    def noise(self, image: bytes | Path, t: int, seed: int | None = None) -> Noised:
        """Run the forward process: an image, its bytes or Path, at timestep t."""
        options: dict[str, Any] = {
            "params": {"t": t} if seed is None else {"t": t, "seed": seed},
            "headers": {"Content-Type": "application/octet-stream", "Accept": PNG},
            "content": bytes_of(image),
            "max_bytes": IMAGE_BYTES,
        }
        return Noised.of(self._connection.request("POST", "/noise", **options))

    def model(self) -> dict[str, Any]:
        """Read the description of the model and its limits, as GET /model has it."""
        return object_of(self._connection.request("GET", "/model"))

    # --- all models of the server ---

    def models(self) -> list[ModelState]:
        """List the models that are served, and those that can be loaded."""
        return models_of(self._connection.request("GET", f"{self._connection.server}/models"))

    def load_model(self, name: str, admin_key: str | None = None) -> ModelState:
        """Load a model. Returns when it is served, which may take minutes.

        admin_key: a key of the role admin for this request, in place of the client's own. Raises Problem: unauthorized,
        forbidden, admin_off, model_not_found, model_busy, checkpoint_refused; ValueError for an invalid name or key.
        """
        return ModelState.of(object_of(self._change(name, "load", admin_key)))

    def reload_model(self, name: str, admin_key: str | None = None) -> ModelState:
        """Read a loaded model's folder again. Returns when its new content is served. Otherwise like load_model."""
        return ModelState.of(object_of(self._change(name, "reload", admin_key)))

    def unload_model(self, name: str, admin_key: str | None = None) -> None:
        """Unload a model; its jobs are still finished. Raises as load_model does."""
        self._change(name, "unload", admin_key)

    def _change(self, name: str, change: str, admin_key: str | None) -> httpx.Response:
        url = f"{self._connection.server}/models/{checks.model_name(name)}/{change}"
        # A second load would be refused, though the first may have done it.
        patience = Patience(self._connection.patience_s, once=True)
        auth: dict[str, Any] = {} if admin_key is None else {"auth": KeyAuth(admin_key)}
        return self._connection.request("POST", url, patience, timeout=timeouts(None), **auth)
