"""`tminus sample`: samples images to PNG files, here or on a server. `--watch` writes an animation."""

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
    make_images,
    model_options,
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
    from tminus.service.client.results import Message, Sampled
    from tminus.service.spec import SampleSpec

MOST_FRAMES = 100  # about this many frames if --every is not given
FORMATS = (".webp", ".gif")
MAX_FRAME_BYTES = 2**28  # limit on the size of all frames of a job, as files
MAX_PIXELS = 2**26  # limit on the pixels of all frames of a job
ANIMATION_PX = 512  # largest width and height to which an animation is enlarged by default


@click.command(short_help="Sample images to PNG files, offline or from a server.")
@model_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    help="File NAME.png, a sheet of all images if -n is above 1; any other name is a folder with a file for each image",
)
@click.option("-n", "--n", type=click.IntRange(1, MAX_LOCAL_N), default=1, help="Number of images")
@click.option(
    "--scale",
    type=click.IntRange(1, MAX_SCALE),
    help="Enlarge each pixel to a square of this side  [default: as needed to see sheets and animations, else 1]",
)
@click.option(
    "--steps",
    metavar="INTEGER",
    help="Denoising steps  [default: the recommended ones, or those that suit the sampler]",
)
@click.option(
    "--sampler",
    shell_complete=SAMPLER_NAMES,
    help=f"Sampler: {', '.join(SAMPLERS)}, or tuned or consistency if the checkpoint has tables  "
    "[default: the recommended one; with --steps that of the scheduler]",
)
@click.option("--eta", metavar="FLOAT", help="Noise of ddim, 0..1")
@click.option("--seed", metavar="INTEGER", help="Seed of the noise, 0..2^64-1  [default: drawn at random]")
@click.option(
    "--to-seed", metavar="INTEGER", help="With --mix: second seed; the noise lies between those of both seeds"
)
@click.option("--mix", metavar="FLOAT", help="Where the noise lies, from --seed (0) to --to-seed (1)")
@click.option(
    "--index", metavar="INTEGER", help="Index of the first image: with the same seed, other indices are other images"
)
@click.option("--class-label", multiple=True, help="Number or name of a class; repeat it to give each image its own")
@click.option(
    "--guidance",
    metavar="FLOAT",
    help="Scale of classifier-free guidance; 1 is off  [default: the recommended one with the recommended sampler and "
    "steps, else 1]",
)
@click.option("--clip/--no-clip", default=None, help="Clip the estimate of x_0  [default: as the checkpoint says]")
@click.option(
    "--bit-depth",
    type=click.Choice(["8", "16"]),
    help="Bits of each value in the PNG; 16 is for models of one channel  [default: 8]",
)
@click.option(
    "--guidance-interval", type=int, nargs=2, help="Lowest and highest timestep at which guidance acts  [default: all]"
)
@click.option(
    "--guidance-rescale",
    metavar="FLOAT",
    help="Rescale the guided output to the spread of the conditional one, by this share, 0..1",
)
@click.option("--timestep-spacing", help="Spacing of the timesteps: leading, trailing, linspace or karras")
@click.option(
    "--nearest",
    is_flag=True,
    default=None,
    help="If the sampler has no table for these steps and this guidance, take its nearest table",
)
@click.option(
    "--quality",
    type=click.Choice(["adaptive"]),
    help="With --url: take the best setting that is ready before --deadline-s",
)
@click.option("--deadline-s", metavar="FLOAT", help="With --url: seconds in which the images must be ready")
@click.option("--image", type=FILE_TYPE, help="Image to vary (--strength) or to edit (--mask)")
@click.option(
    "--mask",
    type=FILE_TYPE,
    help="Image that is white where new pixels are made, and black where the old ones are kept",
)
@click.option("--strength", metavar="FLOAT", help="Share of the steps to run again, above 0, at most 1")
@click.option(
    "--watch",
    type=click.Path(path_type=Path),
    help="With --url: show progress, and write the frames to this animation, .webp or .gif",
)
@click.option(
    "--every",
    type=click.IntRange(1),
    help="With --watch: steps between frames  [default: a hundredth of --steps, or 1]",
)
@click.option(
    "--show",
    type=click.Choice(["x_t", "x_0"]),
    help="With --watch: the noisy image x_t, or the network's estimate of x_0  [default: x_t]",
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
    **flags: Any,
) -> None:
    """Sample images to PNG files, offline or from a server.

    \b
      tminus sample -n 10 --class-label bag --out bags.png
      tminus sample -n 10 --out images/
      tminus sample --class-label sneaker --out sneaker.png
      tminus sample --image sneaker.png --strength 0.6 --out varied.png
      tminus sample -n 4 --url http://localhost:8000 --model colour
      tminus sample -n 4 --steps 100 --url http://localhost:8000 --watch way.webp

    An --out that ends in .png is one file: an image, or a sheet of several images. Any other name is a folder with a
    PNG for each image. The options are the parameters of the API, with the same defaults.

    A sheet is enlarged for viewing, by the largest whole number that keeps each image within 256 pixels a side and the
    sheet within 1024. With --scale 1, the file has the same bytes as a server's response. The recipe in the PNG
    contains the scale, so `tminus reproduce` makes the same file again.

    Without --url, a small job starts at once, with the executor that an earlier start chose on this machine, or
    otherwise with PyTorch in one thread. Before a larger job, the command measures the executors like a server at its
    start, and saves the choice.

    With --url, the command sends the API key in the variable TMINUS_KEY, if there is one. --watch keeps the frames in
    memory, up to 256 MiB and 64 megapixels; raise --every for fewer frames.
    """
    check_model(url, model)
    parameters = request_parameters(flags) | read_pictures(image, mask)
    if watch is not None and url is None:
        fail("--watch needs --url: a server to look at")
    if watch is None and (every is not None or show is not None):
        fail("--every and --show need --watch: a file for the frames")
    if url is None and (flags["quality"] is not None or flags["deadline_s"] is not None):
        fail("--quality and --deadline-s need --url: a server that knows when it is ready")
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
    n, too_large = flags["n"], None
    for name, data in files.items():
        shown = data
        with failing_in_one_line(f"--out {out}"):
            try:
                shown = enlarge_png(data, n, scale or (None if sheet and n > 1 else 1))
            except TooLarge as error:  # the size of images from a server is not known earlier
                too_large = error
        write_file(f"--out {out}", out if sheet else out / name, shown)
    written = f"{len(files)} PNG file{'s' * (len(files) > 1)}"
    if sheet:
        written = "a PNG" if n == 1 else f"a PNG, a sheet of {n} images"
    if made.sampler is not None and made.steps is not None:  # older servers do not send them
        written += f", {Recommended(made.sampler, made.steps, 1.0 if made.guidance is None else made.guidance)}"
    say(f"{out}: {written}, seed {made.seed}")
    if watch is not None:
        write_animation(watch, enlarge_frames(frames, n, scale))
    if too_large is not None:
        fail(f"--scale {scale}: {too_large}; {out} is not enlarged")


