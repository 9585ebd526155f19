"""`serve` runs a server from settings. The functions that need torch import it themselves.

If a checkpoint, key or store is unusable, the command ends before the server listens. Once the server listens, a thread
measures the models. Until the models are measured, the server answers probes and refuses other requests with 503.
"""

import asyncio
import logging
import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import sqlalchemy as sa

from tminus.model.files import CheckpointError
from tminus.model.hub import HubId, checkpoint_folder
from tminus.service.access.access import Access
from tminus.service.api.request.classes import class_label_of
from tminus.service.errors import StorageFailed
from tminus.service.jobs.crash_report import CrashFile, CrashReport, log_crash_reports, prefix_of, take_crash_reports
from tminus.service.jobs.store.async_store import Results, Stores
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import listed
from tminus.service.jobs.store.sqlite_store import open_store, state_folder
from tminus.service.jobs.webhooks.deliverer import Rules
from tminus.service.jobs.webhooks.sender import read_secrets, read_secrets_of
from tminus.service.model_info import ModelInfo
from tminus.service.startup.app import VERSION, Application, create_app
from tminus.service.startup.loader import ModelLoader
from tminus.service.startup.models import Prepared, ServedModels, UnloadedModel
from tminus.service.startup.server import (
    BACKLOG,
    SWITCH_S,
    Opening,
    Server,
    allow_connections,
    config_of,
    is_ready,
    listen,
    serve_metrics,
)
from tminus.service.startup.settings import Library, Settings, name_of, named, variable_of
from tminus.service.startup.traces import start_traces
from tminus.service.threads import LOADING, in_daemon_thread, started_pool
from tminus.service.worker.worker import Worker

if TYPE_CHECKING:
    from tminus.service.engine.loading import Measured, ReadModel
    from tminus.service.startup.telemetry import Traces

log = logging.getLogger(__name__)

