"""`mcr check`: are these files right, on this machine?"""

from collections.abc import Collection, Iterator
from pathlib import Path

import click

from mcr.config import Config, by_position, read_config
from mcr.errors import Faults, McrError, raise_all
from mcr.netlink import read_interfaces
from mcr.rule import InterfaceFacts, Origin, plan


def _interface_faults(config: Config, present: Collection[str]) -> Iterator[McrError]:
    """Every interface that is named must be there."""
    named: list[tuple[str, Origin | None]] = [(each.interface, each.origin) for each in config.attachments]
    for rule in config.rules:
        named.append((rule.stream.interface, rule.origin))
        named += [(output.interface, rule.origin) for output in rule.outputs if output.interface]
    for interface, origin in dict.fromkeys(named):
        if interface not in present:
            yield McrError(
                f"there is no interface {interface}", "see which there are: ip link", str(origin or "")
            )


def _path_faults(config: Config, facts: dict[str, InterfaceFacts], errors: list[McrError]) -> list[McrError]:
    """Every path must be possible; of a rule that is at fault already, nothing more is said."""
    at_fault = {error.where for error in errors}
    faults = Faults()
    for rule in config.rules:
        if str(rule.origin) not in at_fault:
            with faults:
                plan(rule, facts)
    return faults.found


@click.command(name="check")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
def command(paths: tuple[Path, ...]) -> None:
    """Check configuration files against each other and this machine; change nothing.

    Everything that is wrong is said, each with its line and its remedy, up to 50 errors.
    """
    config, errors = read_config(paths)
    facts = read_interfaces()
    machine = [*_interface_faults(config, facts), *_path_faults(config, facts, errors)]
    raise_all(by_position([*errors, *machine], paths))
    print(f"{len(config.attachments)} interfaces, {len(config.rules)} rules: no error")
