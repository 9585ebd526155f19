"""What a server sends of a job, held to what was asked for and to the order it must come in: messages, events. No I/O.

Without this a server could send frames without end, and whoever keeps them would run out of memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import checks
from .errors import SWITCHING_PROTOCOLS, expecting
from .messages import Done, Ended, Event, Frame, Message, Progress, Waiting, event_of, images_after, message_of
from .patience import Patience
from .results import MAX_IMAGES
from .sse import Decoder, ServerSentEvent

MIB = 2**20
IMAGE_BYTES = 16 * MIB  # one image in a file: 2048 x 2048 pixels in colour, with its text
ANSWER_BYTES = 512 * MIB  # any answer or message
ANIMATION_BYTES = 64 * MIB  # which a server makes of 16 MiB of pixels at most
TRAJECTORY_BYTES = 64 * MIB  # of which a server makes 32 MiB at most
DOCUMENT_BYTES = 16 * MIB  # JSON without images
MAX_STEPS = 100_000  # of a request that does not say
EVENTS_QUIET_S = 45.0  # the server sends a comment every 15 s
OK, NO_CONTENT = 200, 204


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, as far as it bounds what answers it."""

    images: int  # n
    passes: int  # that an image takes, at most; frames count these as steps
    every: int  # steps between two frames, at least
    shows: frozenset[str]  # what frames may show
    in_sheets: bool  # one picture of all images, not one each
    frame_type: str  # media type of a frame

    @classmethod
    def of(cls, parameters: Mapping[str, Any], show: str | None = "x_t") -> "Asked":
        """Read it from the parameters of a call; `show` holds where they have none."""
        shows = parameters.get("show", show)
        # A sampler takes two passes a step and one more at most; with `nearest` the server chooses the steps.
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
        """How many pictures a step is shown in, for each of `shows`."""
        return 1 if self.in_sheets else self.images

    @property
    def picture_bytes(self) -> int:
        """How long one of them may be."""
        return min(self.images * IMAGE_BYTES, ANSWER_BYTES) if self.in_sheets else IMAGE_BYTES

    def answer_bytes(self, media_type: str) -> int:
        """How long an answer of a media type may be."""
        if media_type == "image/webp":
            return ANIMATION_BYTES
        if media_type == "application/vnd.tminus.trajectory":
            return TRAJECTORY_BYTES
        encoded = 4 * IMAGE_BYTES // 3 if media_type == "application/json" else IMAGE_BYTES
        return min(self.images * encoded, ANSWER_BYTES)


def _whole(given: object, otherwise: int) -> int:
    """A parameter as a number; another value than a number from 1 up is for the server to refuse."""
    try:
        number = int(given)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return otherwise
    return number if number >= 1 else otherwise


class FrameOrder:
    """Frames show one step after the other, and each step at most once in each of the pictures that were asked for."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._step, self._shown = asked, 0, set[tuple[str, int | None]]()

    def check(self, frame: Frame) -> None:
        """Raise ValueError for a frame that cannot come now."""
        asked, each = self._asked, (frame.show, frame.image)
        if not frame.step <= frame.steps <= asked.passes:
            raise ValueError(f"a frame of step {frame.step} of {frame.steps}, where {asked.passes} are the most")
        if frame.show not in asked.shows or (frame.image is None) != asked.in_sheets:
            raise ValueError(f"a frame of {frame.show!r:.40}, image {frame.image}, which was not asked for")
        if frame.step != self._step:
            if frame.step // asked.every <= self._step // asked.every:
                raise ValueError(f"a frame of step {frame.step} after one of step {self._step}")
            self._step, self._shown = frame.step, set()
        if each in self._shown or len(self._shown) >= len(asked.shows) * asked.pictures:
            raise ValueError(f"more frames of step {frame.step} than were asked for")
        self._shown.add(each)
        checks.picture(frame.data, asked.frame_type)


class Reading:
    """The messages of one watched job: Accepted, then frames, then the end with as many images as were asked for."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._frames, self._accepted = asked, FrameOrder(asked), False
        self._members: Mapping[str, Any] = {}

    def begin(self, text: str | bytes) -> int:
        """Check the JSON part of a message; returns how many images follow it. Raises UnexpectedAnswer."""
        with expecting(SWITCHING_PROTOCOLS):
            self._members = checks.mapping(checks.loads(text))
            kind, images = checks.text(self._members["type"]), images_after(self._members)
            if kind != "error" and (kind == "accepted") == self._accepted:
                raise ValueError(f"{kind!r:.40} came at the wrong time")
            if kind == "done" and images != self._asked.pictures:
                raise ValueError(f"{images} images, where {self._asked.pictures} were asked for")
        self._accepted = True
        return images

    def end(self, images: Sequence[str | bytes]) -> Message:
        """Read the message that began, with its images. Raises Problem, UnexpectedAnswer."""
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
    """Reads GET /jobs/{id}/events over several connections; `ended` once the job has.

    The patience starts over whenever the server says something.
    """

    def __init__(self, last_id: str, patience: Patience, asked: Asked) -> None:
        self.ended = False
        self._last_id, self._patience, self._asked = last_id, patience, asked
        self._decoder, self._frames, self._heard = Decoder(), FrameOrder(asked), False

    def begin_connection(self) -> dict[str, str]:
        """Discard an incomplete event of the last connection; returns the headers of the next request."""
        self._decoder, self._frames, self._heard = Decoder(), FrameOrder(self._asked), False
        return {"Accept": "text/event-stream"} | ({"Last-Event-ID": self._last_id} if self._last_id else {})

    def read(self, chunk: bytes) -> Iterator[Event]:
        """Give the events that end in a chunk. Raises UnexpectedAnswer."""
        with expecting(OK):
            received = self._decoder.feed(chunk)
        if received or self._heard:  # the first chunk is only a greeting, which a server about to stop sends too
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
                checks.token(sent.id)  # it is sent back in a header
            if isinstance(event, Frame):
                self._frames.check(event)
            elif isinstance(event, Waiting | Progress):
                # Beside frames these come only first: from a server that begins to work on the job. It may be another
                # one, whose events come over the same connection, and which goes on from a snapshot: steps come again.
                self._frames = FrameOrder(self._asked)
        return event
