"""`mcr detach`: take MCR off an interface."""

import click

from mcr.cli.common import Settings, call, complete_interfaces


@click.command(name="detach")
@click.argument("interface", metavar="IFACE", shell_complete=complete_interfaces)
@click.pass_obj
def command(settings: Settings, interface: str) -> None:
    """Detach MCR from IFACE; its rules wait."""
    call(settings, "detach", interface=interface)
