"""What the commands share: the instance, the client, tables.

It must never import the supervisor's side: commands that only ask must start fast.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from mcr.control import ControlClient, socket_path

Row = dict[str, Any]

json_option = click.option("-j", "--json", "as_json", is_flag=True, help="A list of flat JSON objects.")


@dataclass(frozen=True, slots=True)
class Settings:
    """The global options."""

    instance: str


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
