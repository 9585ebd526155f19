"""`tminus reproduce` and `tminus trajectory check`: make a file again from its recipe, and compare."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.service.cli.images import (
    MAX_LOCAL_N,
    MAX_SCALE,
    SCALE,
    LocalJob,
    check_model,
    decode_png,
    enlarge_png,
    make_images,
    model_options,
    opaque_png,
    read_pictures,
    sample_from,
    server_at,
)
from tminus.service.cli.options import CHECKPOINT_TYPE, DEVICE, EXECUTOR_NAMES, FILE_TYPE, PRECISION_NAMES
from tminus.service.cli.output import check_png, fail, failing_in_one_line, say, write_file
from tminus.service.engine.protocol import BUNDLED, LoadOptions

if TYPE_CHECKING:
    import numpy as np

    from tminus.service.images.trajectory import Arrays, TrajectoryFile

MAX_FILE_BYTES = 256 * 2**20
# Arrays that must be bit-identical. An element at position k (`x_t_at`, `x_0_at`) belongs to step k plus the value.
BY_STEP = {"x_t": 0, "x_0": 1}
# Relative and absolute tolerances of the arrays that are computed from x_t and x_0. These arrays need not be identical,
# because NumPy versions round differently.
CLOSE = {"mean": (1e-6, 1e-6), "s": (1e-6, 0.0), "log_p": (1e-9, 1e-6)}  # log_p can be close to 0
PLAN_CLOSE = (1e-12, 0.0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an image was made: the parameters, a hash of the weights, and the engine's fingerprint."""

    parameters: dict[str, Any]
    weights: str
    fingerprint: str
    scale: int = 1  # the factor by which the PNG was enlarged
    opaque: bool = False  # True if the PNG has a white background instead of alpha


@click.command(
    short_help="Make a PNG again from its recipe, and compare.",
    epilog="Exit codes: 0 the same bytes; 1 other bytes, or the command failed; 2 wrong command line; 130 stopped by "
    "Ctrl-C.",
)
@click.argument("png", type=FILE_TYPE)
@click.option("--image", type=FILE_TYPE, help="Of an edit: the picture that it was made from")
@click.option("--mask", type=FILE_TYPE, help="Of an edit with a mask: that mask")
@model_options
@click.option("--out", type=FILE_TYPE, help="File for the new PNG")
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
    """Make PNG again from the recipe in the file, and compare the bytes.

    \b
      tminus reproduce sneaker.png
      tminus reproduce varied.png --image sneaker.png --url http://localhost:8000

    With --url and without --model, the server's model with the weights in the recipe is asked, if there is one.
    """
    check_model(url, model)
    if out is not None:
        check_png(f"--out {out}", out)
    with failing_in_one_line(str(png)):
        original = read_bounded(png)
        recipe = read_recipe(original)
    check_recipe_pictures(png, recipe, image, mask)
    parameters = recipe.parameters | read_pictures(image, mask)  # hashes are checked later
    if url is not None:
        again = sample_from(url, model or served_model(url, recipe.weights), parameters, "image/png").data
    else:
        here = LoadOptions(checkpoint, device, executor, precision)
        again = make_images(here, parameters, sheet=True, fingerprint=recipe.fingerprint)[0]["sheet"]
    with failing_in_one_line(f"{url or png}: scale {recipe.scale}"):
        again = opaque_png(again) if recipe.opaque else again
        again = enlarge_png(again, parameters["n"], recipe.scale)
    if out is not None:
        write_file(f"--out {out}", out, again)
    if again == original:
        say(f"{png}: the same {len(original)} bytes")
        return
    with failing_in_one_line(str(url or png)):
        found = difference(original, again, recipe)
    fail(f"{png}: {found}")


def served_model(url: str, weights: str) -> str | None:
    """Return the name of the server's model with these weights, or None if that is its default model or not there."""
    with server_at(url) as client:
        found = [each for each in client.models() if each.info is not None and each.info.get("weights_hash") == weights]
    return None if any(each.default for each in found) else next((each.name for each in found), None)


