"""The errors that the client raises."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from . import checks

PROBLEM_JSON = "application/problem+json"
SWITCHING_PROTOCOLS = 101
GONE = (502, 503)  # statuses that a proxy sends if it cannot reach the server


class ClientError(Exception):
    """Base class of all errors that the client raises."""


class Problem(ClientError):
    """The server refused the call, or failed. The errors page of the docs lists the codes.

    `field`, `value` and `bound` describe the first mistake in the parameters. `errors` lists all mistakes, each with
    `code`, `detail`, `field`, `value` and `bound`. `retry_after_s` is the number of seconds to wait before a retry.
    `document` is the whole response. Some codes have additional members in `document`; for example, no_images has
    `cause`.
    """

    def __init__(self, document: Mapping[str, Any], retry_after_s: float | None = None) -> None:
        self.document = dict(document)
        self.status: int = document.get("status", 0)
        self.code: str = document.get("code", "")
        self.detail: str = document.get("detail", "")
        self.field: str | None = document.get("field")
        self.value: Any = document.get("value")
        self.bound: str | None = document.get("bound")
        self.errors: list[dict[str, Any]] = [dict(each) for each in document.get("errors", ())]
        self.retry_after_s = retry_after_s
        also = "".join(f"; {each.get('detail', '')}" for each in self.errors[1:])
        super().__init__(f"{self.status} {self.detail}{also}")


class Unreachable(ClientError):
    """The connection did not open, or it broke. `reached`: the server may have received the request."""

    def __init__(self, detail: str, *, reached: bool) -> None:
        super().__init__(detail)
        self.reached = reached


class UnexpectedAnswer(ClientError):
    """The response does not come from a tminus server; it may come from a proxy. `status`: the HTTP status.

    Also raised if a member has the wrong type, or if the response is larger than what the call asked for.
    """

    def __init__(self, status: int, reason: object = "") -> None:
        what = f"no {reason}" if isinstance(reason, KeyError) else str(reason)
        super().__init__(f"{status}, and not from a tminus server{f' ({what:.200})' if what else ''}")
        self.status = status


@contextmanager
def expecting(status: int) -> Iterator[None]:
    """Convert the ValueError or KeyError of a failed check to UnexpectedAnswer."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise UnexpectedAnswer(status, error) from None


def error_of(status: int, headers: Mapping[str, str], content: bytes) -> ClientError:
    """Return the error for a response that is not 2xx. The names in `headers` must be in lower case."""
    if headers.get("content-type", "").partition(";")[0] == PROBLEM_JSON:
        try:
            document = {"status": status} | checks.mapping(checks.loads(content))
            return problem_of(document, retry_after_s(headers.get("retry-after")))
        except ValueError:
            pass
    if status in GONE:
        return Unreachable(f"{status}: the server is not there, says a proxy", reached=True)
    return UnexpectedAnswer(status)


def problem_of(members: Mapping[str, Any], retry_after_s: float | None) -> Problem:
    """Parse a problem document. Raises ValueError if a member has the wrong type."""
    checks.whole(members.get("status", 0))
    for name in ("code", "detail"):
        checks.text(members.get(name, ""))
    for name in ("field", "bound"):
        checks.optional(checks.text, members.get(name))
    for each in checks.items(members.get("errors", [])):
        checks.text(checks.mapping(each).get("detail", ""))
    return Problem(members, retry_after_s)


def retry_after_s(text: str | None) -> float | None:
    """Parse a Retry-After header. Returns None for a date, because no tminus server sends one."""
    return float(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 9 else None
