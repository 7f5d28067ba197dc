"""`mcr explain`: what would happen to a packet of a stream now, and why."""

import click

from mcr.cli.common import Row, Settings, call, json_option, print_json
from mcr.stream import parse_stream

LABEL_WIDTH = 8


def _print(rows: list[Row]) -> None:
    verdict, *others = rows
    print(f"{verdict['stream']}: {verdict['text']}")
    for row in others:
        if row["object"] == "problem":
            print(f"{row['cause']}\n  remedy: {row['remedy']}")
        else:
            print(f"  {row['object'].ljust(LABEL_WIDTH)}  {row['text']}")


@click.command(name="explain")
@click.argument("stream")
@click.option("--ttl", type=click.IntRange(1, 255), help="The TTL that the packets come with.")
@click.option("--size", type=click.IntRange(0), metavar="BYTES", help="Their UDP payload, in bytes.")
@json_option
@click.pass_obj
def command(settings: Settings, stream: str, ttl: int | None, size: int | None, as_json: bool) -> None:
    """Tell what would happen to a packet of STREAM now.

    STREAM is an input: [SOURCE@]ADDRESS%INTERFACE:PORT[,vlan=TAG].
    """
    parse_stream(stream)  # so that a mistake is found without a supervisor
    rows = call(settings, "explain", stream=stream, ttl=ttl, size=size)
    if as_json:
        print_json(rows)
    else:
        _print(rows)
