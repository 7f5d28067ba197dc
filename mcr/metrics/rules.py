"""The metrics of rules and outputs, of which there may be thousands: templates, filled in at each scrape.

The templates are made anew when the rules change; the counters of many rules are read in one call that does
not hold Python's lock, and CHUNK of them are written in one step. Every drop reason has its series from the
start, so that Prometheus sees an increase from nothing as one.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mcr.desired import Desired, RuleState
from mcr.maps import (
    DROP_REASONS,
    OCTAVE_BOUNDS_NS,
    OCTAVE_COLUMNS,
    OUTPUT_COLUMNS,
    OUTPUT_DROP_REASONS,
    RULE_COLUMNS,
    Maps,
)
from mcr.metrics.text import Family, Line, label_text

CHUNK = 256  # rules or outputs
CLOCK_STEP_S = 0.5

_REASONS = tuple(Line(labels=label_text(reason=reason)) for reason in DROP_REASONS)
_OUTPUT_REASONS = tuple(Line(labels=label_text(reason=reason)) for reason in OUTPUT_DROP_REASONS)
_BUCKETS = tuple(Line("_bucket", label_text(le=f"{bound / 1e9:.9g}")) for bound in OCTAVE_BOUNDS_NS)

RULE_COUNTERS = (
    Family("mcr_rule_received_packets_total", "counter", "Packets that matched the rule."),
    Family("mcr_rule_received_bytes_total", "counter", "UDP payload of the packets that matched the rule."),
    Family("mcr_rule_relayed_packets_total", "counter", "Packets handed to the rule's outputs."),
    Family("mcr_rule_relayed_bytes_total", "counter", "UDP payload of the packets handed to the outputs."),
)
_COUNTER_COLUMNS = (0, 1, 3, 4)  # of RuleCounts
_LAST_SEEN_COLUMN = 2
RULE_LAST_SEEN = Family(
    "mcr_rule_last_packet_timestamp_seconds",
    "gauge",
    "Unix time of the last packet that matched the rule, 0 if none has.",
    (Line(value="%.3f"),),
)
RULE_DROPPED = Family(
    "mcr_rule_dropped_packets_total", "counter", "Packets received and not relayed, by reason.", _REASONS
)
RULE_INFO = Family("mcr_rule_info", "gauge", "The rule's input and the path that its packets take; 1.")
RULE_ACTIVE = Family("mcr_rule_active", "gauge", "Whether the rule is in place; 0 while it is pending.")
RULE_LATENCY = Family(
    "mcr_rule_latency_seconds",
    "histogram",
    "Worker path: from the receive of a packet to the completed send, of each packet and output.",
    (*_BUCKETS, Line("_bucket", label_text(le="+Inf")), Line("_sum", value="%.9f"), Line("_count")),
)
OUTPUT_COUNTERS = (
    Family("mcr_output_relayed_packets_total", "counter", "Packets handed to the output."),
    Family("mcr_output_sent_packets_total", "counter", "Packets of the output that the kernel took."),
    Family("mcr_output_sent_bytes_total", "counter", "UDP payload of the packets that the kernel took."),
)
OUTPUT_DROPPED = Family(
    "mcr_output_dropped_packets_total", "counter", "Packets relayed and not sent, by reason.", _OUTPUT_REASONS
)
OUTPUT_ACTIVE = Family("mcr_output_active", "gauge", "Whether the output is in use; 0 while it is pending.")


_RULE_FAMILIES = (*RULE_COUNTERS, RULE_LAST_SEEN, RULE_DROPPED)
_OUTPUT_FAMILIES = (*OUTPUT_COUNTERS, OUTPUT_DROPPED)


@dataclass(frozen=True, slots=True)
class _Part:
    """Up to CHUNK things of one kind: their ids in the maps, and a template for each family."""

    ids: Sequence[int]
    templates: dict[str, str]


class RuleText:
    """Writes the metrics of all rules and their outputs."""

    def __init__(self) -> None:
        self._desired: Desired | None = None
        self._rules: list[_Part] = []
        self._worker_path: list[_Part] = []
        self._outputs: list[_Part] = []
        self._states: list[str] = []
        self._clock_offset_s = 0.0

    def text(self, desired: Desired, maps: Maps) -> Iterator[str]:
        """The metrics, in pieces."""
        if desired is not self._desired:
            self._make_templates(list(desired.rules.values()))
            self._desired = desired
        yield from self._states
        yield from self._rule_families(maps)
        yield from self._latency_family(maps)
        yield from self._output_families(maps)

    def _make_templates(self, rules: Sequence[RuleState]) -> None:
        named = [(state, label_text(rule=state.rule.name)) for state in rules]
        outputs = [
            (output, f"{labels},{label_text(output=str(output.output))}")
            for state, labels in named
            for output in state.outputs
        ]
        rule_ids = [(state.rule_id, labels) for state, labels in named]
        measured = [(state.rule_id, labels) for state, labels in named if state.path == "worker"]
        output_ids = [(output.output_id, labels) for output, labels in outputs]
        self._rules = _parts(rule_ids, _RULE_FAMILIES)
        self._worker_path = _parts(measured, (RULE_LATENCY,))
        self._outputs = _parts(output_ids, _OUTPUT_FAMILIES)
        self._states = [
            RULE_INFO.text((f"{labels},{_info(state)}", 1) for state, labels in named),
            RULE_ACTIVE.text((labels, int(not state.pending)) for state, labels in named),
            OUTPUT_ACTIVE.text((labels, int(not output.pending)) for output, labels in outputs),
        ]

    def _rule_families(self, maps: Maps) -> Iterator[str]:
        read = [maps.rule_totals(part.ids) for part in self._rules]
        parts = list(zip(self._rules, read, strict=True))
        for family, column in zip(RULE_COUNTERS, _COUNTER_COLUMNS, strict=True):
            yield family.head
            for part, values in parts:
                yield part.templates[family.name] % tuple(values[column::RULE_COLUMNS])
        yield RULE_LAST_SEEN.head
        offset_s = self._clock_offset()
        for part, values in parts:
            seen = (
                ns and ns / 1e9 + offset_s for ns in values[_LAST_SEEN_COLUMN::RULE_COLUMNS]
            )  # 0 stays 0: never
            yield part.templates[RULE_LAST_SEEN.name] % tuple(seen)
        yield RULE_DROPPED.head
        for part, values in parts:
            dropped = _columns(values, RULE_COLUMNS, RULE_COLUMNS - len(DROP_REASONS), RULE_COLUMNS)
            yield part.templates[RULE_DROPPED.name] % dropped

    def _latency_family(self, maps: Maps) -> Iterator[str]:
        yield RULE_LATENCY.head
        for part in self._worker_path:
            values: list[float] = list(maps.latency_octaves(part.ids))
            filled: list[float] = []
            for first in range(0, len(values), OCTAVE_COLUMNS):
                *buckets, total, sum_ns = values[first : first + OCTAVE_COLUMNS]
                filled += (*buckets, total, sum_ns / 1e9, total)
            yield part.templates[RULE_LATENCY.name] % tuple(filled)

    def _output_families(self, maps: Maps) -> Iterator[str]:
        read = [maps.output_totals(part.ids) for part in self._outputs]
        parts = list(zip(self._outputs, read, strict=True))
        for column, family in enumerate(OUTPUT_COUNTERS):
            yield family.head
            for part, values in parts:
                yield part.templates[family.name] % tuple(values[column::OUTPUT_COLUMNS])
        yield OUTPUT_DROPPED.head
        first = len(OUTPUT_COUNTERS)
        for part, values in parts:
            dropped = _columns(values, OUTPUT_COLUMNS, first, first + len(OUTPUT_DROP_REASONS))
            yield part.templates[OUTPUT_DROPPED.name] % dropped

    def _clock_offset(self) -> float:
        """Seconds from CLOCK_MONOTONIC to Unix time. It stays as it is until the clock is set, so that the
        time of one packet is told alike by every scrape."""
        offset_s = time.time() - time.monotonic()
        if abs(offset_s - self._clock_offset_s) > CLOCK_STEP_S:
            self._clock_offset_s = offset_s
        return self._clock_offset_s


def _parts(items: Sequence[tuple[int, str]], families: Iterable[Family]) -> list[_Part]:
    """items: ids with their labels."""
    parts = []
    for first in range(0, len(items), CHUNK):
        ids, label_sets = zip(*items[first : first + CHUNK], strict=True)
        parts.append(_Part(ids, {family.name: family.template(label_sets) for family in families}))
    return parts


def _columns(values: Sequence[int], width: int, first: int, end: int) -> tuple[int, ...]:
    """The columns from first to before end of each row."""
    rows = range(0, len(values), width)
    return tuple(value for row in rows for value in values[row + first : row + end])


def _info(state: RuleState) -> str:
    stream = state.rule.stream
    return label_text(stream=str(stream), interface=stream.interface, path=state.path)
