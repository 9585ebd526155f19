"""What a call needs done outside itself. No I/O.

A call is a generator: it yields effects, is sent what came of each, has an Unreachable thrown in where nothing did, and
returns its result. So a call is written once, and whoever runs it may wait in a thread or in an event loop.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from service.client.errors import Unreachable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request. quiet_s: how long the server may say nothing; None: as long as it takes."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    quiet_s: float | None = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response. The names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a request; gives its Answer."""

    request: Request


@dataclass(frozen=True, slots=True)
class Listen:
    """Send a request whose answer does not end; gives its Answer, with the content where it is not 200."""

    request: Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Wait for more of what is listened to; gives bytes, or None at the end."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a WebSocket and say something; gives an Answer, of status 101 where it is open."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Hear:
    """Wait for a message over the WebSocket; gives str or bytes."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Give:
    """Hand a value to who iterates."""

    value: Any


@dataclass(frozen=True, slots=True)
class Returned:
    """The call is at its end."""

    value: Any


Effect = Ask | Listen | Chunk | Dial | Hear | Pause | Give
Call = Generator[Effect, Any, T]


def advance(call: Call[Any], came: Any = None, failed: Unreachable | None = None) -> Effect | Returned:
    """Tell a call what came of its last effect; gives the next one. Raises the error that the call ends in."""
    try:
        return call.send(came) if failed is None else call.throw(failed)
    except StopIteration as stop:
        return Returned(stop.value)