def read_bounded(file: Path) -> bytes:
    """Read a file. Raises ValueError if it is larger than MAX_FILE_BYTES."""
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
    return file.read_bytes()


def check_recipe_pictures(png: Path, recipe: Recipe, image: Path | None, mask: Path | None) -> None:
    """Fail if a picture that the recipe needs is missing, or if an unneeded picture is given."""
    for name, file in (("image", image), ("mask", mask)):
        digest = recipe.parameters.get(f"{name}_sha256")
        if digest is not None and file is None:
            fail(f"{png}: it is an edit of another picture; name it by --{name} (sha256 of its pixels {digest})")
        if digest is None and file is not None:
            fail(f"{png}: it was made without {'an image' if name == 'image' else 'a mask'}; leave --{name} out")


def read_recipe(png: bytes) -> Recipe:
    """Read the recipe in a PNG. Raises ValueError if there is none, or if this version cannot read it."""
    from tminus.service.images.encoder import PNG_TEXT_KEY

    _, text = decode_png(png)  # also finds damaged pixels, before the job runs
    if text is None:
        raise ValueError(f"no {PNG_TEXT_KEY!r} text in it: not made by tminus, or stripped since")
    with _reading_recipe(f"its {PNG_TEXT_KEY!r} text"):
        return recipe_of(json.loads(text, parse_constant=_finite, parse_float=_finite))


@contextmanager
def _reading_recipe(source: str) -> Iterator[None]:
    """Turn the errors of a malformed recipe into ValueError. source: what the message calls the recipe."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source} is no recipe of this version ({error!r:.200})") from None


def recipe_of(document: Any) -> Recipe:
    """Parse a recipe. Raises ValueError, TypeError, KeyError or AttributeError if it is malformed."""
    from tminus.service.api.request.classes import NUMBER
    from tminus.service.api.request.specs import parameters_of
    from tminus.service.images.encoder import BACKGROUND
    from tminus.service.spec import SampleSpec

    fields = document["spec"]
    parameters = parameters_of(SampleSpec.from_json(fields))
    if type(fields["n"]) is not int or not 1 <= fields["n"] <= MAX_LOCAL_N:  # check this before memory is allocated
        raise ValueError(f"n must be 1..{MAX_LOCAL_N}")
    if labels := parameters.pop("class_label", None):  # marked as numbers: a class may have a number as its name
        parameters["class_label"] = [None if label is None else f"{NUMBER}{label}" for label in labels]
    scale = document.get(SCALE, 1)
    if type(scale) is not int or not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"{SCALE} must be 1..{MAX_SCALE}")
    return Recipe(
        parameters, str(document["weights"]), str(document["fingerprint"]), scale, document.get(BACKGROUND) == "white"
    )


def _finite(text: str) -> float:
    """Parse a number. Raises ValueError for NaN and infinity, which Python's JSON parser accepts."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is no number")
    return value


def difference(original: bytes, again: bytes, recipe: Recipe) -> str:
    """Describe how two PNGs differ. Names different weights and different builds as reasons."""
    import numpy as np

    mine = read_recipe(again)
    reasons = []
    if mine.weights != recipe.weights:
        reasons.append(f"made by other weights ({recipe.weights[:12]}, here {mine.weights[:12]})")
    if mine.fingerprint != recipe.fingerprint:
        reasons.append(f"made by another build ({recipe.fingerprint}, here {mine.fingerprint})")
    (a, _), (b, _) = decode_png(original), decode_png(again)
    if a.shape != b.shape:
        found = f"another size, {a.shape} and {b.shape}"
    else:
        most = int(abs(a.astype(np.int32) - b.astype(np.int32)).max())
        largest = np.iinfo(a.dtype).max if a.dtype.kind == "u" else 1
        found = f"{int((a != b).sum())} of {a.size} values differ, by {most} of {largest} at most"
    return "; ".join([found, *reasons])


