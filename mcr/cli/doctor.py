"""`mcr doctor`: whether this machine has what MCR needs, with or without a running supervisor.

It only looks: nothing here changes anything.
"""

import socket
import struct
from collections.abc import Sequence
from pathlib import Path

import click

from mcr.cli.common import Settings, json_option, print_json
from mcr.control import ControlClient, socket_path
from mcr.errors import ExitStatus, McrError
from mcr.features import Check, Relay, host_checks, no_supervisor
from mcr.interface_features import Use, interface_checks
from mcr.limits import scaled
from mcr.netlink import read_interfaces
from mcr.rule import InterfaceFacts
from mcr.stream import parse_output

TIMEOUT_S = 10.0


def _relay(path: Path) -> Relay:
    """The supervisor behind a control socket. Raises McrError if there is none, or none that answers."""
    with ControlClient(path, timeout_s=TIMEOUT_S) as client:
        status, rules = client.call("status"), client.call("rule.show")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(scaled(TIMEOUT_S))
            probe.connect(str(path))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError as error:
        raise McrError(f"{path}: {error.strerror or error}", "try again") from error
    return Relay(struct.unpack("3i", credentials)[0], status, rules)


def _chosen(interface: str | None, relay: Relay | None, facts: dict[str, InterfaceFacts]) -> list[Use]:
    """The one that is named, or those that the supervisor uses, or those that a supervisor could use."""
    if interface is not None:
        return [Use(interface, True, True)]
    if relay is None:
        return [Use(each.name, False, False) for each in facts.values() if each.ethernet and each.up]
    attached = [row["interface"] for row in relay.status if row["object"] == "interface"]
    outputs = [parse_output(row["to"]).interface for row in relay.rules]
    names = dict.fromkeys([*attached, *outputs])
    return [Use(name, True, name in attached) for name in names if name]


def _print(checks: Sequence[Check]) -> None:
    lines = [(each.check, each.interface or "-", each.answer) for each in checks]
    head = ("CHECK", "INTERFACE", "ANSWER")
    widths = [max(len(cell) for cell in column) for column in zip(head, *lines, strict=True)]
    evidence = ["EVIDENCE", *(each.evidence for each in checks)]
    remedies = ["", *(each.remedy if each.answer == "no" else "" for each in checks)]
    for cells, seen, remedy in zip((head, *lines), evidence, remedies, strict=True):
        print(*(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)), seen, sep="  ")
        if remedy:
            print(f"  remedy: {remedy}")
    missing = [each for each in checks if each.answer == "no" and each.needed]
    for each in missing:
        print(f"MCR needs: {each.check}{f' ({each.interface})' if each.interface else ''}")
    if not missing:
        print("nothing that MCR needs is missing, as far as can be told")


@click.command(name="doctor")
@click.argument("interface", required=False, metavar="[IFACE]")
@json_option
@click.pass_obj
def command(settings: Settings, interface: str | None, as_json: bool) -> int:
    """Check what MCR needs of this machine, and of IFACE or the interfaces in use.

    Each check is answered with yes, no or can't tell. Exit status 1 if something is missing that MCR needs.
    """
    relay: Relay | None = None
    checks: list[Check] = []
    path = socket_path(settings.instance)
    try:
        relay = _relay(path)
    except McrError as error:
        checks.append(no_supervisor(error))
    facts = read_interfaces()
    of_interfaces: list[Check] = []
    for use in _chosen(interface, relay, facts):  # first, while what the supervisor has said still holds
        of_interfaces += interface_checks(use, facts.get(use.interface), relay)
    checks += [*host_checks(relay), *of_interfaces]
    if as_json:
        print_json([each.row() for each in checks])
    else:
        _print(checks)
    missing = any(each.answer == "no" and each.needed for each in checks)
    return ExitStatus.FAILED if missing else ExitStatus.DONE
