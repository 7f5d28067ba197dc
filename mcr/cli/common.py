"""What the commands share: the instance, the client, tables.

It must never import the supervisor's side: commands that only ask must start fast.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from mcr import logs
from mcr.control import ControlClient, socket_path
from mcr.errors import McrError

Row = dict[str, Any]

json_option = click.option("-j", "--json", "as_json", is_flag=True, help="A list of flat JSON objects.")


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
        print(f"mcr: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def errors_logged(as_json: bool) -> Iterator[None]:
    """Where the log is JSON, an error that ends the supervisor is a line of it, too."""
    try:
        yield
    except McrError as error:
        if not as_json:
            raise
        logging.getLogger("mcr").error("%s", error, extra={"remedy": error.remedy})
        sys.exit(error.status)


def call(settings: Settings, method: str, **params: object) -> Any:
    """One request to the instance's supervisor. Raises McrError, also when there is none."""
    with ControlClient(socket_path(settings.instance), timeout_s=30) as client:
        return client.call(method, **params)


def print_json(rows: Sequence[Row]) -> None:
    """The rows as JSON, one object a line, so that both `jq` and `grep` can read it."""
    print("[" + ",\n ".join(json.dumps(row) for row in rows) + "]")


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Aligned columns under their names; numbers to the right."""
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in (list(columns), *cells)) for index in range(len(columns))]
    numeric = [all(isinstance(row.get(column), int | float | None) for row in rows) for column in columns]
    for line in ([column.replace("_", " ").upper() for column in columns], *cells):
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        print("  ".join(padded).rstrip())


def _text(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
