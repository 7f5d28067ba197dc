"""What the XDP program does with one frame: its verdict, the bytes, the metadata and every counter.

Expected offsets are spelled out from the RFCs; nothing here asks a parser what it thinks.
"""

import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest

from mcr.maps import DROP_REASONS
from mcr.stream import Stream
from tests.kernel import packets
from tests.kernel.packets import (
    CUSTOMER_TAG,
    DESTINATION,
    GROUP,
    GROUP6,
    HOP_BY_HOP,
    IPV4,
    IPV6,
    PORT,
    ROUTING,
    SERVICE_TAG,
    SOURCE,
    SOURCE6,
    Extension,
    datagram4,
    datagram6,
    ethernet,
    ipv4,
    ipv6,
    udp,
)
from tests.kernel.relay import Counted, Metadata, Relay, Verdict

RULE, RULE6 = 7, 4095  # the highest rule_id there is
PAYLOAD = b"seventeen bytes!!"
ADDRESSES6 = SOURCE6.packed + GROUP6.packed
STREAM = Stream(GROUP, PORT, "in0")
STREAM6 = Stream(GROUP6, PORT, "in0")
NOTHING = Counted()
MONOTONIC_COARSE = 6  # CLOCK_MONOTONIC_COARSE of linux/time.h
CHAIN = (
    packets.options(HOP_BY_HOP, 1),
    packets.options(DESTINATION),
    packets.options(ROUTING, 2),
    packets.fragment(),
    packets.authentication(),
    packets.options(DESTINATION, 4),
)
CHAIN_BYTES = 16 + 8 + 24 + 8 + 24 + 40


@pytest.fixture
def ready(relay: Relay) -> Relay:
    """One IPv4 and one IPv6 rule, and a socket on the first queue."""
    relay.add_rule(RULE, STREAM)
    relay.add_rule(RULE6, STREAM6)
    relay.add_socket(0)
    return relay


def metadata4(payload_length: int, *, ip_offset: int = 14, options_length: int = 0) -> Metadata:
    payload_offset = ip_offset + 20 + options_length + 8
    return Metadata(RULE, payload_offset, payload_length, ip_offset, PORT, ttl=17, tos=0xB8)


def metadata6(payload_length: int, *, ip_offset: int = 14, extensions_length: int = 0) -> Metadata:
    payload_offset = ip_offset + 40 + extensions_length + 8
    return Metadata(RULE6, payload_offset, payload_length, ip_offset, PORT, ttl=17, tos=0xB8)


def assert_relayed(relay: Relay, frame: bytes, metadata: Metadata) -> None:
    """The frame goes, untouched and counted once, to the socket, with exactly this metadata before it."""
    result = relay.run(frame)
    assert (result.verdict, result.metadata) == (Verdict.REDIRECT, metadata)
    assert result.frame == frame
    assert relay.counted(metadata.rule_id) == Counted(1, metadata.payload_length)
    assert relay.counted(RULE if metadata.rule_id == RULE6 else RULE6) == NOTHING


def assert_passed(relay: Relay, frame: bytes, *, ifindex: int | None = None) -> None:
    """The frame goes to the stack byte for byte, and no counter moves."""
    result = relay.run(frame, ifindex=ifindex)
    assert (result.verdict, result.metadata) == (Verdict.PASS, None)
    assert result.frame == frame
    for rule_id in (RULE, RULE6):
        assert relay.counted(rule_id) == NOTHING
        assert relay.counts(rule_id).last_seen_ns == 0


def assert_dropped(
    relay: Relay, frame: bytes, reason: str, *, rule_id: int = RULE, payload_bytes: int = 0
) -> None:
    """The frame is dropped and counted once, with exactly this reason."""
    assert relay.run(frame).verdict is Verdict.DROP
    assert relay.counted(rule_id) == Counted(1, payload_bytes, {reason: 1})
    assert relay.counted(RULE if rule_id == RULE6 else RULE6) == NOTHING


# Relayed: IPv4, IPv6, VLAN tags


@pytest.mark.parametrize("size", [0, 1, 17, 512, 1472])
def test_every_payload_size_is_relayed_over_ipv4(ready: Relay, size: int) -> None:
    assert_relayed(ready, datagram4(bytes(size)), metadata4(size))


@pytest.mark.parametrize("size", [0, 1, 17, 512, 1452])
def test_every_payload_size_is_relayed_over_ipv6(ready: Relay, size: int) -> None:
    assert_relayed(ready, datagram6(bytes(size)), metadata6(size))


