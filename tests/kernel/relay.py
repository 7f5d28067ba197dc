"""The loaded XDP program as the kernel-level tests use it: rules in, one frame through it, counters out.

Frames go through BPF_PROG_TEST_RUN, which runs the real program on the real maps and sends nothing. This
module must never compute what a test expects.
"""

import mmap
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, Self

from mcr._bpf import ffi, lib

from mcr.loader import load_traced, open_pin
from mcr.maps import Maps, RuleCounts, lookups_needed, rule_key
from mcr.stream import Stream
from mcr.tap_events import Event, decode

LARGEST_FRAME = 1 << 17
FRAME_LIMIT = 1522
READ_BYTES = 1 << 20
METADATA_BYTES = ffi.sizeof("struct mcr_metadata")
# linux/if_xdp.h
AF_XDP, SOL_XDP = 44, 283
XDP_RX_RING, XDP_UMEM_REG, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING = 2, 4, 5, 6
RING_SLOTS, FRAME_SIZE = 64, 4096


class Verdict(IntEnum):
    """enum xdp_action of linux/bpf.h."""

    ABORTED = 0
    DROP = 1
    PASS = 2
    TX = 3
    REDIRECT = 4


@dataclass(frozen=True, slots=True)
class Metadata:
    """`struct mcr_metadata`; the time takes no part in a comparison."""

    rule_id: int
    payload_offset: int
    payload_length: int
    ip_offset: int
    dport: int
    ttl: int
    tos: int
    flags: int = 0
    rx_time_ns: int = field(default=0, compare=False)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What a worker reads: the struct that ends where the frame begins."""
        assert len(data) >= METADATA_BYTES
        metadata = ffi.new("struct mcr_metadata *")
        ffi.memmove(metadata, data[-METADATA_BYTES:], METADATA_BYTES)
        return cls(**{each.name: getattr(metadata, each.name) for each in fields(cls)})


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one frame; metadata is None where the program left none."""

    verdict: Verdict
    frame: bytes
    metadata: Metadata | None


@dataclass(frozen=True, slots=True)
class Counted:
    """What a rule has counted; dropped has the reasons that occurred. Only the kernel path relays here."""

    packets: int = 0
    payload_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    relayed_packets: int = 0
    relayed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """What an output of the kernel path has counted; dropped has the reasons that occurred."""

    packets: int = 0
    payload_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


class XskSocket:
    """An AF_XDP socket with its frame pool and rings, which the XSKMAP takes; it receives nothing."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, RING_SLOTS * FRAME_SIZE)
        self._socket = socket.socket(AF_XDP, socket.SOCK_RAW)
        start = int(ffi.cast("uintptr_t", ffi.from_buffer(self._memory)))
        pool = struct.pack("=QQIIII", start, len(self._memory), FRAME_SIZE, 0, 0, 0)  # struct xdp_umem_reg
        self._socket.setsockopt(SOL_XDP, XDP_UMEM_REG, pool)
        for ring in (XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING, XDP_RX_RING):
            self._socket.setsockopt(SOL_XDP, ring, RING_SLOTS)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


class Tapped:
    """What a trace is told."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._buffer = ffi.new("char[]", READ_BYTES)

    def events(self) -> list[Event]:
        """What was told since the last time."""
        told: list[Event] = []
        while (length := lib.mcr_tap_read(self._reader, self._buffer, READ_BYTES)) > 0:
            told += decode(ffi.buffer(self._buffer, length)[:])
        return told

    def missed(self) -> int:
        """Reports that were written over before they were read."""
        return int(lib.mcr_tap_missed(self._reader))


