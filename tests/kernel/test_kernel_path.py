"""The kernel path with one output, frame by frame: what leaves is compared byte by byte with a frame that is
built from scratch, every checksum summed up anew.

Rules with several outputs end here at the redirect, because BPF_PROG_TEST_RUN runs no device map program;
tests/netns sees what becomes of their clones.
"""

import random
import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from mcr._bpf import lib

from mcr.maps import address_bytes
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
    ethernet,
    ipv4,
    ipv6,
    udp,
)
from tests.kernel.relay import Counted, Relay, Sent, Verdict

RULE, OUTPUT, OTHER_OUTPUT = 7, 8191, 1  # the highest output_id there is
FAN_OUT, DEVICE_SET = 8191, 8190  # the highest there are
PAYLOAD = b"seventeen bytes!!"
LARGE = 20_000
NEW_MACS = bytes.fromhex("01005e020202 020000000b0b")
NEW_MACS6 = bytes.fromhex("333300020002 020000000b0b")
NEW_GROUP, NEW_SOURCE, NEW_PORT = IPv4Address("239.2.2.2"), IPv4Address("10.2.0.1"), 6000
NEW_GROUP6, NEW_SOURCE6 = IPv6Address("ff15::2:2"), IPv6Address("fd02::1")
KEEP_PORT, PRESERVE_DSCP = lib.MCR_OUTPUT_KEEP_PORT, lib.MCR_OUTPUT_PRESERVE_DSCP
DECREMENT_TTL, PRESERVE_SOURCE = lib.MCR_OUTPUT_DECREMENT_TTL, lib.MCR_OUTPUT_PRESERVE_SOURCE
CHAIN = (
    packets.options(HOP_BY_HOP, 1),
    packets.options(ROUTING, 2),
    packets.fragment(),
    packets.authentication(),
    packets.options(DESTINATION, 4),
)


@dataclass(frozen=True, slots=True)
class Packet:
    """A datagram in a frame, as plain values. mode is how the checksum field is filled."""

    family: int = 4
    macs: bytes = packets.MAC_ADDRESSES
    source: IPv4Address | IPv6Address = SOURCE
    group: IPv4Address | IPv6Address = GROUP
    port: int = PORT
    ttl: int = 17
    tos: int = 0xB9
    payload: bytes = PAYLOAD
    tags: tuple[tuple[int, int], ...] = ()
    ip_options: bytes = b""
    extensions: tuple[Extension, ...] = ()
    mode: str = "complete"

    def frame(self) -> bytes:
        addresses = self.source.packed + self.group.packed
        form = {"with_checksum": self.mode != "zero", "partial": self.mode == "partial"}
        datagram = udp(self.payload, addresses, port=self.port, **form)
        if self.family == 4:
            assert isinstance(self.source, IPv4Address)
            assert isinstance(self.group, IPv4Address)
            packet = ipv4(
                datagram, source=self.source, destination=self.group,
                ip_options=self.ip_options, tos=self.tos, ttl=self.ttl,
            )  # fmt: skip
            return ethernet(packet, IPV4, self.tags, self.macs)
        assert isinstance(self.source, IPv6Address)
        assert isinstance(self.group, IPv6Address)
        packet = ipv6(
            datagram, source=self.source, destination=self.group,
            extensions=self.extensions, traffic_class=self.tos, hop_limit=self.ttl,
        )  # fmt: skip
        return ethernet(packet, IPV6, self.tags, self.macs)

    def at(self, value: int) -> "Packet":
        """With a payload whose first word makes the complete checksum this one."""
        assert len(self.payload) >= 2
        bare = replace(self, payload=b"\0\0" + self.payload[2:], mode="complete")
        word = (checksum_of(bare.frame(), self) - value) % 0xFFFF
        return replace(self, payload=struct.pack("!H", word) + self.payload[2:])