@pytest.mark.parametrize("words", range(6, 16))
def test_ipv4_options_are_skipped(ready: Relay, words: int) -> None:
    length = 4 * words - 20
    frame = datagram4(PAYLOAD, ip_options=b"\x01" * length)
    assert_relayed(ready, frame, metadata4(17, options_length=length))


@pytest.mark.parametrize("flag", [0x4000, 0x8000], ids=["dont_fragment", "reserved"])
def test_an_ipv4_flag_that_says_nothing_of_fragments_is_no_obstacle(ready: Relay, flag: int) -> None:
    assert_relayed(ready, datagram4(PAYLOAD, fragment_field=flag), metadata4(17))


@pytest.mark.parametrize(
    ("extensions", "length"),
    [
        ((packets.options(HOP_BY_HOP),), 8),
        ((packets.options(HOP_BY_HOP, 255),), 2048),
        ((packets.options(DESTINATION, 1),), 16),
        ((packets.options(ROUTING, 2),), 24),
        ((packets.authentication(),), 24),
        ((packets.authentication(0),), 12),
        ((packets.authentication(4),), 28),
        ((packets.fragment(),), 8),
        ((packets.options(HOP_BY_HOP), packets.fragment()), 16),
        (CHAIN, CHAIN_BYTES),
    ],
    ids=[
        "hop_by_hop", "longest", "destination", "routing", "authentication", "short_authentication",
        "long_authentication", "atomic_fragment", "two", "six",
    ],
)  # fmt: skip
def test_ipv6_extension_headers_are_skipped(
    relay: Relay, extensions: tuple[Extension, ...], length: int
) -> None:
    relay.add_rule(RULE6, STREAM6, frame_limit=4096)
    relay.add_socket(0)
    assert_relayed(relay, datagram6(PAYLOAD, extensions), metadata6(17, extensions_length=length))


def test_more_than_six_ipv6_extension_headers_pass(ready: Relay) -> None:
    assert_passed(ready, datagram6(PAYLOAD, (*CHAIN, packets.options(DESTINATION))))


