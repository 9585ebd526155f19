"""Options that several commands share, and the types of option values."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import click
from click.shell_completion import CompletionItem

from tminus.model.catalogue import SAMPLERS, TABLE_SAMPLERS
from tminus.model.hub import checkpoint_folder
from tminus.service.cli.output import failing_in_one_line
from tminus.service.engine.protocol import BUNDLED

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completing(*words: str, files: str | None = None) -> Complete:
    """Return a shell completion that offers some words.

    files: what to offer if no word fits: files ("file") or folders ("dir").
    """

    def complete(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(word) for word in words if word.startswith(incomplete)]
        return found if found or files is None else [CompletionItem(incomplete, type=files)]

    return complete


# These names are only for completion. Invalid values are found later, by the code that uses them.
DEVICE_NAMES = completing("auto", "cpu", "cuda")
EXECUTOR_NAMES = completing("auto", "eager", "compile", "openvino")
PRECISION_NAMES = completing("auto", "float32", "tf32", "bfloat16")
SAMPLER_NAMES = completing(*SAMPLERS, *TABLE_SAMPLERS)
DATA_FOLDERS = completing("fashion-mnist", files="dir")
FILE_TYPE = click.Path(dir_okay=False, path_type=Path)
FOLDER_TYPE = click.Path(file_okay=False, path_type=Path)


class CheckpointType(click.Path):
    """A checkpoint: a folder, or an id on the Hugging Face Hub, from which it is downloaded once."""

    name = "checkpoint"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the folder of the checkpoint. Exits with 1 on an error."""
        with failing_in_one_line():
            folder = checkpoint_folder(value)
        return super().convert(folder, parameter, context)


CHECKPOINT_TYPE = CheckpointType(file_okay=False, path_type=Path)
CHECKPOINT = click.option(
    "--checkpoint", type=CHECKPOINT_TYPE, default=BUNDLED, help="Folder or hub id of the checkpoint"
)
BACKGROUND = click.option(
    "--background", default="black", help="Colour behind the transparent pixels of a folder's images"
)
DEVICE = click.option(
    "--device",
    shell_complete=DEVICE_NAMES,
    default="auto",
    help="Device: auto, cpu or cuda; auto takes a GPU if there is one",
)
EXECUTOR = click.option(
    "--executor",
    shell_complete=EXECUTOR_NAMES,
    default="auto",
    help="What runs the network: auto, eager, compile or openvino",
)
PRECISION = click.option(
    "--precision",
    shell_complete=PRECISION_NAMES,
    default="auto",
    help="Number format: auto, float32, tf32 (CUDA) or bfloat16",
)
THREADS = click.option(
    "--threads",
    default=0,
    help="CPU threads of PyTorch; 0 takes one for each core that is free at the start",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on one line, and nothing else")
Option = Callable[[Callable[..., Any]], Callable[..., Any]]
Callback = Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...] | None]


def options(*several: Option) -> Option:
    """Combine several options into one decorator. --help lists them in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(several):
            command = option(command)
        return command

    return decorate


def config_options(config: type[Any]) -> Option:
    """Make one option for each field of a dataclass whose annotation contains a help text."""
    hints = get_type_hints(config, include_extras=True)
    made = []
    for field in dataclasses.fields(config):
        hint, flag = hints[field.name], f"--{field.name.replace('_', '-')}"
        default = None if field.default is dataclasses.MISSING else field.default
        usual = ",".join(map(str, default)) if isinstance(default, tuple) else default
        for text in getattr(hint, "__metadata__", ()):
            if isinstance(text, str):
                kind = hint.__origin__ if default is None else None
                is_flag = hint.__origin__ is bool
                made.append(click.option(flag, type=kind, is_flag=is_flag, default=usual, help=text))
    return options(*made)


def integers(flag: str, text: str) -> tuple[int, ...]:
    """Parse integers separated by commas. flag: the flag to name in the message. Raises ValueError."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{flag} must be integers joined by commas, got {text!r}") from None


def comma_separated(read: Callable[[str], Any], bound: str, allows: Callable[[Any], bool]) -> Callback:
    """Return a callback that parses a comma-separated list and removes duplicates. None stays None.

    read: parses one value. allows: returns True if a value is valid. bound: describes the valid values in error
    messages.
    """

    def convert(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[Any, ...] | None:
        if text is None:
            return None
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
