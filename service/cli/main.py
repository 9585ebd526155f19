"""The `tminus` command: serve and sample. The rest is in the other cli_ files; nothing else prints or exits."""

import base64
import io
import logging
import signal
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from pydantic import ValidationError

from service.settings import Settings

if TYPE_CHECKING:
    from service.client import Client, Sampled
    from service.client.results import MediaType
    from service.engine.loading import Loaded

DEFAULT_CHECKPOINT = Path("checkpoints/fashion-mnist-32")
MAX_LOCAL_N = 4096
MAX_LOCAL_IMAGE_BYTES = 2**30
FILE_TYPE = click.Path(dir_okay=False, path_type=Path)
CHECKPOINT_TYPE = click.Path(file_okay=False, path_type=Path)


@click.group(context_settings={"show_default": True, "max_content_width": 120})
@click.version_option(package_name="tminus")
def main() -> None:
    """Serve, sample, train and evaluate denoising diffusion U-Nets."""


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of Settings; left out, its variable or default holds."""
    for name, field in reversed(Settings.model_fields.items()):
        flag = f"--{name.replace('_', '-')}"
        if field.annotation == bool | None:
            flag += f"/--no-{name.replace('_', '-')}"
        default = f"[default: {field.default}]" if field.default is not None else ""
        text = f"{field.description} {default} [env: TMINUS_{name.upper()}]"
        command = click.option(flag, name, default=None, help=text, show_default=False)(command)
    return command


@main.command()
@settings_options
def serve(**flags: Any) -> None:
    """Load a checkpoint and serve it over HTTP."""
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        fail(f"--{name.replace('_', '-')} (TMINUS_{name.upper()}): {first['msg']}, got {first['input']!r}")
    # While the model loads there is nothing to finish; and a process 1, as in a container, has no default action.
    signal.signal(signal.SIGTERM, lambda _signum, _frame: sys.exit(0))
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")

    log = logging.getLogger(__name__)
    log.debug("loading %s", settings.checkpoint)

    from service.app import create_app
    from service.jobs.sqlite_store import open_store
    from service.model_info import Limits
    from service.scheduling.scheduler import Sharing
    from service.server import bind
    from service.server import serve as run_server

    try:
        listener = bind(settings.host, settings.port)
    except (OSError, UnicodeError) as error:
        fail(f"cannot listen on {settings.host}:{settings.port}: {error}")
    loaded = load(
        checkpoint=settings.checkpoint,
        device=settings.device,
        executor=settings.executor,
        precision=settings.precision,
        exact=settings.exact,
        threads=settings.threads,
        max_batch=settings.max_batch,
        short_batch=settings.short_batch,
        max_rows=settings.max_rows,
        max_jobs=settings.max_jobs,
        cache_dir=settings.cache_dir,
    )
    limits = Limits(
        max_n=min(settings.max_n, loaded.max_rows),
        max_batch=loaded.max_batch,
        max_rows=loaded.max_rows,
        max_jobs=settings.max_jobs,
        max_backlog_s=settings.max_backlog_s,
        max_body_bytes=settings.max_body_bytes,
        max_image_bytes=settings.max_image_bytes,
        result_cache_bytes=settings.result_cache_mb * 2**20,
        max_streams=settings.max_connections // 2,
        max_streams_per_address=settings.max_streams_per_address,
        keep_jobs_s=settings.keep_jobs_s,
        keep_jobs_bytes=settings.keep_jobs_mb * 2**20,
    )
    try:
        store = open_store(settings.state_dir, loaded.engine.info.weights_hash)
    except ValueError as error:
        fail(f"--state-dir (TMINUS_STATE_DIR): {error}")
    sharing = Sharing.of(loaded.max_batch, policy=settings.policy, short_batch=loaded.short_batch)
    origins = frozenset(origin.strip().lower() for origin in settings.allowed_origins.split(",") if origin.strip())
    info = loaded.engine.info
    log.info(
        "serving %s (%.2f M parameters, %dx%d) on %s, fingerprint %s",
        info.name, info.num_parameters / 1e6, info.height_px, info.width_px, info.device, info.fingerprint,
    )  # fmt: skip
    stopped_well = run_server(
        create_app(loaded.engine, limits, loaded.tick_times, sharing, store, origins),
        listener,
        grace_s=settings.grace_s,
        log_level=settings.log_level,
        max_connections=settings.max_connections,
        max_message_bytes=limits.max_edit_bytes,
    )
    if not stopped_well:
        fail("the worker crashed; the log says why")


@main.command()
@click.option("--url", help="ask this server instead of loading a checkpoint")
@click.option("--checkpoint", type=CHECKPOINT_TYPE, default=DEFAULT_CHECKPOINT)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out.png"), help=".png: a sheet; else a folder")
@click.option("-n", "--n", type=click.IntRange(1, MAX_LOCAL_N), default=1, help="how many images")
@click.option("--steps", help="denoising steps  [default: T]")
@click.option("--sampler", help="ddpm, ddim or dpmpp_2m  [default: the checkpoint's]")
@click.option("--eta", help="noise of ddim, 0..1")
@click.option("--seed", help="0..2^64-1; drawn if absent")
@click.option("--index", help="index of the first image")
@click.option("--class-label", multiple=True, help="number or name; repeat it for one an image")
@click.option("--guidance", help="classifier-free guidance scale; 1 is off")
@click.option("--clip/--no-clip", default=None, help="clip x_0  [default: the checkpoint's]")
@click.option("--guidance-interval", type=int, nargs=2, help="lowest and highest timestep that is guided")
@click.option("--timestep-spacing", help="leading, trailing, linspace or karras")
@click.option("--image", type=FILE_TYPE, help="a picture to start from (--strength) or to keep a part of (--mask)")
@click.option("--mask", type=FILE_TYPE, help="a picture, white where the other is to be made new")
@click.option("--strength", help="how much of the way from noise is run again from the picture, above 0, at most 1")
@click.option("--executor", default="auto", help="auto, eager, compile or openvino; not with --url")
@click.option("--precision", default="auto", help="auto, float32 or bfloat16; not with --url")
@click.option("--watch", type=click.Path(path_type=Path), help="with --url: keep the way there as .webp or .gif")
@click.option("--every", type=click.IntRange(1), help="steps between its frames  [default: a hundredth of them]")
@click.option("--show", type=click.Choice(["x_t", "x_0"]), help="the latent, or the network's guess  [default: x_t]")
def sample(
    url: str | None,
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
    parameters = {name: value for name, value in given.items() if value not in (None, ())} | pictures(image, mask)
    if interval := parameters.pop("guidance_interval", None):
        parameters["guidance_interval"] = list(interval)
    if labels := parameters.pop("class_label", None):
        parameters["class_label"] = list(labels) if len(labels) > 1 else labels[0]
    sheet = out.suffix.lower() == ".png"
    if watch is not None and url is None:
        fail("--watch needs --url: a server to look at")
    if watch is None and (every is not None or show is not None):
        fail("--every and --show need --watch: a file for the frames")
    try:
        (out.parent if sheet else out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out}: {error}")
    if url is None:
        files, seed = offline(Running(checkpoint, device, executor, precision), parameters, sheet)
    elif watch is None:
        files, seed = _from_server(url, parameters, sheet)
    else:
        from service.cli.watch import follow, write_animation

        files, seed, frames = follow(url, parameters, sheet, watch, every, show or "x_t")
    try:
        for name, data in files.items():
            (out if sheet else out / name).write_bytes(data)
    except OSError as error:
        fail(f"--out {out}: {error}")
    click.echo(f"{out}: {given['n']} image(s), seed {seed}")
    if watch is not None:
        write_animation(watch, frames)


def pictures(image: Path | None, mask: Path | None) -> dict[str, str]:
    """The parameters image and mask, in base64; one clear line and exit code 1 where a file cannot be read."""
    parameters = {}
    for name, file in (("image", image), ("mask", mask)):
        if file is not None:
            try:
                parameters[name] = base64.b64encode(file.read_bytes()).decode("ascii")
            except OSError as error:
                fail(f"--{name} {file}: {error}")
    return parameters


@dataclass(frozen=True, slots=True)
class Running:
    """How a command runs a model in its own process."""

    checkpoint: Path
    device: str
    executor: str
    precision: str

    def engine(self, n: int) -> "Loaded":
        """Load for one job of n rows: as the server does that is told nothing else, so that the bits are the same."""
        return load(
            checkpoint=self.checkpoint,
            device=self.device,
            executor=self.executor,
            precision=self.precision,
            max_rows=n,
        )


def offline(running: Running, parameters: dict[str, Any], sheet: bool) -> tuple[dict[str, bytes], int]:
    """Sample in this process: PNG files by name, and the seed."""
    from tqdm import tqdm

    from service.api.schemas import SampleRequest
    from service.engine.local import sample_locally
    from service.errors import ServiceError
    from service.images.decoder import decode_inputs
    from service.images.encoder import PNG, ZIP, encode_result
    from service.model_info import Limits

    n = parameters["n"]
    loaded = running.engine(n)
    model, batch = loaded.engine.info, loaded.max_batch
    limits = Limits(
        max_n=n,
        max_batch=batch,
        max_rows=n,
        max_jobs=1,
        max_backlog_s=float("inf"),
        max_body_bytes=0,
        max_image_bytes=MAX_LOCAL_IMAGE_BYTES,
    )
    try:
        asked = SampleRequest.parse(parameters, model, limits)
        spec = asked.to_spec(model, limits)
        inputs = decode_inputs(asked.image, asked.mask, model) if asked.image is not None else None
        spec = asked.with_inputs(spec, inputs)
        with tqdm(total=spec.n * spec.num_steps, unit="row-step", dynamic_ncols=True) as progress:
            images = sample_locally(loaded.engine, spec, batch, progress.update, inputs)
    except (ValueError, ServiceError) as error:
        fail(str(error))
    if sheet:
        return {"sheet": encode_result(PNG, spec, images, model)}, spec.seed
    with zipfile.ZipFile(io.BytesIO(encode_result(ZIP, spec, images, model))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}, spec.seed


def _from_server(url: str, parameters: dict[str, Any], sheet: bool) -> tuple[dict[str, bytes], int]:
    sampled = sample_from(url, parameters, "image/png" if sheet else "application/zip")
    return {"sheet": sampled.data} if sheet else sampled.files, sampled.seed


def sample_from(url: str, parameters: dict[str, Any], media_type: "MediaType") -> "Sampled":
    """Ask a server; one clear line and exit code 1 where it does not answer with images."""
    from service.client import ClientError

    try:
        with client_of(url) as tminus:
            return tminus.sample(accept=media_type, **parameters)
    except ClientError as error:
        fail(f"{url}: {error}")


def client_of(url: str) -> "Client":
    """A client of the server that --url names; one clear line and exit code 1 where it names none."""
    from service.client import Client

    try:
        return Client(url)
    except ValueError as error:
        fail(str(error))


def load(**options: Any) -> "Loaded":
    """Load an engine; one clear line and exit code 1 if it cannot be had."""
    from model.checkpoint import CheckpointError
    from service.engine.loading import LoadOptions, load_engine

    try:
        return load_engine(LoadOptions(**options))
    except (CheckpointError, ValueError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Print one line to stderr and exit with 1."""
    click.echo(f"tminus: {message}", err=True)
    sys.exit(1)
