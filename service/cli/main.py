"""The `tminus` command: a group to which every subcommand is added here, and how Ctrl-C ends them.

The files of the subcommands import torch and what needs it in their functions, so that `--help` is quick.
"""

import signal
import sys
from typing import Any

import click

from tminus.service.cli.approve import approve
from tminus.service.cli.configuration import config
from tminus.service.cli.convert import convert, inspect
from tminus.service.cli.evaluate import evaluate
from tminus.service.cli.key import key
from tminus.service.cli.models import models
from tminus.service.cli.pull import pull
from tminus.service.cli.ray_serve import ray
from tminus.service.cli.reproduce import reproduce, trajectory
from tminus.service.cli.sample import sample
from tminus.service.cli.serve import serve
from tminus.service.cli.train import distill, train, train_autoencoder
from tminus.service.cli.tune import tune


class Commands(click.Group):
    """A group whose commands end with 130 on Ctrl-C, as a shell has it, and not with 1, which is a failure."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            click.echo(f"tminus: {str(stop) or 'interrupted'}", err=True)
            sys.exit(128 + signal.SIGINT)


@click.group(cls=Commands, context_settings={"show_default": True, "max_content_width": 120})
@click.version_option(package_name="tminus")
def main() -> None:
    """Serve, sample, train, distill, evaluate and convert denoising diffusion U-Nets."""


COMMANDS = (
    *(serve, pull, ray, config, key, models, sample, reproduce, trajectory),
    *(train, train_autoencoder, tune, distill, evaluate, approve, inspect, convert),
)
for command in COMMANDS:
    main.add_command(command)
