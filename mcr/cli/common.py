"""What the commands share: the instance, the client, tables.

It must never import the supervisor's side: commands that only ask must start fast.
"""

import contextlib
import json
import logging
import shutil
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from mcr import logs
from mcr.cli.progress import progress
from mcr.cli.tables import table
from mcr.control import ControlClient, socket_path
from mcr.errors import McrError

Row = dict[str, Any]

json_option = click.option("-j", "--json", "as_json", is_flag=True, help="A list of flat JSON objects.")


COMPLETE_WITHIN_S = 1.0


def complete_rules(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The names of the instance's rules that begin so; none where there is no supervisor to ask."""
    instance = ctx.find_root().params.get("instance") or "default"
    try:
        with ControlClient(socket_path(instance), timeout_s=COMPLETE_WITHIN_S) as client:
            names = dict.fromkeys(row["rule"] for row in client.call("rule.show"))
    except McrError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def complete_interfaces(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """The interfaces of this network namespace that begin so."""
    return sorted(name for _, name in socket.if_nameindex() if name.startswith(incomplete))


@dataclass(frozen=True, slots=True)
class Settings:
    """The global options."""

    instance: str


def log_options(command: Callable[..., None]) -> Callable[..., None]:
    """--log-level and --log-json, of what is or becomes a supervisor."""
    as_json = click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
    level = click.option("--log-level", type=click.Choice(logs.LEVELS), help="Log from this level on.")
    return level(as_json(command))


def configure_log(level: str | None, as_json: bool) -> None:
    """As the options say; without --log-level it stays as `mcr` or `mcr -v` has set it."""
    logs.configure(level or logs.level(), as_json)


def say(text: str, as_json: bool) -> None:
    """A sign of life for who waits: as it is, or where the log is JSON as a line of it."""
    if as_json:
        logging.getLogger("mcr").info("%s", text)
    else:
        with contextlib.suppress(OSError):  # a full disk behind it ends nothing
            print(f"mcr: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def errors_logged(as_json: bool) -> Iterator[None]:
    """Where the log is JSON, an error that ends the supervisor is a line of it, too."""
    try:
        yield
    except McrError as error:
        if not as_json:
            raise
        for each in error.each():
            logging.getLogger("mcr").error("%s", each, extra={"remedy": each.remedy})
        sys.exit(error.status)


def call(settings: Settings, method: str, **params: object) -> Any:
    """One request to the instance's supervisor. Raises McrError, also when there is none."""
    path = socket_path(settings.instance)
    with progress("waiting for the supervisor"), ControlClient(path, timeout_s=30) as client:
        return client.call(method, **params)


def print_json(rows: Sequence[Row]) -> None:
    """The rows as JSON, one object a line, so that both `jq` and `grep` can read it."""
    print("[" + ",\n ".join(json.dumps(row) for row in rows) + "]")


def print_table(
    rows: Sequence[Row], columns: Sequence[str], names: Collection[str] = (), numbers: Collection[str] = ()
) -> None:
    """Aligned columns under their names; on a terminal the columns in names are cut to fit it."""
    for line in table(rows, columns, terminal_width(), names, numbers):
        print(line)


def terminal_width() -> int | None:
    """Columns; None where the output goes to a file or another program, which gets everything."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
