"""The section "Options" of docs/command-line.md, made of what `--help` says.

    python -m tests.options_page

writes it anew; tests/test_docs.py fails where it is not what the commands have.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import click

from tminus.__main__ import main
from tminus.service.engine.protocol import BUNDLED
from tminus.service.startup.settings import Settings

PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"
HEADING = "\n## Options\n"
INTRODUCTION = """
What `--help` says, command by command. The options of `tminus serve` are its settings ([settings.md](settings.md)) and
`--config FILE`.
"""


def section() -> str:
    """Every command with its options, as Markdown."""
    return HEADING + INTRODUCTION + "".join(f"\n{text}" for name in COMMANDS for text in part(name, COMMANDS[name]))


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by its name; one of a group by both names."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(commands(main))


def part(name: str, command: click.Command) -> Iterator[str]:
    """The heading of a command, its usage and its table."""
    if name == "serve":
        return
    context = click.Context(command, info_name=f"tminus {name}", show_default=True)
    yield f"### {name}\n"
    yield f"    {command.get_usage(context).removeprefix('Usage: ')}\n"
    settings = {option for option in command.params if option.name in {*Settings.model_fields, "config"}}
    own = [option for option in command.params if isinstance(option, click.Option)]
    if name in ("config", "ray serve"):
        yield "The options of `tminus serve`, and\n"
        own = [option for option in own if option not in settings]
    yield "| option | values | default | meaning |\n|---|---|---|---|\n" + "".join(row(each, context) for each in own)


def row(option: click.Option, context: click.Context) -> str:
    """One option as a line of the table."""
    record = option.get_help_record(context)
    assert record is not None, f"{option.name} is hidden"
    assert option.help, f"{context.info_name} {option.opts[0]} has no help"
    said = " ".join(record[1].replace(str(BUNDLED), f"the bundled {BUNDLED.name}").split())
    said = re.sub(r" \[env: \w+\]$", "", said)  # of a setting: its name says it
    text, _, default = re.sub(r"\[(required|\S+<=x\S*|x>=\S+)\]|; \S+<=x\S*(?=\])", "", said).partition("[default: ")
    default = "required" if option.required else default.strip("()] ")
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    cells = (names, "" if option.is_flag else values(option), default, text.strip())
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def values(option: click.Option) -> str:
    """What an option takes, in words."""
    match option.type:
        case click.Choice(choices=choices):
            return ", ".join(f"`{choice}`" for choice in choices)
        case click.IntRange(min=low, max=high) | click.FloatRange(min=low, max=high):
            return f"{low}..{high}" if high is not None else f"{low} or more"
        case click.Path():
            return {"directory": "folder"}.get(option.type.name, option.type.name)
    word = re.sub("^(INTEGER|FLOAT) ", "", option.metavar or option.type.name)
    if word[0].isdigit() or word.startswith("above "):
        return word.replace("..", " or more") if word.endswith("..") else word
    word = {"integer": "integer", "float": "number", "text": "text", "list": "list"}.get(word.lower(), f"`{word}`")
    return word if option.nargs == 1 else f"{option.nargs} {word}s"


def documented() -> str:
    """The section as the page has it."""
    return HEADING + PAGE.read_text("utf-8").partition(HEADING)[2]


if __name__ == "__main__":
    before = PAGE.read_text("utf-8").partition(HEADING)[0]
    PAGE.write_text(re.sub(r"\n+$", "\n", before) + section(), "utf-8")
