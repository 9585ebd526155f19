"""`tminus reproduce image.png`: make an image again from the recipe in its PNG, and compare."""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tminus.service.cli.images import LocalModel, check_model, make_images, read_pictures, sample_from
from tminus.service.cli.options import FILE_TYPE, MAX_LOCAL_N, local_model_options
from tminus.service.cli.output import check_png, fail, say, write_file

MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = MAX_LOCAL_N * 128 * 128


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an image was made, as its PNG says: parameters, the hash of the weights and the fingerprint."""

    parameters: dict[str, Any]
    weights: str
    fingerprint: str


@click.command()
@click.argument("png", type=FILE_TYPE)
@click.option("--image", type=FILE_TYPE, help="of an edit: the picture that it was made from")
@click.option("--mask", type=FILE_TYPE, help="of an edit with a mask: that mask")
@local_model_options
@click.option("--out", type=FILE_TYPE, help="keep the new PNG here")
def reproduce(
    png: Path,
    image: Path | None,
    mask: Path | None,
    url: str | None,
    model: str | None,
    checkpoint: Path,
    device: str,
    executor: str,
    precision: str,
    out: Path | None,
) -> None:
    """Make PNG again from what it says, and compare. Exit code 0: the same bytes; 1: not the same."""
    check_model(url, model)
    if out is not None:
        check_png(f"--out {out}", out)
    try:
        if png.stat().st_size > MAX_FILE_BYTES:
            fail(f"{png}: larger than {MAX_FILE_BYTES} bytes")
        original = png.read_bytes()
        recipe = read_recipe(original)
    except (OSError, ValueError) as error:
        fail(f"{png}: {error}")
    check_pictures(png, recipe, image, mask)
    parameters = recipe.parameters | read_pictures(image, mask)  # their hashes are compared where the image is made
    if url is not None:
        again = sample_from(url, model, parameters, "image/png").data
    else:
        here = LocalModel(checkpoint, device, executor, precision)
        again = make_images(here, parameters, sheet=True, fingerprint=recipe.fingerprint)[0]["sheet"]
    if out is not None:
        write_file(f"--out {out}", out, again)
    if again == original:
        say(f"{png}: the same {len(original)} bytes")
        return
    try:
        found = difference(original, again, recipe)
    except ValueError as error:
        fail(f"{url or png}: {error}")
    fail(f"{png}: {found}")


def check_pictures(png: Path, recipe: Recipe, image: Path | None, mask: Path | None) -> None:
    """Fail unless the pictures that an edit needs are given, and no others."""
    for name, file in (("image", image), ("mask", mask)):
        digest = recipe.parameters.get(f"{name}_sha256")
        if digest is not None and file is None:
            fail(f"{png}: it is an edit of another picture; name it by --{name} (sha256 of its pixels {digest})")
        if digest is None and file is not None:
            fail(f"{png}: it was made without {'an image' if name == 'image' else 'a mask'}; leave --{name} out")


def read_recipe(png: bytes) -> Recipe:
    """Read the recipe in a PNG. Raises ValueError where there is none, or none that can be read."""
    from PIL import Image, UnidentifiedImageError

    from tminus.service.images.encoder import PNG_TEXT_KEY
    from tminus.service.images.image_header import read_header

    try:
        header = read_header(png)
    except ValueError as error:
        raise ValueError(f"not a PNG that can be read ({error})") from None
    if header is None or header.format != "PNG":
        raise ValueError(f"not a PNG{f' but a {header.format}' if header else ''}; only PNGs say how they were made")
    if header.pixels > MAX_PIXELS:
        raise ValueError(f"{header.width_px}x{header.height_px} pixels, over {MAX_PIXELS}")
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as opened:
            opened.load()  # damaged pixels are found here, not when they are compared
            text = opened.info.get(PNG_TEXT_KEY)
    except UnidentifiedImageError:  # which would name the object that holds the bytes
        raise ValueError("not a PNG that can be read") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"not a PNG that can be read ({error})") from None
    if text is None:
        raise ValueError(f"no {PNG_TEXT_KEY!r} text in it: not made by tminus, or stripped since")
    try:
        return recipe_of(json.loads(text, parse_constant=_finite, parse_float=_finite))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its {PNG_TEXT_KEY!r} text is no recipe of this version ({error!r:.200})") from None


def recipe_of(document: Any) -> Recipe:
    """Read a recipe. Raises ValueError, TypeError, KeyError or AttributeError for what is none."""
    from tminus.service.api.request.classes import NUMBER
    from tminus.service.api.request.schemas import parameters_of
    from tminus.service.spec import SampleSpec

    fields = document["spec"]
    parameters = parameters_of(SampleSpec.from_json(fields))
    if type(fields["n"]) is not int or not 1 <= fields["n"] <= MAX_LOCAL_N:  # before rows are allocated
        raise ValueError(f"n must be 1..{MAX_LOCAL_N}")
    if labels := parameters.pop("class_label", None):  # a recipe does not say whether some class has such a name
        parameters["class_label"] = [None if label is None else f"{NUMBER}{label}" for label in labels]
    return Recipe(parameters, str(document["weights"]), str(document["fingerprint"]))


def _finite(text: str) -> float:
    """A number of JSON, without NaN and infinity, which Python's JSON knows and nobody else's."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is no number")
    return value


def difference(original: bytes, again: bytes, recipe: Recipe) -> str:
    """Say how two PNGs differ, and why they may: other weights, another build, or altered pixels."""
    import numpy as np
    from PIL import Image

    mine = read_recipe(again)
    reasons = []
    if mine.weights != recipe.weights:
        reasons.append(f"made by other weights ({recipe.weights[:12]}, here {mine.weights[:12]})")
    if mine.fingerprint != recipe.fingerprint:
        reasons.append(f"made by another build ({recipe.fingerprint}, here {mine.fingerprint})")
    with Image.open(io.BytesIO(original)) as first, Image.open(io.BytesIO(again)) as second:
        a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape:
        found = f"another size, {a.shape} and {b.shape}"
    else:
        most = int(abs(a.astype(np.int32) - b.astype(np.int32)).max())
        found = f"{int((a != b).sum())} of {a.size} values differ, by {most} of 255 at most"
    return "; ".join([found, *reasons])
