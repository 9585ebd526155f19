"""Requests to the replica that works on a job, for the job's state, events and frames.

These requests carry the client's own credentials, so a replica has no more rights than its clients. A request from a
replica is never forwarded again: the response contains what this replica knows.
"""

import logging
import re
from collections.abc import AsyncGenerator
from contextlib import suppress

import httpx
from starlette.requests import Request

from tminus.service.api.answers.documents import JobAnswer

log = logging.getLogger(__name__)

FORWARDED = "x-tminus-forwarded"
PASSED = (b"authorization", b"cookie", b"traceparent", b"x-request-id")
# Every error that a bad address or a bad response can raise.
FAILURES = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError)
CONNECT_S, ANSWER_S = 1.0, 2.0  # timeouts in seconds; afterwards this replica responds with what it knows
SILENT_S = 40.0  # maximum seconds between two events; comments come more often
EVENT_ID = re.compile(rb"^id: ?(\S+)$", re.MULTILINE)


class OtherReplicas:
    """Owns the HTTP client for other replicas, which is created on first use."""

    def __init__(self) -> None:
        self._http: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def job(self, address: str, request: Request, job_id: str) -> JobAnswer | None:
        """Return a job's state from the replica at this address, or None on failure."""
        try:
            answer = await self._client().get(f"{address}/jobs/{job_id}", headers=_headers(request), timeout=ANSWER_S)
            return JobAnswer.model_validate_json(answer.content) if answer.status_code == 200 else None
        except FAILURES as error:  # pydantic's ValidationError is a ValueError
            log.warning("%s does not tell where job %s stands: %r", address, job_id, error)
            return None

    async def events(
        self, address: str, request: Request, job_id: str, last_id: str
    ) -> AsyncGenerator[tuple[bytes, str]]:
        """Yield the bytes of a job's events, with the id of the last event so far.

        Stops when the replica ends the stream, or on failure.
        """
        url = f"{address}/jobs/{job_id}/events"
        headers = _headers(request)
        if last_id:
            headers.append((b"last-event-id", last_id.encode("latin-1", "ignore")))
        timeout = httpx.Timeout(SILENT_S, connect=CONNECT_S)
        rest = b""
        with suppress(*FAILURES):
            query = str(request.query_params)
            asked = self._client().stream("GET", f"{url}?{query}", headers=headers, timeout=timeout)
            async with asked as answer:
                if answer.status_code != 200:
                    return
                async for part in answer.aiter_raw():
                    whole, separator, rest = (rest + part).rpartition(b"\n\n")  # forward only complete events
                    if found := EVENT_ID.findall(whole):
                        last_id = found[-1].decode()
                    if separator:
                        yield whole + separator, last_id

    def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            logging.getLogger("httpx").setLevel(logging.WARNING)  # httpx logs each request at level INFO
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
            self._http = httpx.AsyncClient(trust_env=False, limits=limits)
        return self._http


def came_from_a_replica(request: Request) -> bool:
    """Return whether another replica forwarded this request."""
    return FORWARDED in request.headers


def _headers(request: Request) -> list[tuple[bytes, bytes]]:
    """Return the headers to forward, as raw bytes: a browser's cookies may contain any bytes."""
    passed = [(name, value) for name, value in request.headers.raw if name in PASSED]
    if request.client is not None:
        passed.append((b"x-forwarded-for", request.client.host.encode("latin-1", "ignore")))
    return [*passed, (FORWARDED.encode(), b"1"), (b"accept-encoding", b"identity")]
