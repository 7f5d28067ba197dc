"""The benchmark's own traffic: a generator and sinks at the XDP hook (traffic_kern.c), from Python.

It must never decide what to measure, and must never be what limits a measurement: `measure.py` checks that.
"""

import ctypes
import ipaddress
import os
import platform
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mcr.errors import McrError
from mcr.loader import Link, attach, bpf_source_dir
from tests.netns.lab import Lab, Namespace

SOURCE_FILE = Path(__file__).with_name("traffic_kern.c")
HEADER_BYTES = 42  # Ethernet, IPv4, UDP: as in traffic_kern.c
SEQUENCE_BYTES = 8
MAX_INTERFACES = 1024
MAX_ARRIVALS = 65536
MIN_RATE_PPS = 5_000  # below it the generator does not keep its pace
DUE_UNIT_NS = 1 / 256
BURST_S = 5e-6  # a paced generator hands over its packets after this time at the latest
MAX_BATCH = 64
LIVE_FRAMES = 2  # BPF_F_TEST_XDP_LIVE_FRAMES, linux/bpf.h
SOURCE_MAC = bytes.fromhex("02 6d 63 72 00 01")
TTL = 16  # routers forward only what has more than 1 left
FIRST_PRIORITY = -20  # nice: of generator and relays alike, so that other work on the machine weighs little
TRIAL_SHIFT = 40  # as in traffic_kern.c
QUIET_S = 0.05
POLL_S = 0.005


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
        if not SEQUENCE_BYTES <= self.payload_bytes <= 1472:
            raise McrError(f"a payload of {self.payload_bytes} bytes", "choose 8 to 1472 bytes")

    def all(self) -> Iterator[tuple[str, int]]:
        """Group and port of each stream."""
        for index in range(self.count):
            group = ipaddress.IPv4Address(self.group) + (index if self.by_group else 0)
            yield str(group), self.port + (0 if self.by_group else index)


@dataclass(frozen=True, slots=True)
class Sent:
    """What the generator did: packets offered, and the time from the first to the last of them."""

    packets: int
    elapsed_s: float

    @property
    def rate_pps(self) -> float:
        return self.packets / self.elapsed_s


@dataclass(frozen=True, slots=True)
class Arrived:
    """What reached one interface. missing: sequence numbers jumped over; late: out of order or twice."""

    packets: int
    missing: int
    late: int
    first_ns: int
    last_ns: int


class _TestRunOptions(ctypes.Structure):
    """struct bpf_test_run_opts of libbpf's bpf/bpf.h; sz tells libbpf which fields there are."""

    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    ]


def frame_header(streams: Streams) -> bytes:
    """Ethernet, IPv4 and UDP headers of the first stream's packets; no UDP checksum (RFC 768)."""
    group = ipaddress.IPv4Address(streams.group)
    mac = b"\x01\x00\x5e" + (int(group) & 0x7FFFFF).to_bytes(3, "big")  # RFC 1112 section 6.4
    udp_bytes = 8 + streams.payload_bytes
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + udp_bytes, 0, 0x4000, TTL, socket.IPPROTO_UDP, 0,
        socket.inet_aton("10.1.0.1"), group.packed,
    )  # fmt: skip
    total = _word_sum(ip)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    ip = ip[:10] + checksum.to_bytes(2, "big") + ip[12:]
    return mac + SOURCE_MAC + b"\x08\x00" + ip + struct.pack("!HHHH", 40000, streams.port, udp_bytes, 0)


def _word_sum(data: bytes) -> int:
    return sum(struct.unpack(f"!{len(data) // 2}H", data))


