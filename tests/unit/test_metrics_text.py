"""The text that Prometheus reads: labels and values exactly, whatever an interface is called."""

import re

from hypothesis import given
from hypothesis import strategies as st

from mcr.metrics.text import Family, Line, label_text

LABEL = re.compile(r'name="((?:[^"\\\n]|\\["\\n])*)"')


def unescaped(value: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], value)


@given(st.text().filter(lambda text: "\0" not in text))
def test_any_label_survives(value: str) -> None:
    family = Family("m", "gauge", "Help.")
    for text in (
        family.text([(label_text(name=value), 3)]).removeprefix(family.head),
        family.template([label_text(name=value)]) % 3,
    ):
        match = re.fullmatch(r"m\{(.*)\} 3\n", text, re.DOTALL)
        assert match is not None
        label = LABEL.fullmatch(match[1])
        assert label is not None and unescaped(label[1]) == value


def test_a_template_has_a_gap_for_each_line_of_each_label_set() -> None:
    family = Family(
        "m", "histogram", "Help.", (Line("_bucket", label_text(le="1")), Line("_sum", value="%.3f"))
    )
    template = family.template([label_text(rule="a"), label_text(rule="b")])
    assert (template % (1, 0.5, 2, 1.25)).splitlines() == [
        'm_bucket{rule="a",le="1"} 1',
        'm_sum{rule="a"} 0.500',
        'm_bucket{rule="b",le="1"} 2',
        'm_sum{rule="b"} 1.250',
    ]


def test_a_family_without_samples_is_only_its_head() -> None:
    assert Family("m", "counter", "Help.").text([]) == "# HELP m Help.\n# TYPE m counter\n"


def test_a_sample_without_labels_has_no_braces() -> None:
    assert Family("m", "gauge", "Help.").text([("", 1)]).endswith("\nm 1\n")
