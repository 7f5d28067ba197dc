"""The benchmark's streams as values: their groups and ports, what a relay makes of them, their first frame.

Pure. This module must never open a socket or a map.
"""

import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mcr.errors import McrError

HEADER_BYTES = 42  # Ethernet, IPv4, UDP: as in traffic_kern.c
STAMP_BYTES = 16  # sequence number and time: as in traffic_kern.c
MAX_PAYLOAD_BYTES = 1472
SOURCE_ADDRESS = "10.1.0.1"
SOURCE_MAC = bytes.fromhex("02 6d 63 72 00 01")
SOURCE_PORT = 40000
TTL = 16  # routers forward only what has more than 1 left
GROUPS_APART = 0x10000  # between the groups of one output and the next: more than any benchmark's streams
PORTS_APART = 1000


@dataclass(frozen=True, slots=True)
class Streams:
    """Streams that differ in port, or in group if by_group, from `group:port` upwards; all of one size."""

    group: str
    port: int
    count: int = 1
    payload_bytes: int = 1316
    by_group: bool = False

    def __post_init__(self) -> None:
        first = ipaddress.IPv4Address(self.group)
        last = first + self.count - 1 if self.by_group else first
        last_port = self.port if self.by_group else self.port + self.count - 1
        if not (first.is_multicast and last.is_multicast and 1 <= self.port <= last_port <= 0xFFFF):
            raise McrError(
                f"{self.count} streams from {self.group}:{self.port} do not fit", "ask for fewer streams"
            )
        if not STAMP_BYTES <= self.payload_bytes <= MAX_PAYLOAD_BYTES:
            raise McrError(
                f"a payload of {self.payload_bytes} bytes", f"choose {STAMP_BYTES} to {MAX_PAYLOAD_BYTES}"
            )

    def all(self) -> Iterator[tuple[str, int]]:
        """Group and port of each stream."""
        for index in range(self.count):
            group = ipaddress.IPv4Address(self.group) + (index if self.by_group else 0)
            yield str(group), self.port + (0 if self.by_group else index)

    def translated(self, output: int) -> "Streams":
        """What a relay that translates calls them at an output."""
        group = ipaddress.IPv4Address(self.group) + GROUPS_APART * (output + 1)
        return replace(self, group=str(group), port=self.port + PORTS_APART)


def frame_header(streams: Streams) -> bytes:
    """Ethernet, IPv4 and UDP headers of the first stream's packets; no UDP checksum (RFC 768)."""
    group = ipaddress.IPv4Address(streams.group)
    mac = b"\x01\x00\x5e" + (int(group) & 0x7FFFFF).to_bytes(3, "big")  # RFC 1112 section 6.4
    udp_bytes = 8 + streams.payload_bytes
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + udp_bytes, 0, 0x4000, TTL, socket.IPPROTO_UDP, 0,
        socket.inet_aton(SOURCE_ADDRESS), group.packed,
    )  # fmt: skip
    total = word_sum(ip)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    ip = ip[:10] + checksum.to_bytes(2, "big") + ip[12:]
    return mac + SOURCE_MAC + b"\x08\x00" + ip + struct.pack("!HHHH", SOURCE_PORT, streams.port, udp_bytes, 0)


def word_sum(data: bytes) -> int:
    """The sum of big-endian 16-bit words, without the carries folded in (RFC 1071)."""
    return sum(struct.unpack(f"!{len(data) // 2}H", data))
