"""`mcr log`: from which level on the supervisor logs."""

import click

from mcr.cli.common import Settings, call
from mcr.logs import LEVELS


@click.command(name="log")
@click.argument("level", required=False, type=click.Choice(LEVELS))
@click.pass_obj
def command(settings: Settings, level: str | None) -> None:
    """Show from which level on the supervisor logs, or set it to LEVEL until it ends."""
    if level is None:
        print(call(settings, "log")["level"])
    else:
        call(settings, "log.set", level=level)
