"""Ethernet frames from plain values, for the tests of the XDP program and of the parsers.

What is built is valid, checksums included, unless the caller asks for a field that is not. This module must
never use the code under test: an offset or a checksum that is wrong there must not be wrong here as well.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

MAC_ADDRESSES = bytes.fromhex("01005e010101 02000000000a")
IPV4, IPV6, ARP = 0x0800, 0x86DD, 0x0806
CUSTOMER_TAG, SERVICE_TAG = 0x8100, 0x88A8  # 802.1Q, 802.1ad
HOP_BY_HOP, ICMP, IGMP, TCP, UDP, ROUTING, FRAGMENT = 0, 1, 2, 6, 17, 43, 44
ESP, AUTHENTICATION, ICMPV6, NO_NEXT_HEADER, DESTINATION, MOBILITY = 50, 51, 58, 59, 60, 135
DONT_FRAGMENT, MORE_FRAGMENTS = 0x4000, 0x2000

GROUP, SOURCE, PORT = IPv4Address("239.1.1.1"), IPv4Address("10.1.0.1"), 5000
GROUP6, SOURCE6 = IPv6Address("ff15::1:1"), IPv6Address("fd01::1")


@dataclass(frozen=True, slots=True)
class Extension:
    """An IPv6 extension header; the body is everything after its first byte, the next header."""

    protocol: int
    body: bytes


def options(protocol: int, units: int = 0) -> Extension:
    """A hop-by-hop, destination or routing header of 8 * (units + 1) bytes (RFC 8200 section 4)."""
    return Extension(protocol, bytes([units]) + bytes(8 * (units + 1) - 2))


def authentication(icv_words: int = 3) -> Extension:
    """An authentication header with an integrity check value of so many 32-bit words (RFC 4302 section 2)."""
    return Extension(AUTHENTICATION, struct.pack("!BHII", 1 + icv_words, 0, 77, 1) + bytes(4 * icv_words))


def fragment(offset: int = 0, more: bool = False, *, identification: int = 0x1234) -> Extension:
    """A fragment header; offset in units of 8 bytes. Without arguments an atomic one (RFC 6946)."""
    return Extension(FRAGMENT, struct.pack("!BHI", 0, offset << 3 | more, identification))


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def ethernet(
    packet: bytes, ethertype: int, tags: Sequence[tuple[int, int]] = (), macs: bytes = MAC_ADDRESSES
) -> bytes:
    """A frame without check sequence; tags from the outermost, each its ethertype and its 16 bits."""
    stack = b"".join(struct.pack("!HH", *tag) for tag in tags)
    return macs + stack + struct.pack("!H", ethertype) + packet


def ipv4(
    payload: bytes,
    *,
    source: IPv4Address = SOURCE,
    destination: IPv4Address = GROUP,
    protocol: int = UDP,
    ip_options: bytes = b"",
    tos: int = 0xB8,
    ttl: int = 17,
    identification: int = 0x1234,
    fragment_field: int = 0,
    total_length: int | None = None,
    first_byte: int | None = None,
) -> bytes:
    """An IPv4 packet (RFC 791); ip_options is a multiple of 4 bytes, fragment_field flags and offset."""
    header_length = 20 + len(ip_options)
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x40 | header_length // 4 if first_byte is None else first_byte,
        tos,
        header_length + len(payload) if total_length is None else total_length,
        identification,
        fragment_field,
        ttl,
        protocol,
        0,
        source.packed,
        destination.packed,
    )
    header += ip_options
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def ipv6(
    payload: bytes,
    *,
    source: IPv6Address = SOURCE6,
    destination: IPv6Address = GROUP6,
    protocol: int = UDP,
    extensions: Sequence[Extension] = (),
    traffic_class: int = 0xB8,
    hop_limit: int = 17,
    payload_length: int | None = None,
    version: int = 6,
) -> bytes:
    """An IPv6 packet (RFC 8200) with a flow label, so that no field beside the traffic class is zero."""
    following = [extension.protocol for extension in extensions] + [protocol]
    body = b"".join(
        bytes([next_header]) + extension.body
        for extension, next_header in zip(extensions, following[1:], strict=True)
    )
    body += payload
    return (
        struct.pack(
            "!IHBB",
            version << 28 | traffic_class << 20 | 0xABCDE,
            len(body) if payload_length is None else payload_length,
            following[0],
            hop_limit,
        )
        + source.packed
        + destination.packed
        + body
    )


def udp(
    payload: bytes,
    addresses: bytes = SOURCE.packed + GROUP.packed,
    *,
    port: int = PORT,
    length: int | None = None,
    with_checksum: bool = True,
    partial: bool = False,
) -> bytes:
    """A UDP datagram (RFC 768); addresses is source and destination, which its checksum covers.

    partial: the checksum field is what a sender leaves whose device completes it, the pseudo header's sum.
    """
    true_length = 8 + len(payload)
    header = struct.pack("!HHH", 40000, port, true_length if length is None else length)
    pseudo = addresses + struct.pack("!HH", true_length, UDP)  # RFC 8200 section 8.1 sums up to the same
    value = checksum(pseudo + header + b"\0\0" + payload) or 0xFFFF if with_checksum else 0
    if partial:
        value = checksum(pseudo) ^ 0xFFFF
    return header + struct.pack("!H", value) + payload


def datagram4(payload: bytes, tags: Sequence[tuple[int, int]] = (), **ip: int | bytes | IPv4Address) -> bytes:
    """A frame of the stream GROUP:PORT from SOURCE; ip overrides arguments of `ipv4`."""
    return ethernet(ipv4(udp(payload), **ip), IPV4, tags)  # type: ignore[arg-type]


def datagram6(
    payload: bytes, extensions: Sequence[Extension] = (), tags: Sequence[tuple[int, int]] = ()
) -> bytes:
    """A frame of the stream [GROUP6]:PORT from SOURCE6."""
    datagram = udp(payload, SOURCE6.packed + GROUP6.packed)
    return ethernet(ipv6(datagram, extensions=extensions), IPV6, tags)
