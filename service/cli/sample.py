"""`tminus sample`: sample images to PNG files, offline or from a server; `--watch` keeps its frames as an animation."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.model.catalogue import SAMPLERS, Recommended
from tminus.service.cli.images import (
    MAX_LOCAL_N,
    MAX_SCALE,
    TooLarge,
    check_model,
    enlarge_png,
    local_model_options,
    make_images,
    read_pictures,
    sample_from,
    server_at,
)
from tminus.service.cli.options import FILE_TYPE, SAMPLER_NAMES
from tminus.service.cli.output import check_png, fail, failing_in_one_line, make_folder, say, write_file
from tminus.service.engine.protocol import LoadOptions

if TYPE_CHECKING:
    from PIL.Image import Image

    from tminus.service.client import Accepted
    from tminus.service.client.messages import Message
    from tminus.service.client.results import Sampled
    from tminus.service.spec import SampleSpec

MOST_FRAMES = 100  # unless --every says so
FORMATS = (".webp", ".gif")
MAX_FRAME_BYTES = 2**28  # of all frames of a job, as they come
MAX_PIXELS = 2**26  # of all frames of a job
ANIMATION_PX = 512  # of its longer side, at most


@click.command()
@local_model_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    help="NAME.png: a PNG, a sheet if -n is above 1; else a folder",
)
@click.option("-n", "--n", type=click.IntRange(1, MAX_LOCAL_N), default=1, help="how many images")
@click.option(
    "--scale",
    type=click.IntRange(1, MAX_SCALE),
    help="enlarge each pixel to so many squared  [default: sheets and animations as a person sees them, else 1]",
)
@click.option(
    "--steps", metavar="INTEGER", help="denoising steps  [default: as recommended, or the sampler's good number]"
)
@click.option(
    "--sampler",
    shell_complete=SAMPLER_NAMES,
    help=f"{', '.join(SAMPLERS)}  or tuned, consistency  [default: as recommended; with --steps the scheduler's own]",
)
@click.option("--eta", metavar="FLOAT", help="noise of ddim, 0..1")
@click.option("--seed", metavar="INTEGER", help="0..2^64-1; drawn if absent")
@click.option("--to-seed", metavar="INTEGER", help="with --mix: noise between those of two seeds")
@click.option("--mix", metavar="FLOAT", help="how far from --seed (0) to --to-seed (1)")
@click.option("--index", metavar="INTEGER", help="index of the first image")
@click.option("--class-label", multiple=True, help="number or name; repeat it for one an image")
@click.option(
    "--guidance",
    metavar="FLOAT",
    help="classifier-free guidance scale  [default: as recommended where sampler and steps are, else 1, which is off]",
)
@click.option("--clip/--no-clip", default=None, help="clip x_0  [default: the checkpoint's]")
@click.option("--bit-depth", type=click.Choice(["8", "16"]), help="8, or 16 of a model of one channel  [default: 8]")
@click.option("--guidance-interval", type=int, nargs=2, help="lowest and highest timestep that is guided")
@click.option("--guidance-rescale", metavar="FLOAT", help="0..1: back to the spread of the conditional output")
@click.option("--timestep-spacing", help="leading, trailing, linspace or karras")
@click.option("--nearest", is_flag=True, default=None, help="of the sampler's tables, take the nearest")
@click.option("--background", is_flag=True, default=None, help="with --url: let the server's other jobs go first")
@click.option("--image", type=FILE_TYPE, help="image to start from (--strength) or to edit (--mask)")
@click.option("--mask", type=FILE_TYPE, help="image: white where the image is regenerated, black where it is kept")
@click.option("--strength", metavar="FLOAT", help="share of the steps to run again, above 0, at most 1")
@click.option(
    "--watch", type=click.Path(path_type=Path), help="with --url: write the frames as an animation, .webp or .gif"
)
@click.option(
    "--every", type=click.IntRange(1), help="steps between its frames  [default: a hundredth of --steps, or 1]"
)
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
    scale: int | None,
    watch: Path | None,
    every: int | None,
    show: str | None,
    image: Path | None,
    mask: Path | None,
    **given: Any,
) -> None:
    """Sample images to PNG files, offline or from a server.

    \b
      tminus sample -n 8
      tminus sample -n 8 --checkpoint runs/digits --class-label 3 --out threes.png
      tminus sample -n 8 --url http://localhost:8000

    A sheet is enlarged, so that a person sees it; with --scale 1 it is the bytes that a server answers.
    """
    check_model(url, model)
    parameters = request_parameters(given) | read_pictures(image, mask)
    if watch is not None and url is None:
        fail("--watch needs --url: a server to look at")
    if given["background"] and url is None:
        fail("--background needs --url: a server with other jobs")
    if watch is None and (every is not None or show is not None):
        fail("--every and --show need --watch: a file for the frames")
    check_png(f"--out {out}", out, ", or a folder's name for one file an image")
    sheet = out.suffix.lower() == ".png"
    made: Sampled | SampleSpec | Accepted
    make_folder(f"--out {out}", out.parent if sheet else out)
    if url is None:
        options = LoadOptions(checkpoint, device, executor, precision)
        try:
            files, made = make_images(options, parameters, sheet=sheet, scale=scale or 1)
        except TooLarge as error:
            fail(f"--scale {scale}: {error}")
    elif watch is None:
        made = sample_from(url, model, parameters, "image/png" if sheet else "application/zip")
        files = {"sheet": made.data} if sheet else made.files
    else:
        files, made, frames = follow(url, model, parameters, sheet, watch, every, show or "x_t")
    n, too_large = given["n"], None
    for name, data in files.items():
        shown = data
        with failing_in_one_line(f"--out {out}"):
            try:
                shown = enlarge_png(data, n, scale or (None if sheet and n > 1 else 1))
            except TooLarge as error:  # of a server's, whose size nobody knew before
                too_large = error
        write_file(f"--out {out}", out if sheet else out / name, shown)
    written = f"{len(files)} PNG file{'s' * (len(files) > 1)}"
    if sheet:
        written = "a PNG" if n == 1 else f"a PNG, a sheet of {n} images"
    if made.sampler is not None and made.steps is not None:  # a server of an earlier version does not say
        written += f", {Recommended(made.sampler, made.steps, 1.0 if made.guidance is None else made.guidance)}"
    say(f"{out}: {written}, seed {made.seed}")
    if watch is not None:
        write_animation(watch, enlarge_frames(frames, n, scale))
    if too_large is not None:
        fail(f"--scale {scale}: {too_large}; {out} is not enlarged")


def request_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a request, as its JSON body has them, from the options that were given."""
    parameters = {name: value for name, value in given.items() if value not in (None, ())}
    if interval := parameters.pop("guidance_interval", None):
        parameters["guidance_interval"] = list(interval)
    if labels := parameters.pop("class_label", None):
        parameters["class_label"] = list(labels) if len(labels) > 1 else labels[0]
    return parameters


