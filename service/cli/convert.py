"""`tminus convert`: a checkpoint of another project to a folder that tminus, and often diffusers, loads."""

from pathlib import Path
from typing import Any

import click

from tminus.service.cli.facts import fact_options, given_facts
from tminus.service.cli.options import FOLDER_TYPE
from tminus.service.cli.output import fail, say


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=FOLDER_TYPE)
@fact_options
def convert(source: Path, folder: Path, **options: Any) -> None:
    """Write SOURCE, a checkpoint of another project or a U-Net without a scheduler, as the checkpoint FOLDER.

    docs/formats.md has the formats.
    """
    from tminus.model.files import CheckpointError
    from tminus.model.formats.read import convert as run
    from tminus.model.unet import CLASS_NAME

    try:
        converted = run(source, folder, given_facts(options))
    except (CheckpointError, ValueError, OSError) as error:
        fail(str(error))
    say(f"{folder}: written from {converted.format}")
    for note in converted.notes:
        say(f"taken: {note}")
    if converted.unet.class_name != CLASS_NAME:
        say("diffusers has no such network: the folder is for tminus alone")
    say(f"Try: tminus serve --checkpoint {folder}")
