"""`tminus serve`: load a checkpoint and serve it over HTTP, by settings from flags and TMINUS_ variables."""

import os
import signal
from pathlib import Path
from typing import Any

import click

from tminus.service.cli.configuration import SettingsCommand, read_settings, settings_options
from tminus.service.cli.output import fail
from tminus.service.startup.logs import SERVER_FORM, set_up_log
from tminus.service.startup.settings import Settings


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

    The page is at http://localhost:8000, unless --port or --host says otherwise. The settings page of the docs
    describes the options in full. You can also give each as a variable, or as a line of the file that --config names.
    """
    settings, _ = read_settings(Settings, config, flags)
    # While the model loads there is nothing to finish; and a process 1, as in a container, has no default action. An
    # exception is no way out: raised in the middle of a library's start, it can abort the process.
    signal.signal(signal.SIGTERM, lambda _signum, _frame: os._exit(0))
    set_up_log(settings.log_level.upper(), SERVER_FORM, settings.log_format)

    from tminus.service.startup.serve import serve as run_server

    try:
        stopped_well = run_server(settings)
    except ValueError as error:
        fail(str(error))
    if not stopped_well:
        fail("the worker crashed; the log says why")
