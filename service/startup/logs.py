"""The log of a process on stderr: text with escaped control characters, or one JSON object per line.

One handler writes the lines of all loggers, including those of libraries. The handler masks the secrets of API keys,
and limits how many similar lines are written.
"""

import json
import logging
import sys
import time
from collections import Counter
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from tminus.service.errors import masked
from tminus.service.tracing import NO_ID, REQUEST_ID, ids_of

# Fields that describe a request or a job. A log line may have any of them.
FIELDS = ("request_id", "client", "key", "method", "target", "status", "seconds", "job_id", "code")
TRACE_FIELDS = ("trace_id", "span_id")
MAX_LINE = 2000  # characters; a logged response from another server may be megabytes long
WINDOW_S = 10.0
# Maximum number of similar lines in WINDOW_S seconds. Warnings and errors have the lower limit, because a traceback may
# be kilobytes long. INFO has the higher limit, because each request logs a line.
MOST_ERRORS, MOST_OTHERS = 100, 5000
SERVER_FORM = "%(asctime)s %(levelname)s %(name)s %(message)s"


def printable(text: str) -> str:
    """Escape line breaks and other invisible characters, and shorten long text."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: MAX_LINE + 1])
    return shown if len(shown) <= MAX_LINE else shown[:MAX_LINE] + "…"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := REQUEST_ID.get()) != NO_ID:
            line["request_id"] = request_id
        line |= ids_of()
        line |= {name: getattr(record, name) for name in (*FIELDS, *TRACE_FIELDS) if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to stderr, masks the secrets of API keys, and limits the rate of similar lines.

    Lines are similar if they come from the same logger and differ only in their arguments. Lines above the limit are
    dropped. The number of dropped lines is logged before the first line after the window, or at the end of the process.
    """

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        # The handler's lock guards both attributes.
        self._counts: Counter[_Line] = Counter()
        self._until_s = 0.0

    def format(self, record: logging.LogRecord) -> str:
        """Format a record. Any part of a record may be text from a client, another server or a file."""
        text = masked(super().format(record))
        return text if isinstance(self.formatter, _Json) else "\n".join(map(printable, text.split("\n")))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless too many similar records came before it in this window.

        The caller holds the handler's lock.
        """
        if (now_s := time.monotonic()) >= self._until_s:
            self._end_window()
            self._until_s = now_s + WINDOW_S
        line = _Line.of(record)
        self._counts[line] += 1
        if self._counts[line] <= line.most:
            super().emit(record)

    def _end_window(self) -> None:
        for line, count in self._counts.items():
            if count > line.most:
                message, args = "%d more lines like this one are left out: %s", (count - line.most, line.message)
                record = logging.LogRecord(line.logger, line.level, "", 0, message, args, None)
                Context().run(super().emit, record)  # an empty context has no request id
        self._counts.clear()

    def close(self) -> None:
        """Report the dropped lines, at the end of the process."""
        self.acquire()
        try:
            self._end_window()
        finally:
            self.release()
        super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Report which code logged a line that could not be written. Unlike the base class, omit the line's content."""
        with suppress(OSError, ValueError):
            kind = type(sys.exception()).__name__
            self.stream.write(f"a line of the log could not be written: {kind} at {record.pathname}:{record.lineno}\n")


@dataclass(frozen=True, slots=True)
class _Line:
    """What similar records have in common."""

    logger: str
    level: int
    message: str  # first line without arguments; asyncio's further lines vary
    error: type[BaseException] | None

    @classmethod
    def of(cls, record: logging.LogRecord) -> "_Line":
        error = record.exc_info[0] if record.exc_info else None
        return cls(record.name, record.levelno, str(record.msg).partition("\n")[0][:MAX_LINE], error)

    @property
    def most(self) -> int:
        """Maximum number of these records in one window."""
        return MOST_ERRORS if self.level >= logging.WARNING else MOST_OTHERS


def set_up_log(level: str, form: str, log_format: str = "text") -> None:
    """Set up the log on stderr, as text or JSON. form: format string for text."""
    handler = _Handler(_Json() if log_format == "json" else logging.Formatter(form))
    logging.basicConfig(level=level, handlers=[handler])
