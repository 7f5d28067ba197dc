"""What a device makes of a frame that the stack left to it: datagrams of one segment each, with checksums.

As the kernel's own segmentation of UDP does it (net/ipv4/udp_offload.c, net/ipv4/af_inet.c): the IP
identification counts up from the first one. This module must never do I/O.
"""

import struct
from collections.abc import Iterator

UDP = 17
VLAN_ETHERTYPES = (0x8100, 0x88A8)


def _sum(data: bytes) -> int:
    """The sum of 16-bit words in ones' complement (RFC 1071), which is the remainder by 0xffff."""
    return int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF


def _ip_offset(frame: bytes, ethernet: bool) -> int:
    if not ethernet:
        return 0
    offset = 12
    while struct.unpack_from("!H", frame, offset)[0] in VLAN_ETHERTYPES:
        offset += 4
    return offset + 2


def on_wire(frame: bytes, segment: int, udp_offset: int, ethernet: bool) -> Iterator[bytes]:
    """The frames that leave.

    segment: payload bytes of each, 0 for one frame. udp_offset: of a UDP header whose checksum is partial, 0
    where nothing is left to the device.
    """
    if not udp_offset:
        yield frame
        return
    ip_offset = _ip_offset(frame, ethernet)
    payload_offset = udp_offset + 8
    length = segment or len(frame) - payload_offset
    for number, at in enumerate(range(payload_offset, max(len(frame), payload_offset + 1), max(length, 1))):
        head, payload = bytearray(frame[:payload_offset]), frame[at : at + length]
        _set_lengths(head, ip_offset, udp_offset, len(payload), number if segment else 0)
        head[udp_offset + 6 : udp_offset + 8] = _checksum(head, ip_offset, udp_offset, payload)
        yield bytes(head) + payload


def _set_lengths(head: bytearray, ip_offset: int, udp_offset: int, payload_length: int, number: int) -> None:
    struct.pack_into("!H", head, udp_offset + 4, 8 + payload_length)
    after_ip = udp_offset + 8 + payload_length - ip_offset
    if head[ip_offset] >> 4 == 6:
        struct.pack_into("!H", head, ip_offset + 4, after_ip - 40)
        return
    (identification,) = struct.unpack_from("!H", head, ip_offset + 4)
    struct.pack_into("!HH", head, ip_offset + 2, after_ip, identification + number & 0xFFFF)
    struct.pack_into("!H", head, ip_offset + 10, 0)
    struct.pack_into("!H", head, ip_offset + 10, _sum(bytes(head[ip_offset:udp_offset])) ^ 0xFFFF)


def _checksum(head: bytearray, ip_offset: int, udp_offset: int, payload: bytes) -> bytes:
    addresses = (
        slice(ip_offset + 8, ip_offset + 40)
        if head[ip_offset] >> 4 == 6
        else slice(ip_offset + 12, ip_offset + 20)
    )
    covered = bytes(head[addresses]) + struct.pack("!HH", UDP, 8 + len(payload))
    covered += bytes(head[udp_offset : udp_offset + 6]) + payload
    return struct.pack("!H", _sum(covered) ^ 0xFFFF or 0xFFFF)