@click.group(short_help="Check a trajectory: make it again, and compare.")
def trajectory() -> None:
    """Check trajectory files, which servers make for reinforcement learning."""


@trajectory.command(
    short_help="Make a trajectory again from its file, and compare.",
    epilog="Exit codes: 0 identical; 1 not identical, or the command failed; 2 wrong command line; 130 stopped by "
    "Ctrl-C.",
)
@click.argument("file", type=FILE_TYPE)
@click.option(
    "--checkpoint", type=CHECKPOINT_TYPE, default=BUNDLED, help="Folder or hub id of the checkpoint that made it"
)
@click.option("--image", type=FILE_TYPE, help="Of an edit: the picture that it was made from")
@click.option(
    "--executor",
    shell_complete=EXECUTOR_NAMES,
    help="What runs the network: auto, eager, compile or openvino  [default: that of the file, or auto]",
)
@click.option(
    "--precision",
    shell_complete=PRECISION_NAMES,
    help="Number format: auto, float32, tf32 (CUDA) or bfloat16  [default: that of the file, or auto]",
)
@DEVICE
def check(
    file: Path, checkpoint: Path, image: Path | None, executor: str | None, precision: str | None, device: str
) -> None:
    """Make the trajectory in FILE again, and compare.

    \b
      tminus trajectory check rollout.safetensors --checkpoint runs/digits

    The values of x_t and x_0 must be bit-identical; mean, s and log p must be close. If a value differs, the command
    names the first step and image.
    """
    from tminus.service.images.trajectory import arrays_of, read_trajectory
    from tminus.service.work import noisy_passes, select_passes
    from tminus.service.worker.recording import TrajectoryRecorder

    with failing_in_one_line(str(file)):
        found = read_trajectory(read_bounded(file))
        with _reading_recipe("its metadata"):
            recipe = recipe_of(found.document)
        keep = _keep_of(found)
    check_recipe_pictures(file, recipe, image, None)
    made_by = _made_by(found)
    exact = True if made_by.get("exact") else None
    # Run first with default settings, like a server. If the fingerprint then differs, run with the settings in the
    # file.
    for how in dict.fromkeys(
        (executor or str(by.get("executor", "auto")), precision or str(by.get("precision", "auto")))
        for by in ({}, made_by)
    ):
        options = LoadOptions(checkpoint, device, *how, exact)
        job = LocalJob.of(options, recipe.parameters | read_pictures(image, None), recipe.fingerprint)
        spec, info = job.spec, job.loaded.engine.info
        if info.fingerprint == recipe.fingerprint or info.weights_hash != recipe.weights:
            break
    if info.weights_hash != recipe.weights:
        fail(f"{file}: made by other weights ({recipe.weights[:12]}, {checkpoint} has {info.weights_hash[:12]})")
    if not noisy_passes(spec, info):
        fail(f"{file}: no step of its recipe adds noise ({spec.sampler}), so that it has no log p to compare")
    try:
        selection = select_passes(keep, spec, info)
    except ValueError as error:
        fail(f"{file}: `keep` in its metadata must be {error}, got {keep!s:.80}")
    row = (info.channels, info.height_px, info.width_px)
    if info.latent is not None:
        row = (info.latent.channels, info.latent.height, info.latent.width)
    shape, x_t = (len(selection.points), spec.n, *row), found.arrays.get("x_t")
    if x_t is None or x_t.shape != shape:  # check this before sampling
        fail(f"{file}: x_t must be of shape {shape}, got {'none' if x_t is None else x_t.shape}")
    path = TrajectoryRecorder(spec, selection, "float16" if x_t.dtype == "float16" else "float32")
    images = job.run(path.record)
    again = arrays_of(path.trajectory(), images, spec, info)
    differs = first_difference(found.arrays, again)
    if differs is None:
        noisy = len(again["passes"])
        kept = spec.num_passes if keep is None else f"{len(keep)} of {spec.num_passes}"
        say(f"{file}: identical: x_t of {spec.n} images at {kept} steps, log p of the {noisy} that add noise")
        return
    if info.fingerprint != recipe.fingerprint:
        there = f"{recipe.fingerprint}, {made_by.get('executor', '?')} in {made_by.get('precision', '?')}"
        here = f"{info.fingerprint}, {info.executor} in {info.precision}"
        fail(f"{file}: {differs}; made by another build ({there}; here {here})")
    if not info.exact:
        fail(f"{file}: {differs}; weights and build are the same, but it is not --exact, so that bits depend on load")
    fail(f"{file}: {differs}; weights and build are the same: the file was changed")


