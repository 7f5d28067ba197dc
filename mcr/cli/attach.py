"""`mcr attach`: attach an interface, in the running supervisor or in one that this command becomes."""

import asyncio

import click

from mcr.cli.common import (
    Settings,
    call,
    complete_interfaces,
    configure_log,
    errors_logged,
    log_options,
    say,
)
from mcr.config import parse_attachment
from mcr.errors import ExitStatus, McrError


def _become_supervisor(
    settings: Settings, options: dict[str, object], log_level: str | None, log_json: bool
) -> None:
    from mcr.service import run
    from mcr.supervisor import Supervisor

    configure_log(log_level, log_json)
    attachment = parse_attachment(options)

    def ready(supervisor: Supervisor) -> None:
        interface = supervisor.attached[attachment.interface]
        _report(interface.name, interface.mode or "none", interface.ingress, interface.shortfall)
        say("no supervisor was running, so this is one now; Ctrl-C ends it", log_json)

    with errors_logged(log_json):
        asyncio.run(run(settings.instance, attachment=attachment, ready=ready))


def _report(interface: str, mode: str, ingress: str, shortfall: str) -> None:
    print(f"attached {interface}: mode {mode}, ingress {ingress}", flush=True)
    if shortfall:
        print(f"{interface}: {shortfall}", flush=True)


@click.command(name="attach")
@click.argument("interface", metavar="IFACE", shell_complete=complete_interfaces)
@click.option("--mode", type=click.Choice(["auto", "native", "generic"]), default="auto", show_default=True)
@click.option("--ingress", type=click.Choice(["auto", "xsk", "packet"]), default="auto", show_default=True)
@click.option("--zero-copy", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option(
    "--udp-checksums",
    type=click.Choice(["verify", "trust"]),
    default="verify",
    show_default=True,
    help="Whether the worker path drops what a wrong checksum shows to be damaged.",
)
@click.option("--busy-poll", is_flag=True, help="Spin instead of sleeping: lowest latency, one core busy.")
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes that share the receive queues.",
)
@click.option(
    "--egress-threads",
    type=click.IntRange(0, 8),
    default=0,
    show_default=True,
    help="Threads of each worker that send; 0: the one that receives.",
)
@click.option("--cpus", metavar="LIST", help="CPUs to pin the workers' threads to, in turn: 2,3 or 2-5.")
@log_options
@click.pass_obj
def command(settings: Settings, /, log_level: str | None, log_json: bool, **options: object) -> None:
    """Attach MCR to IFACE. Where no supervisor runs, this becomes one, in the foreground.

    The options of the log count only then.
    """
    options = {name: value for name, value in options.items() if value is not None}
    try:
        done = call(settings, "attach", **options)
    except McrError as error:
        if error.status != ExitStatus.NO_SUPERVISOR:
            raise
        _become_supervisor(settings, options, log_level, log_json)
    else:
        _report(done["interface"], done["mode"], done["ingress"], done["shortfall"])
