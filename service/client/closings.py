"""What the errors of websockets mean. No I/O. Imported for `watch` alone: the rest does without websockets."""

from websockets.exceptions import ConnectionClosed, InvalidStatus

from .errors import SWITCHING_PROTOCOLS, ClientError, UnexpectedAnswer, Unreachable, error_of
from .transport import too_large

OUR_COMPLAINTS = (1002, 1007, 1009)  # closes by us: against the protocol, no UTF-8, larger than asked for


def closed(error: ConnectionClosed, max_bytes: int) -> ClientError:
    """Make the error for a WebSocket that was closed before its end; max_bytes is the bound of a message."""
    if error.sent is None or error.rcvd_then_sent:
        return Unreachable(f"the server closed before the job was done ({error})", reached=True)
    if error.sent.code == 1009:
        return too_large(SWITCHING_PROTOCOLS, max_bytes)
    if error.sent.code in OUR_COMPLAINTS:
        return UnexpectedAnswer(SWITCHING_PROTOCOLS)
    return Unreachable(f"the client closed before the job was done ({error})", reached=True)


def refused(error: InvalidStatus) -> ClientError:
    """Make the error for a WebSocket that the server did not open."""
    response = error.response
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    return error_of(response.status_code, headers, bytes(response.body or b""))