class Relay:
    """The program and maps of one instance; the calling thread is in the namespace of its interfaces."""

    def __init__(self, instance: str, maps: Maps, ifindex: int, other_ifindex: int) -> None:
        self.instance = instance
        self.maps = maps
        self.ifindex = ifindex
        self.other_ifindex = other_ifindex
        self._rules: dict[int, tuple[Stream, Any]] = {}
        self._outputs: set[int] = set()
        self._sockets: dict[int, XskSocket] = {}
        self._out = ffi.new("char[]", LARGEST_FRAME)
        self._numbers = ffi.new("uint32_t[3]")
        self._can_trace = False

    def add_rule(
        self, rule_id: int, stream: Stream, *, xsk_base: int = 0, frame_limit: int = FRAME_LIMIT
    ) -> None:
        """Adds a worker-path rule on the first interface, and the lookup that it needs."""
        self._add(stream, {"rule_id": rule_id, "xsk_base": xsk_base, "frame_limit": frame_limit})

    def add_kernel_rule(self, rule_id: int, stream: Stream, output_id: int, **fields: int) -> None:
        """Adds a kernel-path rule with one output, or with several if output_id is 0.

        fields: further ones of `struct mcr_rule_value`; flags are added to those of a kernel-path rule.
        """
        flags = lib.MCR_RULE_KERNEL | fields.pop("flags", 0)
        given = {"rule_id": rule_id, "frame_limit": FRAME_LIMIT, "output_id": output_id, "flags": flags}
        self._add(stream, given | fields)

    def _add(self, stream: Stream, fields: dict[str, int]) -> None:
        key = rule_key(stream, self.ifindex)
        self.maps.set_rule(key, fields)
        self._rules[fields["rule_id"]] = stream, key
        self.maps.set_lookups(lookups_needed([each for each, _ in self._rules.values()]))

    def set_output(self, output_id: int, fields: dict[str, int | bytes]) -> None:
        """fields: those of `struct mcr_kernel_output`. Its interface has the slot of bulk 0, where a frame
        counts as sent at once: nothing is flushed here."""
        if fields.get("ifindex"):
            self.maps.set_device(0, int(fields["ifindex"]), asks=False)
        self.maps.set_kernel_output(output_id, fields)
        self._outputs.add(output_id)

    def delete_rule(self, rule_id: int) -> None:
        """Deletes a rule and its counters; the lookups stay as they are."""
        self.maps.delete_rule(self._rules.pop(rule_id)[1])
        self.maps.clear_rule(rule_id)

    def add_socket(self, index: int) -> XskSocket:
        """Puts a new AF_XDP socket into the XSKMAP."""
        self._sockets[index] = XskSocket()
        self.maps.set_xsk(index, self._sockets[index].fileno())
        return self._sockets[index]

    def run(
        self, frame: bytes, *, ifindex: int | None = None, queue: int = 0, metadata_before: bytes = b""
    ) -> Result:
        """One frame through the program, as if received on the first interface or on `ifindex`.

        metadata_before: what an earlier XDP program left in front of the frame.
        """
        given = metadata_before + frame
        length, metadata_length, verdict = (self._numbers + i for i in range(3))
        status = lib.mcr_test_run(
            self.maps.program_fd, ffi.from_buffer(given), len(frame), len(metadata_before),
            self.ifindex if ifindex is None else ifindex, queue,
            self._out, LARGEST_FRAME, length, metadata_length, verdict,
        )  # fmt: skip
        if status:
            raise OSError(-status, "BPF_PROG_TEST_RUN")
        left = ffi.buffer(self._out, length[0])[:]
        split = metadata_length[0]
        if length[0] - split == len(frame) + METADATA_BYTES:  # for a worker: no output adds so much
            split += METADATA_BYTES
        metadata = Metadata.from_bytes(left[:split]) if left[:split] != metadata_before else None
        return Result(Verdict(verdict[0]), left[split:], metadata)

    def counts(self, rule_id: int) -> RuleCounts:
        """The rule's counters, summed over all CPUs."""
        return self.maps.rule_counts(rule_id)

    def read(self, name: str, index: int, into: Any) -> None:
        """An entry of an array map, as the kernel has it."""
        with self._open(name) as fd:
            status = lib.bpf_map_lookup_elem(fd, ffi.new("__u32 *", index), into)
        if status:
            raise OSError(-status, f"reading {name}[{index}]")

    def write(self, name: str, index: int, value: Any) -> None:
        """An entry of an array map, as whoever else writes it would."""
        with self._open(name) as fd:
            assert lib.bpf_map_update_elem(fd, ffi.new("__u32 *", index), value, 0) == 0

    def put(self, name: str, key: Any, value: int) -> None:
        """An entry of a hash map of numbers."""
        with self._open(name) as fd:
            assert lib.bpf_map_update_elem(fd, key, ffi.new("__u32 *", value), 0) == 0

    def packets_of_cpu(self, rule_id: int) -> list[int]:
        """The packets that each CPU has counted for the rule; the index is the CPU."""
        per_cpu = ffi.new("struct mcr_rule_stats[]", lib.libbpf_num_possible_cpus())
        self.read("rule_stats", rule_id, per_cpu)
        return [stats.packets for stats in per_cpu]

    def counted(self, rule_id: int) -> Counted:
        """The rule's counters without the time."""
        counts = self.counts(rule_id)
        dropped = {reason: count for reason, count in counts.dropped.items() if count}
        received = counts.received_packets, counts.received_bytes
        return Counted(*received, dropped, counts.relayed_packets, counts.relayed_bytes)

    def sent(self, output_id: int) -> Sent:
        """The output's counters."""
        counts = self.maps.output_counts(output_id)
        dropped = {reason: count for reason, count in counts.dropped.items() if count}
        return Sent(counts.sent_packets, counts.sent_bytes, dropped)

    def remember_fragment(self, fields: dict[str, Any], dport: int) -> None:
        """As if the first fragment of a datagram had been seen; fields: of `struct mcr_fragment_key`."""
        key = ffi.new("struct mcr_fragment_key *", {"ifindex": self.ifindex, **fields})
        with self._open("fragments") as fd:
            assert lib.bpf_map_update_elem(fd, key, ffi.new("__u16 *", dport), 0) == 0

    def forget_fragments(self) -> int:
        """Forgets every datagram whose first fragment was seen, and returns how many there were."""
        key, count = ffi.new("struct mcr_fragment_key *"), 0
        with self._open("fragments") as fd:
            while lib.bpf_map_get_next_key(fd, ffi.NULL, key) == 0:
                assert lib.bpf_map_delete_elem(fd, key) == 0
                count += 1
        return count

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        fd = open_pin(self.instance, name)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def tapped(self, key: Any = None, **fields: int) -> Iterator["Tapped"]:
        """A trace or capture is running; fields: of `struct mcr_tap`, without a limit unless they say one."""
        if not self._can_trace:
            load_traced(self.instance)
            self._can_trace = True
        key = ffi.new("struct mcr_rule_key *") if key is None else key
        unlimited = {"deadline_ns": (1 << 64) - 1, "limit": (1 << 64) - 1}
        with self._open("tap_events") as events, self._open("tap_reports") as reports:
            reader = lib.mcr_tap_open(events, reports)
            assert reader != ffi.NULL
            tapped = Tapped(reader)
            tapped.events()  # those that nobody has read
            self.maps.set_tap(key, **unlimited | fields)
            self.maps.set_tracing(True)
            try:
                yield tapped
            finally:
                self.maps.set_tracing(False)
                lib.mcr_tap_close(reader)

    def forget(self) -> None:
        """Everything as it was when the program was loaded: no rule, lookup, output, socket or count."""
        for rule_id in tuple(self._rules):
            self.delete_rule(rule_id)
        self.maps.set_lookups(0)
        for index, xsk in self._sockets.items():
            self.maps.delete_xsk(index)
            xsk.close()
        self._sockets.clear()
        for output_id in self._outputs:
            self.maps.set_kernel_output(output_id, {})
            self.maps.clear_output(output_id)
        self._outputs.clear()
        self.forget_fragments()
