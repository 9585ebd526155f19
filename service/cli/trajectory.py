"""`tminus trajectory check`: run a trajectory again from the recipe in its file, and compare every value."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.service.cli.images import LocalJob, LocalModel, read_pictures
from tminus.service.cli.options import DEVICE, FILE_TYPE, FOLDER_TYPE
from tminus.service.cli.output import fail, say
from tminus.service.cli.reproduce import Recipe, check_pictures, recipe_of
from tminus.service.engine.options import BUNDLED

if TYPE_CHECKING:
    import numpy as np

    from tminus.service.images.trajectory import Arrays, TrajectoryFile

MAX_FILE_BYTES = 256 * 2**20
BY_STEP = {"x_t": 0, "x_0": 1}  # the arrays that are compared to the bit, and the number of the step in their first
# How near others have to be, relative and absolute: they follow from those, and another NumPy may round another way.
CLOSE = {"mean": (1e-6, 1e-6), "s": (1e-6, 0.0), "log_p": (1e-9, 1e-6)}  # log p may be about 0
PLAN_CLOSE = (1e-12, 0.0)


@click.group()
def trajectory() -> None:
    """Look after files of trajectories, which servers make for reinforcement learning."""


@trajectory.command()
@click.argument("file", type=FILE_TYPE)
@click.option("--checkpoint", type=FOLDER_TYPE, default=BUNDLED, help="folder of the checkpoint that it was made by")
@click.option("--image", type=FILE_TYPE, help="of an edit: the picture that it was made from")
@click.option("--executor", help="auto, eager, compile or openvino  [default: auto, or the one that the file names]")
@click.option(
    "--precision", help="auto, float32, tf32 (CUDA) or bfloat16  [default: auto, or the one that the file names]"
)
@DEVICE
def check(
    file: Path, checkpoint: Path, image: Path | None, executor: str | None, precision: str | None, device: str
) -> None:
    """Make the trajectory in FILE again, and compare: x_t to the bit, and mean, s and log p.

    Exit code 0: identical; 1: not, with the first step and image that differ.
    """
    from tminus.service.images.trajectory import arrays_of, read_trajectory
    from tminus.service.work import noisy_passes
    from tminus.service.worker.recording import Path as Recorded

    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            fail(f"{file}: larger than {MAX_FILE_BYTES} bytes")
        found = read_trajectory(file.read_bytes())
        recipe = _recipe_of(found)
    except (OSError, ValueError) as error:
        fail(f"{file}: {error}")
    check_pictures(file, recipe, image, None)
    made_by = _made_by(found)
    exact = True if made_by.get("exact") else None
    # As a server with default settings would run it, and if that is another build, as the file says.
    for how in dict.fromkeys(
        (executor or str(said.get("executor", "auto")), precision or str(said.get("precision", "auto")))
        for said in ({}, made_by)
    ):
        model = LocalModel(checkpoint, device, *how, exact)
        job = LocalJob.of(model, recipe.parameters | read_pictures(image, None), recipe.fingerprint)
        spec, info = job.spec, job.loaded.engine.info
        if info.fingerprint == recipe.fingerprint or info.weights_hash != recipe.weights:
            break
    if info.weights_hash != recipe.weights:
        fail(f"{file}: made by other weights ({recipe.weights[:12]}, {checkpoint} has {info.weights_hash[:12]})")
    if not noisy_passes(spec, info):
        fail(f"{file}: no step of its recipe adds noise ({spec.sampler}), so that it has no log p to compare")
    row = (info.channels, info.height_px, info.width_px)
    if info.latent is not None:
        row = (info.latent.channels, info.latent.height, info.latent.width)
    wanted, got = (spec.num_passes + 1, spec.n, *row), found.arrays.get("x_t")
    if got is None or got.shape != wanted:  # before so much is made again
        fail(f"{file}: x_t must be of shape {wanted}, got {'none' if got is None else got.shape}")
    path = Recorded(spec)
    images = job.run(path.record)
    again = arrays_of(path.trajectory(), images, spec, info)
    differs = difference(found.arrays, again)
    if differs is None:
        noisy = len(again["passes"])
        say(
            f"{file}: identical: x_t of {spec.n} images at {spec.num_passes} steps, log p of the {noisy} that add noise"
        )
        return
    if info.fingerprint != recipe.fingerprint:
        there = f"{recipe.fingerprint}, {made_by.get('executor', '?')} in {made_by.get('precision', '?')}"
        here = f"{info.fingerprint}, {info.executor} in {info.precision}"
        fail(f"{file}: {differs}; made by another build ({there}; here {here})")
    if not info.exact:
        fail(f"{file}: {differs}; weights and build are the same, but it is not --exact, so that bits depend on load")
    fail(f"{file}: {differs}; weights and build are the same: the file was changed")


def _recipe_of(file: "TrajectoryFile") -> Recipe:
    try:
        return recipe_of(file.document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its metadata is no recipe of this version ({error!r:.200})") from None


def _made_by(file: "TrajectoryFile") -> Mapping[str, Any]:
    """How the file says that the network was run, as far as it is known here."""
    from tminus.service.engine.autotune import EXECUTORS
    from tminus.service.engine.executors import PRECISIONS

    said = file.document.get("made_by")
    said = said if isinstance(said, dict) else {}
    known: dict[str, tuple[object, ...]] = {"executor": EXECUTORS, "precision": PRECISIONS, "exact": (True, False)}
    return {name: said[name] for name, among in known.items() if said.get(name) in among}


def difference(file: "Arrays", again: "Arrays") -> str | None:
    """Say where the arrays of a file first differ from those that were made again; None: nowhere."""
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
            apart = theirs.view(np.uint32) != mine.view(np.uint32)  # 0 and -0 are two, and NaN is itself
        elif theirs.dtype.kind == "f":
            rtol, atol = CLOSE.get(name, PLAN_CLOSE)
            apart = ~np.isclose(theirs, mine, rtol=rtol, atol=atol)
        else:
            apart = theirs != mine
        if apart.any():
            with np.errstate(invalid="ignore"):  # a line that does not clip has infinity
                by = abs(theirs.astype(np.float64) - mine)
            return _where(name, apart, by, again, steps)
    return None


def _where(name: str, apart: "np.ndarray", by: "np.ndarray", again: "Arrays", steps: int) -> str:
    """Name the first step and image of an array that differ, and how far."""
    first = tuple(int(each[0]) for each in apart.nonzero())
    if name == "x_t" and first[0] == 0:
        where, of = f"in its first noise, image {first[1]}", first[:2]
    elif name in BY_STEP:
        step = first[0] + BY_STEP[name]
        where, of = f"at step {step} of {steps} (t = {again['timesteps'][step - 1]:g}), image {first[1]}", first[:2]
    elif name in ("mean", "log_p") or (name == "s" and apart.shape[1] > 1):
        where, of = f"at step {int(again['passes'][first[0]]) + 1} of {steps}, image {first[1]}", first[:2]
    else:
        where, of = f"at {list(first)}", first[:1]
    there = apart[of]
    most = float(by[of][there].max())
    return f"{name} differs first {where}: {int(there.sum())} of {there.size} values, by {most:.3g} at most"
