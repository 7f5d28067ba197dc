"""What the traced programs tell of one frame, and that they do with it what the others do.

Clones of rules with several outputs are seen in tests/netns only, because BPF_PROG_TEST_RUN runs no device
map program.
"""

from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest
from mcr._bpf import ffi, lib

from mcr.maps import DROP_REASONS, OUTPUT_DROP_REASONS, address_bytes, rule_key
from mcr.stream import Stream
from mcr.tap_events import LARGEST_SNAPLEN, Event
from mcr.tap_events import Verdict as Told
from tests.kernel.packets import (
    CUSTOMER_TAG,
    GROUP,
    GROUP6,
    IPV4,
    MORE_FRAGMENTS,
    PORT,
    SERVICE_TAG,
    SOURCE,
    SOURCE6,
    datagram4,
    datagram6,
    ethernet,
    ipv4,
    udp,
)
from tests.kernel.relay import Relay, Verdict

RULE, OUTPUT = 7, 9
STREAM, STREAM6 = Stream(GROUP, PORT, "in0"), Stream(GROUP6, PORT, "in0")
FRAME, FRAME6 = datagram4(b"seventeen bytes!!"), datagram6(b"seventeen bytes!!")
RING_BYTES = lib.MCR_TAP_RING_PAGES * 4096


def wanted(relay: Relay, stream: Stream = STREAM) -> Any:
    """The filter of a trace of the stream."""
    return rule_key(stream, relay.ifindex)


def the_one(events: list[Event]) -> Event:
    (event,) = events
    return event


def put_output(relay: Relay, **fields: int | bytes) -> None:
    """A kernel-path rule for STREAM with one output."""
    plain: dict[str, int | bytes] = {
        "ifindex": relay.other_ifindex, "mtu": 1500, "dport": 6000, "ttl": 8,
        "mac_destination": bytes.fromhex("01005e020202"), "mac_source": bytes.fromhex("020000000b0b"),
        "saddr": address_bytes(IPv4Address("10.2.0.1")), "daddr": address_bytes(IPv4Address("239.2.2.2")),
    }  # fmt: skip
    relay.set_output(OUTPUT, plain | fields)
    relay.add_kernel_rule(RULE, STREAM, OUTPUT)


@pytest.mark.parametrize(("stream", "frame"), [(STREAM, FRAME), (STREAM6, FRAME6)], ids=["ipv4", "ipv6"])
def test_a_packet_without_a_rule_is_told_as_passed(relay: Relay, stream: Stream, frame: bytes) -> None:
    with relay.tapped(wanted(relay, stream)) as tapped:
        result = relay.run(frame, queue=1)
        event = the_one(tapped.events())
    assert (result.verdict, result.frame, result.metadata) == (Verdict.PASS, frame, None)
    assert (event.verdict, event.rule_id, event.output_id, event.queue) == (Told.PASSED, 0, 0, 1)
    source = SOURCE if stream is STREAM else SOURCE6
    assert event.stream("in0") == replace(stream, source=source)
    assert (event.ifindex, event.ttl, event.tos, event.length) == (relay.ifindex, 17, 0xB8, len(frame))
    assert event.data == b""


def test_a_packet_for_the_worker_is_marked_with_the_time_that_its_event_has(relay: Relay) -> None:
    relay.add_rule(RULE, STREAM)
    relay.add_socket(0)
    with relay.tapped(wanted(relay)) as tapped:
        result = relay.run(FRAME)
        event = the_one(tapped.events())
    assert result.verdict is Verdict.REDIRECT
    assert result.metadata is not None
    assert result.metadata.flags == lib.MCR_METADATA_TRACED
    assert (event.verdict, event.rule_id) == (Told.TO_WORKER, RULE)
    assert event.time_ns == result.metadata.rx_time_ns
    assert event.time_ns % 64 == event.cpu
    assert event.done_ns > event.time_ns


@pytest.mark.parametrize(
    ("reason", "frame"),
    [
        ("no_worker", FRAME),
        ("fragment", datagram4(b"abc", fragment_field=MORE_FRAGMENTS)),
        ("truncated", datagram4(b"abc", total_length=1000)),
        ("bad_length", ethernet(ipv4(udp(b"abc", length=7)), IPV4)),
        ("oversize", datagram4(bytes(1600))),
    ],
)
def test_a_dropped_packet_is_told_with_its_reason(relay: Relay, reason: str, frame: bytes) -> None:
    relay.add_rule(RULE, STREAM)
    with relay.tapped(wanted(relay)) as tapped:
        assert relay.run(frame).verdict is Verdict.DROP
        event = the_one(tapped.events())
    assert (event.verdict, DROP_REASONS[event.reason], event.rule_id) == (Told.DROPPED, reason, RULE)
    assert relay.counted(RULE).dropped == {reason: 1}


