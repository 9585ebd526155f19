"""From settings to an application: read the checkpoints, open the stores, measure, put the parts together.

torch is imported when the functions run.
"""

import logging
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tminus.model.files import CheckpointError
from tminus.service.access.access import Access
from tminus.service.errors import StorageFailed
from tminus.service.jobs.process_end import End, EndFile, count_ends, prefix_of, take_ends, tell_ends
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import listed
from tminus.service.jobs.store.results import Results
from tminus.service.jobs.store.sqlite_store import open_store, state_folder
from tminus.service.jobs.webhooks.deliverer import Rules
from tminus.service.jobs.webhooks.sender import read_secrets, read_secrets_of
from tminus.service.model_info import ModelInfo
from tminus.service.startup.app import Application, create_app
from tminus.service.startup.library import Library, name_of
from tminus.service.startup.parts import Prepared
from tminus.service.startup.settings import Settings

if TYPE_CHECKING:
    from tminus.service.engine.loading import Measured, ReadModel
    from tminus.service.startup.telemetry import Traces

log = logging.getLogger(__name__)

UNTOLD = "if a job ends this process, it will not be known which: %s"


def prepare(
    settings: Settings, address: tuple[str, int], access: Access, traces: "Traces | None", *, with_metrics: bool
) -> Callable[[], Application]:
    """Read the checkpoints and open the stores; return what measures, and puts the parts together.

    address: where the server listens. access: who may ask. with_metrics: whether /metrics is answered. Raises
    ValueError for what cannot be used; so may what is returned. The app closes the stores.
    """
    models = read_models(settings)
    folders = {model.name: model.folder for model in models}
    open_one, results = opener_of_stores(settings, address), open_results(settings)
    webhooks = webhook_rules(settings)
    stores: dict[str, JobStore] = {}
    try:
        for weights_hash in [model.checkpoint.weights_hash for model in models]:
            stores[weights_hash] = open_one(weights_hash)
    except ValueError as error:
        for store in stores.values():
            store.close()
        setting = "--state-dir (TMINUS_STATE_DIR)" if settings.job_store is None else "--job-store (TMINUS_JOB_STORE)"
        raise ValueError(f"{setting}: {error}") from None
    place, ends = look_at_ends(settings, models[0].folder)
    tell_ends(ends)
    counted = set(stores)  # by the hash of their weights: an end that is counted twice would count as two
    for store in stores.values():
        count_ends(ends, store)
    tell_left_behind(stores)

    def take_store(weights_hash: str) -> JobStore:
        """One that is open already, once; else it is opened."""
        if (store := stores.pop(weights_hash, None)) is None:
            store = open_one(weights_hash)
            if weights_hash not in counted:
                counted.add(weights_hash)
                count_ends(ends, store)
        return store

    measured: dict[str, Measured | None] = {}  # by the model's name

    def measure(model: "ReadModel", *, busy: bool = False) -> Prepared:
        """Measure a model, and give it its name."""
        from tminus.service.engine.devices import release_memory
        from tminus.service.engine.loading import prepare_engine

        try:
            options = settings.load_options(model.folder)
            loaded = prepare_engine(model.checkpoint, options, measured.get(model.name), busy=busy)
        except Exception as error:
            del model
            traceback.clear_frames(error.__traceback__)  # whose variables hold it too
            release_memory()
            raise
        measured[model.name] = loaded.measured
        loaded.engine.info = replace(loaded.engine.info, name=model.name)
        log_model(loaded.engine.info)
        limits = settings.limits(loaded)
        return Prepared(loaded.engine, limits, settings.speed(loaded, limits.max_rows), release_memory)

    def read_and_measure(name: str, folder: Path) -> Prepared:
        from tminus.service.engine.loading import ReadModel, read_checkpoint

        return measure(ReadModel(name, folder, read_checkpoint(settings.load_options(folder))), busy=True)

    def build() -> Application:
        try:
            first = []
            while models:  # which must not keep what is unloaded later
                first.append(measure(models.pop(0)))
        except Exception:
            for store in stores.values():
                store.close()
            raise
        try:
            end_file = EndFile(*place) if place is not None else None
        except OSError as error:
            log.warning(UNTOLD, error)
            end_file = None
        return create_app(
            first,
            first[0].limits,
            take_store,
            settings.doors(),
            library=Library(folders, settings.models),
            prepare=read_and_measure,
            access=access,
            results=results,
            webhooks=webhooks,
            with_metrics=with_metrics,
            with_docs=settings.docs,
            traces=traces,
            end_file=end_file,
        )

    return build


