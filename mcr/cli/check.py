"""`mcr check`: are these files right, on this machine?"""

from pathlib import Path

import click

from mcr.config import Config, load_config
from mcr.errors import McrError
from mcr.netlink import read_interfaces
from mcr.rule import Origin, plan


def _check_interfaces(config: Config) -> None:
    """Every interface that is named must be there, and every path must be possible."""
    facts = read_interfaces()
    named: list[tuple[str, Origin | None]] = [(each.interface, each.origin) for each in config.attachments]
    for rule in config.rules:
        named.append((rule.stream.interface, rule.origin))
        named += [(output.interface, rule.origin) for output in rule.outputs if output.interface]
    for interface, origin in named:
        if interface not in facts:
            raise McrError(
                f"there is no interface {interface}", "see which there are: ip link", str(origin or "")
            )
    for rule in config.rules:
        plan(rule, facts)


@click.command(name="check")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
def command(paths: tuple[Path, ...]) -> None:
    """Check configuration files against each other and this machine; change nothing."""
    config = load_config(paths)
    _check_interfaces(config)
    print(f"{len(config.attachments)} interfaces, {len(config.rules)} rules: no error")