def follow(
    url: str,
    model: str | None,
    parameters: dict[str, Any],
    sheet: bool,
    animation: Path,
    every: int | None,
    show: str,
) -> tuple[dict[str, bytes], "Accepted", list["Image"]]:
    """Run a job on a server with a progress bar; returns its PNG files by name, what it is, and its frames."""
    if animation.suffix.lower() not in FORMATS:
        fail(f"--watch {animation}: must end in {' or '.join(FORMATS)}")
    every = every or max(1, _number(parameters.get("steps", 0)) // MOST_FRAMES)
    layout = "sheet" if sheet else "images"
    with (
        server_at(url, model) as tminus,
        tminus.watch(**parameters, every=every, show=show, layout=layout) as messages,
    ):
        accepted, shown, finals = _read(messages)
        frames = _decode([*shown, finals])
    index = _number(parameters.get("index", 0))
    names = ["sheet"] if sheet else [f"{index + k:05d}.png" for k in range(len(finals))]
    return dict(zip(names, finals, strict=True)), accepted, frames


def enlarge_frames(frames: list["Image"], n: int, scale: int | None) -> list["Image"]:
    """Enlarge the frames of an animation of n images, but not beyond MAX_PIXELS in all.

    scale: None for as large as a person sees them.
    """
    from tminus.service.images.encoder import viewing_scale

    width, height = frames[0].size
    scale = scale or viewing_scale(n, height, width, ANIMATION_PX)
    while scale > 1 and len(frames) * width * height * scale**2 > MAX_PIXELS:
        scale -= 1
    return [frame.resize((width * scale, height * scale), 0) for frame in frames]  # 0: the nearest pixel


def write_animation(file: Path, frames: list["Image"]) -> None:
    """Write the frames to a file; one clear line and exit code 1 where that fails."""
    from tminus.service.images.encoder import encode_animation

    with failing_in_one_line(f"--watch {file}"):
        data = encode_animation(frames, file.suffix.lower().removeprefix("."))
    make_folder(f"--watch {file}", file.parent)
    write_file(f"--watch {file}", file, data)
    say(f"{file}: {len(frames)} frames")


def _number(given: Any) -> int:
    """An option as a number, or 0 for a text that is none: the server refuses it and says why."""
    try:
        return int(float(given))
    except (ValueError, OverflowError):
        return 0


def _read(messages: "Iterable[Message]") -> tuple["Accepted", list[list[bytes]], Sequence[bytes]]:
    """Read a job's messages to its end: what was accepted, the pictures of each step that was shown, and the PNGs."""
    from tqdm import tqdm

    from tminus.service.client import Accepted, ClientError, Done, Frame

    accepted, shown, num_bytes = None, dict[int, list[bytes]](), 0
    with tqdm(total=None, unit="step", dynamic_ncols=True, disable=None) as progress:
        for message in messages:
            match message:
                case Accepted():
                    accepted = message
                    if message.position:
                        progress.set_description(f"{message.position} jobs ahead, {message.eta_s:.0f} s")
                case Frame():
                    num_bytes += len(message.data)
                    if num_bytes > MAX_FRAME_BYTES:
                        raise ClientError(f"the frames take more than {MAX_FRAME_BYTES} bytes; give a larger --every")
                    shown.setdefault(message.step, []).append(message.data)
                    progress.total = message.steps
                    progress.set_description(f"t={message.t:g}, {message.eta_s:.1f} s left")
                    progress.update(message.step - progress.n)
                case Done() if accepted is not None:
                    progress.update((progress.total or progress.n) - progress.n)
                    return accepted, [*shown.values()], message.images
    raise ClientError("the job was cancelled")


def _decode(frames: Sequence[Sequence[bytes]]) -> list["Image"]:
    """Decode the pictures of each step into one. Raises ClientError where they are none, or of several sizes."""
    from PIL import Image

    from tminus.service.client import ClientError
    from tminus.service.images.image_header import read_header

    try:
        headers = [read_header(picture) for frame in frames for picture in frame]
        sizes = {(header.width_px, header.height_px) for header in headers if header is not None}
        if len(sizes) > 1:
            raise ClientError(f"frames of several sizes came: {sorted(sizes)!s:.80}")
        if sum(header.pixels for header in headers if header is not None) > MAX_PIXELS:  # before Pillow sees any
            raise ClientError(f"the frames have more than {MAX_PIXELS} pixels; give a larger --every")
        opened = [[Image.open(io.BytesIO(picture), formats=["PNG"]) for picture in frame] for frame in frames]
        return [_sheet(frame) for frame in opened]
    except (OSError, ValueError, SyntaxError) as error:
        raise ClientError(f"a frame that is no PNG came ({type(error).__name__})") from None


def _sheet(pictures: Sequence["Image"]) -> "Image":
    """Lay pictures of one size out as a contact sheet, unless it is one."""
    import numpy as np
    from PIL import Image

    from tminus.service.images.encoder import contact_sheet

    coloured = [each.convert("RGBA" if each.has_transparency_data else "RGB") for each in pictures]
    return coloured[0] if len(coloured) == 1 else Image.fromarray(contact_sheet(np.stack([*map(np.asarray, coloured)])))
