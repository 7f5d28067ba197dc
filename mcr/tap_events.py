"""What traces and captures tell, as values: the events of `struct mcr_tap_event`, decoded.

Shared by the supervisor, which passes the events on as they are, and the commands, which show them. This
module must never do I/O.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import ip_address

from mcr._bpf import ffi, lib
from mcr.stream import Address, Stream

EVENT_BYTES: int = ffi.sizeof("struct mcr_tap_event")
LARGEST_SNAPLEN: int = lib.MCR_TAP_BYTES


class Verdict(IntEnum):
    """enum mcr_tap_verdict."""

    PASSED = lib.MCR_TAP_PASSED
    DROPPED = lib.MCR_TAP_DROPPED
    TO_WORKER = lib.MCR_TAP_TO_WORKER
    RELAYED = lib.MCR_TAP_RELAYED
    SENT = lib.MCR_TAP_SENT
    NOT_SENT = lib.MCR_TAP_NOT_SENT


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a packet (output_id 0), or of its copy for one output.

    time_ns, done_ns: CLOCK_MONOTONIC; time_ns is what all events of a packet share. reason, error: numbers,
    of which the verdict says the kind. ifindex: where it came in, or left. data: as much of the frame as was
    asked for, of `length` bytes in all; segment and checksum_offset tell what is not yet as it will be on the
    wire.
    """

    time_ns: int
    done_ns: int
    ifindex: int
    rule_id: int
    output_id: int
    queue: int
    cpu: int
    length: int
    error: int
    segment: int
    checksum_offset: int
    verdict: int
    reason: int
    ttl: int
    tos: int
    vlan: int
    vlan_outer: int
    dport: int
    saddr: bytes
    daddr: bytes
    data: bytes

    def stream(self, interface: str) -> Stream:
        """What the packet is of, from its one source."""
        return Stream(
            address=_address(self.daddr),
            port=self.dport,
            interface=interface,
            source=_address(self.saddr),
            vlan=self.vlan,
            vlan_outer=self.vlan_outer,
        )


def _address(raw: bytes) -> Address:
    return ip_address(raw[12:]) if raw[:12] == bytes(10) + b"\xff\xff" else ip_address(raw)


def decode(chunk: bytes) -> Iterator[Event]:
    """The events of one answer. What does not hold a whole event ends it."""
    at = 0
    while at + EVENT_BYTES <= len(chunk):
        raw = ffi.cast("struct mcr_tap_event *", ffi.from_buffer(chunk) + at)
        at += EVENT_BYTES
        data = chunk[at : at + raw.captured]
        at += raw.captured
        yield Event(
            time_ns=raw.time_ns,
            done_ns=raw.done_ns,
            ifindex=raw.key.ifindex,
            rule_id=raw.rule_id,
            output_id=raw.output_id,
            queue=raw.queue,
            cpu=raw.cpu,
            length=raw.length,
            error=raw.error,
            segment=raw.segment,
            checksum_offset=raw.checksum_offset,
            verdict=raw.verdict,
            reason=raw.reason,
            ttl=raw.ttl,
            tos=raw.tos,
            vlan=raw.key.vlan,
            vlan_outer=raw.key.vlan_outer,
            dport=raw.key.dport,
            saddr=bytes(raw.key.saddr),
            daddr=bytes(raw.key.daddr),
            data=data,
        )


def encode_sent(
    rule_id: int, output_id: int, ifindex: int, done_ns: int, length: int, data: bytes, **fields: int
) -> bytes:
    """The event of a frame that an output sent, with as much of it as there is in data."""
    event = ffi.new("struct mcr_tap_event *", fields)
    event.rule_id, event.output_id, event.key.ifindex = rule_id, output_id, ifindex
    event.done_ns, event.length, event.captured = done_ns, length, len(data)
    event.verdict = lib.MCR_TAP_SENT
    return bytes(ffi.buffer(event)) + data
