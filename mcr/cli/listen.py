"""`mcr listen`: a test sink on the command line.

Options to values, a report to text; the work is in mcr.traffic.sink. It says `ready` on stderr once no packet
can be missed, so that scripts know when to start the source.
"""

import json
import sys
from dataclasses import asdict

import click

from mcr.errors import ExitStatus
from mcr.stream import parse_stream
from mcr.traffic.interrupt import stop_on_signals
from mcr.traffic.sink import ListenReport, Sink


@click.command(name="listen")
@click.argument("stream")
@click.option(
    "--expect",
    type=click.IntRange(min=1),
    metavar="N",
    help="End shortly after this many packets; anything else is a failure.",
)
@click.option(
    "--idle",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="End after this many seconds without a packet, once one came.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="End after this many seconds in any case.",
)
@click.option("--digest", is_flag=True, help="Also give the SHA-256 over all payloads, in order of arrival.")
@click.option("-j", "--json", "as_json", is_flag=True, help="Print a list of flat JSON objects.")
def command(
    stream: str, expect: int | None, idle: float | None, timeout: float | None, digest: bool, as_json: bool
) -> None:
    """Receive test packets of STREAM, such as 239.1.1.1%eth0:5000, and account for each.

    A group is joined, from one source if STREAM names it; a unicast address must be the machine's own. Ends
    with --expect, --idle, --timeout or Ctrl-C. Exit status 0 if everything arrived once and intact, else 1.
    """
    with stop_on_signals() as stop, Sink(parse_stream(stream), digest=digest) as sink:
        click.echo("ready", err=True)
        report = sink.run(
            expect=expect,
            idle_s=idle,
            timeout_s=timeout,
            stop=stop,
            progress=show_progress if sys.stderr.isatty() else None,
        )
    click.echo(json.dumps([as_flat(report)]) if as_json else describe(report))
    if not report.complete:
        sys.exit(ExitStatus.FAILED)


def show_progress(report: ListenReport) -> None:
    """One line on stderr."""
    click.echo(
        f"{report.packets} packets, lost {report.lost}, duplicates {report.duplicates}, "
        f"p99 {_microseconds(report.latency_p99_ns)}",
        err=True,
    )


def as_flat(report: ListenReport) -> dict[str, object]:
    """The report as one flat JSON object."""
    return {**asdict(report), "complete": report.complete}


def describe(report: ListenReport) -> str:
    """The report in words, for a terminal."""
    wanted = f" of {report.expected}" if report.expected is not None else ""
    lines = [
        f"received {report.packets}{wanted} packets, {report.bytes} bytes of {report.stream} "
        f"in {report.seconds:.3f} s: {report.rate:.0f} packets/s",
        f"lost {report.lost}, duplicates {report.duplicates}, reordered {report.reordered}, "
        f"corrupt {report.corrupt}",
        f"payload {report.size_min} to {report.size_max} bytes, without sequence number {report.unsequenced}",
        f"latency min {_microseconds(report.latency_min_ns)}, p50 {_microseconds(report.latency_p50_ns)}, "
        f"p99 {_microseconds(report.latency_p99_ns)}, max {_microseconds(report.latency_max_ns)}",
        f"from {_listed(report.sources)}, TTL {_listed(report.ttls)}, DSCP {_listed(report.dscps)}",
    ]
    lines += [f"{name.replace('_', ' ')} {value}" for name, value in _oddities(report).items() if value]
    if report.digest:
        lines.append(f"sha256 {report.digest}")
    return "\n".join(lines)


def _oddities(report: ListenReport) -> dict[str, int]:
    """Counts that are worth a line only when they are not 0."""
    return {
        "socket_dropped": report.socket_dropped,
        "checksum_errors": report.checksum_errors,
        "stale": report.stale,
        "ignored": report.ignored,
        "from_other_sources": report.other_sources,
        "latency_negative": report.latency_negative,
    }


def _microseconds(value_ns: int | None) -> str:
    return "-" if value_ns is None else f"{value_ns / 1000:.1f} µs"


def _listed(values: tuple[int, ...] | tuple[str, ...]) -> str:
    return " ".join(str(value) for value in values) or "-"
