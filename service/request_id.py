"""The id of the request that is being answered, for the lines of a log. Threads that work for it do not have it."""

from contextvars import ContextVar

NO_ID = "-"  # where no request is answered
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default=NO_ID)
