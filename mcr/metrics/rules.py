"""The metrics of rules and outputs, of which there may be thousands: templates, filled in at each scrape.

The templates are made anew when the rules change, those of CHUNK neighbours that did not change are kept; the
counters of a chunk are read in one call that does not hold Python's lock, and written in one step. Every drop
reason has its series from the start, so that Prometheus sees an increase from nothing as one.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

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
from mcr.metrics.text import VALUE, Family, gaps, label_set

CHUNK = 256  # rules or outputs
CLOCK_STEP_S = 0.5

OF_RULE = ("rule",)
OF_OUTPUT = ("rule", "output")
OF_INFO = ("rule", "stream", "interface", "path")


def _counter(name: str, help_text: str, labels: Sequence[str]) -> Family:
    counter = CounterMetricFamily(name, help_text, labels=labels)
    counter.add_metric(gaps(*labels), VALUE)
    return Family.of(counter)


def _gauge(name: str, help_text: str, labels: Sequence[str]) -> Family:
    gauge = GaugeMetricFamily(name, help_text, labels=labels)
    gauge.add_metric(gaps(*labels), VALUE)
    return Family.of(gauge)


def _dropped(name: str, help_text: str, labels: Sequence[str], reasons: Sequence[str]) -> Family:
    counter = CounterMetricFamily(name, help_text, labels=[*labels, "reason"])
    for reason in reasons:
        counter.add_metric([*gaps(*labels), reason], VALUE)
    return Family.of(counter)


def _latency(name: str, help_text: str, labels: Sequence[str]) -> Family:
    histogram = HistogramMetricFamily(name, help_text, labels=labels)
    bounds = [f"{bound / 1e9:.9g}" for bound in OCTAVE_BOUNDS_NS]
    histogram.add_metric(gaps(*labels), [(bound, VALUE) for bound in (*bounds, "+Inf")], VALUE)
    return Family.of(histogram)


RULE_COUNTERS = (
    _counter("mcr_rule_received_packets_total", "Packets that matched the rule.", OF_RULE),
    _counter("mcr_rule_received_bytes_total", "UDP payload of the packets that matched the rule.", OF_RULE),
    _counter("mcr_rule_relayed_packets_total", "Packets handed to the rule's outputs.", OF_RULE),
    _counter("mcr_rule_relayed_bytes_total", "UDP payload of the packets handed to the outputs.", OF_RULE),
)
_COUNTER_COLUMNS = (0, 1, 3, 4)  # of RuleCounts
_LAST_SEEN_COLUMN = 2
RULE_LAST_SEEN = _gauge(
    "mcr_rule_last_packet_timestamp_seconds",
    "Unix time of the last packet that matched the rule, 0 if none has.",
    OF_RULE,
)
RULE_DROPPED = _dropped(
    "mcr_rule_dropped_packets_total", "Packets received and not relayed, by reason.", OF_RULE, DROP_REASONS
)
RULE_INFO = _gauge("mcr_rule_info", "The rule's input and the path that its packets take; 1.", OF_INFO)
RULE_ACTIVE = _gauge("mcr_rule_active", "Whether the rule is in place; 0 while it is pending.", OF_RULE)
RULE_LATENCY = _latency(
    "mcr_rule_latency_seconds",
    "Worker path: from the receive of a packet to the completed send, of each packet and output.",
    OF_RULE,
)
OUTPUT_COUNTERS = (
    _counter("mcr_output_relayed_packets_total", "Packets handed to the output.", OF_OUTPUT),
    _counter("mcr_output_sent_packets_total", "Packets of the output that the kernel took.", OF_OUTPUT),
    _counter("mcr_output_sent_bytes_total", "UDP payload of the packets that the kernel took.", OF_OUTPUT),
)
OUTPUT_DROPPED = _dropped(
    "mcr_output_dropped_packets_total",
    "Packets relayed and not sent, by reason.",
    OF_OUTPUT,
    OUTPUT_DROP_REASONS,
)
OUTPUT_ACTIVE = _gauge("mcr_output_active", "Whether the output is in use; 0 while it is pending.", OF_OUTPUT)


_RULE_FAMILIES = (RULE_INFO, RULE_ACTIVE, *RULE_COUNTERS, RULE_LAST_SEEN, RULE_DROPPED)
_OUTPUT_FAMILIES = (OUTPUT_ACTIVE, *OUTPUT_COUNTERS, OUTPUT_DROPPED)


@dataclass(frozen=True, slots=True)
class _Thing:
    """A rule or an output: its id in the maps, its labels, and whether it is in place."""

    number: int
    labels: dict[str, str]
    active: bool


@dataclass(frozen=True, slots=True)
class _Described:
    """A rule and its outputs, and what they were made from."""

    state: RuleState
    rule: _Thing
    outputs: Sequence[_Thing]


@dataclass(frozen=True, slots=True)
class _Part:
    """Up to CHUNK things of one kind, their ids, and a template for each family."""

    things: Sequence[_Thing]
    ids: Sequence[int]
    templates: dict[Family, str]


class RuleText:
    """Writes the metrics of all rules and their outputs."""

    def __init__(self) -> None:
        self._desired: Desired | None = None
        self._described: dict[str, _Described] = {}
        self._rules: list[_Part] = []
        self._worker_path: list[_Part] = []
        self._outputs: list[_Part] = []
        self._clock_offset_s = 0.0

    def prepare(self, desired: Desired) -> None:
        """Makes the templates for these rules, unless they are those of the last time."""
        if desired is self._desired:
            return
        known = self._described
        self._described = {
            name: known[name] if name in known and known[name].state is state else _describe(state)
            for name, state in desired.rules.items()
        }
        rules = list(self._described.values())
        worker_path = [each.rule for each in rules if each.state.path == "worker"]
        outputs = [output for each in rules for output in each.outputs]
        self._rules = _parts([each.rule for each in rules], _RULE_FAMILIES, self._rules)
        self._worker_path = _parts(worker_path, (RULE_LATENCY,), self._worker_path)
        self._outputs = _parts(outputs, _OUTPUT_FAMILIES, self._outputs)
        self._desired = desired

    def text(self, maps: Maps) -> Iterator[str]:
        """The metrics, in pieces."""
        yield from self._rule_families(maps)
        yield from self._latency_family(maps)
        yield from self._output_families(maps)

    def _rule_families(self, maps: Maps) -> Iterator[str]:
        yield from _filled(RULE_INFO, ((part, [1] * len(part.ids)) for part in self._rules))
        yield from _filled(RULE_ACTIVE, ((part, _active(part)) for part in self._rules))
        read = [(part, maps.rule_totals(part.ids)) for part in self._rules]
        for family, column in zip(RULE_COUNTERS, _COUNTER_COLUMNS, strict=True):
            yield from _filled(family, ((part, values[column::RULE_COLUMNS]) for part, values in read))
        offset_s = self._clock_offset()
        yield from _filled(RULE_LAST_SEEN, ((part, _last_seen(values, offset_s)) for part, values in read))
        first = RULE_COLUMNS - len(DROP_REASONS)
        dropped = ((part, _columns(values, RULE_COLUMNS, first, RULE_COLUMNS)) for part, values in read)
        yield from _filled(RULE_DROPPED, dropped)

    def _latency_family(self, maps: Maps) -> Iterator[str]:
        read = ((part, _latencies(maps.latency_octaves(part.ids))) for part in self._worker_path)
        yield from _filled(RULE_LATENCY, read)

    def _output_families(self, maps: Maps) -> Iterator[str]:
        yield from _filled(OUTPUT_ACTIVE, ((part, _active(part)) for part in self._outputs))
        read = [(part, maps.output_totals(part.ids)) for part in self._outputs]
        for column, family in enumerate(OUTPUT_COUNTERS):
            yield from _filled(family, ((part, values[column::OUTPUT_COLUMNS]) for part, values in read))
        first = len(OUTPUT_COUNTERS)
        end = first + len(OUTPUT_DROP_REASONS)
        dropped = ((part, _columns(values, OUTPUT_COLUMNS, first, end)) for part, values in read)
        yield from _filled(OUTPUT_DROPPED, dropped)

    def _clock_offset(self) -> float:
        """Seconds from CLOCK_MONOTONIC to Unix time. It stays as it is until the clock is set, so that the
        time of one packet is told alike by every scrape."""
        offset_s = time.time() - time.monotonic()
        if abs(offset_s - self._clock_offset_s) > CLOCK_STEP_S:
            self._clock_offset_s = offset_s
        return self._clock_offset_s


def _describe(state: RuleState) -> _Described:
    stream = state.rule.stream
    labels = label_set(rule=state.rule.name, stream=str(stream), interface=stream.interface, path=state.path)
    outputs = [
        _Thing(
            output.output_id,
            label_set(rule=state.rule.name, output=str(output.output)),
            not output.pending,
        )
        for output in state.outputs
    ]
    return _Described(state, _Thing(state.rule_id, labels, not state.pending), outputs)


def _parts(things: Sequence[_Thing], families: Iterable[Family], old: Iterable[_Part]) -> list[_Part]:
    """The things in parts; an old part that would be the same is kept."""
    known = {part.ids[0]: part for part in old}
    parts = []
    for first in range(0, len(things), CHUNK):
        chunk = things[first : first + CHUNK]
        part = known.get(chunk[0].number)
        if part is None or part.things != chunk:
            label_sets = [thing.labels for thing in chunk]
            templates = {family: family.template(label_sets) for family in families}
            part = _Part(chunk, [thing.number for thing in chunk], templates)
        parts.append(part)
    return parts


def _filled(family: Family, values: Iterable[tuple[_Part, Iterable[float]]]) -> Iterator[str]:
    yield family.head
    for part, numbers in values:
        yield part.templates[family] % tuple(numbers)


def _active(part: _Part) -> list[int]:
    return [int(thing.active) for thing in part.things]


def _last_seen(values: Sequence[int], offset_s: float) -> list[float]:
    """Unix times; 0 stays 0: never."""
    return [ns and round(ns / 1e9 + offset_s, 3) for ns in values[_LAST_SEEN_COLUMN::RULE_COLUMNS]]


def _latencies(octaves: Sequence[int]) -> list[float]:
    """What the library writes of a histogram: the buckets, how many in all, twice, and their sum."""
    filled: list[float] = []
    for first in range(0, len(octaves), OCTAVE_COLUMNS):
        *buckets, total, sum_ns = octaves[first : first + OCTAVE_COLUMNS]
        filled += (*buckets, total, total, sum_ns / 1e9)
    return filled


def _columns(values: Sequence[int], width: int, first: int, end: int) -> list[int]:
    """The columns from first to before end of each row."""
    rows = range(0, len(values), width)
    return [value for row in rows for value in values[row + first : row + end]]
