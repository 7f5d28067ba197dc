"""`mcr stats`: what was received, relayed, sent and dropped, and how long it took."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from mcr.cli.common import Row, Settings, call, complete_rules, json_option, print_json, print_table
from mcr.cli.tables import amount, duration

if TYPE_CHECKING:
    from mcr.cli.streams import Stream

TOTALS = ("stream", "received", "relayed", "sent", "dropped", "p50", "p99", "max")
RATES = ("stream", "received/s", "relayed/s", "sent/s", "bit/s", "dropped/s", "p50", "p99")


def _reasons(row: Row) -> dict[str, int]:
    """Only what is not zero."""
    found = {key.removeprefix("dropped_"): row[key] for key in row if key.startswith("dropped_")}
    return {reason: count for reason, count in found.items() if count}


def _print_totals(rows: list[Row]) -> None:
    lines, dropped = [], []
    for row in rows:
        is_rule, reasons = row["object"] == "rule", _reasons(row)
        name = f"{row['rule']}  {row['stream']}" if is_rule else f"  -> {row['output']}"
        line: Row = {"stream": name, "relayed": row.get("relayed_packets"), "dropped": sum(reasons.values())}
        if is_rule:
            line["received"] = row["received_packets"]
            line |= {each: duration(row[f"latency_{each}_seconds"]) for each in ("p50", "p99", "max")}
        else:
            line["sent"] = row["sent_packets"]
        lines.append(line)
        if reasons:
            listed = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
            dropped.append(f"{row['rule']}{'' if is_rule else ' -> ' + row['output']} dropped: {listed}")
    print_table(lines, TOTALS, names=("stream",), numbers=TOTALS[1:])
    for text in dropped:
        print(text)


def _watch(settings: Settings, name: str | None) -> None:
    """Rates every second."""
    from mcr.cli.streams import Reading, streams  # which reads the ABI: what shows totals does without

    before: Reading | None = None
    while True:
        now = Reading(time.monotonic(), call(settings, "stats", name=name, latency=True))
        if before:
            lines = [line for each in streams(before, now) for line in _rate_lines(each)]
            print_table(lines, RATES, names=("stream",), numbers=RATES[1:])
            print(flush=True)
        before = now
        time.sleep(1)


def _rate_lines(stream: "Stream") -> Iterator[Row]:
    yield {
        "stream": f"{stream.rule}  {stream.stream}",
        "received/s": amount(stream.received_packets),
        "relayed/s": amount(stream.relayed_packets),
        "bit/s": amount(stream.received_bits),
        "dropped/s": amount(stream.dropped_packets),
        "p50": duration(stream.latency_p50_s),
        "p99": duration(stream.latency_p99_s),
    }
    for output in stream.outputs:
        yield {
            "stream": f"  -> {output.name}",
            "sent/s": amount(output.sent_packets),
            "bit/s": amount(output.sent_bits),
            "dropped/s": amount(output.dropped_packets),
        }


@click.command(name="stats")
@click.argument("name", required=False, shell_complete=complete_rules)
@json_option
@click.option("--watch", is_flag=True, help="Print rates every second until Ctrl-C; with -j the totals.")
@click.pass_obj
def command(settings: Settings, name: str | None, as_json: bool, watch: bool) -> None:
    """Show what each rule, or one, received, relayed, sent and dropped, in packets, and its latency."""
    if watch and not as_json:
        _watch(settings, name)
    while True:
        rows = call(settings, "stats", name=name)
        if as_json:
            print_json(rows)
        else:
            _print_totals(rows)
        if not watch:
            return
        time.sleep(1)
        print(flush=True)
