"""Metrics of thousands of label sets: the library's own text of one of them, with gaps, copied for each.

prometheus_client writes every line by itself: 50,000 samples take it 253 ms, filling in templates 3.3 ms
(each is one step of Python's own formatting). What a line looks like is still the library's business: this
module must never write a name or a suffix, and never know what a rule is.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

VALUE = float("nan")  # the library writes NaN; only values are between a blank and the end of a line
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "%": "%%"})


def gaps(*names: str) -> list[str]:
    """Label values that differ from label set to label set."""
    return [f"%({name})s" for name in names]


def label_set(**labels: str) -> dict[str, str]:
    """Values for the gaps of these names, as a template needs them."""
    return {name: value.translate(_ESCAPES) for name, value in labels.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _One(Collector):
    metric: Metric

    def collect(self) -> Iterator[Metric]:
        yield self.metric


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A metric whose samples have gaps for label values, and VALUE for a value that each scrape fills in."""

    head: str
    block: str

    @classmethod
    def of(cls, metric: Metric) -> "Family":
        registry = CollectorRegistry()
        registry.register(_One(metric))
        lines = generate_latest(registry).decode().splitlines(keepends=True)
        head = "".join(line for line in lines if line.startswith("#"))
        block = "".join(line for line in lines if not line.startswith("#"))
        return cls(head, block.replace(" NaN\n", " %%s\n"))

    def template(self, label_sets: Iterable[Mapping[str, str]]) -> str:
        """The samples of each label set, to be filled in with as many values as have VALUE."""
        return "".join([self.block % labels for labels in label_sets])
