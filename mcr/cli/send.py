"""`mcr send`: a test source on the command line.

Options to values, a report to text; the work is in mcr.traffic.source.
"""

import json
import sys
from dataclasses import asdict

import click

from mcr.cli.progress import progress
from mcr.errors import ExitStatus
from mcr.stream import parse_output
from mcr.traffic.interrupt import stop_on_signals
from mcr.traffic.source import MAX_BURST, MAX_PAYLOAD, SendReport, send


def parse_sizes(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    """`1316` or `0,1,512` as payload sizes in bytes. Raises click.BadParameter."""
    items = text.split(",")
    if not all(item.isascii() and item.isdigit() for item in items):
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1316 or 0,1,512")
    return tuple(int(item) for item in items)


@click.command(name="send")
@click.argument("stream")
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    default=1000,
    show_default=True,
    metavar="PPS",
    help="Packets per second; 0 is as fast as possible.",
)
@click.option(
    "--size",
    "sizes",
    default="1316",
    show_default=True,
    metavar="N[,N...]",
    callback=parse_sizes,
    help=f"Payload bytes, 0 to {MAX_PAYLOAD}; several are used in turn.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after this many packets.")
@click.option(
    "--duration",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="End after this many seconds.",
)
@click.option(
    "--burst",
    type=click.IntRange(1, MAX_BURST),
    default=32,
    show_default=True,
    metavar="N",
    help="Packets per system call, at most.",
)
@click.option("--digest", is_flag=True, help="Also give the SHA-256 over all payloads, in the order sent.")
@click.option("-j", "--json", "as_json", is_flag=True, help="Print a list of flat JSON objects.")
def command(
    stream: str,
    rate: float,
    sizes: tuple[int, ...],
    count: int | None,
    duration: float | None,
    burst: int,
    digest: bool,
    as_json: bool,
) -> None:
    """Send test packets to STREAM, an output such as 239.1.1.1%eth1:5000,ttl=8,dscp=46.

    Each payload carries a sequence number and a timestamp, which `mcr listen` checks. Without --count and
    --duration it sends until Ctrl-C.
    """
    output = parse_output(stream)
    with stop_on_signals() as stop, progress("sending"):
        report = send(
            output,
            rate=rate,
            sizes=sizes,
            count=count,
            duration_s=duration,
            burst=burst,
            digest=digest,
            stop=stop,
        )
    click.echo(json.dumps([asdict(report)]) if as_json else describe(report))
    if report.unreachable:
        sys.exit(ExitStatus.FAILED)


def describe(report: SendReport) -> str:
    """The report in words, for a terminal."""
    lines = [
        f"sent {report.packets} packets, {report.bytes} bytes to {report.stream} "
        f"in {report.seconds:.3f} s: {report.rate:.0f} packets/s"
    ]
    if report.retries:
        lines.append(f"waited {report.retries} times for a full socket or queue")
    if report.unreachable:
        lines.append(f"unreachable: answered {report.unreachable} times that nobody is there")
    if report.digest:
        lines.append(f"sha256 {report.digest}")
    return "\n".join(lines)