def checksum_of(frame: bytes, packet: Packet) -> int:
    """The checksum field of a frame whose headers are as long as the packet's."""
    end = len(frame) - len(packet.payload)
    return int.from_bytes(frame[end - 2 : end])


PACKET = {4: Packet(), 6: Packet(6, source=SOURCE6, group=GROUP6)}
EXPECTED = {
    4: Packet(4, NEW_MACS, NEW_SOURCE, NEW_GROUP, NEW_PORT, 8, 10 << 2 | 1),
    6: Packet(6, NEW_MACS6, NEW_SOURCE6, NEW_GROUP6, NEW_PORT, 8, 10 << 2 | 1),
}


def stream(family: int, **fields: Any) -> Stream:
    return replace(Stream(GROUP if family == 4 else GROUP6, PORT, "in0"), **fields)


def output(relay: Relay, family: int, **fields: int | bytes) -> dict[str, int | bytes]:
    """The output that makes PACKET[family] into EXPECTED[family]; fields: what shall differ."""
    wanted = EXPECTED[family]
    plain: dict[str, int | bytes] = {
        "ifindex": relay.other_ifindex,
        "mtu": LARGE,
        "dport": NEW_PORT,
        "ttl": 8,
        "dscp": 10,
        "mac_destination": wanted.macs[:6],
        "mac_source": wanted.macs[6:],
        "saddr": address_bytes(wanted.source),
        "daddr": address_bytes(wanted.group),
    }
    return plain | fields


def put(relay: Relay, family: int, *, flags: int = 0, vlan: int = 0, **fields: int | bytes) -> None:
    """A kernel-path rule for PACKET[family], tagged as vlan if that is not 0, with one output."""
    relay.set_output(OUTPUT, output(relay, family, **fields))
    relay.add_kernel_rule(RULE, stream(family, vlan=vlan), OUTPUT, frame_limit=LARGE, flags=flags)


def assert_relayed(relay: Relay, given: Packet, expected: Packet) -> None:
    """The frame leaves as expected, with no metadata, and is counted once everywhere."""
    assert_becomes(relay, given.frame(), expected.frame(), len(given.payload))


def assert_becomes(relay: Relay, given: bytes, expected: bytes, payload_bytes: int) -> None:
    relay.maps.clear_rule(RULE)
    relay.maps.clear_output(OUTPUT)
    result = relay.run(given)
    assert (result.verdict, result.metadata) == (Verdict.REDIRECT, None)
    assert result.frame.hex(" ", 2) == expected.hex(" ", 2)
    assert relay.counted(RULE) == Counted(1, payload_bytes, {}, 1, payload_bytes)
    assert relay.sent(OUTPUT) == Sent(1, payload_bytes)


def assert_output_drops(relay: Relay, given: bytes, reason: str, payload_bytes: int) -> None:
    """Relayed, but not sent by the output."""
    assert relay.run(given).verdict is Verdict.DROP
    assert relay.counted(RULE) == Counted(1, payload_bytes, {}, 1, payload_bytes)
    assert relay.sent(OUTPUT) == Sent(0, 0, {reason: 1})


# Headers

FAMILIES = pytest.mark.parametrize("family", [4, 6])