@pytest.mark.parametrize(
    ("tags", "vlan", "vlan_outer"),
    [
        ([(CUSTOMER_TAG, 100)], 100, 0),
        ([(CUSTOMER_TAG, 0xB000 | 100)], 100, 0),
        ([(SERVICE_TAG, 100)], 100, 0),
        ([(CUSTOMER_TAG, 0xA000)], 0, 0),
        ([(CUSTOMER_TAG, 0), (CUSTOMER_TAG, 0)], 0, 0),
        ([(SERVICE_TAG, 200), (CUSTOMER_TAG, 100)], 100, 200),
        ([(CUSTOMER_TAG, 200), (CUSTOMER_TAG, 100)], 100, 200),
        ([(CUSTOMER_TAG, 0xE000), (CUSTOMER_TAG, 100)], 100, 0),
        ([(SERVICE_TAG, 200), (CUSTOMER_TAG, 0xE000)], 200, 0),
    ],
    ids=[
        "tag", "tag_with_priority", "service_tag", "priority_tag", "two_priority_tags",
        "service_and_customer", "two_customer_tags", "tag_in_priority_tag", "priority_tag_in_tag",
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", [4, 6])
def test_a_rule_finds_its_tagged_stream(
    relay: Relay, family: int, tags: list[tuple[int, int]], vlan: int, vlan_outer: int
) -> None:
    base = STREAM if family == 4 else STREAM6
    stream = replace(base, vlan=vlan, vlan_outer=vlan_outer)
    relay.add_rule(RULE if family == 4 else RULE6, stream)
    relay.add_socket(0)
    offset = 14 + 4 * len(tags)
    if family == 4:
        assert_relayed(relay, datagram4(PAYLOAD, tags), metadata4(17, ip_offset=offset))
    else:
        assert_relayed(relay, datagram6(PAYLOAD, tags=tags), metadata6(17, ip_offset=offset))


@pytest.mark.parametrize(
    ("vlan", "vlan_outer", "tags"),
    [
        (0, 0, [(CUSTOMER_TAG, 100)]),
        (100, 0, []),
        (100, 0, [(CUSTOMER_TAG, 101)]),
        (100, 0, [(CUSTOMER_TAG, 0x1000)]),
        (100, 0, [(SERVICE_TAG, 200), (CUSTOMER_TAG, 100)]),
        (100, 200, [(CUSTOMER_TAG, 100)]),
        (100, 200, [(SERVICE_TAG, 100), (CUSTOMER_TAG, 200)]),
        (100, 200, [(SERVICE_TAG, 201), (CUSTOMER_TAG, 100)]),
        (0, 0, [(CUSTOMER_TAG, 0)] * 3),
        (100, 200, [(SERVICE_TAG, 300), (SERVICE_TAG, 200), (CUSTOMER_TAG, 100)]),
    ],
)
def test_the_stream_with_other_tags_passes(
    relay: Relay, vlan: int, vlan_outer: int, tags: list[tuple[int, int]]
) -> None:
    relay.add_rule(RULE, replace(STREAM, vlan=vlan, vlan_outer=vlan_outer))
    relay.add_socket(0)
    assert_passed(relay, datagram4(PAYLOAD, tags))


@pytest.mark.parametrize("size", [0, 1, 17])
def test_ethernet_padding_is_no_payload(ready: Relay, size: int) -> None:
    frame = datagram4(bytes(size))
    assert len(frame) < 60
    assert_relayed(ready, frame + b"\xa5" * (60 - len(frame)), metadata4(size))


def test_a_udp_datagram_shorter_than_its_ip_packet_ends_where_udp_says(ready: Relay) -> None:
    frame = ethernet(ipv4(udp(PAYLOAD) + b"behind it"), IPV4)
    assert_relayed(ready, frame, metadata4(17))


def test_a_udp_checksum_of_zero_is_relayed(ready: Relay) -> None:
    frame = ethernet(ipv4(udp(PAYLOAD, with_checksum=False)), IPV4)
    assert frame[40:42] == b"\0\0"
    assert_relayed(ready, frame, metadata4(17))


@pytest.mark.parametrize(("ttl", "tos"), [(1, 0), (2, 1), (255, 255)])
def test_ttl_and_dscp_are_in_the_metadata(ready: Relay, ttl: int, tos: int) -> None:
    assert_relayed(ready, datagram4(PAYLOAD, ttl=ttl, tos=tos), replace(metadata4(17), ttl=ttl, tos=tos))
    frame = ethernet(ipv6(udp(PAYLOAD, ADDRESSES6), traffic_class=tos, hop_limit=ttl), IPV6)
    assert ready.run(frame).metadata == replace(metadata6(17), ttl=ttl, tos=tos)


@pytest.mark.parametrize("port", [1, 255, 256, 65535])
def test_the_metadata_of_a_port_wildcard_has_the_port_of_the_packet(relay: Relay, port: int) -> None:
    relay.add_rule(RULE, replace(STREAM, port=None))
    relay.add_socket(0)
    frame = ethernet(ipv4(udp(PAYLOAD, port=port)), IPV4)
    assert_relayed(relay, frame, replace(metadata4(17), dport=port))


def test_a_frame_of_several_buffers_is_relayed_whole(relay: Relay) -> None:
    relay.add_rule(RULE, STREAM, frame_limit=9042)
    relay.add_socket(0)
    assert_relayed(relay, datagram4(bytes(range(250)) * 36), metadata4(9000))


@pytest.mark.parametrize("length", [4, 8, 24, 32])
def test_metadata_is_right_before_the_frame_where_another_program_left_some(
    ready: Relay, length: int
) -> None:
    result = ready.run(datagram4(PAYLOAD), metadata_before=b"\xee" * length)
    assert (result.verdict, result.metadata) == (Verdict.REDIRECT, metadata4(17))


# Passed: what no rule names

OTHER_TRAFFIC = {
    "tcp": ethernet(ipv4(bytes(20), protocol=packets.TCP), IPV4),
    "icmp": ethernet(ipv4(b"\x08\0\0\0" + bytes(60), protocol=packets.ICMP), IPV4),
    "igmp": ethernet(ipv4(bytes(8), protocol=packets.IGMP), IPV4),
    "udp_lite": ethernet(ipv4(udp(PAYLOAD), protocol=136), IPV4),
    "icmpv6": ethernet(ipv6(bytes(24), protocol=packets.ICMPV6), IPV6),
    "tcp_over_ipv6": ethernet(ipv6(bytes(20), protocol=packets.TCP), IPV6),
    "no_next_header": ethernet(ipv6(b"", protocol=packets.NO_NEXT_HEADER), IPV6),
    "esp": ethernet(ipv6(udp(PAYLOAD, ADDRESSES6), protocol=packets.ESP), IPV6),
    "mobility": datagram6(PAYLOAD, [packets.options(packets.MOBILITY)]),
    "arp": ethernet(bytes(46), packets.ARP),
    "unknown_ethertype": ethernet(ipv4(udp(PAYLOAD)), 0x88B5),
    "ieee_802_3_length": ethernet(bytes(46), 46),
    "only_an_ethernet_header": ethernet(b"", IPV4),
    "other_group": datagram4(PAYLOAD, destination=IPv4Address("239.1.1.2")),
    "other_group_of_ipv6": ethernet(
        ipv6(udp(PAYLOAD, ADDRESSES6), destination=IPv6Address("ff15::1:2")), IPV6
    ),
    "other_port": ethernet(ipv4(udp(PAYLOAD, port=PORT + 1)), IPV4),
    "swapped_port": ethernet(ipv4(udp(PAYLOAD, port=PORT >> 8 | (PORT & 255) << 8)), IPV4),
    "ipv4_that_says_version_6": ethernet(ipv4(udp(PAYLOAD), first_byte=0x65), IPV4),
    "ipv6_that_says_version_4": ethernet(ipv6(udp(PAYLOAD, ADDRESSES6), version=4), IPV6),
    "ipv4_in_an_ipv6_ethertype": ethernet(ipv4(udp(PAYLOAD)), IPV6),
    "header_length_of_16": datagram4(PAYLOAD, first_byte=0x44),
    "total_length_without_room_for_udp": datagram4(PAYLOAD, total_length=27),
    "payload_length_without_room_for_udp": ethernet(ipv6(udp(PAYLOAD, ADDRESSES6), payload_length=7), IPV6),
    "later_fragment": datagram4(PAYLOAD, fragment_field=packets.MORE_FRAGMENTS | 1),
    "last_fragment": datagram4(PAYLOAD, fragment_field=185),
    "farthest_fragment": datagram4(PAYLOAD, fragment_field=0x1FFF),
    "later_fragment_of_ipv6": datagram6(PAYLOAD, [packets.fragment(1, more=True)]),
    "last_fragment_of_ipv6": datagram6(PAYLOAD, [packets.fragment(181)]),
    "farthest_fragment_of_ipv6": datagram6(PAYLOAD, [packets.fragment(0x1FFF)]),
}


@pytest.mark.parametrize("name", OTHER_TRAFFIC)
def test_other_traffic_passes_untouched(ready: Relay, name: str) -> None:
    assert_passed(ready, OTHER_TRAFFIC[name])


def test_ipv6_to_a_mapped_group_is_not_the_ipv4_stream(ready: Relay) -> None:
    mapped = IPv6Address("::ffff:239.1.1.1")
    assert_passed(
        ready, ethernet(ipv6(udp(PAYLOAD, SOURCE6.packed + mapped.packed), destination=mapped), IPV6)
    )


def test_another_source_passes_where_the_rule_names_one(relay: Relay) -> None:
    relay.add_rule(RULE, replace(STREAM, source=SOURCE))
    relay.add_socket(0)
    assert_passed(relay, datagram4(PAYLOAD, source=IPv4Address("10.1.0.2")))
    assert_relayed(relay, datagram4(PAYLOAD), metadata4(17))


def test_the_stream_on_another_interface_passes(ready: Relay) -> None:
    assert_passed(ready, datagram4(PAYLOAD), ifindex=ready.other_ifindex)
    assert_passed(ready, datagram6(PAYLOAD), ifindex=ready.other_ifindex)


@pytest.mark.parametrize("frame", [datagram4(b""), datagram6(b"", CHAIN)], ids=["ipv4", "ipv6"])
def test_a_frame_cut_off_before_its_ports_are_complete_passes(ready: Relay, frame: bytes) -> None:
    for length in range(14, len(frame)):
        assert_passed(ready, frame[:length])


# Dropped, each for one reason


@pytest.mark.parametrize("flags", [0x2000, 0x6000, 0xE000])
def test_the_first_fragment_is_counted_with_its_part_of_the_payload(ready: Relay, flags: int) -> None:
    frame = ethernet(ipv4(udp(PAYLOAD, length=4000), fragment_field=flags), IPV4)
    assert_dropped(ready, frame, "fragment", payload_bytes=17)


@pytest.mark.parametrize(
    "before", [(), (packets.options(HOP_BY_HOP),), (packets.options(ROUTING), packets.authentication())]
)
def test_the_first_fragment_of_ipv6_is_counted(ready: Relay, before: tuple[Extension, ...]) -> None:
    frame = datagram6(PAYLOAD, [*before, packets.fragment(more=True)])
    assert_dropped(ready, frame, "fragment", rule_id=RULE6, payload_bytes=17)


def test_an_atomic_fragment_header_in_a_first_fragment_does_not_hide_it(ready: Relay) -> None:
    frame = datagram6(PAYLOAD, [packets.fragment(more=True), packets.fragment()])
    assert_dropped(ready, frame, "fragment", rule_id=RULE6, payload_bytes=17)


FIRST4 = datagram4(PAYLOAD, fragment_field=packets.MORE_FRAGMENTS)
FIRST6 = datagram6(PAYLOAD, [packets.fragment(more=True)])
LATER4 = ethernet(ipv4(b"later part", fragment_field=185), IPV4)
LATER6 = ethernet(ipv6(b"later part", extensions=[packets.fragment(185)]), IPV6)


@pytest.mark.parametrize(
    ("first", "later", "rule_id"), [(FIRST4, LATER4, RULE), (FIRST6, LATER6, RULE6)], ids=["ipv4", "ipv6"]
)
def test_later_fragments_are_counted_with_the_rule_of_the_first(
    ready: Relay, first: bytes, later: bytes, rule_id: int
) -> None:
    assert_passed(ready, later)
    assert ready.run(first).verdict is Verdict.DROP
    for _ in range(3):
        assert ready.run(later).verdict is Verdict.DROP
    assert ready.counted(rule_id) == Counted(4, 17 + 3 * 10, {"fragment": 4})
    assert ready.run(later, ifindex=ready.other_ifindex).verdict is Verdict.PASS
    assert ready.counted(rule_id).packets == 4


@pytest.mark.parametrize(
    ("first", "later", "rule_id"), [(FIRST4, LATER4, RULE), (FIRST6, LATER6, RULE6)], ids=["ipv4", "ipv6"]
)
def test_a_truncated_fragment_is_counted_as_that(
    ready: Relay, first: bytes, later: bytes, rule_id: int
) -> None:
    assert_dropped(ready, first[:-1], "truncated", rule_id=rule_id)
    assert ready.run(later).verdict is Verdict.PASS  # what was cut off is not known as its first one
    ready.run(first)
    assert ready.run(later[:-1]).verdict is Verdict.DROP
    assert ready.counted(rule_id) == Counted(3, 17, {"truncated": 2, "fragment": 1})


@pytest.mark.parametrize(
    "later",
    [
        ethernet(ipv4(b"later part", fragment_field=185, identification=0x1235), IPV4),
        ethernet(ipv4(b"later part", fragment_field=185, source=IPv4Address("10.1.0.2")), IPV4),
        ethernet(ipv4(b"later part", fragment_field=185, destination=IPv4Address("239.1.1.2")), IPV4),
        ethernet(ipv4(b"later part", fragment_field=185, protocol=packets.TCP), IPV4),
        ethernet(ipv4(b"later part", fragment_field=185), IPV4, [(CUSTOMER_TAG, 100)]),
        ethernet(ipv6(b"later part", extensions=[packets.fragment(185, identification=0x5678)]), IPV6),
        ethernet(ipv6(b"later part", extensions=[packets.fragment(185)], protocol=packets.TCP), IPV6),
    ],
    ids=["identification", "source", "group", "protocol", "tag", "identification_of_ipv6", "next_header"],
)
def test_a_fragment_of_another_datagram_passes(ready: Relay, later: bytes) -> None:
    ready.run(FIRST4)
    ready.run(FIRST6)
    result = ready.run(later)
    assert (result.verdict, result.frame) == (Verdict.PASS, later)
    assert (ready.counted(RULE).packets, ready.counted(RULE6).packets) == (1, 1)


def test_an_identification_that_comes_again_for_another_port_is_not_claimed(ready: Relay) -> None:
    foreign = udp(PAYLOAD, port=PORT + 1)
    ready.run(FIRST4)
    assert ready.run(ethernet(ipv4(foreign, fragment_field=0x2000), IPV4)).verdict is Verdict.PASS
    assert ready.run(LATER4).verdict is Verdict.PASS
    assert ready.counted(RULE).packets == 1


def test_only_fragments_of_rules_are_remembered(ready: Relay) -> None:
    ready.run(datagram4(PAYLOAD, fragment_field=0x2000, destination=IPv4Address("239.1.1.2")))
    ready.run(datagram4(PAYLOAD))
    ready.run(datagram6(PAYLOAD, [packets.fragment()]))
    assert ready.forget_fragments() == 0
    ready.run(FIRST4)
    ready.run(FIRST6)
    assert ready.forget_fragments() == 2


@pytest.mark.parametrize("missing", [1, 8, 17, 1400, 65000])
def test_an_ip_packet_longer_than_its_frame_is_truncated(ready: Relay, missing: int) -> None:
    assert_dropped(ready, datagram4(PAYLOAD, total_length=45 + missing), "truncated")


@pytest.mark.parametrize("length", [26, 33, 65535])
def test_an_ipv6_packet_longer_than_its_frame_is_truncated(ready: Relay, length: int) -> None:
    frame = ethernet(ipv6(udp(PAYLOAD, ADDRESSES6), payload_length=length), IPV6)
    assert_dropped(ready, frame, "truncated", rule_id=RULE6)


@pytest.mark.parametrize("length", [0, 1, 7, 26, 1000, 65535])
def test_a_udp_length_that_contradicts_ip_is_a_bad_length(ready: Relay, length: int) -> None:
    assert_dropped(ready, ethernet(ipv4(udp(PAYLOAD, length=length)), IPV4), "bad_length")
    frame = ethernet(ipv6(udp(PAYLOAD, ADDRESSES6, length=length)), IPV6)
    assert ready.run(frame).verdict is Verdict.DROP
    assert ready.counted(RULE6) == Counted(1, 0, {"bad_length": 1})


def test_a_udp_length_is_bad_even_where_ethernet_padding_would_hold_it(ready: Relay) -> None:
    frame = ethernet(ipv4(udp(b"", length=9)), IPV4)
    assert_dropped(ready, frame + bytes(60 - len(frame)), "bad_length")


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (datagram4(PAYLOAD, fragment_field=0x2000, total_length=1500), "truncated"),
        (ethernet(ipv4(udp(PAYLOAD, length=3), fragment_field=0x2000), IPV4), "fragment"),
        (ethernet(ipv4(udp(PAYLOAD, length=3), total_length=1500), IPV4), "truncated"),
        (ethernet(ipv4(udp(bytes(1600), length=3)), IPV4), "bad_length"),
    ],
    ids=["fragment_truncated", "fragment_bad", "truncated_bad", "bad_oversize"],
)
def test_a_frame_with_several_faults_is_counted_once(ready: Relay, frame: bytes, reason: str) -> None:
    assert_dropped(ready, frame, reason, payload_bytes=17 if reason == "fragment" else 0)


