"""Makes PNG files for `sample` and `reproduce`, in this process or on a server."""

import base64
import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tminus.service.cli.options import CHECKPOINT, DEVICE, EXECUTOR, PRECISION, options
from tminus.service.cli.output import fail, failing_in_one_line
from tminus.service.engine.protocol import LoadOptions

if TYPE_CHECKING:
    import numpy as np

    from tminus.service.client import Client, Sampled
    from tminus.service.client.results import MediaType
    from tminus.service.engine.loading import Loaded
    from tminus.service.engine.protocol import Record
    from tminus.service.images.decoder import ImageHeader
    from tminus.service.model_info import ModelInfo
    from tminus.service.spec import Inputs, Pixels, SampleSpec

KEY = "TMINUS_KEY"  # environment variable with the API key to send
MAX_LOCAL_N = 4096  # maximum number of images of a job in this process
MAX_PIXELS = MAX_LOCAL_N * 128 * 128  # maximum number of pixels in a PNG
MAX_SCALE = 64
SCALE = "scale"  # name of a value in a PNG's recipe: the factor by which the PNG was enlarged
# Options that select a model, either on a server or to be loaded in this process.
model_options = options(
    click.option("--url", help="Server to ask, instead of loading a checkpoint"),
    click.option("--model", help="With --url: name of one of its models  [default: its default model]"),
    CHECKPOINT,
    DEVICE,
    EXECUTOR,
    PRECISION,
)
LOCAL_ONLY = ("checkpoint", "device", "executor", "precision")  # options that cannot be combined with --url
MAX_LOCAL_IMAGE_BYTES = 2**30


def check_model(url: str | None, model: str | None) -> None:
    """Fail if --model is used without --url, or if --url is used with an option for a local model."""
    if model is not None and url is None:
        fail("--model needs --url: a server that has it")
    context = click.get_current_context()
    for name in LOCAL_ONLY:
        if url is not None and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            fail(f"--{name} is for a model that this command loads; with --url the server has its own")


def read_pictures(image: Path | None, mask: Path | None) -> dict[str, str]:
    """Read image and mask, and return them as base64 parameters. Exits with 1 on an error."""
    parameters = {}
    for name, file in (("image", image), ("mask", mask)):
        if file is not None:
            with failing_in_one_line(f"--{name} {file}"):
                parameters[name] = base64.b64encode(file.read_bytes()).decode("ascii")
    return parameters


@dataclass(frozen=True, slots=True)
class LocalJob:
    """A job that can run in this process."""

    loaded: "Loaded"
    spec: "SampleSpec"
    inputs: "Inputs | None"

    @classmethod
    def of(cls, options: LoadOptions, parameters: dict[str, Any], fingerprint: str | None = None) -> "LocalJob":
        """Load a model, and check a job's parameters against it. Exits with 1 on an error.

        The model is loaded in the same way as by a server with default settings. A small job skips the measurements:
        see `load_engine`. fingerprint: if the job makes earlier images again, the fingerprint of the engine that made
        them.
        """
        from tminus.service.api.request.schemas import SampleRequest, bounds_of
        from tminus.service.api.request.specs import spec_of, with_inputs
        from tminus.service.engine.loading import load_engine
        from tminus.service.images.decoder import decode_inputs
        from tminus.service.model_info import Limits
        from tminus.service.work import work_of

        n = parameters["n"]
        limits = Limits(
            max_n=n,
            max_batch=n,
            max_rows=n,
            max_jobs=1,
            max_backlog_s=float("inf"),
            max_body_bytes=0,
            max_image_bytes=MAX_LOCAL_IMAGE_BYTES,
        )

        def places_of(info: "ModelInfo") -> int:
            request = SampleRequest.parse(parameters, bounds_of(info, limits))
            return work_of(spec_of(request, info, limits), info).places

        with failing_in_one_line():
            loaded = load_engine(replace(options, max_rows=n), places_of, fingerprint)
            info = loaded.engine.info
            request = SampleRequest.parse(parameters, bounds_of(info, limits))
            inputs = decode_inputs(request.image, request.mask, info) if request.image is not None else None
            return cls(loaded, with_inputs(spec_of(request, info, limits), request, inputs), inputs)

    def run(self, record: "Record | None" = None) -> "Pixels":
        """Sample with a progress bar. Exits with 1 on an error. record: see sample_locally."""
        from tqdm import tqdm

        from tminus.service.engine.protocol import sample_locally

        engine, spec, batch = self.loaded.engine, self.spec, self.loaded.speed.policy.max_batch
        with (
            failing_in_one_line(),
            tqdm(total=spec.n * spec.num_passes, unit="row-step", dynamic_ncols=True, disable=None) as progress,
        ):
            return sample_locally(engine, spec, batch, progress.update, self.inputs, record)


def read_png_header(png: bytes) -> "ImageHeader":
    """Read the header of a PNG. Raises ValueError if the file is not a PNG."""
    from tminus.service.images.decoder import read_header

    try:
        header = read_header(png)
    except ValueError as error:
        raise ValueError(f"not a PNG that can be read ({error})") from None
    if header is None or header.format != "PNG":
        raise ValueError(f"not a PNG{f' but a {header.format}' if header else ''}; only PNGs say how they were made")
    return header


