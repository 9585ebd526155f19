"""Reads the messages and events of a job, and checks their number and order. No I/O.

Without these checks, a server could send endless frames. A caller that keeps all frames would then run out of memory.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import checks
from .errors import SWITCHING_PROTOCOLS, UnexpectedAnswer, expecting, problem_of
from .patience import Patience
from .results import (
    MAX_IMAGES,
    Accepted,
    Cancelled,
    Done,
    Ended,
    Event,
    Frame,
    JobState,
    Message,
    Progress,
    Waiting,
)

MIB = 2**20
IMAGE_BYTES = 16 * MIB  # maximum of one image file: 2048 x 2048 pixels in colour, with text
ANSWER_BYTES = 512 * MIB  # maximum of any response or message
ANIMATION_BYTES = 64 * MIB  # a server encodes at most 16 MiB of pixels per animation
TRAJECTORY_BYTES = 64 * MIB  # a server sends trajectories of at most 32 MiB
DOCUMENT_BYTES = 16 * MIB  # maximum of a JSON response without images
MAX_STEPS = 100_000  # assumed maximum if the number of steps is unknown
EVENTS_QUIET_S = 45.0  # timeout without data; the server sends a comment every 15 s
OK, NO_CONTENT = 200, 204
CANCEL = '{"type": "cancel"}'
LINE_END = re.compile(rb"\r\n|\n|\r")
EVENT_BYTES = 64 * MIB  # maximum of one event, in which frames are base64
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Expected:
    """What a response may contain, according to the parameters of its request."""

    images: int  # number of images
    passes: int  # maximum number of network passes per image; `Frame.step` counts passes
    every: int  # minimum number of steps between two frames
    shows: frozenset[str]  # any of x_t and x_0
    in_sheets: bool  # True if one picture shows all images
    frame_type: str  # media type of a frame

    @classmethod
    def of(cls, parameters: Mapping[str, Any], show: str | None = "x_t") -> "Expected":
        """Derive the limits from the parameters of a call. show: the default of the parameter `show`."""
        shows = parameters.get("show", show)
        # A sampler makes at most 2 * steps + 1 passes. With `nearest`, the server itself chooses the number of steps.
        passes = MAX_STEPS if parameters.get("nearest") else 2 * _whole(parameters.get("steps"), MAX_STEPS) + 1
        return cls(
            images=_whole(parameters.get("n", 1), MAX_IMAGES),
            passes=passes,
            every=_whole(parameters.get("every"), 1),
            shows=frozenset([shows] if isinstance(shows, str) else shows or ()),
            in_sheets=parameters.get("layout", "sheet") == "sheet",
            frame_type=f"image/{parameters.get('frame_format', 'png')}",
        )

    @property
    def pictures(self) -> int:
        """Number of pictures per step for each element of `shows`."""
        return 1 if self.in_sheets else self.images

    @property
    def picture_bytes(self) -> int:
        return min(self.images * IMAGE_BYTES, ANSWER_BYTES) if self.in_sheets else IMAGE_BYTES

    def answer_bytes(self, media_type: str) -> int:
        if media_type == "image/webp":
            return ANIMATION_BYTES
        if media_type == "application/vnd.tminus.trajectory":
            return TRAJECTORY_BYTES
        encoded = 4 * IMAGE_BYTES // 3 if media_type == "application/json" else IMAGE_BYTES
        return min(self.images * encoded, ANSWER_BYTES)


def _whole(parameter: object, default: int) -> int:
    """Convert a parameter to an integer of at least 1.

    Returns the default for any other value, because the server refuses that value.
    """
    try:
        number = int(parameter)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return default
    return number if number >= 1 else default


def images_after(members: Mapping[str, Any]) -> int:
    """Return how many binary messages follow a JSON message. Raises KeyError or ValueError."""
    match checks.text(members["type"]):
        case "frame":
            return 1
        case "done":
            return checks.whole(members["images"])
    return 0


def message_of(members: Mapping[str, Any], pictures: tuple[bytes, ...]) -> Message:
    """Parse a message. Raises KeyError or ValueError if it is malformed, and Problem for type `error`."""
    match members["type"]:
        case "accepted":
            return checks.read(Accepted, members)
        case "frame":
            return frame(members, pictures[0])
        case "done":
            return checks.read(Done, {**members, "images": pictures})
        case "cancelled":
            return checks.read(Cancelled, members)
        case "error":
            raise problem_of(members, checks.optional(checks.number, members.get("retry_after_s")))
    raise ValueError(f"a message of type {members['type']!r:.40}")


def frame(members: Mapping[str, Any], data: bytes) -> Frame:
    """Parse a frame. Raises KeyError or ValueError if it is malformed."""
    return checks.read(Frame, {"image": None, **members, "data": data})


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """A server-sent event. `id` is the newest id so far; the next connection sends it as Last-Event-ID."""

    event: str
    data: str
    id: str


class EventDecoder:
    """Decodes server-sent events (HTML standard, section 9.2.6) from chunks of any size.

    Raises ValueError for an event of more than EVENT_BYTES. httpx-sse (0.4.3) is not used, because it reads from httpx
    itself, and does not remove a byte order mark or events without data.
    """

    def __init__(self) -> None:
        self.retry_s: float | None = None  # pause before reconnecting, if the server has requested one
        self._line = bytearray()  # the line that is not complete yet
        self._after_cr = False  # True if the last chunk ended in CR; an LF may follow
        self._at_start = True
        self._event, self._id = "", ""
        self._data: list[str] = []
        self._held = 0  # size of the complete lines of the event that is not complete yet

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Parse a chunk. Returns the events that are complete now."""
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
        name, _, value = line.partition(":")  # a comment has an empty name
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


