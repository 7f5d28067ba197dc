"""Tables and numbers for people: aligned, and never a digit cut."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcr.cli.tables import NARROWEST, amount, duration, table


def test_columns_are_aligned_and_numbers_stand_to_the_right() -> None:
    rows = [
        {"rule": "cam", "sent": 7, "last_errno": None},
        {"rule": "longer", "sent": 12345, "last_errno": 1},
    ]
    assert table(rows, ("rule", "sent", "last_errno")) == [
        "RULE     SENT  LAST ERRNO",
        "cam         7           -",
        "longer  12345           1",
    ]


def test_the_widest_name_is_cut_first_and_no_number_is() -> None:
    rows = [{"rule": "a-rule-with-a-long-name", "to": "10.0.0.1:5000", "sent": 123456789012}]
    assert table(rows, ("rule", "to", "sent"), width=40, names=("rule", "to")) == [
        "RULE          TO                    SENT",
        "a-rule-with…  10.0.0.1:50…  123456789012",
    ]


@given(
    st.lists(
        st.tuples(st.text("abc-%:", min_size=1, max_size=60), st.integers(0, 2**64)), min_size=1, max_size=5
    ),
    st.integers(1, 120),
)
def test_any_table_fits_or_has_names_of_the_least_width(rows: list[tuple[str, int]], width: int) -> None:
    lines = table(
        [{"name": name, "count": count} for name, count in rows],
        ("name", "count"),
        width=width,
        names=("name",),
    )
    digits = max(5, *(len(str(count)) for _, count in rows))
    longest = max(4, *(len(name) for name, _ in rows))
    assert max(map(len, lines)) <= max(width, min(longest, NARROWEST) + 2 + digits)
    for line, (_, count) in zip(lines[1:], rows, strict=True):
        assert line.endswith(str(count))


def test_what_is_not_there_is_a_dash() -> None:
    assert table([{"a": None, "b": ""}], ("a", "b"))[1].split() == ["-", "-"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0, "0"),
        (0.25, "0.2"),
        (999, "999"),
        (999.6, "1.00k"),
        (1020, "1.02k"),
        (99960, "100k"),
        (12_600_000, "12.6M"),
        (845e9, "845G"),
        (2.5e12, "2.50T"),
    ],
)
def test_amounts(value: float | None, shown: str) -> None:
    assert amount(value) == shown


@given(st.floats(0, 9.99e14))
def test_an_amount_has_at_most_5_columns_and_is_right_to_a_twentieth(value: float) -> None:
    shown = amount(value)
    assert len(shown) <= 5
    match = re.fullmatch(r"([\d.]+)([kMGT]?)", shown)
    assert match is not None
    told = float(match[1]) * 1000 ** " kMGT".index(match[2] or " ")
    assert told == pytest.approx(value, rel=0.05, abs=0.06)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (7.4e-7, "740ns"),
        (1.23e-5, "12.3µs"),
        (1.02e-3, "1.02ms"),
        (0.9996, "1.00s"),
        (4.3, "4.30s"),
        (120, "120s"),
    ],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


@given(st.floats(0, 1e4))
def test_a_duration_has_at_most_6_columns(seconds: float) -> None:
    assert len(duration(seconds)) <= 6