def look_at_ends(settings: Settings, folder: Path) -> tuple[tuple[Path, str] | None, list[End]]:
    """Read how servers before this one ended; return also where this one has its file, and how the name begins.

    folder: of the default model. By it the file is found again, whatever is loaded or reloaded meanwhile.
    """
    store = ""
    if settings.job_store is not None:
        parsed = sa.make_url(settings.job_store.get_secret_value())
        store = parsed.set(password=None).render_as_string()
    prefix = prefix_of(store, settings.job_namespace, str(folder.absolute()))
    try:
        if (state := state_folder(settings.state_dir)) is not None:
            return (state, prefix), take_ends(state, prefix)
    except ValueError as error:  # without a file in it a server needs no folder
        log.warning(UNTOLD, error)
    return None, []


def opener_of_stores(settings: Settings, address: tuple[str, int]) -> Callable[[str], JobStore]:
    """What opens the store of some weights' durable jobs. Raises ValueError for a database that cannot be used."""
    if settings.job_store is None:
        return partial(open_store, settings.state_dir)
    try:
        from tminus.service.jobs.store.postgres_database import own_address
        from tminus.service.jobs.store.postgres_store import open_postgres
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--job-store (TMINUS_JOB_STORE) needs the extra postgres: {error}; pip install 'tminus[postgres]'"
        ) from None
    try:
        url = settings.job_store.get_secret_value()
        reached_by = settings.job_address or own_address(url, *address)
        return open_postgres(url, settings.job_namespace, settings.job_lease_s, reached_by)
    except ValueError as error:
        raise ValueError(f"--job-store (TMINUS_JOB_STORE): {error}") from None


def tell_left_behind(stores: Mapping[str, JobStore]) -> None:
    """Name in the log the jobs that wait for other weights than those that are served. stores: by hashes of these."""
    with suppress(StorageFailed):
        for weights, job_ids in next(iter(stores.values())).left_behind(stores).items():
            log.warning(
                "%d durable jobs wait for a start with the weights %s: %s", len(job_ids), weights, listed(job_ids)
            )


def open_results(settings: Settings) -> Results | None:
    """Where large results go, if not into the store. Raises ValueError for an object store that cannot be used."""
    if settings.job_results is None:
        return None
    try:
        from tminus.service.jobs.store.objects import open_objects
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--job-results (TMINUS_JOB_RESULTS) needs the extra s3: {error}; pip install 'tminus[s3]'"
        ) from None
    try:
        objects = open_objects(settings.job_results, settings.job_namespace)
    except ValueError as error:
        raise ValueError(f"--job-results (TMINUS_JOB_RESULTS): {error}") from None
    return Results(objects, settings.job_results_above_kb * 1024)


def webhook_rules(settings: Settings) -> Rules | None:
    """How webhooks are sent; None without a secret that signs them. Raises ValueError for one that is none."""
    given = settings.webhook_secret
    if given is not None and settings.webhook_secret_file is not None:
        raise ValueError(
            "--webhook-secret (TMINUS_WEBHOOK_SECRET) and --webhook-secret-file (TMINUS_WEBHOOK_SECRET_FILE) exclude "
            "each other"
        )
    try:
        if given is not None:
            secrets = read_secrets(given.get_secret_value())
        elif settings.webhook_secret_file is not None:
            secrets = read_secrets_of(settings.webhook_secret_file)
        else:
            return None
    except ValueError as error:
        name = "--webhook-secret-file" if given is None else "--webhook-secret"
        raise ValueError(f"{name} (TMINUS_{name[2:].replace('-', '_').upper()}): {error}") from None
    try:
        return Rules.of(secrets, settings.webhook_allow, settings.webhook_retry_s)
    except OSError as error:
        raise ValueError(f"SSL_CERT_FILE: the certificates for webhooks cannot be read: {error}") from None


def read_models(settings: Settings) -> "list[ReadModel]":
    """Read all checkpoints, with their names. Raises ValueError for what is wrong with one."""
    from tminus.service.engine.loading import ReadModel, read_checkpoint

    models: dict[str, ReadModel] = {}
    for given, folder in settings.checkpoints():
        log.debug("loading %s", folder)
        try:
            checkpoint = read_checkpoint(settings.load_options(folder))
        except CheckpointError as error:
            raise ValueError(str(error)) from None
        name = given or name_of(checkpoint.name)
        for other in models.values():
            if other.name == name:
                raise ValueError(f"two models are named {name}; give one another name: --checkpoint NAME={folder}")
            if other.checkpoint.weights_hash == checkpoint.weights_hash:
                raise ValueError(f"{name} has the weights of {other.name}; serve one of them")
        models[name] = ReadModel(name, folder, checkpoint)
    return list(models.values())


def log_model(info: ModelInfo) -> None:
    """Log what is served."""
    log.info(
        "serving %s (%.2f M parameters, %dx%d) on %s, fingerprint %s",
        info.name, info.num_parameters / 1e6, info.height_px, info.width_px, info.device, info.fingerprint,
    )  # fmt: skip
