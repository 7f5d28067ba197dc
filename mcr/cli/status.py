"""`mcr status`: the attached interfaces and their workers."""

import click

from mcr.cli.common import Row, Settings, call, json_option, print_json, print_table

COLUMNS = (
    "interface",
    "state",
    "mode",
    "ingress",
    "queues",
    "rules",
    "worker",
    "restarts",
)
WORKER_COLUMNS = ("interface", "worker", "pid", "state", "queues", "cpus", "restarts")
REFUSED_SHOWN = 10


def _shown(row: Row) -> Row:
    """worker is its pid, or how many there are; an ingress that does not copy says so."""
    ingress = f"{row['ingress']} zero-copy" if row["zero_copy"] else row["ingress"]
    worker = row["worker_pid"] if row["workers"] == 1 else f"{row['workers']} workers"
    return row | {"ingress": ingress, "worker": worker, "restarts": row["worker_restarts"]}


@click.command(name="status")
@json_option
@click.pass_obj
def command(settings: Settings, as_json: bool) -> None:
    """Show the attached interfaces, their workers, and what is joined."""
    rows = call(settings, "status")
    if as_json:
        print_json(rows)
        return
    interfaces = [row for row in rows if row["object"] == "interface"]
    if interfaces:
        print_table([_shown(row) for row in interfaces], COLUMNS, names=("interface",))
    else:
        print("no interface is attached (mcr attach IFACE)")
    workers = [row for row in rows if row["object"] == "worker"]
    if len(workers) > len(interfaces):
        print_table(workers, WORKER_COLUMNS)
    for row in workers:
        if row["crash_loop"]:
            print(f"{row['interface']}: crash loop of worker {row['worker']}")
    for row in interfaces:
        for text in filter(None, (row["reason"], row["shortfall"])):
            print(f"{row['interface']}: {text}")
    for row in rows:
        if row["object"] == "drift":
            print(f"drift: {row['mended']} put right, the last {row['seconds_ago']:.0f} s ago: {row['last']}")
        if row["object"] == "membership":
            print(
                f"joined {row['held']} of {row['wanted']} groups"
                + (f", {row['failed']} refused (mcr joins):" if row["failed"] else "")
            )
    for row in [row for row in rows if row["object"] == "join"][:REFUSED_SHOWN]:
        print(f"{row['reason']}\n  remedy: {row['remedy']}")
