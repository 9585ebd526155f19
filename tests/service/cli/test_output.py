import io
import json
import logging
from datetime import datetime, timedelta

import click.testing
import pytest

from tminus.service.cli.main import main
from tminus.service.cli.output import fail, say
from tminus.service.request_id import REQUEST_ID
from tminus.service.startup.logs import MAX_LINE, printable, set_up_log


def test_what_could_drive_a_terminal_is_escaped_and_text_of_any_script_is_kept() -> None:
    assert printable("\x1b[2J\x07\r\n\x9b31m\u202e\ud800\x7f") == "\\x1b[2J\\x07\\r\\n\\x9b31m\\u202e\\ud800\\x7f"
    assert printable("Schönes Bild, 画像, ok") == "Schönes Bild, 画像, ok"
    assert len(printable("x" * 10**6)) == MAX_LINE + 1


def test_a_failure_is_one_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail("a\nb\x1b[2J")
    assert capsys.readouterr().err == "tminus: a\\nb\\x1b[2J\n"
    say("one\ntwo\x1b[2J")
    assert capsys.readouterr().out == "one\ntwo\\x1b[2J\n"


def test_the_log_is_escaped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged of a checkpoint has its name, which is from a file."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    result = click.testing.CliRunner().invoke(main, ["evaluate", "--approve"])
    assert "needs a --precision" in result.output  # it has ended at once
    (handler,) = root.handlers
    record = logging.LogRecord("x", logging.INFO, "", 0, "serving %s\nand", ("\x1b[2J",), None)
    assert handler.format(record) == "serving \\x1b[2J\nand"


def test_a_log_of_json_has_an_object_a_line_with_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    root, text = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr("sys.stderr", text)
    set_up_log("INFO", "%(message)s", "json")
    log = logging.getLogger("tminus.x")
    log.info("a\n%s", "b\x1b[2J", extra={"job_id": "j", "status": 200, "unknown": 1})
    token = REQUEST_ID.set("r")
    try:
        raise RuntimeError("oh")
    except RuntimeError:
        log.exception("it failed")
    finally:
        REQUEST_ID.reset(token)
    first, second = map(json.loads, text.getvalue().splitlines())
    assert first == first | {
        "level": "info",
        "logger": "tminus.x",
        "message": "a\nb\x1b[2J",
        "job_id": "j",
        "status": 200,
    }
    assert first.keys() == {"time", "level", "logger", "message", "job_id", "status"}
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)
    assert (second["request_id"], second["level"]) == ("r", "error")
    assert "RuntimeError: oh" in second["traceback"]
