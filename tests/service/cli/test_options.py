import shlex
from typing import Any

import click
import click.testing
import pytest

from tminus.service.cli.evaluate import command_line
from tminus.service.cli.options import comma_separated

SMALL = comma_separated(int, "a whole number, 1..9", lambda number: bool(1 <= number <= 9))


@click.command("measure")
@click.option("-n", "--numbers", "--number", "numbers", callback=SMALL, default="3")
@click.option("--name", default="a")
@click.option("--pair", type=int, nargs=2)
@click.option("--fast", is_flag=True)
def measure(**options: Any) -> None:
    click.echo(repr(options["numbers"]))
    click.echo(command_line(click.get_current_context()))


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(measure, list(arguments))


@pytest.mark.parametrize(
    ("text", "values"),
    [("5", (5,)), ("1,2,9", (1, 2, 9)), (" 2 , 1 ", (2, 1)), ("4,4,1,4", (4, 1))],
)
def test_a_list_is_read_in_its_order_each_value_once(text: str, values: tuple[int, ...]) -> None:
    assert run("--numbers", text).output.splitlines()[0] == repr(values)
    assert run("--number", text).output.splitlines()[0] == repr(values)


def test_the_command_line_gives_the_command_again_by_the_longest_name_of_an_option() -> None:
    for arguments in (("--numbers", "1,2", "--name", "it's a <name>", "--pair", "3", "4", "--fast"), ()):
        assert shlex.split(run(*arguments).output.splitlines()[1]) == ["tminus", "measure", *arguments]
    assert run("-n", "4,4,5").output.splitlines()[1] == "tminus measure --numbers 4,5"


@pytest.mark.parametrize(
    ("text", "bad"), [("", ""), ("1,", ""), ("1,0", "0"), ("1;2", "1;2"), ("1,x", "x"), ("10", "10")]
)
def test_a_bad_value_is_named_with_its_option_and_bound(text: str, bad: str) -> None:
    result = run("--numbers", text)
    assert result.exit_code == 2
    assert "--numbers" in result.output
    assert f"each must be a whole number, 1..9, got {bad!r}" in result.output
