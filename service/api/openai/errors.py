"""Errors in OpenAI's form, made of problem documents."""

from collections.abc import Mapping
from typing import Any

STATUS = {422: 400, 409: 503}  # OpenAI knows no 422, and its libraries take any 409 for one to be tried again
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def as_openai(problem: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
    """Turn a problem document into a status and a body of OpenAI's."""
    status: int = STATUS.get(problem["status"], problem["status"])
    error = {
        "message": problem["detail"],
        "type": TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": problem.get("field"),
        "code": problem["code"],
    }
    return status, {"error": error}
