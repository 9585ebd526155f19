"""WS /sample/stream as a call. No I/O."""

import json
from collections.abc import Mapping
from typing import Any

from service.client import messages
from service.client.effects import Answer, Call, Dial, Give, Hear, Pause
from service.client.errors import ClientError, Problem, UnexpectedAnswer, error_of
from service.client.parameters import body_of
from service.client.patience import Patience
from service.client.transport import SWITCHING_PROTOCOLS

PATH = "/sample/stream"
CANCEL = json.dumps({"type": "cancel"})


def watch(parameters: Mapping[str, Any], patience_s: float) -> Call[None]:
    """Give the Messages of a job. Refusals are waited for; once the job was accepted every error is the end."""
    text = json.dumps(body_of(parameters))
    patience = Patience(patience_s)
    while True:
        try:
            answer: Answer = yield Dial(PATH, text)
            if answer.status != SWITCHING_PROTOCOLS:
                raise error_of(answer.status, answer.headers, answer.content)
            message = yield from _message()
        except ClientError as error:
            pause_s = patience.pause_s(error)
        else:
            break
        yield Pause(pause_s)
    while True:
        yield Give(message)
        if isinstance(message, messages.Done | messages.Cancelled):
            return
        message = yield from _message()


def _message() -> Call[messages.Message]:
    """Read a message and the pictures that follow it. Raises Problem for an error; UnexpectedAnswer."""
    text = yield Hear()
    try:
        message = json.loads(text)
        match message["type"]:
            case "accepted":
                return messages.accepted(message)
            case "frame":
                return messages.frame(message, (yield from _picture()))
            case "done":
                pictures: list[bytes] = []
                for _ in range(message["images"]):
                    pictures += [(yield from _picture())]
                return messages.done(message, tuple(pictures))
            case "cancelled":
                return messages.Cancelled(message["id"])
            case "error":
                raise Problem(message, message.get("retry_after_s"))
    except (ValueError, KeyError, TypeError):
        pass
    raise UnexpectedAnswer(SWITCHING_PROTOCOLS)


def _picture() -> Call[bytes]:
    data = yield Hear()
    if not isinstance(data, bytes):
        raise UnexpectedAnswer(SWITCHING_PROTOCOLS)
    return data
