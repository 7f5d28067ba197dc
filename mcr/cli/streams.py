"""Streams as people look at them: two readings of the counters in, rates and states out.

Pure. A reading is what the method `stats` returned, and when. Where a counter went back, because the rule or
the supervisor is a new one, there is no rate until the next reading. This module must never ask a supervisor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcr.latency import BUCKETS, Latency

Row = dict[str, Any]

SILENT_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class Reading:
    """The rows of `stats`, read at a time in seconds of a monotonic clock."""

    time_s: float
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Output:
    """What one output does; None where two readings do not tell."""

    name: str
    sent_packets: float | None
    sent_bits: float | None
    dropped_packets: float | None


@dataclass(frozen=True, slots=True)
class Stream:
    """What one rule does, per second, and its outputs.

    dropped_packets: by the rule; lost_packets: by its outputs as well. latency_p50_s and latency_p99_s:
    quantiles of the packets since the reading before. state is one word: ok, silent, loss or pending.
    """

    rule: str
    stream: str
    path: str
    received_packets: float | None
    received_bits: float | None
    relayed_packets: float | None
    dropped_packets: float | None
    lost_packets: float | None
    latency_p50_s: float | None
    latency_p99_s: float | None
    state: str
    outputs: tuple[Output, ...]


def streams(before: Reading | None, now: Reading) -> list[Stream]:
    """Every rule of the reading, in its order."""
    earlier = {_key(row): row for row in before.rows} if before else {}
    seconds = now.time_s - before.time_s if before else 0.0
    found: list[Stream] = []
    outputs: dict[str, list[tuple[Row, Row | None]]] = {}
    for row in now.rows:
        if row["object"] == "output":
            outputs.setdefault(row["rule"], []).append((row, earlier.get(_key(row))))
    for row in now.rows:
        if row["object"] == "rule":
            own = outputs.get(row["rule"], [])
            found.append(_stream(row, earlier.get(_key(row)), own, seconds))
    return found


def dropped(row: Mapping[str, Any]) -> int:
    """All the packets that a rule or an output dropped."""
    return sum(value for key, value in row.items() if key.startswith("dropped_"))


def _key(row: Row) -> tuple[str, str]:
    return row["rule"], row.get("output", "")


def _stream(row: Row, before: Row | None, outputs: list[tuple[Row, Row | None]], seconds: float) -> Stream:
    shown = tuple(_output(output, earlier, seconds) for output, earlier in outputs)
    own = _rate(dropped(row), before and dropped(before), seconds)
    losses = [own, *(output.dropped_packets for output in shown)]
    known = [loss for loss in losses if loss is not None]
    lost = sum(known) if known else None
    latency = _latency(row, before)
    return Stream(
        rule=row["rule"],
        stream=row["stream"],
        path=row["path"],
        received_packets=_counter_rate("received_packets", row, before, seconds),
        received_bits=_bits(_counter_rate("received_bytes", row, before, seconds)),
        relayed_packets=_counter_rate("relayed_packets", row, before, seconds),
        dropped_packets=own,
        lost_packets=lost,
        latency_p50_s=_seconds(latency.quantile_ns(0.5)) if latency else None,
        latency_p99_s=_seconds(latency.quantile_ns(0.99)) if latency else None,
        state=_state(row, lost),
        outputs=shown,
    )


def _output(row: Row, before: Row | None, seconds: float) -> Output:
    return Output(
        row["output"],
        _counter_rate("sent_packets", row, before, seconds),
        _bits(_counter_rate("sent_bytes", row, before, seconds)),
        _rate(dropped(row), before and dropped(before), seconds),
    )


def _state(row: Row, lost: float | None) -> str:
    if row["pending"]:
        return "pending"
    silent_s = row["last_seen_seconds"]
    if silent_s is None or silent_s > SILENT_AFTER_S:
        return "silent"
    return "loss" if lost else "ok"


def _counter_rate(name: str, row: Row, before: Row | None, seconds: float) -> float | None:
    return _rate(row[name], before and before[name], seconds)


def _rate(now: int, before: Any, seconds: float) -> float | None:
    if before is None or now < before or seconds <= 0:
        return None
    return float((now - before) / seconds)


def _bits(octets: float | None) -> float | None:
    return None if octets is None else 8 * octets


def _seconds(ns: float | None) -> float | None:
    return None if ns is None else ns / 1e9


def _latency(row: Row, before: Row | None) -> Latency | None:
    """That of the packets between the two readings; None where it is not measured."""
    now = _histogram(row)
    if now is None or before is None:
        return None
    earlier = _histogram(before)
    if earlier is None or earlier.count > now.count:
        return None
    return now.since(earlier)


def _histogram(row: Row) -> Latency | None:
    """`latency_buckets` has only the buckets that count something, by their number."""
    if "latency_buckets" not in row:
        return None
    counts: dict[str, int] = row["latency_buckets"]
    buckets = [0] * BUCKETS
    for bucket, count in counts.items():
        buckets[int(bucket)] = count
    return Latency(sum(buckets), 0, round(row["latency_max_seconds"] * 1e9), tuple(buckets))
