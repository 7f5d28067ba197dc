"""`mcr reload`: read the configuration files again."""

import click

from mcr.cli.common import Settings, call


@click.command(name="reload")
@click.pass_obj
def command(settings: Settings) -> None:
    """Read the supervisor's files again and apply what has changed."""
    call(settings, "reload")