def test_a_frame_longer_than_the_limit_is_oversize(relay: Relay) -> None:
    relay.add_rule(RULE, STREAM, frame_limit=142)
    relay.add_socket(0)
    assert_dropped(relay, datagram4(bytes(101)), "oversize", payload_bytes=101)
    relay.maps.clear_rule(RULE)
    assert_relayed(relay, datagram4(bytes(100)), metadata4(100))


def test_padding_does_not_count_towards_the_frame_limit(relay: Relay) -> None:
    relay.add_rule(RULE, STREAM, frame_limit=42)
    relay.add_socket(0)
    assert_relayed(relay, datagram4(b"").ljust(60, b"\0"), metadata4(0))
    relay.maps.clear_rule(RULE)
    assert_dropped(relay, datagram4(b"x").ljust(60, b"\0"), "oversize", payload_bytes=1)


@pytest.mark.parametrize("size", [9000, 65507])
def test_a_frame_of_several_buffers_is_oversize_where_the_pool_is_small(ready: Relay, size: int) -> None:
    assert_dropped(ready, datagram4(bytes(size)), "oversize", payload_bytes=size)


def test_without_a_socket_the_reason_is_no_worker(relay: Relay) -> None:
    relay.add_rule(RULE, STREAM)
    assert_dropped(relay, datagram4(PAYLOAD), "no_worker", payload_bytes=17)


