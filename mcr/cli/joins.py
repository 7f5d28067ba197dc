"""`mcr joins`: the groups that are joined, and the ones that the kernel refused."""

import click

from mcr.cli.common import Settings, call, json_option, print_json, print_table


@click.command(name="joins")
@json_option
@click.pass_obj
def command(settings: Settings, as_json: bool) -> None:
    """Show every group that is joined or shall be, and why it is not."""
    rows = call(settings, "joins")
    if as_json:
        print_json(rows)
        return
    print_table(rows, ("interface", "group", "source", "state"))
    for row in rows:
        if row["reason"]:
            print(f"{row['reason']}\n  remedy: {row['remedy']}")
