"""The commands as a user gives them, and how one fails: with exit code 1 and a line, without a traceback."""

from pathlib import Path

from click.testing import CliRunner, Result

from tminus.service.cli.main import main


def run(*arguments: object, **variables: str | None) -> Result:
    """Run a command in this process. variables: of its environment."""
    return CliRunner().invoke(main, [*map(str, arguments)], env=variables)


def line_of(result: Result) -> str:
    """The last line of a command that failed as it should."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), "no traceback"
    line: str = result.stderr.strip().splitlines()[-1]
    assert line.startswith("tminus: ")
    assert line.isprintable()
    return line


def refusal(*arguments: str | Path) -> str:
    """The line in which a command ends that cannot be done."""
    return line_of(run(*arguments))
