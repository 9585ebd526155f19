"""Decode server-sent events as the HTML standard says (section 9.2.6). No I/O.

Written here since httpx-sse (0.4.3) reads from httpx itself, and keeps a byte order mark and events without data.
"""

import re
from dataclasses import dataclass

LINE_END = re.compile(rb"\r\n|\n|\r")
EVENT_BYTES = 64 * 2**20  # a frame as base64
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event; `id` is the last one sent up to it, for the Last-Event-ID of the next connection."""

    event: str
    data: str
    id: str


class Decoder:
    """Takes bytes in pieces of any size, and gives events as soon as they are complete.

    An event of more than EVENT_BYTES raises ValueError.
    """

    def __init__(self) -> None:
        self.retry_s: float | None = None  # the pause between two connections that the server asks for
        self._line = bytearray()  # the line that is not complete yet
        self._after_cr = False  # the last chunk ended in CR, which may be half of CRLF
        self._at_start = True
        self._event, self._id = "", ""
        self._data: list[str] = []
        self._held = 0  # bytes of the lines of the event that is not complete yet

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Parse a chunk. Returns the events it completes."""
        if not chunk:
            return []
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        events = []
        *ends, rest = LINE_END.split(chunk)
        for end in ends:
            self._line += end
            line = bytes(self._line)
            self._line.clear()
            if self._at_start:
                line = line.removeprefix(BOM)
                self._at_start = False
            self._held += len(line) + 1
            if line:
                self._take(line.decode("utf-8", "replace"))
            elif (event := self._dispatch()) is not None:
                events.append(event)
            self._bound()
        self._line += rest
        self._bound()
        return events

    def _bound(self) -> None:
        if self._held + len(self._line) > EVENT_BYTES:
            raise ValueError(f"an event of more than {EVENT_BYTES} bytes")

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")  # a comment has no name
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdecimal() and len(value) < 9:
            self.retry_s = int(value) / 1000

    def _dispatch(self) -> ServerSentEvent | None:
        data, kind = self._data, self._event
        self._data, self._event, self._held = [], "", 0
        return ServerSentEvent(kind or "message", "\n".join(data), self._id) if data else None
