"""`tminus sample --url … --watch FILE`: watch a server denoise, and keep the frames as an animation."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tminus.service.cli.images import client_of, fail_at
from tminus.service.cli.output import fail, make_folder, say, write_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from tminus.service.client.messages import Message

MOST_FRAMES = 100  # unless --every says so
FORMATS = (".webp", ".gif")
MAX_FRAME_BYTES = 2**28  # of all frames of a job, as they come
MAX_PIXELS = 2**26  # of all frames of a job


def follow(
    url: str,
    model: str | None,
    parameters: dict[str, Any],
    sheet: bool,
    animation: Path,
    every: int | None,
    show: str,
) -> tuple[dict[str, bytes], int, list["Image"]]:
    """Run a job on a server with a progress bar; returns its PNG files by name, the seed and the animation's frames."""
    from tminus.service.client import ClientError

    if animation.suffix.lower() not in FORMATS:
        fail(f"--watch {animation}: must end in {' or '.join(FORMATS)}")
    every = every or max(1, _number(parameters.get("steps", 1000)) // MOST_FRAMES)
    layout = "sheet" if sheet else "images"
    try:
        with (
            client_of(url, model) as tminus,
            tminus.watch(**parameters, every=every, show=show, layout=layout) as messages,
        ):
            seed, shown, finals = _read(messages)
        frames = _decode([*shown, finals])
    except ClientError as error:
        fail_at(url, error)
    index = _number(parameters.get("index", 0))
    names = ["sheet"] if sheet else [f"{index + k:05d}.png" for k in range(len(finals))]
    return dict(zip(names, finals, strict=True)), seed, frames


def write_animation(file: Path, frames: list["Image"]) -> None:
    """Write the frames to a file; one clear line and exit code 1 where that fails."""
    from tminus.service.images.encoder import encode_animation

    try:
        data = encode_animation(frames, file.suffix.lower().removeprefix("."))
    except (OSError, ValueError) as error:
        fail(f"--watch {file}: {error}")
    make_folder(f"--watch {file}", file.parent)
    write_file(f"--watch {file}", file, data)
    say(f"{file}: {len(frames)} frames")


def _number(given: Any) -> int:
    """An option as a number, or 0 for a text that is none: the server refuses it and says why."""
    try:
        return int(float(given))
    except (ValueError, OverflowError):
        return 0


def _read(messages: "Iterable[Message]") -> tuple[int, list[list[bytes]], Sequence[bytes]]:
    """Read a job's messages to its end: the seed, the pictures of each step that was shown, and the PNGs."""
    from tqdm import tqdm

    from tminus.service.client import Accepted, ClientError, Done, Frame

    seed, shown, num_bytes = 0, dict[int, list[bytes]](), 0
    with tqdm(total=None, unit="step", dynamic_ncols=True, disable=None) as progress:
        for message in messages:
            match message:
                case Accepted():
                    seed = message.seed
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
                case Done():
                    progress.update((progress.total or progress.n) - progress.n)
                    return seed, [*shown.values()], message.images
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

    coloured = [each.convert("RGB") for each in pictures]
    return coloured[0] if len(coloured) == 1 else Image.fromarray(contact_sheet(np.stack([*map(np.asarray, coloured)])))
