"""Options, their types, defaults and bounds, that several commands have."""

from collections.abc import Callable
from pathlib import Path

import click

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