def test_a_socket_that_is_closed_leaves_no_worker(relay: Relay) -> None:
    relay.add_rule(RULE, STREAM)
    xsk = relay.add_socket(0)
    assert_relayed(relay, datagram4(PAYLOAD), metadata4(17))
    xsk.close()
    assert relay.run(datagram4(PAYLOAD)).verdict is Verdict.DROP
    assert relay.counted(RULE) == Counted(2, 34, {"no_worker": 1})


def test_the_socket_is_that_of_the_receive_queue(relay: Relay) -> None:
    relay.add_rule(RULE, STREAM, xsk_base=64)
    relay.add_socket(65)
    assert relay.run(datagram4(PAYLOAD), queue=0).verdict is Verdict.DROP
    assert relay.counted(RULE) == Counted(1, 17, {"no_worker": 1})
    assert relay.run(datagram4(PAYLOAD), queue=1).verdict is Verdict.REDIRECT
    assert relay.counted(RULE) == Counted(2, 34, {"no_worker": 1})


@pytest.mark.parametrize("xsk_base", [4095, 4096, 0xFFFFFFFF])
def test_a_socket_beyond_the_map_is_no_worker(relay: Relay, xsk_base: int) -> None:
    relay.add_rule(RULE, STREAM, xsk_base=xsk_base)
    assert relay.run(datagram4(PAYLOAD), queue=1).verdict is Verdict.DROP
    assert relay.counted(RULE) == Counted(1, 17, {"no_worker": 1})


