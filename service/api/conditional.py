"""Whether a client has the answer already (RFC 9110, section 13)."""

from fastapi import Request


def matches(request: Request, tag: str) -> bool:
    """Whether the client already has it (RFC 9110, section 13.1.2; the weak comparison).

    A POST that only asks is safe to repeat, so it is answered as a GET is; but `*`, any answer at all, is no name.
    """
    headers = request.headers.getlist("if-none-match")
    names = [name.strip().removeprefix("W/") for header in headers for name in header.split(",")]
    return tag in names or ("*" in names and request.method == "GET")
