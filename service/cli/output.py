"""How commands end and write: a failure is one clear line on stderr and exit code 1, never a traceback.

What a server or a file says is shown with its control characters escaped, so that none of them reaches the terminal.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import click

from tminus.service.request_id import REQUEST_ID
from tminus.service.tracing import TRACER

# What a line of the log may have beside its message: of a request, of a job.
FIELDS = ("request_id", "client", "key", "method", "target", "status", "seconds", "job_id", "code")
TRACE_FIELDS = ("trace_id", "span_id")
MAX_LINE = 2000  # characters; a server may send megabytes
NO_PICTURES = frozenset({".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".zip", ".tar", ".gz"})


def printable(text: str) -> str:
    """Escape line ends and whatever else is no visible character, and shorten what is too long for a line."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: MAX_LINE + 1])
    return shown if len(shown) <= MAX_LINE else shown[:MAX_LINE] + "…"


def say(text: str) -> None:
    """Print lines to stdout."""
    click.echo("\n".join(map(printable, text.split("\n"))))


def fail(message: str) -> NoReturn:
    """Print one line to stderr and exit with 1."""
    click.echo(f"tminus: {printable(message)}", err=True)
    sys.exit(1)


class _Printable(logging.Formatter):
    """Formats the lines of a log, which may quote a server or a file."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


class _Json(logging.Formatter):
    """Formats a line as one JSON object. Line ends and the like are escaped, as JSON has them anyway."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := REQUEST_ID.get()) != "-":
            line["request_id"] = request_id
        if (tracer := TRACER.get()) is not None:
            line |= tracer.ids
        line |= {name: getattr(record, name) for name in (*FIELDS, *TRACE_FIELDS) if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_log(level: str, form: str, log_format: str = "text") -> None:
    """Log to stderr, as text of this form or as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if log_format == "json" else _Printable(form))
    logging.basicConfig(level=level, handlers=[handler])


def check_png(option: str, file: Path, otherwise: str = "") -> None:
    """Fail where the name of a file to be written says that it is something else than a PNG."""
    if file.suffix.lower() in NO_PICTURES:
        fail(f"{option}: what is written is PNG, so give a name that ends in .png{otherwise}")


def make_folder(option: str, folder: Path) -> None:
    """Make a folder and its parents; `option` names the flag in the line of a failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{option}: {error}")


def write_file(option: str, file: Path, data: bytes) -> None:
    """Write a file; `option` names the flag in the line of a failure."""
    try:
        file.write_bytes(data)
    except OSError as error:
        fail(f"{option}: {error}")