def event_of(sent: ServerSentEvent) -> Event | None:
    """Parse an event of a job. Returns None for a kind that this client does not know. Raises UnexpectedAnswer."""
    try:
        members = checks.mapping(checks.loads(sent.data))
        match sent.event:
            case "waiting":
                return checks.read(Waiting, members)
            case "progress":
                return checks.read(Progress, members)
            case "frame":
                return frame(members, checks.decoded(members["data"]))
            case "done" | "failed" | "cancelled":
                return Ended(JobState.of(members))
    except (ValueError, KeyError):
        raise UnexpectedAnswer(200, f"the event {sent.event[:40]!r} cannot be read") from None
    return None


class FrameOrder:
    """Checks that frames come in order of their steps, and that no step has more pictures than requested."""

    def __init__(self, expected: Expected) -> None:
        self._expected, self._step, self._shown = expected, 0, set[tuple[str, int | None]]()

    def check(self, frame: Frame) -> None:
        """Raise ValueError if a frame is out of order, was not requested, or has the wrong format."""
        expected, each = self._expected, (frame.show, frame.image)
        if not frame.step <= frame.steps <= expected.passes:
            raise ValueError(f"a frame of step {frame.step} of {frame.steps}, where {expected.passes} are the most")
        if frame.show not in expected.shows or (frame.image is None) != expected.in_sheets:
            raise ValueError(f"a frame of {frame.show!r:.40}, image {frame.image}, which was not asked for")
        if frame.step != self._step:
            if frame.step // expected.every <= self._step // expected.every:
                raise ValueError(f"a frame of step {frame.step} after one of step {self._step}")
            self._step, self._shown = frame.step, set()
        if each in self._shown or len(self._shown) >= len(expected.shows) * expected.pictures:
            raise ValueError(f"more frames of step {frame.step} than were asked for")
        self._shown.add(each)
        checks.picture(frame.data, expected.frame_type)


class Reading:
    """Reads the messages of a watched job: first Accepted, then Frames, then Done or Cancelled."""

    def __init__(self, expected: Expected) -> None:
        self._expected, self._frames, self._accepted = expected, FrameOrder(expected), False
        self._members: Mapping[str, Any] = {}

    def begin(self, text: str | bytes) -> int:
        """Read the JSON part of a message. Returns how many images follow. Raises UnexpectedAnswer."""
        with expecting(SWITCHING_PROTOCOLS):
            self._members = checks.mapping(checks.loads(text))
            kind, images = checks.text(self._members["type"]), images_after(self._members)
            if kind != "error" and (kind == "accepted") == self._accepted:
                raise ValueError(f"{kind!r:.40} came at the wrong time")
            if kind == "done" and images != self._expected.pictures:
                raise ValueError(f"{images} images, where {self._expected.pictures} were asked for")
        self._accepted = True
        return images

    def end(self, images: Sequence[str | bytes]) -> Message:
        """Return the message, completed with its images. Raises Problem or UnexpectedAnswer."""
        with expecting(SWITCHING_PROTOCOLS):
            pictures = tuple(image for image in images if isinstance(image, bytes))
            if len(pictures) < len(images):
                raise ValueError("text in place of an image")
            message = message_of(self._members, pictures)
            if isinstance(message, Frame):
                self._frames.check(message)
            elif isinstance(message, Done):
                for image in message.images:
                    checks.picture(image, "image/png")
        return message


class Following:
    """Reads GET /jobs/{id}/events until the job has `ended`, over several connections if necessary.

    Each event calls `Patience.renew`.
    """

    def __init__(self, last_id: str, patience: Patience, expected: Expected) -> None:
        self.ended = False
        self._last_id, self._patience, self._expected = last_id, patience, expected
        self._decoder, self._frames, self._heard = EventDecoder(), FrameOrder(expected), False

    def begin_connection(self) -> dict[str, str]:
        """Prepare for a new connection: drop an incomplete event. Returns the headers of the request."""
        self._decoder, self._frames, self._heard = EventDecoder(), FrameOrder(self._expected), False
        return {"Accept": "text/event-stream"} | ({"Last-Event-ID": self._last_id} if self._last_id else {})

    def read(self, chunk: bytes) -> Iterator[Event]:
        """Yield the events that are complete after this chunk. Raises UnexpectedAnswer."""
        with expecting(OK):
            received = self._decoder.feed(chunk)
        if received or self._heard:  # the first chunk is no progress: even a stopping server sends it
            self._patience.renew()
        self._heard = True
        for sent in received:
            event = self._event(sent)
            if event is not None:
                yield event
            self.ended = isinstance(event, Ended)
            if self.ended:
                return
            self._last_id = sent.id or self._last_id
        self._patience.first_s = self._decoder.retry_s or self._patience.first_s

    def _event(self, sent: ServerSentEvent) -> Event | None:
        event = event_of(sent)
        with expecting(OK):
            if sent.id:
                checks.token(sent.id)  # the next request sends the id in a header
            if isinstance(event, Frame):
                self._frames.check(event)
            elif isinstance(event, Waiting | Progress):
                # These events come before the first frame. They also come if a different server takes over the job
                # while the connection stays open. That server continues from a snapshot, so it repeats some steps.
                self._frames = FrameOrder(self._expected)
        return event
