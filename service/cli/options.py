"""Options, their types, defaults and bounds, that several commands have, and those that take several values."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tminus.service.engine.options import BUNDLED

MAX_LOCAL_N = 4096  # images made without a server in one command
FILE_TYPE = click.Path(dir_okay=False, path_type=Path)
FOLDER_TYPE = click.Path(file_okay=False, path_type=Path)
BACKGROUND = click.option(
    "--background", default="black", help="colour that transparent pixels of a folder's images are laid over"
)
DEVICE = click.option("--device", default="auto", help="auto, cpu or cuda; auto takes a GPU if there is one")
THREADS = click.option(
    "--threads",
    default=0,
    help="of torch on a CPU; 0: one for each core that is free when the run begins",
)
LOCAL_MODEL = (
    click.option("--url", help="ask this server instead of loading a checkpoint"),
    click.option("--model", help="with --url: the name of one of its models  [default: its default model]"),
    click.option("--checkpoint", type=FOLDER_TYPE, default=BUNDLED, help="folder of the checkpoint; not with --url"),
    click.option(
        "--device",
        default="auto",
        help="auto, cpu or cuda; auto takes a GPU if there is one, which CUDA_VISIBLE_DEVICES names; not with --url",
    ),
    click.option("--executor", default="auto", help="auto, eager, compile or openvino; not with --url"),
    click.option("--precision", default="auto", help="auto, float32, tf32 (CUDA) or bfloat16; not with --url"),
)
Callback = Callable[[click.Context, click.Parameter, str], tuple[Any, ...]]


def local_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which model makes images: a server's, or one loaded here."""
    for option in reversed(LOCAL_MODEL):
        command = option(command)
    return command


def integers(flag: str, text: str) -> tuple[int, ...]:
    """Read integers joined by commas. Raises ValueError, which names the flag."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{flag} must be integers joined by commas, got {text!r}") from None


def comma_separated(read: Callable[[str], Any], bound: str, allows: Callable[[Any], bool]) -> Callback:
    """Make a callback that reads a list, each value once. `bound` says what each must be, `allows` whether it is."""

    def convert(_context: click.Context, _option: click.Parameter, text: str) -> tuple[Any, ...]:
        found: dict[Any, None] = {}
        for part in map(str.strip, text.split(",")):
            try:
                one = read(part)
            except ValueError:
                one = None
            if one is None or not allows(one):
                raise click.BadParameter(f"each must be {bound}, got {part!r:.100}")
            found[one] = None
        return tuple(found)

    return convert


def command_line(context: click.Context) -> str:
    """The command with the options that were given, as a shell reads it."""
    words = ["tminus", context.info_name or ""]
    for option in context.command.params:
        if context.get_parameter_source(option.name or "") is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[option.name or ""]
        words.append(max(option.opts, key=len))
        if option.nargs > 1:
            words += map(str, value)
        elif isinstance(value, tuple):
            words.append(",".join(map(str, value)))
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)
