"""`tminus serve`: load a checkpoint and serve it over HTTP, by settings from flags and TMINUS_ variables."""

import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.service.cli.configuration import read_settings, settings_options
from tminus.service.cli.output import fail
from tminus.service.model_info import max_edit_bytes
from tminus.service.startup.logs import SERVER_FORM, set_up_log
from tminus.service.startup.traces import start_traces

if TYPE_CHECKING:
    import socket

    from tminus.service.startup.app import Application

log = logging.getLogger(__name__)


@click.command()
@settings_options
def serve(config: Path | None, **flags: Any) -> None:
    """Load one or more checkpoints and serve them over HTTP."""
    settings = read_settings(config, flags)
    # While the model loads there is nothing to finish; and a process 1, as in a container, has no default action. An
    # exception is no way out: raised in the middle of a library's start, it can abort the process.
    signal.signal(signal.SIGTERM, lambda _signum, _frame: os._exit(0))
    set_up_log(settings.log_level.upper(), SERVER_FORM, settings.log_format)
    from tminus.service.startup.app import VERSION
    from tminus.service.startup.building import prepare

    try:
        traces = start_traces(VERSION)
    except ValueError as error:
        fail(str(error))

    from tminus.service.startup.metrics_server import serve_metrics
    from tminus.service.startup.server import allow_connections
    from tminus.service.startup.server import serve as run_server

    # What can be found out at once is, before anything is measured.
    try:
        settings = settings.model_copy(update={"max_connections": allow_connections(settings.max_connections)})
    except ValueError as error:
        fail(str(error))
    listener, for_metrics = listen(settings.host, settings.port), None
    if settings.metrics and settings.metrics_port is not None:
        for_metrics = listen(settings.metrics_host or settings.host, settings.metrics_port)
    try:
        address = listener.getsockname()[:2]
        access = settings.access(address[0])
        prepared = prepare(settings, address, access, traces, with_metrics=settings.metrics and for_metrics is None)
    except ValueError as error:
        listener.close()
        fail(str(error))

    built: list[Application] = []  # empty while the model is measured

    def build() -> "Application":
        """Measure, and put the parts together."""
        built.append(prepared())
        return built[0]

    if for_metrics is not None:
        serve_metrics(for_metrics, lambda: built[0] if built else None, settings.doors())
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


def listen(host: str, port: int) -> "socket.socket":
    """Reserve an address; where that fails one clear line."""
    from tminus.service.startup.server import bind

    try:
        return bind(host, port)
    except (OSError, UnicodeError) as error:
        fail(f"cannot listen on {host}:{port}: {error}")