def test_a_packet_of_the_kernel_path_is_told_with_its_output_and_both_its_frames(relay: Relay) -> None:
    put_output(relay)
    with relay.tapped(rule_id=RULE, bytes_before=LARGEST_SNAPLEN, bytes_after=LARGEST_SNAPLEN) as tapped:
        result = relay.run(FRAME)
        sent, packet = tapped.events()
    assert result.verdict is Verdict.REDIRECT
    assert (packet.verdict, packet.rule_id, packet.data) == (Told.RELAYED, RULE, FRAME)
    assert (sent.verdict, sent.output_id, sent.ifindex) == (Told.SENT, OUTPUT, relay.other_ifindex)
    assert (sent.data, sent.length, sent.checksum_offset) == (result.frame, len(FRAME), 0)
    assert sent.time_ns == packet.time_ns
    assert packet.done_ns >= sent.done_ns > packet.time_ns


@pytest.mark.parametrize(
    ("reason", "fields"),
    [("ttl_expired", {"flags": lib.MCR_OUTPUT_DECREMENT_TTL}), ("too_large", {"mtu": 40})],
)
def test_what_an_output_does_not_send_is_told_with_its_reason(
    relay: Relay, reason: str, fields: dict[str, int]
) -> None:
    put_output(relay, **fields)
    with relay.tapped(rule_id=RULE, bytes_after=100) as tapped:
        assert relay.run(datagram4(b"seventeen bytes!!", ttl=1)).verdict is Verdict.DROP
        dropped, packet = tapped.events()
    assert packet.verdict == Told.RELAYED
    assert (dropped.verdict, OUTPUT_DROP_REASONS[dropped.reason]) == (Told.NOT_SENT, reason)
    assert (dropped.output_id, dropped.data) == (OUTPUT, b"")
    assert relay.sent(OUTPUT).dropped == {reason: 1}


@pytest.mark.parametrize("vlan", [0, 100])
def test_a_checksum_that_stays_partial_is_told_with_its_place(relay: Relay, vlan: int) -> None:
    put_output(relay, vlan=vlan)
    relay.add_kernel_rule(RULE, STREAM, OUTPUT, flags=lib.MCR_RULE_GENERIC)
    frame = ethernet(ipv4(udp(b"seventeen bytes!!", partial=True)), IPV4)
    with relay.tapped(rule_id=RULE, bytes_after=100) as tapped:
        relay.run(frame)
        sent, _ = tapped.events()
    assert sent.checksum_offset == (38 if vlan else 34)


def test_bytes_are_cut_off_where_it_was_asked(relay: Relay) -> None:
    put_output(relay)
    with relay.tapped(rule_id=RULE, bytes_before=20, bytes_after=16) as tapped:
        result = relay.run(FRAME)
        sent, packet = tapped.events()
    assert (packet.data, packet.length) == (FRAME[:20], len(FRAME))
    assert (sent.data, sent.length) == (result.frame[:16], len(FRAME))


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (STREAM, True),
        (replace(STREAM, port=None), True),
        (replace(STREAM, source=SOURCE), True),
        (replace(STREAM, port=PORT + 1), False),
        (replace(STREAM, source=IPv4Address("10.1.0.2")), False),
        (replace(STREAM, address=IPv4Address("239.1.1.2")), False),
        (replace(STREAM, vlan=100), False),
    ],
    ids=str,
)
def test_only_packets_of_the_stream_are_told(relay: Relay, stream: Stream, told: bool) -> None:
    with relay.tapped(wanted(relay, stream)) as tapped:
        relay.run(FRAME)
        assert len(tapped.events()) == told


@pytest.mark.parametrize(("stream", "told"), [(STREAM, 3), (replace(STREAM, vlan=100), 2)], ids=str)
def test_tags_matter_only_where_they_are_named(relay: Relay, stream: Stream, told: int) -> None:
    tagged = datagram4(b"abc", ((CUSTOMER_TAG, 100),))
    twice = datagram4(b"abc", ((SERVICE_TAG, 200), (CUSTOMER_TAG, 100)))
    with relay.tapped(wanted(relay, stream)) as tapped:
        for frame in (FRAME, tagged, twice):
            relay.run(frame)
        assert len(tapped.events()) == told


def test_another_interface_is_not_told(relay: Relay) -> None:
    with relay.tapped(wanted(relay)) as tapped:
        relay.run(FRAME, ifindex=relay.other_ifindex)
        assert tapped.events() == []


def test_a_capture_takes_the_packets_of_its_rule_alone(relay: Relay) -> None:
    relay.add_rule(RULE, replace(STREAM, source=SOURCE))
    relay.add_rule(RULE + 1, STREAM)
    with relay.tapped(rule_id=RULE + 1) as tapped:
        relay.run(FRAME)
        relay.run(datagram4(b"abc", source=IPv4Address("10.1.0.9")))
        assert the_one(tapped.events()).rule_id == RULE + 1


