"""`tminus serve`: load a checkpoint and serve it over HTTP, by settings from flags and TMINUS_ variables."""

import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.service.cli.configuration import read_settings, settings_options
from tminus.service.cli.loading import read
from tminus.service.cli.output import fail, set_up_log
from tminus.service.cli.traces import start_traces
from tminus.service.library import Library, name_of
from tminus.service.model_info import max_edit_bytes

if TYPE_CHECKING:
    import socket

    from tminus.model.checkpoint import Checkpoint
    from tminus.service.app import Application
    from tminus.service.jobs.results import Results
    from tminus.service.jobs.store import JobStore
    from tminus.service.model_info import ModelInfo
    from tminus.service.settings import Settings

log = logging.getLogger(__name__)


@click.command()
@settings_options
def serve(config: Path | None, **flags: Any) -> None:
    """Load one or more checkpoints and serve them over HTTP."""
    settings = read_settings(config, flags)
    # While the model loads there is nothing to finish; and a process 1, as in a container, has no default action.
    signal.signal(signal.SIGTERM, lambda _signum, _frame: sys.exit(0))
    set_up_log(settings.log_level.upper(), "%(asctime)s %(levelname)s %(name)s %(message)s", settings.log_format)
    tracer = start_traces(settings.traces)

    from tminus.model.checkpoint import Checkpoint
    from tminus.service.app import create_app
    from tminus.service.engine.loading import Measured, prepare_engine, read_checkpoint
    from tminus.service.engine.memory import release_memory
    from tminus.service.metrics_server import serve_metrics
    from tminus.service.parts import Prepared
    from tminus.service.server import serve as run_server

    # What can be found out at once is, before anything is measured.
    listener, for_metrics = listen(settings.host, settings.port), None
    if settings.metrics and settings.metrics_port is not None:
        for_metrics = listen(settings.metrics_host or settings.host, settings.metrics_port)
    try:
        access = settings.access(listener.getsockname()[0])
    except ValueError as error:
        listener.close()
        fail(str(error))
    models = read_models(settings)
    folders = {name: folder for name, _, folder in models}
    open_store, results = opener_of_stores(settings, listener), open_results(settings)
    stores: dict[str, JobStore] = {}
    try:
        for weights_hash in [checkpoint.weights_hash for _, checkpoint, _ in models]:
            stores[weights_hash] = open_store(weights_hash)
    except ValueError as error:
        fail(f"--state-dir (TMINUS_STATE_DIR): {error}")

    def take_store(weights_hash: str) -> "JobStore":
        """One that is open already, once; else it is opened."""
        return stores.pop(weights_hash, None) or open_store(weights_hash)

    measured: dict[str, Measured | None] = {}  # by the model's name

    def measure(name: str, checkpoint: Checkpoint, folder: Path, *, busy: bool = False) -> "Prepared":
        """Measure a model, and give it its name."""
        try:
            loaded = prepare_engine(checkpoint, settings.load_options(folder), measured.get(name), busy=busy)
        except Exception:
            release_memory()
            raise
        measured[name] = loaded.measured
        loaded.engine.info = replace(loaded.engine.info, name=name)
        log_model(loaded.engine.info)
        limits = settings.limits(loaded)
        return Prepared(loaded.engine, limits, settings.speed(loaded, limits.max_rows), release_memory)

    def read_and_measure(name: str, folder: Path) -> "Prepared":
        return measure(name, read_checkpoint(settings.load_options(folder)), folder, busy=True)

    def build() -> "Application":
        """Measure, and put the parts together. The app closes the stores."""
        try:
            first = []
            while models:  # which must not keep what is unloaded later
                first.append(measure(*models.pop(0)))
        except Exception:
            for store in stores.values():
                store.close()
            raise
        application = create_app(
            first,
            first[0].limits,
            take_store,
            settings.doors(),
            library=Library(folders, settings.models),
            prepare=read_and_measure,
            access=access,
            results=results,
            with_metrics=settings.metrics and for_metrics is None,
            with_docs=settings.docs,
            tracer=tracer,
        )
        if for_metrics is not None:
            serve_metrics(for_metrics, application.metrics)
        return application

    try:
        stopped_well = run_server(
            build,
            listener,
            grace_s=settings.grace_s,
            log_level=settings.log_level,
            max_connections=settings.max_connections,
            max_connections_per_address=settings.max_connections_per_address,
            max_message_bytes=max_edit_bytes(settings.max_body_bytes, settings.max_image_bytes),
        )
    except ValueError as error:
        fail(str(error))
    if not stopped_well:
        fail("the worker crashed; the log says why")


def opener_of_stores(settings: "Settings", listener: "socket.socket") -> Callable[[str], "JobStore"]:
    """What opens the store of some weights' durable jobs. A database that cannot be used ends in one line."""
    from tminus.service.jobs.opening import open_store

    if settings.job_store is None:
        return partial(open_store, settings.state_dir)
    try:
        from tminus.service.jobs.postgres import open_postgres, own_address
    except ModuleNotFoundError as error:
        fail(f"--job-store (TMINUS_JOB_STORE) needs the extra postgres: {error}; pip install 'tminus[postgres]'")
    try:
        url = settings.job_store.get_secret_value()
        address = settings.job_address or own_address(url, *listener.getsockname()[:2])
        return open_postgres(url, settings.job_namespace, settings.job_lease_s, address)
    except ValueError as error:
        fail(f"--job-store (TMINUS_JOB_STORE): {error}")


def open_results(settings: "Settings") -> "Results | None":
    """Where large results go, if not into the store. An object store that cannot be used ends in one line."""
    if settings.job_results is None:
        return None
    try:
        from tminus.service.jobs.objects import open_objects
    except ModuleNotFoundError as error:
        fail(f"--job-results (TMINUS_JOB_RESULTS) needs the extra s3: {error}; pip install 'tminus[s3]'")
    from tminus.service.jobs.results import Results

    try:
        objects = open_objects(settings.job_results, settings.job_namespace)
    except ValueError as error:
        fail(f"--job-results (TMINUS_JOB_RESULTS): {error}")
    return Results(objects, settings.job_results_above_kb * 1024)


def listen(host: str, port: int) -> "socket.socket":
    """Reserve an address; where that fails one clear line."""
    from tminus.service.server import bind

    try:
        return bind(host, port)
    except (OSError, UnicodeError) as error:
        fail(f"cannot listen on {host}:{port}: {error}")


def read_models(settings: "Settings") -> "list[tuple[str, Checkpoint, Path]]":
    """Read all checkpoints, with their names. What is wrong with one ends in one line."""
    try:
        folders = settings.checkpoints()
    except ValueError as error:
        fail(str(error))
    models: dict[str, tuple[str, Checkpoint, Path]] = {}
    for given, folder in folders:
        log.debug("loading %s", folder)
        checkpoint = read(settings.load_options(folder))
        name = given or name_of(checkpoint.name)
        for other, known, _ in models.values():
            if other == name:
                fail(f"two models are named {name}; give one another name: --checkpoint NAME={folder}")
            if known.weights_hash == checkpoint.weights_hash:
                fail(f"{name} has the weights of {other}; serve one of them")
        models[name] = name, checkpoint, folder
    return list(models.values())


def log_model(info: "ModelInfo") -> None:
    """Log what is served."""
    log.info(
        "serving %s (%.2f M parameters, %dx%d) on %s, fingerprint %s",
        info.name, info.num_parameters / 1e6, info.height_px, info.width_px, info.device, info.fingerprint,
    )  # fmt: skip
