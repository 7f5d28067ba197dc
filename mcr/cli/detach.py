"""`mcr detach`: take MCR off an interface."""

import click

from mcr.cli.common import Settings, call


@click.command(name="detach")
@click.argument("interface", metavar="IFACE")
@click.pass_obj
def command(settings: Settings, interface: str) -> None:
    """Detach MCR from IFACE; its rules wait."""
    call(settings, "detach", interface=interface)