def request_parameters(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the flags of the command to the parameters of a JSON body."""
    parameters = {name: value for name, value in flags.items() if value not in (None, ())}
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
    """Run a job on a server, with a progress bar.

    Returns the PNG files by name, the Accepted message, and the frames.
    """
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
    """Enlarge the frames of an animation of n images, but not beyond MAX_PIXELS in total.

    scale: the factor; None: a factor for comfortable viewing.
    """
    from tminus.service.images.encoder import viewing_scale

    width, height = frames[0].size
    scale = scale or viewing_scale(n, height, width, ANIMATION_PX)
    while scale > 1 and len(frames) * width * height * scale**2 > MAX_PIXELS:
        scale -= 1
    return [frame.resize((width * scale, height * scale), 0) for frame in frames]  # 0: nearest neighbour


def write_animation(file: Path, frames: list["Image"]) -> None:
    """Write the animation. Exits with 1 on an error."""
    from tminus.service.images.encoder import encode_animation

    with failing_in_one_line(f"--watch {file}"):
        data = encode_animation(frames, file.suffix.lower().removeprefix("."))
    make_folder(f"--watch {file}", file.parent)
    write_file(f"--watch {file}", file, data)
    say(f"{file}: {len(frames)} frames")


def _number(text: Any) -> int:
    """Convert an option to an integer. Returns 0 for invalid text, which the server then refuses."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        return 0


def _read(messages: "Iterable[Message]") -> tuple["Accepted", list[list[bytes]], Sequence[bytes]]:
    """Read a job's messages. Returns the Accepted message, the pictures of each step, and the final PNGs."""
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
    """Decode the frames. The pictures of a frame become one image.

    Raises ClientError for an invalid PNG, or if the sizes differ.
    """
    from PIL import Image

    from tminus.service.client import ClientError
    from tminus.service.images.decoder import read_header

    try:
        headers = [read_header(picture) for frame in frames for picture in frame]
        sizes = {(header.width_px, header.height_px) for header in headers if header is not None}
        if len(sizes) > 1:
            raise ClientError(f"frames of several sizes came: {sorted(sizes)!s:.80}")
        if sum(header.pixels for header in headers if header is not None) > MAX_PIXELS:  # check this before decoding
            raise ClientError(f"the frames have more than {MAX_PIXELS} pixels; give a larger --every")
        opened = [[Image.open(io.BytesIO(picture), formats=["PNG"]) for picture in frame] for frame in frames]
        return [_sheet(frame) for frame in opened]
    except (OSError, ValueError, SyntaxError) as error:
        raise ClientError(f"a frame is not a PNG ({type(error).__name__})") from None


def _sheet(pictures: Sequence["Image"]) -> "Image":
    import numpy as np
    from PIL import Image

    from tminus.service.images.encoder import contact_sheet

    coloured = [each.convert("RGBA" if each.has_transparency_data else "RGB") for each in pictures]
    return coloured[0] if len(coloured) == 1 else Image.fromarray(contact_sheet(np.stack([*map(np.asarray, coloured)])))
