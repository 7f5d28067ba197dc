"""`mcr stats`: what was received, relayed, sent and dropped."""

import time

import click

from mcr.cli.common import Row, Settings, call, json_option, print_json, print_table


def _dropped(row: Row) -> str:
    """`fragment 3, oversize 1`, only what is not zero."""
    reasons = {
        key.removeprefix("dropped_"): value for key, value in row.items() if key.startswith("dropped_")
    }
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items() if count)


def _print(rows: list[Row]) -> None:
    lines = []
    for row in rows:
        if row["object"] == "rule":
            counts = {"received": row["received_packets"], "relayed": row["relayed_packets"], "sent": None}
            lines.append({"rule": row["rule"], "stream": row["stream"], **counts, "dropped": _dropped(row)})
        else:
            counts = {"received": None, "relayed": None, "sent": row["sent_packets"]}
            lines.append({"rule": "", "stream": f"-> {row['output']}", **counts, "dropped": _dropped(row)})
    print_table(lines, ("rule", "stream", "received", "relayed", "sent", "dropped"))


@click.command(name="stats")
@click.argument("name", required=False)
@json_option
@click.option("--watch", is_flag=True, help="Print it every second until Ctrl-C.")
@click.pass_obj
def command(settings: Settings, name: str | None, as_json: bool, watch: bool) -> None:
    """Show what each rule, or one, received, relayed, sent and dropped, in packets."""
    while True:
        rows = call(settings, "stats", name=name)
        if as_json:
            print_json(rows)
        else:
            _print(rows)
        if not watch:
            return
        time.sleep(1)
        print(flush=True)
