"""The calls that have one answer. No I/O: each is a generator of effects."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from service.client.effects import Call, Give, Pause, Request
from service.client.errors import Problem
from service.client.parameters import body_of, bytes_of
from service.client.patience import Patience, persist
from service.client.results import PNG, JobState, Noised, Sampled, object_of

SHORTEST_POLL_S, LONGEST_POLL_S = 0.05, 2.0
PAGE = 200


def sample(parameters: Mapping[str, Any], accept: str, patience_s: float) -> Call[Sampled]:
    """POST /sample. If the connection breaks the server gives the job up, so that asking again does no harm."""
    request = Request("POST", "/sample", json=body_of(parameters), headers={"Accept": accept}, quiet_s=None)
    return Sampled.of((yield from persist(request, Patience(patience_s))))


def noise(image: bytes | Path, t: int, seed: int | None, patience_s: float) -> Call[Noised]:
    """POST /noise."""
    params = {"t": t} if seed is None else {"t": t, "seed": seed}
    headers = {"Content-Type": "application/octet-stream", "Accept": PNG}
    request = Request("POST", "/noise", params, content=bytes_of(image), headers=headers)
    return Noised.of((yield from persist(request, Patience(patience_s))))


def model(patience_s: float) -> Call[dict[str, Any]]:
    """GET /model."""
    return object_of((yield from persist(Request("GET", "/model"), Patience(patience_s))))


def submit(parameters: Mapping[str, Any], key: str | None, patience_s: float) -> Call[JobState]:
    """POST /jobs. With a key it is one job, however often it is asked for."""
    headers = {"Idempotency-Key": uuid.uuid4().hex if key is None else key}
    request = Request("POST", "/jobs", json=body_of(parameters), headers=headers)
    return JobState.of(object_of((yield from persist(request, Patience(patience_s, durable=True)))))


def state(job_id: str, patience_s: float) -> Call[JobState]:
    """GET /jobs/{id}."""
    return JobState.of(object_of((yield from persist(_get(job_id), Patience(patience_s)))))


def wait(
    job_id: str, timeout_s: float | None, patience_s: float, clock: Callable[[], float] = time.monotonic
) -> Call[JobState]:
    """GET /jobs/{id} until it has ended, when it should have. Raises TimeoutError."""
    began = clock()
    patience = Patience(patience_s, durable=True, known=True)
    while True:
        job = JobState.of(object_of((yield from persist(_get(job_id), patience))))
        patience.renew()
        if job.ended:
            return job
        pause_s = min(max(job.eta_s or 0, SHORTEST_POLL_S), LONGEST_POLL_S)
        if timeout_s is not None:
            left_s = began + timeout_s - clock()
            if left_s <= 0:
                raise TimeoutError(f"job {job_id} is {job.state} after {timeout_s:g} s")
            pause_s = min(pause_s, left_s)
        yield Pause(pause_s)


def image(job_id: str, accept: str, patience_s: float) -> Call[Sampled]:
    """GET /jobs/{id}/image."""
    request = Request("GET", f"{path(job_id)}/image", headers={"Accept": accept})
    return Sampled.of((yield from persist(request, Patience(patience_s))))


def cancel(job_id: str, patience_s: float) -> Call[JobState]:
    """POST /jobs/{id}/cancel."""
    request = Request("POST", f"{path(job_id)}/cancel")
    return JobState.of(object_of((yield from persist(request, Patience(patience_s)))))


def delete(job_id: str, patience_s: float) -> Call[None]:
    """DELETE /jobs/{id} until it is not there: one that runs is only cancelled the first time."""
    patience = Patience(patience_s)
    try:
        while True:
            yield from persist(Request("DELETE", path(job_id)), patience)
            yield from persist(_get(job_id), patience)
            yield Pause(SHORTEST_POLL_S)
    except Problem as problem:
        if problem.code != "job_not_found":
            raise


def jobs(state: str | Sequence[str] | None, patience_s: float) -> Call[None]:
    """GET /jobs, page by page; gives a JobState for each."""
    before = None
    states = state if state is None or isinstance(state, str) else ",".join(state)
    while True:
        given = {"state": states, "limit": PAGE, "before": before}
        params = {name: value for name, value in given.items() if value is not None}
        page = object_of((yield from persist(Request("GET", "/jobs", params), Patience(patience_s))))
        for document in page["jobs"]:
            yield Give(JobState.of(document))
        before = page["next"]
        if before is None:
            return


def path(job_id: str) -> str:
    """Where a job is."""
    assert job_id, "a job has an id"
    return f"/jobs/{quote(job_id, safe='')}"


def _get(job_id: str) -> Request:
    return Request("GET", path(job_id))
