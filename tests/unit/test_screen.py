"""What `mcr top` and `stats --watch` show: rates from two readings, and a screen that fits any terminal."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcr.cli.screen import SORTS, View, render, scrolled
from mcr.cli.streams import Reading, Stream, streams
from mcr.latency import lower_bound_ns

Row = dict[str, Any]


def rule(name: str = "cam", received: int = 0, dropped: int = 0, **more: object) -> Row:
    return {
        "object": "rule", "rule": name, "stream": "239.1.1.1%eth0:5000", "path": "worker", "pending": "",
        "received_packets": received, "received_bytes": 100 * received, "relayed_packets": received - dropped,
        "last_seen_seconds": 0.1, "dropped_oversize": dropped, "latency_max_seconds": None, **more,
    }  # fmt: skip


def output(name: str = "cam", sent: int = 0, dropped: int = 0) -> Row:
    return {
        "object": "output", "rule": name, "output": "10.0.0.1:1", "sent_packets": sent,
        "sent_bytes": 100 * sent, "dropped_denied": dropped,
    }  # fmt: skip


def stream(name: str, **more: Any) -> Stream:
    known: dict[str, Any] = {
        "stream": "239.1.1.1%eth0:5000", "path": "kernel", "received_packets": 1.0, "received_bits": 8.0,
        "relayed_packets": 1.0, "dropped_packets": 0.0, "lost_packets": 0.0, "latency_p50_s": None,
        "latency_p99_s": None, "state": "ok", "outputs": (),
    }  # fmt: skip
    return Stream(rule=name, **(known | more))


def test_rates_are_the_difference_of_two_readings_per_second() -> None:
    before = Reading(10.0, [rule(received=1000, dropped=1), output(sent=999)])
    now = Reading(12.0, [rule(received=3000, dropped=5), output(sent=2985, dropped=10)])
    (shown,) = streams(before, now)
    assert (shown.received_packets, shown.received_bits, shown.relayed_packets) == (1000, 800_000, 998)
    assert (shown.dropped_packets, shown.lost_packets, shown.state) == (2, 7, "loss")
    assert (shown.outputs[0].sent_packets, shown.outputs[0].dropped_packets) == (993, 5)


@pytest.mark.parametrize("before", [None, Reading(0.0, []), Reading(0.0, [rule(received=2000)])])
def test_there_is_no_rate_without_an_earlier_smaller_count(before: Reading | None) -> None:
    (shown,) = streams(before, Reading(1.0, [rule(received=1000)]))
    assert shown.received_packets is None
    assert shown.state == "ok"


def test_a_stream_is_silent_or_pending_whatever_it_lost() -> None:
    rows = [rule("a", pending="there is no interface eth0"), rule("b", last_seen_seconds=None)]
    rows.append(rule("c", last_seen_seconds=2.5))
    assert [each.state for each in streams(None, Reading(0.0, rows))] == ["pending", "silent", "silent"]


def test_latency_is_that_of_the_packets_between_two_readings() -> None:
    slow, quick = 100, 20
    seconds = (lower_bound_ns(slow) + 1) / 1e9
    before = Reading(0.0, [rule(latency_buckets={str(slow): 1000}, latency_max_seconds=seconds)])
    now = Reading(1.0, [rule(latency_buckets={str(slow): 1000, str(quick): 50}, latency_max_seconds=seconds)])
    (shown,) = streams(before, now)
    assert shown.latency_p99_s is not None
    assert lower_bound_ns(quick) / 1e9 <= shown.latency_p99_s <= lower_bound_ns(quick + 1) / 1e9


@given(
    st.lists(st.text("abc-1", min_size=1, max_size=64), max_size=60, unique=True),
    st.integers(1, 220),
    st.integers(1, 60),
    st.sampled_from(sorted(SORTS)),
    st.text("no supervisor", max_size=300),
)
def test_every_screen_has_the_size_of_the_terminal(
    names: list[str], width: int, height: int, sort: str, notice: str
) -> None:
    view = View("default", [stream(name) for name in names], "eth0 native xsk", notice, sort)
    lines = render(view, width, height)
    assert len(lines) <= height
    assert all(len(line.text) <= width for line in lines)


@pytest.mark.parametrize("width", [80, 200])
def test_numbers_and_state_are_whole_at_every_width(width: int) -> None:
    busy = stream(
        "a-rule-with-a-name-of-the-greatest-length-that-there-may-be-0001",
        stream="10.200.200.200@239.255.255.255%a-long-ifname12:50000,vlan=4000",
        received_packets=12_345_678.0, received_bits=123.4e9, lost_packets=99_960.0, latency_p99_s=0.0123,
        path="worker", state="pending",
    )  # fmt: skip
    row = render(View("default", [busy]), width, 24)[3].text
    assert row.split()[-6:] == ["worker", "12.3M", "123G", "100k", "12.3ms", "pending"]
    assert "…" in row or width == 200


def test_streams_are_sorted_by_what_the_key_says() -> None:
    shown = [
        stream("a", received_packets=1.0, received_bits=9.0, lost_packets=5.0),
        stream("b", received_packets=3.0, received_bits=1.0, lost_packets=None, latency_p99_s=0.5),
        stream("c", received_packets=2.0, received_bits=5.0, lost_packets=7.0),
    ]
    orders = {
        key: "".join(line.text[0] for line in render(View("i", shown, sort=key), 80, 24)[3:6])
        for key in SORTS
    }
    assert orders == {"r": "bca", "b": "acb", "l": "cab", "p": "bac", "n": "abc"}


def test_scrolling_stops_at_both_ends() -> None:
    view = View("i", [stream(f"{number:03}") for number in range(100)], sort="n")
    assert scrolled(view, -5, 24).first == 0
    assert scrolled(view, 1000, 24).first == 80
    last = render(scrolled(view, 1000, 24), 80, 24)
    assert last[22].text.startswith("099") and "81-100 of 100" in last[23].text


def test_a_notice_takes_the_place_of_the_interfaces_and_the_streams_stay() -> None:
    lines = render(View("i", [stream("cam")], "eth0", "no supervisor is running"), 80, 24)
    assert lines[1].text == "no supervisor is running"
    assert lines[3].text.startswith("cam")


def test_a_tiny_terminal_is_told_so() -> None:
    assert [line.text for line in render(View("i"), 20, 3)] == ["too small"]
