"""The figures of one run, as values and as JSON.

A metric of a relay in a setting either has a figure or is refused with the reason, never both. This module
must never compute one.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.lanes import Setting
from mcr.errors import McrError

FORMAT = 2
DIRECT_LABEL = "no relay"
PEER_LABEL = "smcroute"  # what every other relay is compared with
PEER_METRIC = "peer_throughput_pps"  # of the peer, right before and after each figure of the relay: the mean
LATENCY_SHARES = (10, 50, 90)  # percent of throughput, at which latency is measured
USUAL_METRIC = "usual_throughput_pps"  # of the same relay in the usual setting, in the same rounds


def paired(values: Sequence[float], others: Sequence[float]) -> float | None:
    """The median of the rounds' ratios: what the machine does to a round it does to both.

    None if there is none, or the two were not measured in the same rounds.
    """
    if len(values) != len(others) or not values:
        return None
    ratios = [value / other for value, other in zip(values, others, strict=True) if other]
    return statistics.median(ratios) if ratios else None


@dataclass(slots=True)
class Record:
    """What is known of one relay in one setting.

    metrics: by name, the unit last in the name; medians unless the name says otherwise. refused: why there is
    no figure, by metric. trials: the numbers that the metrics were made from.
    """

    relay: str
    setting: Setting
    metrics: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    trials: dict[str, list[float]] = field(default_factory=dict)

    def put(self, metric: str, trials: Sequence[float]) -> None:
        """The median of the trials, which are kept."""
        if trials:
            self.metrics[metric] = statistics.median(trials)
            self.trials[metric] = list(trials)

    def spread(self, metric: str) -> float | None:
        """Between the least and the most of the trials, as a share of their median."""
        trials = self.trials.get(metric, [])
        middle = statistics.median(trials) if trials else 0.0
        return (max(trials) - min(trials)) / middle if middle else None


class Results:
    """The records of a run, with what they depend on: the machine, the method."""

    def __init__(self, machine: dict[str, Any], method: dict[str, Any]) -> None:
        self.machine, self.method = machine, method
        self._records: dict[tuple[str, Setting], Record] = {}

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def record(self, relay: str, setting: Setting) -> Record:
        """The record of a relay in a setting, a new one if need be."""
        return self._records.setdefault((relay, setting), Record(relay, setting))

    def find(self, relay: str, setting: Setting) -> Record | None:
        return self._records.get((relay, setting))

    def metric(self, relay: str, setting: Setting, name: str) -> float | None:
        """A figure; None if it was not measured or refused."""
        record = self.find(relay, setting)
        return record.metrics.get(name) if record else None

    def share(self, relay: str, setting: Setting, name: str, reference: str) -> float | None:
        """A figure of a relay as a share of what was measured next to it; None if there are not both.

        reference: PEER_METRIC or USUAL_METRIC.
        """
        record = self.find(relay, setting)
        if record is None or not {name, reference} <= record.metrics.keys():
            return None
        return paired(record.trials[name], record.trials[reference])

    def write(self, path: Path) -> None:
        content = {
            "format": FORMAT,
            "machine": self.machine,
            "method": self.method,
            "records": [asdict(record) for record in self],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Raises McrError."""
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise McrError(f"{path} has format {content['format']}, not {FORMAT}", "measure again")
            results = cls(content["machine"], content["method"])
            for row in content["records"]:
                record = Record(**{**row, "setting": Setting(**row["setting"])})
                results._records[record.relay, record.setting] = record
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise McrError(f"cannot read results from {path}: {error}", "measure: make bench") from error
        return results
