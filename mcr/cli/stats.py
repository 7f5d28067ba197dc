"""`mcr stats`: what was received, relayed, sent and dropped, how long it took, and whether that is all."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from mcr.accounting import dropped, unaccounted
from mcr.cli.common import Row, Settings, call, complete_rules, json_option, print_json, print_table
from mcr.cli.tables import amount, duration
from mcr.errors import McrError
from mcr.limits import scaled

if TYPE_CHECKING:
    from mcr.cli.streams import Stream

REST_S = 0.3
SETTLED_S = 9.0  # longer than anything waits to be settled: see accounting.py
CHECK_LIMIT_S = 20.0
TOTALS = ("stream", "received", "relayed", "sent", "dropped", "p50", "p99", "max")
RATES = ("stream", "received/s", "relayed/s", "sent/s", "bit/s", "dropped/s", "p50", "p99")


def _reasons(row: Row) -> dict[str, int]:
    """Only what is not zero."""
    found = {key.removeprefix("dropped_"): row[key] for key in row if key.startswith("dropped_")}
    return {reason: count for reason, count in found.items() if count}


def _print_totals(rows: list[Row]) -> None:
    lines, reasons_of = [], []
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
            reasons_of.append(f"{row['rule']}{'' if is_rule else ' -> ' + row['output']} dropped: {listed}")
    print_table(lines, TOTALS, names=("stream",), numbers=TOTALS[1:])
    for text in reasons_of:
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


def _counts(rows: list[Row]) -> list[dict[str, int]]:
    return [{key: value for key, value in row.items() if key.endswith("_packets")} for row in rows]


def _at_rest(settings: Settings, name: str | None) -> list[Row]:
    """The rows when they have not moved for a moment, and add up or will not any more. Raises McrError."""
    rows: list[Row] = []
    started_s = rested_s = time.monotonic()
    while True:
        before, rows = rows, call(settings, "stats", name=name, settle=True)
        now_s = time.monotonic()
        if _counts(before) != _counts(rows):
            rested_s = now_s
        whole = not any(unaccounted(row) for row in rows)
        if now_s - rested_s > (REST_S if whole else scaled(SETTLED_S)):
            return rows
        if now_s - started_s > scaled(CHECK_LIMIT_S):
            raise McrError(
                f"traffic goes on: no rest within {scaled(CHECK_LIMIT_S):g} s",
                "stop the sources, or name a rule at rest",
            )
        time.sleep(REST_S / 2)


def _described(row: Row, difference: int) -> str:
    if row["object"] == "rule":
        sum_ = f"received {row['received_packets']}, relayed {row['relayed_packets']}"
        what = f"rule {row['rule']}"
    else:
        sum_ = f"relayed {row['relayed_packets']}, sent {row['sent_packets']}"
        what = f"rule {row['rule']}, output {row['output']}"
    return f"{what}: {sum_}, dropped {dropped(row)}: {difference:+d} unaccounted for"


def _check(settings: Settings, name: str | None, as_json: bool) -> int:
    rows = _at_rest(settings, name)
    failed = [(row, unaccounted(row)) for row in rows if unaccounted(row)]
    if as_json:
        print_json([{**row, "unaccounted_packets": unaccounted(row)} for row in rows])
    else:
        for row, difference in failed:
            print(_described(row, difference))
        if not failed:
            print(f"every packet of {sum(row['object'] == 'rule' for row in rows)} rules is accounted for")
    for row in call(settings, "status"):
        if row["object"] == "interface" and row["socket_dropped"]:
            lost = f"{row['socket_dropped']} packets of {row['interface']} were lost before MCR saw them"
            print(f"mcr: {lost}, of streams or not (AF_PACKET)", file=sys.stderr)
    return 1 if failed else 0


@click.command(name="stats")
@click.argument("name", required=False, shell_complete=complete_rules)
@json_option
@click.option("--watch", is_flag=True, help="Print rates every second until Ctrl-C; with -j the totals.")
@click.option("--check", is_flag=True, help="Wait for rest, then tell every packet that is unaccounted for.")
@click.pass_obj
def command(settings: Settings, name: str | None, as_json: bool, watch: bool, check: bool) -> int:
    """Show what each rule, or one, received, relayed, sent and dropped, in packets, and its latency.

    With --check: whether received = relayed + dropped for each rule, and relayed = sent + dropped for each
    output. That holds when no traffic comes; exit status 1 if it does not.
    """
    if check and watch:
        raise click.UsageError("--check looks once, --watch for ever: choose one")
    if check:
        return _check(settings, name, as_json)
    if watch and not as_json:
        _watch(settings, name)
    while True:
        rows = call(settings, "stats", name=name)
        if as_json:
            print_json(rows)
        else:
            _print_totals(rows)
        if not watch:
            return 0
        time.sleep(1)
        print(flush=True)
