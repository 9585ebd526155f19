"""What is known of a job's events from one connection to the next. No I/O."""

from collections.abc import Iterator

from . import checks, messages
from .bounds import Asked
from .errors import UnexpectedAnswer
from .patience import Patience
from .reading import FrameOrder
from .sse import Decoder, ServerSentEvent

EVENTS_QUIET_S = 45.0  # the server sends a comment every 15 s
OK, NO_CONTENT = 200, 204


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

    def read(self, chunk: bytes) -> Iterator[messages.Event]:
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
            self.ended = isinstance(event, messages.Ended)
            if self.ended:
                return
            self._last_id = sent.id or self._last_id
        self._patience.first_s = self._decoder.retry_s or self._patience.first_s

    def _event(self, sent: ServerSentEvent) -> messages.Event | None:
        event = messages.event(sent)
        try:
            if sent.id:
                checks.token(sent.id)  # it is sent back in a header
            if isinstance(event, messages.Frame):
                self._frames.check(event)
            elif isinstance(event, messages.Waiting | messages.Progress):
                # Beside frames these come only first: from a server that begins to work on the job. It may be another
                # one, whose events come over the same connection, and which goes on from a snapshot: steps come again.
                self._frames = FrameOrder(self._asked)
        except ValueError as error:
            raise UnexpectedAnswer(OK, error) from None
        return event
