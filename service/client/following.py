"""GET /jobs/{id}/events as a call. No I/O."""

from collections.abc import Mapping
from typing import Any

from service.client import messages, sse
from service.client.calls import path
from service.client.effects import Answer, Call, Chunk, Give, Listen, Pause, Request
from service.client.errors import ClientError, Unreachable
from service.client.patience import Patience, check

QUIET_S = 45.0  # the server sends a comment every 15 s
NO_CONTENT = 204


def follow(job_id: str, preview: Mapping[str, Any], last_id: str, patience_s: float) -> Call[None]:
    """Give the Events of a durable job to its end, over as many connections as that takes.

    A break is waited out as long as Patience says, counted anew whenever the server says something.
    """
    patience = Patience(patience_s, durable=True, known=True)
    while True:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        request = Request("GET", f"{path(job_id)}/events", preview, headers=headers, quiet_s=QUIET_S)
        decoder = sse.Decoder()
        try:
            answer: Answer = yield Listen(request)
            if answer.status == NO_CONTENT:  # the end is known already
                return
            check(answer)
            heard = False  # more than the greeting
            while (chunk := (yield Chunk())) is not None:
                events = decoder.feed(chunk)
                if events or heard:
                    patience.renew()
                heard = True
                for sent in events:
                    event = messages.event(sent)
                    if event is not None:
                        yield Give(event)
                    if isinstance(event, messages.Ended):
                        return
                    last_id = sent.id or last_id
                patience.first_s = decoder.retry_s or patience.first_s
            raise Unreachable(f"the events of job {job_id} ended before it did", reached=True)
        except ClientError as error:
            pause_s = patience.pause_s(error)
        yield Pause(pause_s)
