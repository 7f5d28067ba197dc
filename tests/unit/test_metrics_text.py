"""The text of thousands of label sets: what prometheus_client reads from it is what it was made of."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from mcr.metrics.text import VALUE, Family, gaps, label_set


def parsed(text: str) -> list[tuple[str, dict[str, str], float]]:
    return [
        (name, labels, value)
        for family in text_string_to_metric_families(text)
        for name, labels, value, *_ in family.samples
    ]


@given(st.lists(st.text(), min_size=1))
def test_any_label_survives(values: list[str]) -> None:
    metric = GaugeMetricFamily("m", "Help, 100 %s.", labels=["rule"])
    metric.add_metric(gaps("rule"), VALUE)
    family = Family.of(metric)
    template = family.template(label_set(rule=value) for value in values)
    text = family.head + template % tuple(range(len(values)))
    assert parsed(text) == [("m", {"rule": value}, number) for number, value in enumerate(values)]


def test_large_counts_are_exact() -> None:
    metric = CounterMetricFamily("m_total", "Help.", labels=["rule"])
    metric.add_metric(gaps("rule"), VALUE)
    assert (
        Family.of(metric).template([label_set(rule="a")]) % (2**64 - 1)
        == f'm_total{{rule="a"}} {2**64 - 1}\n'
    )


def test_a_template_has_a_gap_for_each_sample_of_each_label_set() -> None:
    metric = HistogramMetricFamily("m", "Help.", labels=["rule"])
    metric.add_metric(gaps("rule"), [("1", VALUE), ("+Inf", VALUE)], VALUE)
    family = Family.of(metric)
    template = family.template([label_set(rule="a"), label_set(rule="b")])
    assert parsed(family.head + template % (1, 3, 3, 0.5, 2, 4, 4, 1.25e-05)) == [
        ("m_bucket", {"rule": "a", "le": "1"}, 1),
        ("m_bucket", {"rule": "a", "le": "+Inf"}, 3),
        ("m_count", {"rule": "a"}, 3),
        ("m_sum", {"rule": "a"}, 0.5),
        ("m_bucket", {"rule": "b", "le": "1"}, 2),
        ("m_bucket", {"rule": "b", "le": "+Inf"}, 4),
        ("m_count", {"rule": "b"}, 4),
        ("m_sum", {"rule": "b"}, 1.25e-05),
    ]


def test_a_family_without_samples_is_only_its_head() -> None:
    family = Family.of(CounterMetricFamily("m_total", "Help.", labels=["rule"]))
    assert (family.head, family.block) == ("# HELP m_total Help.\n# TYPE m_total counter\n", "")