def decode_png(png: bytes) -> tuple["np.ndarray", str | None]:
    """Decode a PNG into pixels [H, W, C]. Also returns the recipe's text, or None. Raises ValueError."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    from tminus.service.images.encoder import PNG_TEXT_KEY

    header = read_png_header(png)
    if header.pixels > MAX_PIXELS:
        raise ValueError(f"{header.width_px}x{header.height_px} pixels, over {MAX_PIXELS}")
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as opened:
            pixels = np.asarray(opened)
            return pixels[:, :, None] if pixels.ndim == 2 else pixels, opened.info.get(PNG_TEXT_KEY)
    except UnidentifiedImageError:  # the message of Pillow mentions a BytesIO object
        raise ValueError("not a PNG that can be read") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"not a PNG that can be read ({error})") from None


class TooLarge(ValueError):
    """The enlarged PNG would have more than MAX_PIXELS pixels."""


def check_enlarged(height_px: int, width_px: int, scale: int) -> None:
    """Raise TooLarge if a PNG of this size cannot be enlarged by this factor."""
    pixels = height_px * width_px * scale**2
    if scale > 1 and pixels > MAX_PIXELS:
        raise TooLarge(f"the PNG would have {pixels} pixels, and may have {MAX_PIXELS}")


def enlarge_png(png: bytes, n: int, scale: int | None) -> bytes:
    """Enlarge a PNG of n images. Its recipe gets the scale, so `tminus reproduce` can make the same file.

    scale: the factor; None: a factor for comfortable viewing. Raises TooLarge, or ValueError if the file is not a PNG.
    """
    from tminus.service.client import checks
    from tminus.service.images.encoder import encode_png, enlarge, viewing_scale

    if scale == 1:
        return png
    header = read_png_header(png)
    size = header.height_px, header.width_px
    scale = scale or viewing_scale(n, *size)
    if scale == 1:  # a large PNG is not enlarged, and may be too large to decode
        return png
    check_enlarged(*size, scale)
    pixels, text = decode_png(png)
    recipe = checks.mapping(checks.loads(text)) | {SCALE: scale} if text is not None else None
    return encode_png(enlarge(pixels, scale), recipe)


def opaque_png(png: bytes) -> bytes:
    """Composite a PNG with alpha over white, as /v1/images does. Raises ValueError if it is not a PNG."""
    from tminus.service.client import checks
    from tminus.service.images.encoder import BACKGROUND, encode_png, over_white

    pixels, text = decode_png(png)
    recipe = checks.mapping(checks.loads(text)) | {BACKGROUND: "white"} if text is not None else None
    return encode_png(over_white(pixels), recipe)


def make_images(
    options: LoadOptions, parameters: dict[str, Any], *, sheet: bool, scale: int = 1, fingerprint: str | None = None
) -> "tuple[dict[str, bytes], SampleSpec]":
    """Sample in this process. Returns the PNG files, keyed by name, and the spec.

    The name of a sheet is "sheet". Otherwise there is one file for each image.

    scale: the factor by which the caller will enlarge the files. Raises TooLarge before sampling if they would be too
    large. fingerprint: if earlier images are made again, the fingerprint of the engine that made them.
    """
    from tminus.service.images.encoder import PNG, ZIP, encode_result, sheet_grid

    job = LocalJob.of(options, parameters, fingerprint)
    spec, info = job.spec, job.loaded.engine.info
    rows, columns = sheet_grid(spec.n if sheet else 1)
    check_enlarged(rows * info.height_px, columns * info.width_px, scale)
    images = job.run()
    if sheet:
        return {"sheet": encode_result(PNG, spec, images, info)}, spec
    with zipfile.ZipFile(io.BytesIO(encode_result(ZIP, spec, images, info))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}, spec


@contextmanager
def server_at(url: str, model: str | None = None) -> "Iterator[Client]":
    """Connect to a model of a server, with the key in TMINUS_KEY. Exits with 1 on an error."""
    from tminus.service.client import Client

    with one_line_of_server(url), Client(url, model=model, key=key_of_server()) as client:
        yield client


def key_of_server() -> str | None:
    """Return the API key in the environment variable TMINUS_KEY, or None."""
    return os.environ.get(KEY) or None


@contextmanager
def one_line_of_server(url: str) -> Iterator[None]:
    """Turn a ClientError of the `with` block into one line of output with advice, and exit with 1."""
    from tminus.service.client import ClientError, Problem, Unreachable

    try:
        yield
    except ClientError as error:
        advice = ""
        if isinstance(error, Problem) and error.status == 401:
            unset = "" if key_of_server() else ", which is not set"
            advice = f"; commands send the key in the variable {KEY}{unset}"
        elif isinstance(error, Unreachable) and not error.reached:
            advice = "; is a server running there? tminus serve starts one"
        fail(f"{url}: {error}{advice}")
    except (ValueError, RecursionError) as error:  # the URL, the model name, the key or the JSON is invalid
        fail(str(error))


def sample_from(url: str, model: str | None, parameters: dict[str, Any], media_type: "MediaType") -> "Sampled":
    """Sample on a server. Exits with 1 on an error or a wrong number of images."""
    from tminus.service.client import ClientError

    with server_at(url, model) as tminus:
        sampled = tminus.sample(accept=media_type, **parameters)
        if media_type == "application/zip" and len(sampled.files) != parameters["n"]:
            raise ClientError(f"{len(sampled.files)} images came, where {parameters['n']} were asked for")
        return sampled