COMMAND_SETTINGS = ("config", "key", "pull_from")  # TMINUS_ variables that commands read, besides those of Settings
# Variables that Docker and Kubernetes set for a service named tminus or tminus-….
LINK = re.compile(r"TMINUS_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
LINK_VALUE = re.compile(r"(tcp|udp|sctp)://.+:\d+")
GIB = 2**30
NO_END_FILE = "if a job ends this process, it will not be known which: %s"


def serve(settings: Settings) -> bool:
    """Serve until SIGTERM or SIGINT. Return False if the worker crashed. Raises ValueError for an unusable setting."""
    # Before listening, do everything that can fail without measuring a model.
    traces = start_traces(VERSION)
    settings = settings.model_copy(update={"max_connections": allow_connections(settings.max_connections)})
    listener = listen(settings.host, settings.port)
    try:
        metrics_listener = None
        if settings.metrics_port is not None:
            metrics_listener = listen(settings.host, settings.metrics_port)
        opened = open_all(settings, listener.getsockname()[:2])
    except ValueError:
        listener.close()
        raise
    # The worker needs the GIL briefly after each pass, so limit how long other threads may hold the GIL.
    sys.setswitchinterval(SWITCH_S)
    opening = Opening()
    server = Server(config_of(settings, opening), opening, settings.grace_s)
    # These handlers act until uvicorn installs its own. They also catch the signal that uvicorn raises again after it
    # has stopped. That signal must have no effect, because a stop by a signal is not a failure.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda _signum, _frame: server.end())
    if metrics_listener is not None:
        serve_metrics(metrics_listener, opening, settings.allowed_sites())
    listener.listen(BACKLOG)  # from now on, clients wait instead of being refused
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("listening on %s", url)
    if ip_address(host).is_unspecified:  # some browsers cannot open 0.0.0.0
        url = f"http://localhost:{port}"

    build = partial(measure_and_build, opened, traces, opening)
    asyncio.run(_run(server, opening, listener, build, url))
    # Ignore signals from now on: the exiting interpreter removes Python's handlers, and a signal would then kill the
    # process.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)

    served = opening.application.served if opening.application is not None else None
    worker = served.worker if served is not None else None
    loading = any(thread.name == LOADING and thread.is_alive() for thread in threading.enumerate())
    code = 1 if worker is not None and (worker.state.hangs or worker.state.crashed or worker.state.stall) else 0
    if served is None or worker is None or worker.state.hangs or served.codes_images or loading:
        # A normal exit would wait for a thread that is measuring or hangs. Such a thread cannot be stopped.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    return not worker.state.crashed


async def _run(
    server: Server, opening: Opening, listener: socket.socket, build: Callable[[], Application], url: str
) -> None:
    """Listen, build the application, and serve it until its worker ends. Raises the errors of `build`."""
    asyncio.get_running_loop().set_default_executor(started_pool(min(32, (os.cpu_count() or 1) + 4), "asyncio"))
    serving = asyncio.create_task(server.serve([listener]))
    building = asyncio.create_task(in_daemon_thread(build, LOADING))
    await asyncio.wait((serving, building), return_when=asyncio.FIRST_COMPLETED)
    try:
        if not building.done():  # a signal stopped the server first
            building.cancel()
            return
        application = building.result()
        async with application.app.router.lifespan_context(application.app):
            opening.application = application
            worker, model = application.served.worker, application.served.models.default.model
            ended = asyncio.create_task(in_daemon_thread(worker.join, "tminus-watch"))
            ended.add_done_callback(lambda _: server.end())
            ready_line = asyncio.create_task(_log_when_ready(worker, url, model))
            await serving
            ready_line.cancel()
    finally:
        server.end()
        await serving


async def _log_when_ready(worker: Worker, url: str, model: ModelInfo) -> None:
    if await is_ready(worker):
        log.info("ready: open %s in a browser. By default: %s. %s", url, model.recommended, first_request(url, model))


def first_request(url: str, model: ModelInfo) -> str:
    """Return a curl command for a first request to this model."""
    query: dict[str, object] = {"n": 8}
    if model.conditional and model.null_class is None:  # every image needs a class
        query["class_label"] = class_label_of(0, model.class_names)
    return f"Try: curl -X POST '{url}/sample?{urlencode(query)}' -o out.png"


# --- before the measurement ---


@dataclass(frozen=True, slots=True)
class Opened:
    """The parts of a server that can be opened before the models are measured."""

    settings: Settings
    access: Access
    models: "list[ReadModel]"  # loaded at startup; the default model comes first
    unloaded: list[UnloadedModel]  # each is loaded by its first request
    stores: Stores
    webhooks: Rules | None
    crash_file_place: tuple[Path, str] | None  # folder and prefix of the crash file


def open_all(settings: Settings, address: tuple[str, int]) -> Opened:
    """Read the keys and the checkpoints, and open the stores.

    Raises ValueError if any of them is unusable. address: the server's own host and port.
    """
    if unknown := unknown_variables(settings):
        log.warning("variables that are no settings are ignored: %s", ", ".join(unknown))
    access = settings.access(address[0])
    models, unloaded = read_models(settings)
    open_store, results, webhooks = opener_of_stores(settings, address), open_results(settings), webhook_rules(settings)
    first: dict[str, JobStore] = {}
    with about("job_store" if settings.job_store is not None else "state_dir"), ExitStack() as opened:
        for weights_hash in [each.weights_hash for each in models] + [each.info.weights_hash for each in unloaded]:
            first[weights_hash] = opened.enter_context(closing(open_store(weights_hash)))
        opened.pop_all()  # all stores were opened, so do not close them
    crash_file_place, crash_reports = read_crash_reports(settings, models[0].folder)
    log_crash_reports(crash_reports)
    stores = Stores(open_store, results, first, crash_reports)
    with suppress(StorageFailed):
        for weights, job_ids in first[models[0].weights_hash].left_behind(first).items():
            log.warning(
                "%d durable jobs wait for a start with the weights %s: %s", len(job_ids), weights, listed(job_ids)
            )
    return Opened(settings, access, models, unloaded, stores, webhooks, crash_file_place)


def unknown_variables(settings: Settings) -> list[str]:
    """Return the environment variables that begin with TMINUS_ but are not settings."""
    known = {variable_of(name) for name in (*type(settings).model_fields, *COMMAND_SETTINGS)}
    return sorted(
        name
        for name, value in os.environ.items()
        if name.startswith("TMINUS_")
        and name not in known
        and not (LINK.fullmatch(name) or LINK_VALUE.fullmatch(value))
    )


@contextmanager
def about(setting: str, extra: str = "") -> Iterator[None]:
    """Raise ValueErrors of the `with` block again, with the setting's name.

    If a module is missing, raise a ValueError that names the extra to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{named(setting)} needs the extra {extra}: {error}; pip install '.[{extra}]' in a checkout"
        ) from None
    except ValueError as error:
        raise ValueError(f"{named(setting)}: {error}") from None


def read_models(settings: Settings) -> "tuple[list[ReadModel], list[UnloadedModel]]":
    """Read all checkpoints. Return the models in memory and the unloaded models.

    With --idle-unload, only the default model is in memory. Raises ValueError for an unusable checkpoint.
    """
    from tminus.service.engine.loading import ReadModel, describe, read_checkpoint, recommend_openvino

    recommend_openvino(settings.executor, settings.device)
    models: list[ReadModel] = []
    unloaded: list[UnloadedModel] = []
    hashes: dict[str, str] = {}  # hash of the weights, keyed by model name
    used_bytes, smallest = 0, (sys.maxsize, "")
    on_demand = settings.idle_unload is not None
    for number, (own_name, place) in enumerate(settings.checkpoints()):
        log.debug("loading %s", place)
        try:
            folder = checkpoint_folder(place) if isinstance(place, HubId) else place
            need_bytes = needed_bytes(settings, folder)
            if reason := room_lacking(settings, need_bytes, 0 if on_demand else used_bytes):
                if number < len(settings.checkpoint):
                    raise CheckpointError(f"{folder}: it {reason}")
                log.warning("%s is not loaded: it %s", own_name, reason)  # only models from --models may be skipped
                smallest = min(smallest, (need_bytes, str(own_name)))
                continue
            used_bytes += need_bytes
            checkpoint = read_checkpoint(settings.load_options(folder))
        except CheckpointError as error:
            raise ValueError(str(error)) from None
        name, weights_hash = own_name or name_of(checkpoint.name), checkpoint.weights_hash
        for other, other_hash in hashes.items():
            if other == name:
                raise ValueError(f"two models are named {name}; give one another name: --checkpoint NAME={folder}")
            if other_hash == weights_hash:
                raise ValueError(f"{name} has the weights of {other}; serve one of them")
        hashes[name] = weights_hash
        if on_demand and models:
            info, speed = describe(checkpoint, settings.load_options(folder))
            del checkpoint  # frees the weights
            limits = settings.limits(speed.max_rows, speed.policy.max_batch)
            unloaded.append(UnloadedModel(folder, replace(info, name=name), limits, speed))
        else:
            models.append(ReadModel(name, folder, checkpoint))
    if not models:
        need_bytes, name = smallest
        raise ValueError(
            f"{named('models_memory_gb')}: {settings.models_memory_gb:g} GiB, and the smallest of the models, "
            f"{name}, takes about {need_bytes / GIB:.2g}"
        )
    return models, unloaded


def needed_bytes(settings: Settings, folder: Path) -> int:
    """Return how many bytes a model needs, approximately; 0 without --models-memory-gb. Raises CheckpointError."""
    from tminus.service.engine.loading import serving_bytes

    return serving_bytes(folder) if settings.models_memory_gb is not None else 0


def room_lacking(settings: Settings, need_bytes: int, used_bytes: int) -> str | None:
    """Return why a model does not fit beside models that use `used_bytes`, or None if it fits."""
    if settings.models_memory_gb is None or need_bytes + used_bytes <= settings.models_memory_gb * GIB:
        return None
    left = settings.models_memory_gb - used_bytes / GIB
    return (
        f"takes about {need_bytes / GIB:.2f} GiB, and {max(0.0, left):.2f} of the {settings.models_memory_gb:g} GiB of "
        f"{named('models_memory_gb')} are left"
    )


def read_crash_reports(settings: Settings, folder: Path) -> tuple[tuple[Path, str] | None, list[CrashReport]]:
    """Return where this process writes its crash file, and the crash reports of earlier processes.

    The first value is a folder and a prefix of the file's name, or None without a state folder. folder: the default
    model's folder. The prefix depends on it, so that the next start finds the file even after a reload.
    """
    store = ""
    if settings.job_store is not None:
        parsed = sa.make_url(settings.job_store.get_secret_value())
        store = parsed.set(password=None).render_as_string()
    prefix = prefix_of(store, settings.job_namespace, str(folder.absolute()))
    try:
        if (state := state_folder(settings.state_dir)) is not None:
            return (state, prefix), take_crash_reports(state, prefix)
    except ValueError as error:  # the server can run without a state folder
        log.warning(NO_END_FILE, error)
    return None, []


def opener_of_stores(settings: Settings, address: tuple[str, int]) -> Callable[[str], JobStore]:
    """Return a function that opens the store for a weights hash. Raises ValueError for an unusable database."""
    if settings.job_store is None:
        return partial(open_store, settings.state_dir)
    with about("job_store", "postgres"):
        from tminus.service.jobs.store.postgres_store import open_postgres, own_address

        url = settings.job_store.get_secret_value()
        reached_by = settings.job_address or own_address(url, *address)
        return open_postgres(url, settings.job_namespace, settings.job_lease_s, reached_by)


def open_results(settings: Settings) -> Results | None:
    """Open the object store for large results, if there is one. Raises ValueError if it is unusable."""
    if settings.job_results is None:
        return None
    with about("job_results", "s3"):
        from tminus.service.jobs.store.objects import open_objects

        return Results(open_objects(settings.job_results, settings.job_namespace))


def webhook_rules(settings: Settings) -> Rules | None:
    """Return the rules for sending webhooks, or None if no secret is set.

    Raises ValueError for an invalid secret, and for certificates that cannot be read.
    """
    text, file = settings.webhook_secret, settings.webhook_secret_file
    if text is not None and file is not None:
        raise ValueError(f"{named('webhook_secret')} and {named('webhook_secret_file')} exclude each other")
    if text is not None:
        with about("webhook_secret"):
            secrets = read_secrets(text.get_secret_value())
    elif file is not None:
        with about("webhook_secret_file"):
            secrets = read_secrets_of(file)
    else:
        return None
    try:
        return Rules.of(secrets, settings.webhook_allow)
    except OSError as error:
        raise ValueError(f"SSL_CERT_FILE: the certificates for webhooks cannot be read: {error}") from None


# --- measuring ---


class Preparer:
    """Reads checkpoints and measures models. Keeps the measurements, so no network is measured twice."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._measured: dict[str, Measured] = {}  # keyed by model name

    def load(self, name: str, folder: Path) -> Prepared:
        """Read a folder, and measure its model while other models are served."""
        from tminus.service.engine.loading import ReadModel, read_checkpoint

        options = self._settings.load_options(folder)
        return self.measure(ReadModel(name, folder, read_checkpoint(options)), busy=True)

    def room_lacking(self, folder: Path, used_bytes: int) -> str | None:
        """Return why a model does not fit, or None if it fits. Raises CheckpointError."""
        from tminus.service.engine.loading import memory_lacking

        return room_lacking(self._settings, needed_bytes(self._settings, folder), used_bytes) or memory_lacking(folder)

    def measure(
        self, model: "ReadModel", *, busy: bool = False, progress: Callable[[str, float | None], None] = lambda *_: None
    ) -> Prepared:
        """Measure a model. busy: True if other models are being served.

        progress: called with the name of the current measurement and the approximate seconds left.
        """
        from tminus.service.engine.devices import release_memory
        from tminus.service.engine.loading import prepare_engine

        memory_bytes = needed_bytes(self._settings, model.folder)
        try:
            options, known = self._settings.load_options(model.folder), list(self._measured.values())
            loaded = prepare_engine(model.checkpoint, options, known, busy=busy, progress=progress)
        except Exception as error:
            del model
            traceback.clear_frames(error.__traceback__)  # variables in the traceback's frames refer to the model
            release_memory()
            raise
        if loaded.measured is not None:
            self._measured[model.name] = loaded.measured
        info = loaded.engine.info = replace(loaded.engine.info, name=model.name)
        log.info(
            "serving %s (%.2f M parameters, %dx%d) on %s, fingerprint %s",
            info.name, info.num_parameters / 1e6, info.height_px, info.width_px, info.device, info.fingerprint,
        )  # fmt: skip
        speed = loaded.speed
        limits = self._settings.limits(speed.max_rows, speed.policy.max_batch)
        del model
        release_memory()  # frees the network if the executor has its own copy
        return Prepared(
            loaded.engine, limits, speed, release_memory, loaded.spare_work, memory_bytes, loaded.measure_again
        )


def measure_and_build(opened: Opened, traces: "Traces | None", opening: Opening) -> Application:
    """Measure the models and build the app.

    The app closes the stores. Raises the errors of the measurement. opening: shows the progress to clients.
    """
    settings, preparer = opened.settings, Preparer(opened.settings)
    named = {model.name: model.folder for model in opened.models}
    named |= {model.info.name: model.folder for model in opened.unloaded}
    library = Library(named, settings.models)
    first = []
    try:
        while opened.models:  # pop each model, so that the list does not keep it in memory
            name = opened.models[0].name
            first.append(preparer.measure(opened.models.pop(0), progress=partial(opening.report, name)))
    except Exception:
        opened.stores.close()
        raise
    crash_file = None
    try:
        if opened.crash_file_place is not None:
            crash_file = CrashFile(*opened.crash_file_place)
    except OSError as error:
        log.warning(NO_END_FILE, error)
    served = ServedModels(
        first,
        opened.stores,
        settings.allowed_sites(),
        opened.access,
        webhooks=opened.webhooks,
        crash_file=crash_file,
        unloaded=opened.unloaded,
    )
    loader = ModelLoader(served, library, preparer.load, preparer.room_lacking, settings.idle_unload_s)
    app = create_app(served, loader, with_metrics=settings.metrics_port is None, traces=traces)
    return Application(app, served)
