"""A long answer in pieces.

uvicorn takes all that it is given at once, and holds a copy of it for its client, so that many slow readers of one kept
answer would take many times its memory.
"""

from collections.abc import Iterator

from starlette.types import Message

PIECE_BYTES = 64 * 1024  # and uvicorn waits before it takes more than two


def pieces_of(message: Message) -> Iterator[Message]:
    """The messages to send in place of one, each with at most PIECE_BYTES of its body.

    The last is empty: uvicorn takes it when at most 64 KiB of the others are left.
    """
    body = message.get("body", b"")
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for at in range(0, len(body), PIECE_BYTES):
        yield {**message, "body": body[at : at + PIECE_BYTES], "more_body": True}
    yield {**message, "body": b""}
