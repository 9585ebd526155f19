"""Every way a call of the client ends other than well."""

import json
from collections.abc import Mapping
from typing import Any

PROBLEM_JSON = "application/problem+json"
GONE = (502, 503)  # from a proxy: the server behind it is not there


class ClientError(Exception):
    """What all errors of the client are."""


class Problem(ClientError):
    """The server refused or failed, and said why; docs/errors.md lists the codes.

    `field`, `value` and `bound` say what to change, where one thing has to be. `retry_after_s` is when to come back.
    `document` has all members, `cause` of `no_images` among them.
    """

    def __init__(self, document: Mapping[str, Any], retry_after_s: float | None = None) -> None:
        self.document = dict(document)
        self.status: int = document.get("status", 0)
        self.code: str = document.get("code", "")
        self.detail: str = document.get("detail", "")
        self.field: str | None = document.get("field")
        self.value: Any = document.get("value")
        self.bound: str | None = document.get("bound")
        self.retry_after_s = retry_after_s
        super().__init__(f"{self.status} {self.detail}")


class Unreachable(ClientError):
    """There is no connection, or it broke. `reached` is whether the server may have got the request."""

    def __init__(self, detail: str, *, reached: bool) -> None:
        super().__init__(detail)
        self.reached = reached


class UnexpectedAnswer(ClientError):
    """What answered is no tminus server, or a proxy in front of one. `status` is 0 where it was not even HTTP."""

    def __init__(self, status: int, detail: str = "and not from a tminus server") -> None:
        super().__init__(f"{status}, {detail}")
        self.status = status


def error_of(status: int, headers: Mapping[str, str], content: bytes) -> ClientError:
    """The error that an answer other than 2xx stands for."""
    if headers.get("content-type", "").partition(";")[0] == PROBLEM_JSON:
        try:
            document = json.loads(content)
        except ValueError:
            document = None
        if isinstance(document, dict):
            return Problem({"status": status} | document, retry_after_s(headers.get("retry-after")))
    if status in GONE:
        return Unreachable(f"{status}: the server is not there, says a proxy", reached=True)
    return UnexpectedAnswer(status)


def retry_after_s(text: str | None) -> float | None:
    """Seconds of a Retry-After. A date, which no tminus server sends, is None."""
    return float(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 9 else None