def test_beyond_its_limit_a_packet_is_neither_told_nor_marked(relay: Relay) -> None:
    relay.add_rule(RULE, STREAM)
    relay.add_socket(0)
    with relay.tapped(wanted(relay), limit=2) as tapped:
        flags = [result.metadata.flags for _ in range(4) if (result := relay.run(FRAME)).metadata]
        assert len(tapped.events()) == 2
        assert relay.maps.tap_counts() == (2, 0)
    assert flags == [lib.MCR_METADATA_TRACED] * 2 + [0] * 2


def test_after_its_deadline_nothing_is_told(relay: Relay) -> None:
    with relay.tapped(wanted(relay), deadline_ns=1) as tapped:
        relay.run(FRAME)
        assert tapped.events() == []


def test_a_full_ring_costs_events_which_are_counted_and_no_packets(relay: Relay) -> None:
    put_output(relay)
    relay.add_kernel_rule(RULE, STREAM, OUTPUT, frame_limit=20_000)
    frame = datagram4(bytes(8000))
    relay.set_output(OUTPUT, {"ifindex": relay.other_ifindex, "mtu": 9000, "ttl": 8})
    count = RING_BYTES // len(frame) + 50
    with relay.tapped(rule_id=RULE, bytes_before=LARGEST_SNAPLEN) as tapped:
        verdicts = {relay.run(frame).verdict for _ in range(count)}
        taken, lost = relay.maps.tap_counts()
        told = tapped.events()
    assert verdicts == {Verdict.REDIRECT}
    assert taken == count
    assert lost > 0
    assert len(told) + lost == 2 * count  # each packet's, and its output's
    assert relay.sent(OUTPUT).packets == count


@pytest.mark.parametrize("kernel", [False, True], ids=["worker", "kernel"])
def test_traced_programs_do_with_packets_what_the_others_do(relay: Relay, kernel: bool) -> None:
    if kernel:
        put_output(relay)
    else:
        relay.add_rule(RULE, STREAM)
        relay.add_socket(0)
    frames = [
        FRAME, FRAME6, datagram4(b""), datagram4(bytes(1600)), datagram4(b"abc", ttl=0),
        datagram4(b"abc", total_length=1000), datagram4(b"abc", fragment_field=MORE_FRAGMENTS),
        datagram4(bytes(24), fragment_field=3), datagram4(b"abc", ((CUSTOMER_TAG, 5),)),
        datagram4(b"abc", protocol=6), b"\0" * 14, ethernet(ipv4(udp(b"a", partial=True)), IPV4),
    ]  # fmt: skip

    def fates() -> list[Any]:
        relay.forget_fragments()
        relay.maps.clear_rule(RULE)
        relay.maps.clear_output(OUTPUT)
        results = [relay.run(frame) for frame in frames]
        metadata = [replace(each.metadata, flags=0) if each.metadata else None for each in results]
        counts = relay.counted(RULE), relay.sent(OUTPUT)
        return [*((each.verdict, each.frame) for each in results), *metadata, *counts]

    untraced = fates()
    with relay.tapped(wanted(relay)) as tapped:
        assert fates() == untraced
        assert tapped.events() != []
    with relay.tapped(wanted(relay, STREAM6)):  # traced, but not wanted
        assert fates() == untraced


def write_report(relay: Relay, slot: int, number: int, **event: int) -> None:
    """As a worker does, or one that has gone mad."""
    report = ffi.new("struct mcr_tap_report *", {"number": number, "event": event})
    relay.write("tap_reports", slot, report)


def test_reports_are_read_once_and_their_word_on_bytes_is_not_believed(relay: Relay) -> None:
    write_report(relay, 0, 0)
    with relay.tapped() as tapped:
        write_report(relay, 1, 1, output_id=9, captured=1 << 30)
        write_report(relay, 0, 1)
        event = the_one(tapped.events())
        assert (event.output_id, event.data) == (9, b"")
        assert tapped.events() == []
        write_report(relay, 0, 2)  # taken, and not yet written
        assert tapped.events() == []
        write_report(relay, 2, 2, output_id=10)
        assert the_one(tapped.events()).output_id == 10


@pytest.mark.parametrize("number", [5000, 1 << 40, (1 << 64) - 1])
def test_reports_that_were_written_over_are_counted(relay: Relay, number: int) -> None:
    write_report(relay, 0, 0)
    with relay.tapped() as tapped:
        write_report(relay, 0, number)
        tapped.events()
        assert tapped.missed() >= number - lib.MCR_TAP_REPORTS