class Traffic:
    """The loaded programs: one generator in `source`, sinks on interfaces of `sink`. A context manager."""

    def __init__(self, lab: Lab, source: Namespace, sink: Namespace) -> None:
        self._lab = lab
        self._source, self._sink = source, sink
        self._stack = ExitStack()
        self._arrivals_used = 0
        self._trial = 0
        self._ranges: dict[str, tuple[Streams, int]] = {}
        self._module = _compile()
        self._generate = _load(self._module, "generate")
        self._sink_program = _load(self._module, "sink")
        self._libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._module.cleanup()

    def expect(self, interface: str, streams: Streams) -> None:
        """Attaches the sink to an interface of the sink namespace, to count these streams."""
        first = self._arrivals_used
        with self._lab.inside(self._sink):
            ifindex = socket.if_nametoindex(interface)
            if first + streams.count > MAX_ARRIVALS or ifindex >= MAX_INTERFACES:
                raise McrError("too many streams for the sinks", "ask for fewer streams or outputs")
            table = self._module["expectations"]
            table[ctypes.c_uint32(ifindex)] = table.Leaf(
                int(ipaddress.IPv4Address(streams.group)),
                streams.count,
                first,
                streams.port,
                streams.by_group,
            )
            link: Link = attach(self._sink_program, interface, ifindex, "native")
        self._stack.callback(link.close)
        self._arrivals_used += streams.count
        self._ranges[interface] = (streams, first)

    def send(self, interface: str, streams: Streams, count: int, rate_pps: float, cpu: int) -> Sent:
        """Sends count packets out of an interface of the source namespace, cycling through the streams.

        rate_pps: 0 is flat out. cpu: where the caller, and with it the generator and everything that the
        kernel does with its packets at once, runs meanwhile.
        """
        frame = frame_header(streams) + bytes(streams.payload_bytes)
        with self._lab.inside(self._source), _pinned(cpu):
            self._set_generator(frame, socket.if_nametoindex(interface), streams, count, rate_pps)
            batch = min(MAX_BATCH, max(1, int(rate_pps * BURST_S))) if rate_pps else MAX_BATCH
            self._run(frame, count, batch)
        state = self._module["generators"][ctypes.c_uint32(0)]
        return Sent(int(state.sent), (state.last_ns - state.first_ns) / 1e9)

    def _set_generator(
        self, frame: bytes, ifindex: int, streams: Streams, count: int, rate_pps: float
    ) -> None:
        table = self._module["generators"]
        state = table.Leaf()
        state.count, state.sequence = count, self._trial << TRIAL_SHIFT
        state.interval = round(1e9 / rate_pps / DUE_UNIT_NS) if rate_pps else 0
        ctypes.memmove(state.header, frame, HEADER_BYTES)
        state.checksum_base = _word_sum(frame[14:24]) + _word_sum(frame[26:30])
        state.group, state.port = int(ipaddress.IPv4Address(streams.group)), streams.port
        state.ifindex, state.streams, state.by_group = ifindex, streams.count, streams.by_group
        table[ctypes.c_uint32(0)] = state

    def _run(self, frame: bytes, count: int, batch: int) -> None:
        data = ctypes.create_string_buffer(frame, len(frame))
        options = _TestRunOptions(
            sz=ctypes.sizeof(_TestRunOptions),
            data_in=ctypes.addressof(data),
            data_size_in=len(frame),
            repeat=count,
            flags=LIVE_FRAMES,
            batch_size=batch,
        )
        status = int(self._libbpf.bpf_prog_test_run_opts(self._generate, ctypes.byref(options)))
        if status:
            raise OSError(-status, f"BPF_PROG_TEST_RUN: {os.strerror(-status)}")

    def begin_trial(self) -> None:
        """Sets the sinks' counters to zero; what is still under way from before will not be counted."""
        self._trial += 1
        table = self._module["arrivals"]
        fresh = table.Leaf()
        fresh.next_sequence = self._trial << TRIAL_SHIFT
        for index in range(self._arrivals_used):
            table[ctypes.c_uint32(index)] = fresh

    def arrived(self, interface: str) -> Arrived:
        """What has reached an interface in this trial."""
        streams, first = self._ranges[interface]
        table = self._module["arrivals"]
        rows = [table[ctypes.c_uint32(first + index)] for index in range(streams.count)]
        used = [row for row in rows if row.packets]
        return Arrived(
            sum(int(row.packets) for row in rows),
            sum(int(row.missing) for row in rows),
            sum(int(row.late) for row in rows),
            min((int(row.first_ns) for row in used), default=0),
            max((int(row.last_ns) for row in used), default=0),
        )

    def settle(self, interfaces: tuple[str, ...], sent: int) -> list[Arrived]:
        """What has reached the interfaces, once each has got what was sent or nothing more comes."""
        quiet_since, before = time.monotonic(), self._arrived_packets(interfaces)
        while any(packets < sent for packets in before) and time.monotonic() - quiet_since < QUIET_S:
            time.sleep(POLL_S)
            now = self._arrived_packets(interfaces)
            if now != before:
                quiet_since, before = time.monotonic(), now
        return [self.arrived(interface) for interface in interfaces]

    def _arrived_packets(self, interfaces: tuple[str, ...]) -> list[int]:
        return [self.arrived(interface).packets for interface in interfaces]


@contextmanager
def before_other_sessions() -> Iterator[None]:
    """This session's processes come before those of others for a while, which nice alone does not do.

    The scheduler shares CPUs out among sessions first (autogroups, sched(7)), if it was built so.
    """
    path = Path("/proc/self/autogroup")
    if not path.exists() or not (nice := re.search(r"nice (-?\d+)", path.read_text())):
        yield
        return
    path.write_text(str(FIRST_PRIORITY))
    try:
        yield
    finally:
        path.write_text(nice[1])


@contextmanager
def _pinned(cpu: int) -> Iterator[None]:
    """The calling thread runs on one CPU for a while, before everybody else."""
    before, thread = os.sched_getaffinity(0), threading.get_native_id()
    priority = os.getpriority(os.PRIO_PROCESS, thread)
    os.sched_setaffinity(0, {cpu})
    os.setpriority(os.PRIO_PROCESS, thread, FIRST_PRIORITY)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, thread, priority)
        os.sched_setaffinity(0, before)


def _compile() -> Any:
    """Compiles traffic_kern.c as mcr/loader.py does its own, but in this process, which need not be small."""
    os.environ["BCC_KERNEL_SOURCE"] = str(bpf_source_dir() / "uapi_shim")
    try:
        from bcc import BPF
    except ImportError as error:
        raise McrError(f"the BPF compiler is missing: {error}", "apt install python3-bpfcc") from error
    includes = ["/usr/include", f"/usr/include/{platform.machine()}-linux-gnu"]
    return BPF(src_file=str(SOURCE_FILE), cflags=[word for path in includes for word in ("-idirafter", path)])


def _load(module: Any, name: str) -> int:
    from bcc import BPF

    return int(module.load_func(name, BPF.XDP).fd)
