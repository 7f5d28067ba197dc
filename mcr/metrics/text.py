"""Prometheus' text format: families of samples, and templates for thousands of them.

A template is the text of many samples with a gap for each value; filling it in is one step of Python's own
formatting, which takes about 0.1 µs a sample where building each line takes several. This module must never
know what a rule is.

https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_SLOT = "\0"  # where a template's labels go; no label has it


def label_text(**labels: str) -> str:
    """`rule="cam",reason="oversize"`."""
    return ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())


@dataclass(frozen=True, slots=True)
class Line:
    """One of the samples that every label set of a family has: what is added to the name and to the labels,
    and how its value is formatted."""

    suffix: str = ""
    labels: str = ""
    value: str = "%d"


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with all its samples, which Prometheus wants next to each other."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    lines: Sequence[Line] = (Line(),)

    @property
    def head(self) -> str:
        return f"# HELP {self.name} {self.help}\n# TYPE {self.name} {self.kind}\n"

    def template(self, label_sets: Iterable[str]) -> str:
        """The samples of each label set, to be filled in with as many values as there are lines."""
        block = "".join(
            f"{self.name}{line.suffix}{{{_joined(_SLOT, line.labels)}}} {line.value}\n" for line in self.lines
        )
        return "".join(block.replace(_SLOT, labels.replace("%", "%%")) for labels in label_sets)

    def text(self, samples: Iterable[tuple[str, float]]) -> str:
        """The whole family: label sets and values."""
        return self.head + "".join(f"{self.name}{_braced(labels)} {value}\n" for labels, value in samples)


def _joined(*labels: str) -> str:
    return ",".join(text for text in labels if text)


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""