def _keep_of(file: "TrajectoryFile") -> list[int] | None:
    """Return the numbers of the passes in the file; None if it has all passes. Raises ValueError."""
    keep = file.document.get("keep")
    if keep is not None and not (isinstance(keep, list) and all(type(each) is int for each in keep)):
        raise ValueError(f"`keep` in its metadata must be a list of integers, got {keep!r:.80}")
    return keep


def _made_by(file: "TrajectoryFile") -> Mapping[str, Any]:
    """Return the file's executor, precision and `exact`, except values that this version does not know."""
    from tminus.service.engine.autotune import EXECUTORS
    from tminus.service.engine.executors import PRECISIONS

    made_by = file.document.get("made_by")
    made_by = made_by if isinstance(made_by, dict) else {}
    known: dict[str, tuple[object, ...]] = {"executor": EXECUTORS, "precision": PRECISIONS, "exact": (True, False)}
    return {name: made_by[name] for name, values in known.items() if made_by.get(name) in values}


def first_difference(file: "Arrays", again: "Arrays") -> str | None:
    """Describe the first difference between a file's arrays and the new arrays. None if there is none."""
    import numpy as np

    for name, mine in again.items():
        theirs = file.get(name)
        if theirs is None:
            return f"it has no {name}"
        if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
            return f"{name} is {theirs.dtype} {theirs.shape}, and again {mine.dtype} {mine.shape}"
    if more := file.keys() - again.keys():
        return f"it has {min(more)} too"
    steps = len(again["timesteps"])
    for name in sorted(again, key=lambda name: name not in BY_STEP):
        theirs, mine = file[name], again[name]
        if name in BY_STEP:
            bits = f"u{mine.itemsize}"
            apart = theirs.view(bits) != mine.view(bits)  # compare bits: 0 and -0 differ, and NaN equals NaN
        elif theirs.dtype.kind == "f":
            rtol, atol = CLOSE.get(name, PLAN_CLOSE)
            apart = ~np.isclose(theirs, mine, rtol=rtol, atol=atol)
        else:
            apart = theirs != mine
        if apart.any():
            with np.errstate(invalid="ignore"):  # for steps without clipping, the bound is infinite
                by = abs(theirs.astype(np.float64) - mine)
            return _where(name, apart, by, again, steps)
    return None


def _where(name: str, apart: "np.ndarray", by: "np.ndarray", again: "Arrays", steps: int) -> str:
    """Describe where an array differs first (step and image), and by how much."""
    first = tuple(int(each[0]) for each in apart.nonzero())
    step = int(again[f"{name}_at"][first[0]]) + BY_STEP[name] if name in BY_STEP else 0
    if name == "x_t" and step == 0:
        where, of = f"in its first noise, image {first[1]}", first[:2]
    elif name in BY_STEP:
        where, of = f"at step {step} of {steps} (t = {again['timesteps'][step - 1]:g}), image {first[1]}", first[:2]
    elif name in ("mean", "log_p") or (name == "s" and apart.shape[1] > 1):
        where, of = f"at step {int(again['passes'][first[0]]) + 1} of {steps}, image {first[1]}", first[:2]
    else:
        where, of = f"at {list(first)}", first[:1]
    there = apart[of]
    most = float(by[of][there].max())
    return f"{name} differs first {where}: {int(there.sum())} of {there.size} values, by {most:.3g} at most"