# Counters


def test_counters_add_up_over_many_packets(ready: Relay) -> None:
    for size in range(100):
        assert ready.run(datagram4(bytes(size))).verdict is Verdict.REDIRECT
        assert ready.run(datagram6(bytes(2 * size))).verdict is Verdict.REDIRECT
    for _ in range(7):
        ready.run(datagram4(PAYLOAD, fragment_field=0x2000))
    for _ in range(11):
        ready.run(datagram4(PAYLOAD, total_length=1500))
    assert ready.counted(RULE) == Counted(118, 4950 + 7 * 17, {"fragment": 7, "truncated": 11})
    assert ready.counted(RULE6) == Counted(100, 9900)
    assert set(ready.counts(RULE).dropped) == set(DROP_REASONS)


@pytest.mark.parametrize("frame", [datagram4(PAYLOAD), datagram4(PAYLOAD, total_length=1500)])
def test_last_seen_is_the_last_packet_to_a_tick(ready: Relay, frame: bytes) -> None:
    assert ready.counts(RULE).last_seen_ns == 0
    for _ in range(3):
        before = time.clock_gettime_ns(MONOTONIC_COARSE)
        ready.run(frame)
        assert before <= ready.counts(RULE).last_seen_ns <= time.monotonic_ns()
    assert ready.counts(RULE6).last_seen_ns == 0


