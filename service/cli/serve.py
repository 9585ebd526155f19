"""`tminus serve` and `tminus ray serve`: serve models over HTTP."""

import logging
import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from tminus.service.cli.configuration import SettingsCommand, read_settings, settings_options
from tminus.service.cli.output import fail
from tminus.service.ray_serve.settings import RaySettings
from tminus.service.startup.logs import SERVER_FORM, set_up_log
from tminus.service.startup.settings import Settings

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 5.0  # seconds between checks that the application still exists
ENDING_INTERVAL_S = 0.2  # seconds between checks while the replicas are ending
SLACK_S = 15.0  # time for Ray Serve to notice which replicas have ended, and to kill the others
# Do not send usage statistics, and do not merge similar lines of the log.
QUIET_AND_WHOLE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
CONTROLLER = "SERVE_CONTROLLER_ACTOR"


@click.command(
    cls=SettingsCommand,
    short_help="Serve a model over HTTP, with a web page.",
    epilog="Exit codes: 0 stopped by SIGTERM or Ctrl-C; 1 it could not start, or the worker crashed; 2 wrong command "
    "line.",
)
@settings_options(Settings)
def serve(config: Path | None, **flags: Any) -> None:
    """Serve one or more checkpoints over HTTP, with a web page.

    \b
      tminus serve                             # the bundled model
      tminus serve --checkpoint runs/digits    # one of your own

    The page is at http://localhost:8000; --host and --port change the address. The settings page of the docs describes
    the options in full. You can also set each option with an environment variable, or in the file that --config names.
    """
    settings, _ = read_settings(Settings, config, flags)
    # While the model loads, there is no work to finish. Without this handler, a process with id 1 (in a container)
    # would ignore SIGTERM. Do not raise an exception in the handler: it can abort a library's start.
    signal.signal(signal.SIGTERM, lambda _signum, _frame: os._exit(0))
    set_up_log(settings.log_level.upper(), SERVER_FORM, settings.log_format)

    from tminus.service.startup.serve import serve as run_server

    try:
        stopped_well = run_server(settings)
    except ValueError as error:
        fail(str(error))
    if not stopped_well:
        fail("the worker crashed; the log says why")


# --- on a Ray cluster ---


@click.group()
def ray() -> None:
    """Serve from a Ray cluster: see tminus ray serve."""


@ray.command(
    "serve",
    cls=SettingsCommand,
    short_help="Serve from replicas on a Ray cluster.",
    epilog="Exit codes: 0 stopped by SIGTERM or Ctrl-C; 1 it could not start, or the application has left the cluster; "
    "2 wrong command line.",
)
@settings_options(RaySettings)
def serve_on_ray(config: Path | None, **flags: Any) -> None:
    """Serve from replicas on a Ray cluster. Ray routes the requests, and adds or drains replicas as the load changes.

    \b
      tminus ray serve --checkpoint runs/digits --max-replicas 4 --job-store "$URL"

    The command needs the extra `ray`. It joins a running cluster, or otherwise starts a cluster on this machine. When
    the command ends, the replicas drain. If the command started the cluster, the cluster ends too.
    """
    settings, _ = read_settings(RaySettings, config, flags)
    _exit_on_signals()
    set_up_log(settings.log_level.upper(), SERVER_FORM, settings.log_format)
    for name, value in QUIET_AND_WHOLE.items():  # Ray reads these variables when it is imported
        os.environ.setdefault(name, value)
    try:
        import ray as library
        from ray.util import list_named_actors
    except ModuleNotFoundError as error:
        fail(f"`tminus ray` needs the extra ray: {error}; pip install '.[ray]' in a checkout")
    host = _check(settings)
    try:
        library.init(address=settings.ray_address, include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"no Ray cluster can be joined or started (--ray-address, TMINUS_RAY_ADDRESS): {error}")
    _exit_on_signals()  # again, because Ray has replaced the handlers
    try:
        port = settings.port
        if all(actor["name"] != CONTROLLER for actor in list_named_actors(all_namespaces=True)):
            _, port = _free_port(settings.host, settings.port)  # if Ray Serve is not running yet, the port must be free
        _run(settings, host, port)
    finally:
        with suppress(Exception):
            library.shutdown()


def _check(settings: RaySettings) -> str:
    """Check the settings, and return the numeric address to bind. Exits with 1 on an error."""
    host, _ = _free_port(settings.host, 0)
    try:
        settings.access(host)
        settings.checkpoints()
    except ValueError as error:
        fail(str(error))
    return host


def _free_port(host: str, port: int) -> tuple[str, int]:
    """Return the numeric address and a free port. Exits with 1 on an error."""
    from tminus.service.startup.server import listen

    try:
        with listen(host, port) as listener:
            address = listener.getsockname()
    except ValueError as error:
        fail(str(error))
    return str(address[0]), int(address[1])


def _exit_on_signals() -> None:
    """Make SIGTERM and SIGINT raise SystemExit, until there are replicas to drain."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda _signum, _frame: sys.exit(0))


def _run(settings: RaySettings, host: str, port: int) -> None:
    """Start the replicas, wait for a signal, then drain the replicas."""
    from ray import serve as ray_serve
    from ray.serve.context import _get_global_client

    from tminus.service.ray_serve.app import NAME, app
    from tminus.service.ray_serve.replica import ending_s

    stopped, deployed = threading.Event(), False
    try:
        ray_serve.start(http_options={"host": host, "port": port})
        application, deployed = app(settings), True
        ray_serve.run(application, name=NAME)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda _signum, _frame: stopped.set())
    except BaseException as error:  # even after SystemExit, Ray Serve would go on starting the replicas
        messages = ""
        if deployed:  # otherwise an application with this name is not ours
            with suppress(Exception):
                deployments = ray_serve.status().applications[NAME].deployments
                messages = "".join(each.message for each in deployments.values())
            with suppress(Exception):
                _end(NAME, within_s=0)
        if isinstance(error, RuntimeError):
            fail(f"the replicas cannot start: {last_line(messages) or error}")
        raise
    client: Any = _get_global_client()
    log.info(
        "listening on %s, with %d to %d replicas",
        client.root_url or "no HTTP port of Serve's",  # a running Ray Serve keeps its host and port
        settings.min_replicas, settings.most_replicas,
    )  # fmt: skip
    while not stopped.wait(POLL_INTERVAL_S):
        if NAME not in ray_serve.status().applications:
            fail("the application is no longer on the Ray cluster")
    log.info("the replicas drain")
    within_s = ending_s(settings.grace_s) + SLACK_S
    if not _end(NAME, within_s):
        fail(f"the replicas have not ended within {within_s:.0f} s")


def _end(name: str, within_s: float) -> bool:
    """Delete an application of Ray Serve. Returns False if it still exists after `within_s` seconds.

    Ray Serve can also wait itself, but its wait fails after 60 s, even if the grace period is longer.
    """
    from ray import serve as ray_serve

    until_s = time.monotonic() + within_s
    ray_serve.delete(name, _blocking=False)
    while name in ray_serve.status().applications:  # ask at least once: an answer shows that Serve has got the deletion
        if time.monotonic() >= until_s:
            return False
        time.sleep(ENDING_INTERVAL_S)
    return True


def last_line(text: str) -> str:
    """Return the message at the end of a traceback, or an empty string if there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^[\w.]*(Error|Exception): ", "", lines[-1]) if lines else ""
