"""Writes pcapng files (draft-ietf-opsawg-pcapng): section header, interface and enhanced packet blocks.

Only what captures need: nanoseconds, interfaces with names, a direction and a comment for each packet. It is
our own because nothing well kept writes the format without being a packet library as well. It must never
read a file.
"""

import struct
from typing import BinaryIO

SECTION_HEADER, INTERFACE_DESCRIPTION, ENHANCED_PACKET = 0x0A0D0D0A, 1, 6
BYTE_ORDER_MAGIC = 0x1A2B3C4D
END_OF_OPTIONS, COMMENT = 0, 1
SECTION_APPLICATION, INTERFACE_NAME, INTERFACE_TIME_RESOLUTION, PACKET_FLAGS = 4, 2, 9, 2
NANOSECONDS = b"\x09"
LINK_ETHERNET, LINK_RAW_IP = 1, 101
INBOUND, OUTBOUND = 1, 2


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _options(*options: tuple[int, bytes]) -> bytes:
    packed = b"".join(struct.pack("=HH", code, len(value)) + _padded(value) for code, value in options)
    return packed + struct.pack("=HH", END_OF_OPTIONS, 0)


class PcapngWriter:
    """Writes to a binary stream, which stays the caller's."""

    def __init__(self, stream: BinaryIO, application: str, snaplen: int) -> None:
        self._stream = stream
        self._snaplen = snaplen
        self._interfaces: dict[str, int] = {}
        body = struct.pack("=IHHq", BYTE_ORDER_MAGIC, 1, 0, -1)
        self._block(SECTION_HEADER, body + _options((SECTION_APPLICATION, application.encode())))

    def _block(self, kind: int, body: bytes) -> None:
        length = 12 + len(body)
        self._stream.write(struct.pack("=II", kind, length) + body + struct.pack("=I", length))

    def interface(self, name: str, ethernet: bool) -> int:
        """The number of an interface, which is described the first time."""
        if name not in self._interfaces:
            self._interfaces[name] = len(self._interfaces)
            link = LINK_ETHERNET if ethernet else LINK_RAW_IP
            named = (INTERFACE_NAME, name.encode()), (INTERFACE_TIME_RESOLUTION, NANOSECONDS)
            self._block(INTERFACE_DESCRIPTION, struct.pack("=HHI", link, 0, self._snaplen) + _options(*named))
        return self._interfaces[name]

    def packet(
        self, interface: int, time_ns: int, data: bytes, length: int, direction: int, comment: str
    ) -> None:
        """One packet of `length` bytes, of which data are the first; time_ns since the epoch."""
        header = struct.pack("=IIIII", interface, time_ns >> 32, time_ns & 0xFFFFFFFF, len(data), length)
        flags = (PACKET_FLAGS, struct.pack("=I", direction))
        self._block(ENHANCED_PACKET, header + _padded(data) + _options((COMMENT, comment.encode()), flags))
