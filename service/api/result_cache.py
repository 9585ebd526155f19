"""Finished answers with a given seed, kept in memory up to a bound, so that a repeat costs no step."""

from cachetools import LRUCache


class ResultCache:
    """Owns the bodies, by ETag; the least recently asked for goes first. Used by the event loop's thread only."""

    def __init__(self, max_bytes: int) -> None:
        self._bodies: LRUCache[str, bytes] = LRUCache(max_bytes, getsizeof=len)

    def get(self, etag: str) -> bytes | None:
        """The body of this name, if it is still here."""
        return self._bodies.get(etag)

    def put(self, etag: str, body: bytes) -> None:
        """Keep a body, unless it alone is over the bound."""
        if len(body) <= self._bodies.maxsize:
            self._bodies[etag] = body
