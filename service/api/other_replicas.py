"""Requests to the replica that works on a job, for the job's state, events and frames.

A replica is another server on the same job store. The requests carry the client's own credentials, so a replica can do
no more than its clients. A forwarded request is never forwarded again: the replica that receives it responds with what
it knows itself.
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
# All errors that a bad address or a bad response can cause.
FAILURES = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError)
CONNECT_S, ANSWER_S = 1.0, 2.0  # timeouts in seconds, after which this replica answers alone
SILENT_S = 40.0  # maximum seconds without data; replicas send comments more often than that
EVENT_ID = re.compile(rb"^id: ?(\S+)$", re.MULTILINE)


class OtherReplicas:
    """Owns the HTTP client for requests to other replicas. The client is created on first use."""

    def __init__(self) -> None:
        self._http: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def job(self, address: str, request: Request, job_id: str) -> JobAnswer | None:
        """Return a job's state, as reported by the replica at this address, or None if the request fails."""
        try:
            answer = await self._client().get(f"{address}/jobs/{job_id}", headers=_headers(request), timeout=ANSWER_S)
            return JobAnswer.model_validate_json(answer.content) if answer.status_code == 200 else None
        except FAILURES as error:  # ValueError includes pydantic's ValidationError
            log.warning("%s does not tell where job %s stands: %r", address, job_id, error)
            return None

    async def events(
        self, address: str, request: Request, job_id: str, last_id: str
    ) -> AsyncGenerator[tuple[bytes, str]]:
        """Yield a job's events as bytes, each time with the id of the last event so far.

        Ends when the replica ends the stream, or when the request fails.
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
                    whole, separator, rest = (rest + part).rpartition(b"\n\n")  # forward whole events only
                    if found := EVENT_ID.findall(whole):
                        last_id = found[-1].decode()
                    if separator:
                        yield whole + separator, last_id

    def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            logging.getLogger("httpx").setLevel(logging.WARNING)  # at level INFO, httpx logs every request
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
            self._http = httpx.AsyncClient(trust_env=False, limits=limits)
        return self._http


def came_from_a_replica(request: Request) -> bool:
    """Return True if another replica forwarded this request."""
    return FORWARDED in request.headers


def _headers(request: Request) -> list[tuple[bytes, bytes]]:
    """Return the headers to forward. They stay raw bytes, because a browser's cookies may contain any byte."""
    passed = [(name, value) for name, value in request.headers.raw if name in PASSED]
    if request.client is not None:
        passed.append((b"x-forwarded-for", request.client.host.encode("latin-1", "ignore")))
    return [*passed, (FORWARDED.encode(), b"1"), (b"accept-encoding", b"identity")]
