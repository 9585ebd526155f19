import logging

import click.testing
import pytest

from tminus.service.cli.main import main
from tminus.service.cli.output import MAX_LINE, fail, printable, say


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
    monkeypatch.setattr("tminus.model.files.MAX_JSON_BYTES", 0)  # so that the command ends at once
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    click.testing.CliRunner().invoke(main, ["evaluate"])
    (handler,) = root.handlers
    record = logging.LogRecord("x", logging.INFO, "", 0, "serving %s\nand", ("\x1b[2J",), None)
    assert handler.format(record) == "serving \\x1b[2J\nand"
