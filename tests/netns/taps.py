"""Traces and captures as the tests begin them and read them.

The commands are real, and the reader of pcapng is the tests' own. This module must never judge what it reads.
"""

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.netns.lab import Lab, Namespace, Process

SECTION_HEADER, INTERFACE_DESCRIPTION, ENHANCED_PACKET = 0x0A0D0D0A, 1, 6
START_S = 60.0  # the first trace compiles its programs


@dataclass(frozen=True, slots=True)
class Captured:
    """A packet of a pcapng file. outbound: of epb_flags, else inbound."""

    interface: str
    time_ns: int
    frame: bytes
    length: int
    outbound: bool
    comment: str


def begin(lab: Lab, relay: Namespace, *arguments: str) -> Process:
    """Starts `mcr trace` or `mcr capture`; it misses nothing from here on."""
    argv = [sys.executable, "-m", "mcr.cli.main", "--instance", relay.name, *arguments]
    process = lab.spawn(relay, argv)
    process.wait_for("tracing" if arguments[0] == "trace" else "capturing", START_S)
    return process


def read_pcapng(path: Path) -> list[Captured]:
    """Every packet of the file, strictly: a wrong length or an unknown block is a failure."""
    data, at = path.read_bytes(), 0
    interfaces: list[str] = []
    packets = []
    while at < len(data):
        kind, length = struct.unpack_from("=II", data, at)
        assert length % 4 == 0
        assert struct.unpack_from("=I", data, at + length - 4) == (length,)
        body = data[at + 8 : at + length - 4]
        if kind == INTERFACE_DESCRIPTION:
            options = dict(_options(body[8:]))
            assert options[9] == b"\x09"
            interfaces.append(options[2].decode())
        elif kind == ENHANCED_PACKET:
            packets.append(_packet(body, interfaces))
        else:
            assert kind == SECTION_HEADER
            assert at == 0
        at += length
    return packets


def _packet(body: bytes, interfaces: list[str]) -> Captured:
    interface, high, low, captured, length = struct.unpack_from("=IIIII", body)
    options = dict(_options(body[20 + captured + -captured % 4 :]))
    outbound = struct.unpack("=I", options[2])[0] & 3 == 2
    frame = body[20 : 20 + captured]
    return Captured(interfaces[interface], high << 32 | low, frame, length, outbound, options[1].decode())


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while (code := struct.unpack_from("=H", data, at)[0]) != 0:
        (length,) = struct.unpack_from("=H", data, at + 2)
        yield code, data[at + 4 : at + 4 + length]
        at += 4 + length + -length % 4
    assert at + 4 == len(data)
