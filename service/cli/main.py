"""The `tminus` command group with its subcommands, and the handling of Ctrl-C.

Subcommand modules import torch, and modules that need torch, only inside functions. This keeps `--help` fast.
"""

import signal
import sys
from typing import Any

import click

from tminus.service.cli.approve import approve
from tminus.service.cli.bench import bench
from tminus.service.cli.configuration import config
from tminus.service.cli.convert import convert, inspect
from tminus.service.cli.evaluate import evaluate
from tminus.service.cli.key import key
from tminus.service.cli.models import models
from tminus.service.cli.pull import pull
from tminus.service.cli.reproduce import reproduce, trajectory
from tminus.service.cli.sample import sample
from tminus.service.cli.serve import ray, serve
from tminus.service.cli.train import distill, train, train_autoencoder
from tminus.service.cli.tune import tune

# Sections of the help. The first section has what a new user needs. Every command must be in a section.
SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Begin": (serve, sample, train),
    "Models": (pull, inspect, tune, distill, evaluate, approve, convert, train_autoencoder),
    "Server": (models, bench, config, key, ray),
    "Reproduce": (reproduce, trajectory),
}
EXIT_CODES = (
    "Exit codes: 0 done; 1 failed, and one line on stderr says why; 2 wrong command line; 130 stopped by Ctrl-C."
)
WIDEST_HELP = 200  # maximum characters of a command's description that click takes from its long help


class Commands(click.Group):
    """A group whose help lists SECTIONS. After Ctrl-C, a command exits with 130, as is usual in shells."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            click.echo(f"tminus: {str(stop) or 'interrupted'}", err=True)
            sys.exit(128 + signal.SIGINT)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click passes it)
        """Return the names of the commands, in the order in which they were added."""
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        widest = max(map(len, self.commands))
        for heading, commands in SECTIONS.items():
            lines = [(f"{each.name:<{widest}}", each.get_short_help_str(WIDEST_HELP)) for each in commands]
            with formatter.section(heading):
                formatter.write_dl(lines)
        click.Command.format_options(self, ctx, formatter)


@click.group(
    cls=Commands, invoke_without_command=True, context_settings={"show_default": True, "max_content_width": 120}
)
@click.version_option(package_name="tminus")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Serve, sample and train denoising diffusion U-Nets.

    `tminus serve` serves the bundled model, with a web page. Each command has --help.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (each for commands in SECTIONS.values() for each in commands):
    if not isinstance(command, click.Group) and command.epilog is None:
        command.epilog = EXIT_CODES
    main.add_command(command)