def test_the_metadata_has_the_time_of_receipt(ready: Relay) -> None:
    previous = 0
    for _ in range(3):
        before = time.monotonic_ns()
        metadata = ready.run(datagram4(PAYLOAD)).metadata
        assert metadata is not None
        assert previous < before <= metadata.rx_time_ns <= time.monotonic_ns()
        previous = metadata.rx_time_ns


def test_a_cleared_rule_counts_from_zero(ready: Relay) -> None:
    ready.run(datagram4(PAYLOAD))
    ready.run(datagram6(PAYLOAD))
    ready.maps.clear_rule(RULE)
    assert ready.counted(RULE) == NOTHING
    assert ready.counts(RULE).last_seen_ns == 0
    assert ready.counted(RULE6) == Counted(1, 17)


def test_the_packet_builder_agrees_with_frames_made_by_hand() -> None:
    assert datagram4(b"hi", tags=[(SERVICE_TAG, 200)]) == bytes.fromhex(
        "01005e010101 02000000000a 88a8 00c8 0800"
        "45b8001e 1234 0000 11 11 9cdf 0a010001 ef010101"
        "9c40 1388 000a eda3 6869"
    )
    extensions = [packets.options(HOP_BY_HOP), packets.authentication(), packets.fragment(185, more=True)]
    assert datagram6(b"", extensions)[12:] == bytes.fromhex(
        "86dd 6b8abcde 0030 00 11 fd010000000000000000000000000001 ff150000000000000000000000010001"
        "33 00 000000000000"
        "2c 04 0000 0000004d 00000001 000000000000000000000000"
        "11 00 05c9 00001234"
        "9c40 1388 0008 53fb"
    )
