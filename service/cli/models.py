"""`tminus models`: lists the models of a server, and loads, reloads or unloads a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from tminus.service.cli.images import server_at
from tminus.service.cli.options import JSON
from tminus.service.cli.output import aligned, say, say_json

if TYPE_CHECKING:
    from tminus.service.client import ModelState

HEAD = ("NAME", "STATE", "IMAGES", "CLASSES", "DEVICE", "FINGERPRINT")
COLOURS = {1: "grey", 3: "colour"}  # keyed by number of channels


@click.command(short_help="List a server's models; load, reload or unload one.")
@click.argument("change", type=click.Choice(["load", "reload", "unload"]), required=False)
@click.argument("name", required=False)
@click.option("--url", default="http://localhost:8000", help="Address of the server")
@JSON
def models(change: str | None, name: str | None, url: str, as_json: bool) -> None:
    """List the models of a server; or load, reload or unload the model NAME.

    \b
      tminus models --url http://localhost:8000
      tminus models unload colour     # its jobs still finish
      tminus models load colour       # returns when the model is served
      tminus models reload colour     # reads its folder again
      tminus models --json

    To load, reload or unload, put a key with the role admin in the variable TMINUS_KEY. Loading may take a minute.

    --json prints the response of GET /models: an object with a list `models`, with name, default, state, url and model
    of each model. With load, reload or unload, the list has only the changed model.
    """
    if change is not None and name is None:
        raise click.UsageError(f"{change} needs the NAME of a model")
    with server_at(url) as tminus:
        if change is not None and name is not None:
            {"load": tminus.load_model, "reload": tminus.reload_model, "unload": tminus.unload_model}[change](name)
        found = tminus.models() if change is None or as_json else []
        if as_json:
            say_json({"models": [model_document(each) for each in found if name in (None, each.name)]})
        else:
            say(table(found) if change is None else f"{name}: {change}ed")


def model_document(model: "ModelState") -> dict[str, Any]:
    """Return a model in the form that GET /models uses."""
    return {"name": model.name, "default": model.default, "state": model.state, "url": model.url, "model": model.info}


def table(models: "Sequence[ModelState]") -> str:
    """Return the lines of a table of models. Raises ClientError if a model's description is malformed."""
    return aligned([HEAD, *map(_cells, models)])


def _cells(model: "ModelState") -> tuple[str, ...]:
    """Return a model as one row of the table. Raises ClientError if its description is malformed."""
    from tminus.service.client import ClientError

    state, info = model.state + ", default" * model.default, model.info
    if info is None:
        return (model.name, state, *[""] * (len(HEAD) - 2))
    try:
        colours = COLOURS.get(info["channels"], f"{info['channels']} channels")
        colours = "RGBA" if info.get("alpha") else colours
        images, classes = f"{info['width_px']}x{info['height_px']}, {colours}", len(info["class_names"])
        return (model.name, state, images, str(classes), str(info["device"]), str(info["fingerprint"]))
    except (KeyError, TypeError) as error:
        raise ClientError(f"the description of {model.name} is not that of a model ({error})") from None
