"""`mcr trace`: what becomes of the next packets of a stream, one by one.

Events to lines and rows; what they say is what XDP and the worker did, told by themselves. It must never
guess a fate: where something said nothing, that is what is shown.
"""

import datetime
import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import click

from mcr._bpf import lib
from mcr.cli.common import Row, Settings, json_option, print_json
from mcr.cli.tapping import Tapping
from mcr.errors import McrError
from mcr.explain import differences
from mcr.maps import DROP_REASONS, OUTPUT_DROP_REASONS
from mcr.stream import Stream, parse_stream
from mcr.tap_events import Event, Verdict

WAIT_FOR_OUTPUTS_S = 0.5
MAX_NEAR_MISSES = 3
WORKER_CPU = lib.MCR_TAP_WORKER_CPU


@dataclass(slots=True)
class Traced:
    """A packet and what its outputs have said so far."""

    packet: Event
    seen_s: float
    outputs: dict[int, Event] = field(default_factory=dict)


def why_no_rule(packet: Stream, rules: Sequence[Row]) -> str:
    """Why nobody took the packet, by the rules of its group; rules are rows of `rule show`."""
    told = {}
    for row in rules:
        rule = parse_stream(row["from"])
        if rule.address == packet.address:
            words = ", ".join(each.words for each in differences(packet, rule))
            told[row["rule"]] = f"is {words}" if words else "is pending, or was added later"
    near = [f"rule {name} {words}" for name, words in list(told.items())[:MAX_NEAR_MISSES]]
    return "; ".join(near) or f"no rule names {packet.address}"


class Teller:
    """Puts the events of each packet together, and shows packets in the order of their arrival."""

    def __init__(self, tapping: Tapping, count: int) -> None:
        self._tapping = tapping
        self._count = count
        self._waiting: dict[int, Traced] = {}
        self.told = 0

    def add(self, events: Sequence[Event]) -> None:
        """Takes the packets that are wanted, and what is said of them."""
        by_xdp = [event for event in events if not event.output_id and event.cpu != WORKER_CPU]
        for event in by_xdp:
            if self.told + len(self._waiting) < self._count:
                self._waiting[event.time_ns] = Traced(event, time.monotonic())
        for event in events:
            traced = self._waiting.get(event.time_ns)
            if traced is None:
                continue
            if event.output_id:
                traced.outputs[event.output_id] = event
            elif event.cpu == WORKER_CPU:  # dropped by the worker after all
                traced.packet = replace(traced.packet, verdict=event.verdict, reason=event.reason)

    def ready(self, all_of_them: bool = False) -> Iterator[Traced]:
        """Those of which everything is known, or waited for long enough."""
        for time_ns, traced in list(self._waiting.items()):
            age_s = time.monotonic() - traced.seen_s
            if not all_of_them and age_s < WAIT_FOR_OUTPUTS_S and self._expects(traced):
                return
            del self._waiting[time_ns]
            self.told += 1
            yield traced

    def _expects(self, traced: Traced) -> bool:
        if traced.packet.verdict not in (Verdict.RELAYED, Verdict.TO_WORKER):
            return False
        active = [
            row
            for row in self._tapping.rules.get(traced.packet.rule_id, ())
            if row["output_state"] == "active"
        ]
        return any(row["output_id"] not in traced.outputs for row in active)

    def rows(self, traced: Traced) -> list[Row]:
        """The packet, then each output of its rule, as flat objects."""
        packet, relayed = traced.packet, traced.packet.verdict in (Verdict.RELAYED, Verdict.TO_WORKER)
        rule_rows = self._tapping.rules.get(packet.rule_id, [])
        rows = [self._packet_row(packet, rule_rows[0]["rule"] if rule_rows else "")]
        if relayed:
            common = {"time_ns": rows[0]["time_ns"], "stream": rows[0]["stream"], "rule": rows[0]["rule"]}
            known = {row["output_id"]: row["to"] for row in rule_rows if row["output_state"] == "active"}
            for output_id in dict.fromkeys([*known, *traced.outputs]):
                text = known.get(output_id, f"output_id {output_id}")
                said = traced.outputs.get(output_id)
                rows.append({"object": "output", **common, "output": text, **self._output_row(packet, said)})
        return rows

    def _packet_row(self, packet: Event, rule: str) -> Row:
        stream = packet.stream(self._tapping.interface(packet.ifindex))
        verdict, reason = "relayed", ""
        if packet.verdict == Verdict.PASSED:
            verdict, reason = "passed", why_no_rule(stream, list(self._tapping.outputs.values()))
        elif packet.verdict == Verdict.DROPPED:
            verdict, reason = "dropped", _name(DROP_REASONS, packet.reason)
        return {
            "object": "packet",
            "time_ns": packet.time_ns + self._tapping.to_real_time_ns,
            "stream": str(stream),
            "rule": rule,
            "path": {Verdict.RELAYED: "kernel", Verdict.TO_WORKER: "worker"}.get(Verdict(packet.verdict), ""),
            "verdict": verdict,
            "reason": reason,
            "bytes": packet.length,
            "ttl": packet.ttl,
            "dscp": packet.tos >> 2,
            "queue": packet.queue,
            "cpu": packet.cpu,
        }

    def _output_row(self, packet: Event, said: Event | None) -> Row:
        if said is None:
            return {"verdict": "unknown", "reason": "it has not told", "errno": 0, "after_ns": None}
        sent = said.verdict == Verdict.SENT
        return {
            "verdict": "sent" if sent else "dropped",
            "reason": "" if sent else _name(OUTPUT_DROP_REASONS, said.reason),
            "errno": said.error,
            "after_ns": max(0, said.done_ns - packet.time_ns),
        }


