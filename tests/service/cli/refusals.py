"""How a command fails: with exit code 1 and a line, without a traceback."""

from pathlib import Path
from typing import Any

import click.testing

from tminus.service.cli.main import main


def line_of(result: click.testing.Result) -> str:
    """The last line of a command that failed as it should."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), "no traceback"
    line: str = result.stderr.strip().splitlines()[-1]
    assert line.startswith("tminus: ")
    assert line.isprintable()
    return line


def refusal(*arguments: str | Path, **options: Any) -> str:
    return line_of(click.testing.CliRunner().invoke(main, [*map(str, arguments)], **options))
