"""Answers that have a name: whether a client has one already, and bodies kept in memory.

An answer to a request with a given seed is a function of the request: its name, the ETag, is known before it is made.
"""

from urllib.request import parse_http_list

from cachetools import LRUCache
from starlette.requests import Request


class ResultCache:
    """Owns the bodies, by ETag; the least recently used goes first. Used by the event loop's thread only."""

    def __init__(self, max_bytes: int) -> None:
        self._bodies: LRUCache[str, bytes] = LRUCache(max_bytes, getsizeof=len)

    def get(self, etag: str) -> bytes | None:
        """Look up the body of this name, None if it is not here (any more)."""
        return self._bodies.get(etag)

    def put(self, etag: str, body: bytes) -> None:
        """Keep a body, unless it alone is over the bound."""
        if len(body) <= self._bodies.maxsize:
            self._bodies[etag] = body


def cache_headers(etag: str | None) -> dict[str, str]:
    """Make the headers that name an answer; without a name it is not to be stored."""
    return {"Cache-Control": "no-store"} if etag is None else {"ETag": etag, "Cache-Control": "no-cache"}


def cache_directives(request: Request) -> frozenset[str]:
    """Read what a request says of caches, as no-cache and no-store, in lower case (RFC 9111, section 5.2.1).

    Pragma counts only where there is no Cache-Control (section 5.4).
    """
    headers = request.headers
    directives = parse_http_list(", ".join(headers.getlist("cache-control") or headers.getlist("pragma")))
    return frozenset(directive.partition("=")[0].strip().lower() for directive in directives)


def matches(request: Request, etag: str) -> bool:
    """Say whether the client has this answer already (RFC 9110, section 13.1.2; the weak comparison).

    `*` matches whatever a GET or HEAD would answer. The answer to a POST is no resource, and `*` matches none.
    """
    names = [name.strip().removeprefix("W/") for name in ",".join(request.headers.getlist("if-none-match")).split(",")]
    return etag in names or ("*" in names and request.method in ("GET", "HEAD"))