@FAMILIES
@pytest.mark.parametrize("size", [0, 1, 2, 3, 11, 12, 17, 18, 511, 512, 1316, 1472, 3300, 9000])
def test_every_header_field_is_rewritten_and_no_payload_byte(relay: Relay, family: int, size: int) -> None:
    payload = bytes(range(251)) * (size // 251 + 1)
    put(relay, family)
    given, expected = (replace(each, payload=payload[:size]) for each in (PACKET[family], EXPECTED[family]))
    assert_relayed(relay, given, expected)


@FAMILIES
@pytest.mark.parametrize(
    ("vlan", "tags"),
    [
        (0, ()),
        (0, ((CUSTOMER_TAG, 0xE000),)),
        (100, ((CUSTOMER_TAG, 100),)),
        (100, ((SERVICE_TAG, 0x6064),)),
        (100, ((CUSTOMER_TAG, 0), (CUSTOMER_TAG, 100))),
    ],
    ids=["untagged", "priority_tag", "tag", "service_tag", "two_tags"],
)
@pytest.mark.parametrize("new_vlan", [0, 100, 4094])
def test_tags_are_removed_pushed_and_replaced(
    relay: Relay, family: int, vlan: int, tags: tuple[tuple[int, int], ...], new_vlan: int
) -> None:
    put(relay, family, vlan=vlan)
    relay.set_output(OUTPUT, output(relay, family, vlan=new_vlan))
    new_tags = ((CUSTOMER_TAG, new_vlan),) if new_vlan else ()
    given, expected = replace(PACKET[family], tags=tags), replace(EXPECTED[family], tags=new_tags)
    assert_relayed(relay, given, expected)


@FAMILIES
def test_a_doubly_tagged_stream_leaves_untagged(relay: Relay, family: int) -> None:
    relay.set_output(OUTPUT, output(relay, family))
    relay.add_kernel_rule(RULE, stream(family, vlan=100, vlan_outer=200), OUTPUT)
    given = replace(PACKET[family], tags=((SERVICE_TAG, 200), (CUSTOMER_TAG, 100)))
    assert_relayed(relay, given, EXPECTED[family])


@FAMILIES
def test_ethernet_padding_travels_along(relay: Relay, family: int) -> None:
    put(relay, family)
    given, expected = (replace(each, payload=b"x") for each in (PACKET[family], EXPECTED[family]))
    padding = b"\xa5" * 17
    assert_becomes(relay, given.frame() + padding, expected.frame() + padding, 1)


@FAMILIES
@pytest.mark.parametrize("ttl", [1, 64, 255])
@pytest.mark.parametrize("ttl_before", [1, 2, 255])
def test_a_ttl_is_set_whatever_it_was(relay: Relay, family: int, ttl: int, ttl_before: int) -> None:
    put(relay, family, ttl=ttl)
    assert_relayed(relay, replace(PACKET[family], ttl=ttl_before), replace(EXPECTED[family], ttl=ttl))


@FAMILIES
@pytest.mark.parametrize("ttl", [2, 3, 17, 128, 255])
def test_a_ttl_is_decremented(relay: Relay, family: int, ttl: int) -> None:
    put(relay, family, flags=0)
    relay.set_output(OUTPUT, output(relay, family, flags=DECREMENT_TTL))
    assert_relayed(relay, replace(PACKET[family], ttl=ttl), replace(EXPECTED[family], ttl=ttl - 1))


@FAMILIES
def test_an_expired_ttl_is_a_drop_of_the_output(relay: Relay, family: int) -> None:
    put(relay, family)
    relay.set_output(OUTPUT, output(relay, family, flags=DECREMENT_TTL))
    assert_output_drops(relay, replace(PACKET[family], ttl=1).frame(), "ttl_expired", 17)


@FAMILIES
@pytest.mark.parametrize("tos", [0, 1, 2, 3, 0xB8, 0xFF])
@pytest.mark.parametrize("dscp", [0, 46, 63, None])
def test_a_dscp_is_set_or_kept_and_the_ecn_always_kept(
    relay: Relay, family: int, tos: int, dscp: int | None
) -> None:
    put(relay, family)
    fields = {"flags": PRESERVE_DSCP} if dscp is None else {"dscp": dscp}
    relay.set_output(OUTPUT, output(relay, family, **fields))
    new_tos = tos if dscp is None else dscp << 2 | tos & 3
    assert_relayed(relay, replace(PACKET[family], tos=tos), replace(EXPECTED[family], tos=new_tos))


@FAMILIES
def test_a_preserved_source_is_the_packets_own(relay: Relay, family: int) -> None:
    put(relay, family)
    relay.set_output(OUTPUT, output(relay, family, flags=PRESERVE_SOURCE))
    assert_relayed(relay, PACKET[family], replace(EXPECTED[family], source=PACKET[family].source))


@FAMILIES
@pytest.mark.parametrize("port", [1, 255, 256, 65535])
def test_a_kept_port_is_the_packets_own(relay: Relay, family: int, port: int) -> None:
    relay.set_output(OUTPUT, output(relay, family, flags=KEEP_PORT))
    relay.add_kernel_rule(RULE, stream(family, port=None), OUTPUT)
    assert_relayed(relay, replace(PACKET[family], port=port), replace(EXPECTED[family], port=port))


@pytest.mark.parametrize("words", range(1, 11))
def test_ipv4_options_stay(relay: Relay, words: int) -> None:
    put(relay, 4)
    given, expected = (replace(each, ip_options=b"\x01" * 4 * words) for each in (PACKET[4], EXPECTED[4]))
    assert_relayed(relay, given, expected)


@pytest.mark.parametrize("count", range(1, len(CHAIN) + 1))
@pytest.mark.parametrize("vlan", [0, 100])
def test_ipv6_extension_headers_stay(relay: Relay, count: int, vlan: int) -> None:
    put(relay, 6)
    relay.set_output(OUTPUT, output(relay, 6, vlan=vlan))
    given, expected = (replace(each, extensions=CHAIN[:count]) for each in (PACKET[6], EXPECTED[6]))
    assert_relayed(relay, given, replace(expected, tags=((CUSTOMER_TAG, vlan),) if vlan else ()))


@pytest.mark.parametrize("field", [0x0000, 0x4000])
def test_identification_and_dont_fragment_stay(relay: Relay, field: int) -> None:
    put(relay, 4)
    given = ethernet(ipv4(udp(PAYLOAD), fragment_field=field, identification=0xBEEF, tos=0xB9), IPV4)
    datagram = udp(PAYLOAD, NEW_SOURCE.packed + NEW_GROUP.packed, port=NEW_PORT)
    packet = ipv4(
        datagram, source=NEW_SOURCE, destination=NEW_GROUP, fragment_field=field,
        identification=0xBEEF, ttl=8, tos=EXPECTED[4].tos,
    )  # fmt: skip
    assert_becomes(relay, given, ethernet(packet, IPV4, (), NEW_MACS), 17)


# Checksums

ODD_AND_EVEN = [0, 1, 2, 3, 11, 12, 17, 511, 512, 1316, 1471, 1472, 3300, 9001]
NATIVE, GENERIC = 0, lib.MCR_RULE_GENERIC


@pytest.mark.parametrize("size", ODD_AND_EVEN)
def test_no_checksum_stays_none_over_ipv4(relay: Relay, size: int) -> None:
    put(relay, 4)
    given, expected = (
        replace(each, payload=b"\x5a" * size, mode="zero") for each in (PACKET[4], EXPECTED[4])
    )
    assert_relayed(relay, given, expected)


def test_no_checksum_stays_none_over_ipv6(relay: Relay) -> None:
    """Tunnels may do without one (RFC 6936)."""
    put(relay, 6)
    assert_relayed(relay, replace(PACKET[6], mode="zero"), replace(EXPECTED[6], mode="zero"))


@FAMILIES
@pytest.mark.parametrize("size", ODD_AND_EVEN)
def test_a_partial_checksum_is_completed_in_native_mode(relay: Relay, family: int, size: int) -> None:
    payload = random.Random(size).randbytes(size)
    put(relay, family)
    given, expected = (replace(each, payload=payload) for each in (PACKET[family], EXPECTED[family]))
    assert_relayed(relay, replace(given, mode="partial"), expected)


@FAMILIES
@pytest.mark.parametrize("size", ODD_AND_EVEN)
def test_a_partial_checksum_stays_partial_in_generic_mode(relay: Relay, family: int, size: int) -> None:
    payload = random.Random(size).randbytes(size)
    put(relay, family, flags=GENERIC)
    given, expected = (
        replace(each, payload=payload, mode="partial") for each in (PACKET[family], EXPECTED[family])
    )
    assert_relayed(relay, given, expected)


@FAMILIES
@pytest.mark.parametrize("flags", [NATIVE, GENERIC], ids=["native", "generic"])
@pytest.mark.parametrize("tags", [(), ((CUSTOMER_TAG, 100),)], ids=["untagged", "tagged"])
def test_a_complete_checksum_that_looks_partial_stays_right(
    relay: Relay, family: int, flags: int, tags: tuple[tuple[int, int], ...]
) -> None:
    """One packet in 65536; in generic mode this holds until a sender on this host has been seen."""
    put(relay, family, flags=flags, vlan=100 if tags else 0)
    pseudo = checksum_of(replace(PACKET[family], mode="partial").frame(), PACKET[family])
    given = replace(PACKET[family], tags=tags).at(pseudo)
    assert given.frame() == replace(given, mode="partial").frame()
    assert_relayed(relay, given, replace(EXPECTED[family], payload=given.payload))


@FAMILIES
@pytest.mark.parametrize("mode", ["complete", "partial"])
def test_a_checksum_that_sums_up_to_zero_is_sent_as_ones(relay: Relay, family: int, mode: str) -> None:
    """Zero would say that there is none (RFC 768)."""
    put(relay, family)
    expected = EXPECTED[family].at(0xFFFF)
    assert checksum_of(expected.frame(), expected) == 0xFFFF
    assert_relayed(relay, replace(PACKET[family], payload=expected.payload, mode=mode), expected)


@FAMILIES
def test_a_checksum_of_ones_is_rewritten_as_any_other(relay: Relay, family: int) -> None:
    put(relay, family)
    given = PACKET[family].at(0xFFFF)
    assert checksum_of(given.frame(), given) == 0xFFFF
    assert_relayed(relay, given, replace(EXPECTED[family], payload=given.payload))


@FAMILIES
def test_a_wrong_checksum_stays_wrong_by_as_much(relay: Relay, family: int) -> None:
    """The receiver, and not the relay, is to see that the packet was damaged on its way."""
    put(relay, family)
    given, expected = bytearray(PACKET[family].frame()), bytearray(EXPECTED[family].frame())
    for frame in (given, expected):
        frame[-1] ^= 0x04
    assert_becomes(relay, bytes(given), bytes(expected), 17)


@FAMILIES
def test_a_checksum_beyond_the_limit_cannot_be_completed(relay: Relay, family: int) -> None:
    relay.set_output(OUTPUT, output(relay, family, mtu=60_000))
    relay.add_kernel_rule(RULE, stream(family), OUTPUT, frame_limit=60_000)
    longest = 25 * 512 - 8 - 1  # 24 chunks, the rest of a chunk, and the UDP header
    whole = replace(PACKET[family], payload=bytes(longest), mode="partial")
    assert_relayed(relay, whole, replace(EXPECTED[family], payload=bytes(longest)))
    relay.maps.clear_rule(RULE)
    relay.maps.clear_output(OUTPUT)
    beyond = replace(whole, payload=bytes(longest + 1)).frame()
    assert relay.run(beyond).verdict is Verdict.DROP
    assert relay.counted(RULE) == Counted(1, longest + 1, {"bad_checksum": 1})
    assert relay.sent(OUTPUT) == Sent()


SEED, RANDOM_PACKETS = 20250301, 1500


@FAMILIES
@pytest.mark.parametrize("flags", [NATIVE, GENERIC], ids=["native", "generic"])
def test_random_packets_leave_random_outputs_as_built_from_scratch(
    relay: Relay, family: int, flags: int
) -> None:
    rng = random.Random(f"{SEED} {family} {flags}")
    for _ in range(RANDOM_PACKETS):
        given, fields, expected = random_case(rng, family)
        relay.set_output(OUTPUT, output(relay, family, **fields))
        tag = given.tags[0][1] & 0x0FFF if given.tags else 0
        relay.add_kernel_rule(
            RULE, stream(family, port=None, vlan=tag), OUTPUT, frame_limit=LARGE, flags=flags
        )
        if flags == NATIVE and expected.mode == "partial":
            expected = replace(expected, mode="complete")
        assert_relayed(relay, given, expected)
        relay.delete_rule(RULE)


def random_address(rng: random.Random, family: int) -> IPv4Address | IPv6Address:
    return IPv4Address(rng.getrandbits(32)) if family == 4 else IPv6Address(rng.getrandbits(128))


def random_case(rng: random.Random, family: int) -> tuple[Packet, dict[str, int | bytes], Packet]:
    """A packet, an output, and what the output makes of the packet."""
    given = replace(
        PACKET[family],
        source=random_address(rng, family),
        port=rng.randrange(1, 65536),
        ttl=rng.randrange(2, 256),
        tos=rng.randrange(256),
        payload=rng.randbytes(rng.choice((0, 1, 2, 3, rng.randrange(64), rng.randrange(1473)))),
        tags=rng.choice(((), ((CUSTOMER_TAG, rng.randrange(1 << 16)),))),
        ip_options=bytes(4 * rng.choice((0, 0, 1, 10))),
        extensions=rng.choice(((), CHAIN[: rng.randrange(6)])),
        mode=rng.choice(("complete", "partial") if family == 6 else ("complete", "partial", "zero")),
    )
    flags = rng.randrange(16)
    new_source, new_group = random_address(rng, family), random_address(rng, family)
    vlan, ttl, dscp, dport = (
        rng.choice((0, 7, 4094)),
        rng.randrange(1, 256),
        rng.randrange(64),
        rng.randrange(1, 65536),
    )
    macs = rng.randbytes(12)
    fields: dict[str, int | bytes] = {
        "flags": flags, "dport": dport, "vlan": vlan, "ttl": ttl, "dscp": dscp,
        "mac_destination": macs[:6], "mac_source": macs[6:],
        "saddr": address_bytes(new_source), "daddr": address_bytes(new_group),
    }  # fmt: skip
    expected = replace(
        given,
        macs=macs,
        source=given.source if flags & PRESERVE_SOURCE else new_source,
        group=new_group,
        port=given.port if flags & KEEP_PORT else dport,
        ttl=given.ttl - 1 if flags & DECREMENT_TTL else ttl,
        tos=given.tos if flags & PRESERVE_DSCP else dscp << 2 | given.tos & 3,
        tags=((CUSTOMER_TAG, vlan),) if vlan else (),
    )
    return given, fields, expected


# Fragments


def fragments(family: int, packet: Packet, tos: int) -> tuple[bytes, bytes]:
    """The first and the last fragment of a datagram of 800 bytes of payload."""
    addresses = packet.source.packed + packet.group.packed
    whole = udp(bytes(range(200)) * 4, addresses, port=packet.port)
    made = []
    for part, more, offset in ((whole[:600], True, 0), (whole[600:], False, 75)):
        if family == 4:
            assert isinstance(packet.source, IPv4Address)
            assert isinstance(packet.group, IPv4Address)
            field = packets.MORE_FRAGMENTS * more | offset
            inner = ipv4(
                part, source=packet.source, destination=packet.group,
                ttl=packet.ttl, tos=tos, fragment_field=field,
            )  # fmt: skip
            made.append(ethernet(inner, IPV4, packet.tags, packet.macs))
            continue
        assert isinstance(packet.source, IPv6Address)
        assert isinstance(packet.group, IPv6Address)
        inner = ipv6(
            part, source=packet.source, destination=packet.group, hop_limit=packet.ttl,
            traffic_class=tos, extensions=[packets.options(HOP_BY_HOP), packets.fragment(offset, more)],
        )  # fmt: skip
        made.append(ethernet(inner, IPV6, packet.tags, packet.macs))
    return made[0], made[1]


@FAMILIES
@pytest.mark.parametrize("vlan", [0, 100])
@pytest.mark.parametrize("port", [PORT, None], ids=["port", "any_port"])
def test_all_fragments_of_a_datagram_go_the_same_way(
    relay: Relay, family: int, vlan: int, port: int | None
) -> None:
    relay.set_output(OUTPUT, output(relay, family, vlan=vlan))
    relay.add_kernel_rule(RULE, stream(family, port=port), OUTPUT)
    tags = ((CUSTOMER_TAG, vlan),) if vlan else ()
    first, later = fragments(family, PACKET[family], 0xB9)
    expected = fragments(family, replace(EXPECTED[family], tags=tags), 10 << 2 | 1)
    assert relay.run(later).verdict is Verdict.PASS
    assert_becomes(relay, first, expected[0], 592)
    assert_becomes(relay, later, expected[1], 208)
    assert_becomes(relay, later, expected[1], 208)


@FAMILIES
@pytest.mark.parametrize("part", [0, 1])
def test_a_fragment_is_dropped_for_the_reasons_of_any_packet(relay: Relay, family: int, part: int) -> None:
    put(relay, family)
    first, later = fragments(family, replace(PACKET[family], ttl=1), 0)
    relay.run(first)
    relay.maps.clear_rule(RULE)
    relay.maps.clear_output(OUTPUT)
    relay.set_output(OUTPUT, output(relay, family, flags=DECREMENT_TTL))
    assert_output_drops(relay, (first, later)[part], "ttl_expired", (592, 208)[part])


# What is not sent


@FAMILIES
@pytest.mark.parametrize("tags", [(), ((CUSTOMER_TAG, 100),)], ids=["untagged", "tagged"])
@pytest.mark.parametrize("new_vlan", [0, 200])
def test_an_ip_packet_longer_than_the_mtu_is_too_large(
    relay: Relay, family: int, tags: tuple[tuple[int, int], ...], new_vlan: int
) -> None:
    """Tags do not count: an MTU is that of the IP packet."""
    header = 28 if family == 4 else 48
    put(relay, family, vlan=100 if tags else 0)
    relay.set_output(OUTPUT, output(relay, family, mtu=1500, vlan=new_vlan))
    expected = replace(EXPECTED[family], tags=((CUSTOMER_TAG, new_vlan),) if new_vlan else ())
    fits = bytes(1500 - header)
    given = replace(PACKET[family], tags=tags)
    assert_relayed(relay, replace(given, payload=fits), replace(expected, payload=fits))
    relay.maps.clear_rule(RULE)
    relay.maps.clear_output(OUTPUT)
    size = len(fits) + 1
    assert_output_drops(relay, replace(given, payload=bytes(size)).frame(), "too_large", size)


@pytest.mark.parametrize("missing", [{}, {"mtu": 1500}], ids=["empty", "no_interface"])
def test_an_output_that_is_not_in_place_is_no_output(relay: Relay, missing: dict[str, int | bytes]) -> None:
    relay.set_output(OUTPUT, missing)
    relay.add_kernel_rule(RULE, stream(4), OUTPUT)
    assert relay.run(PACKET[4].frame()).verdict is Verdict.DROP
    assert relay.counted(RULE) == Counted(1, 17, {"no_output": 1})
    assert relay.sent(OUTPUT) == Sent()


def test_a_rule_without_any_output_in_place_is_no_output(relay: Relay) -> None:
    relay.add_kernel_rule(RULE, stream(4), 0)
    assert relay.run(PACKET[4].frame()).verdict is Verdict.DROP
    assert relay.counted(RULE) == Counted(1, 17, {"no_output": 1})


@FAMILIES
@pytest.mark.parametrize("reason", ["truncated", "bad_length", "oversize"])
def test_what_no_rule_relays_the_kernel_path_does_not_either(relay: Relay, family: int, reason: str) -> None:
    relay.set_output(OUTPUT, output(relay, family))
    relay.add_kernel_rule(RULE, stream(family), OUTPUT, frame_limit=100)
    frame = replace(PACKET[family], payload=bytes(100)).frame()
    payload_bytes = 100
    if reason == "truncated":
        frame, payload_bytes = PACKET[family].frame()[:-1], 0
    elif reason == "bad_length":
        datagram = udp(PAYLOAD, PACKET[family].source.packed + PACKET[family].group.packed, length=26)
        frame = ethernet(ipv4(datagram) if family == 4 else ipv6(datagram), IPV4 if family == 4 else IPV6)
        payload_bytes = 0
    assert relay.run(frame).verdict is Verdict.DROP
    assert relay.counted(RULE) == Counted(1, payload_bytes, {reason: 1})
    assert relay.sent(OUTPUT) == Sent()


# Several outputs


@FAMILIES
def test_a_rule_of_several_outputs_hands_the_frame_on_untouched_with_metadata(
    relay: Relay, family: int
) -> None:
    outputs = [(OUTPUT, relay.ifindex), (OTHER_OUTPUT, relay.other_ifindex)]
    for output_id, ifindex in outputs:
        relay.set_output(output_id, output(relay, family, ifindex=ifindex))
    relay.maps.put_fan_out(FAN_OUT, outputs)
    relay.maps.put_device_sets({DEVICE_SET: [ifindex for _, ifindex in outputs]})
    try:
        relay.add_kernel_rule(
            RULE, stream(family), 0, smallest_mtu=LARGE, fan_out=FAN_OUT, device_set=DEVICE_SET
        )
        result = relay.run(PACKET[family].frame())
    finally:
        relay.maps.retire_fan_out(FAN_OUT)
    assert (result.verdict, result.frame) == (Verdict.REDIRECT, PACKET[family].frame())
    assert result.metadata is not None
    assert (result.metadata.rule_id, result.metadata.ttl, result.metadata.tos) == (RULE, 17, 0xB9)
    assert relay.counted(RULE) == Counted(1, 17, {}, 1, 17)


def test_a_frame_that_the_kernel_leaves_out_is_counted_as_too_large_by_those_outputs(relay: Relay) -> None:
    """It leaves out, without a word, devices whose MTU the frame exceeds by more than a tag."""
    outputs = [(OUTPUT, relay.ifindex), (OTHER_OUTPUT, relay.other_ifindex)]
    for (output_id, ifindex), mtu in zip(outputs, (1000, 1500), strict=True):
        relay.set_output(output_id, output(relay, 4, ifindex=ifindex, mtu=mtu))
    relay.maps.put_fan_out(FAN_OUT, outputs)
    relay.maps.put_device_sets({DEVICE_SET: [ifindex for _, ifindex in outputs]})
    try:
        relay.add_kernel_rule(RULE, stream(4), 0, smallest_mtu=1000, fan_out=FAN_OUT, device_set=DEVICE_SET)
        for size in (1000 - 28, 1000 - 28 + 4):  # the egress program counts what is longer by up to a tag
            relay.run(replace(PACKET[4], payload=bytes(size)).frame())
        assert (relay.sent(OUTPUT), relay.sent(OTHER_OUTPUT)) == (Sent(), Sent())
        relay.run(replace(PACKET[4], payload=bytes(1000 - 28 + 5)).frame())
    finally:
        relay.maps.retire_fan_out(FAN_OUT)
    assert (relay.sent(OUTPUT), relay.sent(OTHER_OUTPUT)) == (Sent(0, 0, {"too_large": 1}), Sent())
    assert relay.counted(RULE).relayed_packets == 3
