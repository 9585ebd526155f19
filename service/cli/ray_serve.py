"""`tminus ray serve`: replicas of the server on a Ray cluster, for as long as the command runs."""

import logging
import os
import re
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from tminus.service.cli.configuration import options_of, settings_of
from tminus.service.cli.output import fail
from tminus.service.cli.serve import listen
from tminus.service.logs import SERVER_FORM, set_up_log
from tminus.service.ray_serve.settings import RaySettings

log = logging.getLogger(__name__)

LOOK_S = 5.0  # how often it is looked whether the replicas are still there
# Ray tells its makers nothing of how it is used, and leaves out no line of a replica that is like one of another.
QUIET_AND_WHOLE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
CONTROLLER = "SERVE_CONTROLLER_ACTOR"


@click.group()
def ray() -> None:
    """Serve from a Ray cluster."""


@ray.command()
@options_of(RaySettings)
def serve(config: Path | None, **flags: Any) -> None:
    """Serve from replicas on a Ray cluster; Ray routes to them, adds and drains them by their predicted work.

    Needs the extra `ray`. A cluster that runs is joined, else one is started on this machine. When the command ends,
    the replicas drain, and a cluster that it has started ends.
    """
    settings, _ = settings_of(RaySettings, config, flags)
    for signum in (signal.SIGTERM, signal.SIGINT):  # until something runs that has to end well
        signal.signal(signum, lambda _signum, _frame: sys.exit(0))
    set_up_log(settings.log_level.upper(), SERVER_FORM, settings.log_format)
    for name, value in QUIET_AND_WHOLE.items():  # read as Ray is imported
        os.environ.setdefault(name, value)
    try:
        import ray as library
        from ray.util import list_named_actors
    except ModuleNotFoundError as error:
        fail(f"`tminus ray` needs the extra ray: {error}; pip install 'tminus[ray]'")
    host = _check(settings)
    try:
        library.init(address=settings.ray_address, include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"no Ray cluster can be joined or started (--ray-address, TMINUS_RAY_ADDRESS): {error}")
    try:
        port = settings.port
        if all(actor["name"] != CONTROLLER for actor in list_named_actors(all_namespaces=True)):
            with listen(settings.host, settings.port) as listener:  # while nothing of Ray's does
                port = listener.getsockname()[1]
        _run(settings, host, port)
    finally:
        with suppress(Exception):
            library.shutdown()


def _check(settings: RaySettings) -> str:
    """The numeric address to listen on. What can be seen to be wrong here ends in one line."""
    with listen(settings.host, 0) as listener:
        host = str(listener.getsockname()[0])
    try:
        settings.access(host)
        settings.checkpoints()
    except ValueError as error:
        fail(str(error))
    return host


def _run(settings: RaySettings, host: str, port: int) -> None:
    """Start the replicas, wait for a signal, and let them drain."""
    from ray import serve as ray_serve

    from tminus.service.ray_serve.app import NAME, app

    try:
        ray_serve.start(http_options={"host": host, "port": port})
        ray_serve.run(app(settings), name=NAME)
    except RuntimeError as error:
        application = ray_serve.status().applications.get(NAME)
        said = "".join(each.message for each in application.deployments.values()) if application is not None else ""
        with suppress(Exception):
            ray_serve.delete(NAME)
        fail(f"the replicas cannot start: {last_line(said) or error}")
    stopped = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda _signum, _frame: stopped.set())
    log.info(
        "listening on http://%s:%d, with %d to %d replicas",
        f"[{host}]" if ":" in host else host, port, settings.min_replicas, settings.most_replicas,
    )  # fmt: skip
    while not stopped.wait(LOOK_S):
        if NAME not in ray_serve.status().applications:
            fail("the application is on the Ray cluster no more")
    log.info("the replicas drain")
    ray_serve.delete(NAME)


def last_line(text: str) -> str:
    """What a traceback ends in, without the kind of the error; empty where there is nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^[\w.]*(Error|Exception): ", "", lines[-1]) if lines else ""