def _name(names: Sequence[str], reason: int) -> str:
    return names[reason] if reason < len(names) else f"reason {reason}"


def _packet_line(row: Row) -> str:
    seconds, nanoseconds = divmod(row["time_ns"], 1_000_000_000)
    clock = datetime.datetime.fromtimestamp(seconds).strftime("%H:%M:%S")
    size = (
        f"{row['bytes']} bytes, TTL {row['ttl']}, DSCP {row['dscp']}, queue {row['queue']}, CPU {row['cpu']}"
    )
    fate = {
        "passed": f"passed to the stack: {row['reason']}",
        "dropped": f"rule {row['rule']}: dropped: {row['reason']}",
        "relayed": f"rule {row['rule']}, {row['path']} path",
    }[row["verdict"]]
    return f"{clock}.{nanoseconds:09} {row['stream']} ({size}): {fate}"


def _output_line(row: Row) -> str:
    after = "" if row["after_ns"] is None else f" after {row['after_ns'] / 1000:.1f} µs"
    reason = f": {row['reason']}" if row["reason"] else ""
    if row["errno"]:
        reason += f" ({errno.errorcode.get(row['errno'], row['errno'])}: {os.strerror(row['errno'])})"
    return f"    -> {row['output']}: {row['verdict']}{reason}{after}"


@click.command(name="trace")
@click.argument("stream")
@click.option("-c", "--count", type=click.IntRange(1, 10_000), default=10, show_default=True, metavar="N")
@click.option(
    "--timeout", type=click.FloatRange(min=0.01, max=3600), default=10, show_default=True, metavar="S",
    help="End after this many seconds in any case.",
)  # fmt: skip
@json_option
@click.pass_obj
def command(settings: Settings, stream: str, count: int, timeout: float, as_json: bool) -> None:
    """Show what becomes of the next N packets of STREAM, such as 239.1.1.1%eth0:5000.

    Port * is any port, and without vlan= the tags do not matter. Packets that no rule takes are shown as
    well. A packet is one line, and each of its outputs an indented one.
    """
    rows: list[Row] = []
    with Tapping(settings, "trace.start", stream=stream, count=count, timeout_s=timeout) as tapping:
        click.echo(f"tracing {stream}", err=True)
        teller = Teller(tapping, count)
        for events in tapping.events():
            teller.add(events)
            rows += _show(teller, teller.ready(), as_json)
        rows += _show(teller, teller.ready(all_of_them=True), as_json)
    if as_json:
        print_json(rows)
    if tapping.lost:
        click.echo(f"{tapping.lost} more not shown: they came faster than they could be read", err=True)
    if not teller.told:
        raise McrError(
            f"no packet of {stream} within {timeout:g} s",
            "is the group joined (mcr status), does anything arrive (tcpdump on the sender's side)?",
        )


def _show(teller: Teller, traced: Iterator[Traced], as_json: bool) -> list[Row]:
    """Prints lines, or returns the rows that are to be printed at the end."""
    rows = [row for each in traced for row in teller.rows(each)]
    if as_json:
        return rows
    for row in rows:
        click.echo(_packet_line(row) if row["object"] == "packet" else _output_line(row))
    return []
