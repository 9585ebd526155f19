"""What a server sends of a job, held to what was asked for and to the order it must come in: messages, events. No I/O.

Without this a server could send frames without end, and whoever keeps them would run out of memory.
"""

from collections.abc import Iterator

from . import checks
from .bounds import Asked
from .errors import SWITCHING_PROTOCOLS, UnexpectedAnswer
from .messages import Done, Ended, Event, Frame, Message, Opening, Progress, Waiting, event_of
from .patience import Patience
from .sse import Decoder, ServerSentEvent

EVENTS_QUIET_S = 45.0  # the server sends a comment every 15 s
OK, NO_CONTENT = 200, 204


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

    def begin(self, opening: Opening) -> None:
        """Check a message before the images that follow it are read. Raises UnexpectedAnswer."""
        kind = opening.members["type"]
        if kind != "error" and (kind == "accepted") == self._accepted:
            raise UnexpectedAnswer(SWITCHING_PROTOCOLS, f"{kind!r:.40} came at the wrong time")
        self._accepted = True
        if kind == "done" and opening.images != self._asked.pictures:
            what = f"{opening.images} images, where {self._asked.pictures} were asked for"
            raise UnexpectedAnswer(SWITCHING_PROTOCOLS, what)

    def end(self, message: Message) -> None:
        """Check a message as a whole. Raises UnexpectedAnswer."""
        try:
            if isinstance(message, Frame):
                self._frames.check(message)
            elif isinstance(message, Done):
                for image in message.images:
                    checks.picture(image, "image/png")
        except ValueError as error:
            raise UnexpectedAnswer(SWITCHING_PROTOCOLS, error) from None


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
        try:
            received = self._decoder.feed(chunk)
        except ValueError as error:
            raise UnexpectedAnswer(OK, error) from None
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
        try:
            if sent.id:
                checks.token(sent.id)  # it is sent back in a header
            if isinstance(event, Frame):
                self._frames.check(event)
            elif isinstance(event, Waiting | Progress):
                # Beside frames these come only first: from a server that begins to work on the job. It may be another
                # one, whose events come over the same connection, and which goes on from a snapshot: steps come again.
                self._frames = FrameOrder(self._asked)
        except ValueError as error:
            raise UnexpectedAnswer(OK, error) from None
        return event
