"""`tminus sample`: sample images to PNG files, offline or from a server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tminus.model.catalogue import SAMPLERS
from tminus.service.cli.images import LocalModel, check_model, files_of, make_images, read_pictures, sample_from
from tminus.service.cli.options import FILE_TYPE, MAX_LOCAL_N, local_model_options
from tminus.service.cli.output import check_png, fail, make_folder, say, write_file
from tminus.service.cli.watch import follow, write_animation


@click.command()
@local_model_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    help="NAME.png: a PNG, a sheet if -n is above 1; else a folder",
)
@click.option("-n", "--n", type=click.IntRange(1, MAX_LOCAL_N), default=1, help="how many images")
@click.option("--steps", metavar="INTEGER", help="denoising steps  [default: T]")
@click.option("--sampler", help=f"{', '.join(SAMPLERS)}  or tuned, consistency  [default: the checkpoint's]")
@click.option("--eta", metavar="FLOAT", help="noise of ddim, 0..1")
@click.option("--seed", metavar="INTEGER", help="0..2^64-1; drawn if absent")
@click.option("--to-seed", metavar="INTEGER", help="with --mix: noise between those of two seeds")
@click.option("--mix", metavar="FLOAT", help="how far from --seed (0) to --to-seed (1)")
@click.option("--index", metavar="INTEGER", help="index of the first image")
@click.option("--class-label", multiple=True, help="number or name; repeat it for one an image")
@click.option("--guidance", metavar="FLOAT", help="classifier-free guidance scale; 1 is off")
@click.option("--clip/--no-clip", default=None, help="clip x_0  [default: the checkpoint's]")
@click.option("--guidance-interval", type=int, nargs=2, help="lowest and highest timestep that is guided")
@click.option("--guidance-rescale", metavar="FLOAT", help="0..1: back to the spread of the conditional output")
@click.option("--timestep-spacing", help="leading, trailing, linspace or karras")
@click.option("--nearest", is_flag=True, default=None, help="of the sampler's tables, take the nearest")
@click.option("--image", type=FILE_TYPE, help="image to start from (--strength) or to edit (--mask)")
@click.option("--mask", type=FILE_TYPE, help="image: white where the image is regenerated, black where it is kept")
@click.option("--strength", metavar="FLOAT", help="share of the steps to run again, above 0, at most 1")
@click.option(
    "--watch", type=click.Path(path_type=Path), help="with --url: write the frames as an animation, .webp or .gif"
)
@click.option("--every", type=click.IntRange(1), help="steps between its frames  [default: a hundredth of them]")
@click.option(
    "--show", type=click.Choice(["x_t", "x_0"]), help="the latent, or the network's estimate of x_0  [default: x_t]"
)
def sample(
    url: str | None,
    model: str | None,
    checkpoint: Path,
    device: str,
    executor: str,
    precision: str,
    out: Path,
    watch: Path | None,
    every: int | None,
    show: str | None,
    image: Path | None,
    mask: Path | None,
    **given: Any,
) -> None:
    """Sample images to PNG files, offline or from a server."""
    check_model(url, model)
    parameters = request_parameters(given) | read_pictures(image, mask)
    if watch is not None and url is None:
        fail("--watch needs --url: a server to look at")
    if watch is None and (every is not None or show is not None):
        fail("--every and --show need --watch: a file for the frames")
    check_png(f"--out {out}", out, ", or a folder's name for one file an image")
    sheet = out.suffix.lower() == ".png"
    make_folder(f"--out {out}", out.parent if sheet else out)
    if url is None:
        files, seed = make_images(LocalModel(checkpoint, device, executor, precision), parameters, sheet=sheet)
    elif watch is None:
        sampled = sample_from(url, model, parameters, "image/png" if sheet else "application/zip")
        files = {"sheet": sampled.data} if sheet else files_of(url, sampled, given["n"])
        seed = sampled.seed
    else:
        files, seed, frames = follow(url, model, parameters, sheet, watch, every, show or "x_t")
    for name, data in files.items():
        write_file(f"--out {out}", out if sheet else out / name, data)
    written = f"{len(files)} PNG file{'s' * (len(files) > 1)}"
    if sheet:
        written = "a PNG" if given["n"] == 1 else f"a PNG, a sheet of {given['n']} images"
    say(f"{out}: {written}, seed {seed}")
    if watch is not None:
        write_animation(watch, frames)


def request_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a request, as its JSON body has them, from the options that were given."""
    parameters = {name: value for name, value in given.items() if value not in (None, ())}
    if interval := parameters.pop("guidance_interval", None):
        parameters["guidance_interval"] = list(interval)
    if labels := parameters.pop("class_label", None):
        parameters["class_label"] = list(labels) if len(labels) > 1 else labels[0]
    return parameters
