"""The benchmark's own traffic: a generator and sinks at the XDP hook (traffic_kern.c), from Python.

It must never decide what to measure, and must never be what limits a measurement: `measure.py` checks that.
"""

import ctypes
import errno
import ipaddress
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.histogram import BUCKETS, Histogram
from bench.machine import GENERATOR_CPU, pinned
from bench.streams import HEADER_BYTES, Streams, frame_header, word_sum
from mcr.errors import McrError
from mcr.loader import Link, attach, bpf_source_dir
from tests.netns.lab import Lab, Namespace

SOURCE_FILE = Path(__file__).with_name("traffic_kern.c")
MAX_INPUTS = 8  # this and the next four: as in traffic_kern.c
MAX_INTERFACES = 1024
MAX_STREAMS = 65536
TRIAL_SHIFT = 40
DUE_UNIT_NS = 1 / 256
MAX_BATCH = 64
TCX_INGRESS = 46  # BPF_TCX_INGRESS, linux/bpf.h
LIVE_FRAMES = 2  # BPF_F_TEST_XDP_LIVE_FRAMES, linux/bpf.h
FLOW_LIMIT_S = 30.0  # of traffic that flows until it is stopped
QUIET_S = 0.05
POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Sent:
    """What the generator did: packets offered, from the first to the last, and what of it was waiting."""

    packets: int
    first_ns: int
    elapsed_s: float
    waited_ns: int

    @property
    def rate_pps(self) -> float:
        return self.packets / self.elapsed_s if self.elapsed_s else 0.0


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


def burst_packets(rate_pps: float, burst_s: float) -> int:
    """How many packets a paced generator hands over at once."""
    return min(MAX_BATCH, max(1, int(rate_pps * burst_s)))


class Programs:
    """traffic_kern.c, compiled and loaded once for a whole run; one Traffic at a time uses it."""

    def __init__(self) -> None:
        self.module = _compile()
        self.generate = _load(self.module, b"generate")
        self.sink = _load(self.module, b"sink")
        self.stack_sink = _load(self.module, b"stack_sink", stack=True)
        self.trial = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.module.cleanup()


class Traffic:
    """The generator of one source namespace, the sinks of one sink namespace, and what they counted.

    burst_s: a paced generator hands over its packets after this time at the latest.
    """

    def __init__(self, programs: Programs, lab: Lab, source: Namespace, sink: Namespace) -> None:
        self._programs, self._lab, self._source, self._sink = programs, lab, source, sink
        self._table = programs.module
        self._stack = ExitStack()
        self._streams_used = 0
        self._sinks: dict[str, tuple[int, Streams, int]] = {}  # ifindex, what it expects, its first order
        self._timed = False
        self._libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
        self.burst_s = 5e-6

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        table = self._table[b"sinks"]
        for expected in self._sinks.values():
            table[ctypes.c_uint32(expected[0])] = table.Leaf()

    def expect(self, interface: str, streams: Streams, *, frames: bool) -> None:
        """Attaches the sink to an interface of the sink namespace, to count these streams.

        frames: as what they arrive: XDP frames, or packets of the stack, each with the sink that costs less.
        """
        with self._lab.inside(self._sink):
            ifindex = socket.if_nametoindex(interface)
            if self._streams_used + streams.count > MAX_STREAMS or ifindex >= MAX_INTERFACES:
                raise McrError("too many streams for the sinks", "ask for fewer streams or outputs")
            if frames:
                link: Link = attach(self._programs.sink, interface, ifindex, "native")
                self._stack.callback(link.close)
            else:
                self._stack.callback(os.close, self._attach_to_stack(ifindex))
        self._sinks[interface] = ifindex, streams, self._streams_used
        self._streams_used += streams.count

    def _attach_to_stack(self, ifindex: int) -> int:
        link = int(self._libbpf.bpf_link_create(self._programs.stack_sink, ifindex, TCX_INGRESS, None))
        if link < 0:
            raise McrError(
                f"cannot attach the sink: {os.strerror(-link)}", "the benchmark needs Linux 6.6 (tcx)"
            )
        return link

    def begin_trial(self, interfaces: Sequence[str], timed: bool = False) -> None:
        """Sets the counters of these sinks to zero; what is still under way will not be counted.

        timed: with the time and the latency of each packet; else with the time of every 16th.
        """
        self._programs.trial += 1
        orders, sinks = self._table[b"orders"], self._table[b"sinks"]
        fresh = orders.Leaf()
        fresh.next_sequence = self._programs.trial << TRIAL_SHIFT
        for interface in interfaces:
            ifindex, streams, first = self._sinks[interface]
            for index in range(streams.count):
                orders[ctypes.c_uint32(first + index)] = fresh
            expected = sinks.Leaf()
            expected.group, expected.port = int(ipaddress.IPv4Address(streams.group)), streams.port
            expected.streams, expected.by_group = streams.count, streams.by_group
            expected.first_arrival, expected.timed = first, timed
            sinks[ctypes.c_uint32(ifindex)] = expected
        if timed:
            self._table[b"latencies"].clear()
            self._table[b"longest_ns"].clear()

    def send(self, interfaces: Sequence[str], streams: Streams, count: int, rate_pps: float) -> Sent:
        """Sends count packets out of interfaces of the source namespace, cycling through the streams.

        Stream n leaves by interface n modulo their number. rate_pps: 0 is flat out. The calling thread, and
        with it everything that the kernel does with the packets at once, runs on the generator's CPU.
        """
        frame = frame_header(streams) + bytes(streams.payload_bytes)
        batch = burst_packets(rate_pps, self.burst_s) if rate_pps else MAX_BATCH
        with self._lab.inside(self._source), pinned(GENERATOR_CPU):
            indices = [socket.if_nametoindex(interface) for interface in interfaces]
            self._set_generator(frame, indices, streams, count, rate_pps)
            self._run(frame, count, batch)
        state = self._table[b"generators"][ctypes.c_uint32(0)]
        first_ns, last_ns = int(state.first_ns), int(state.last_ns)
        return Sent(int(state.sent), first_ns, (last_ns - first_ns) / 1e9, int(state.waited_ns))

    @contextmanager
    def flowing(self, interfaces: Sequence[str], streams: Streams, rate_pps: float) -> Iterator[None]:
        """Traffic that flows at a pace until the block ends, or FLOW_LIMIT_S. Call `begin_trial` before."""
        ended: list[BaseException] = []

        def run() -> None:
            try:
                self.send(interfaces, streams, int(rate_pps * FLOW_LIMIT_S), rate_pps)
            except (OSError, McrError) as error:
                ended.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            self._table[b"stopped"][ctypes.c_uint32(0)] = ctypes.c_uint32(1)
            thread.join()
            self._table[b"stopped"][ctypes.c_uint32(0)] = ctypes.c_uint32(0)
        if ended:
            raise ended[0]

    def _set_generator(
        self, frame: bytes, ifindexes: Sequence[int], streams: Streams, count: int, rate_pps: float
    ) -> None:
        if not 1 <= len(ifindexes) <= MAX_INPUTS:
            raise McrError(f"{len(ifindexes)} inputs", f"the generator sends from 1 to {MAX_INPUTS}")
        table = self._table[b"generators"]
        state = table.Leaf()
        state.count, state.sequence = count, self._programs.trial << TRIAL_SHIFT
        state.interval = round(1e9 / rate_pps / DUE_UNIT_NS) if rate_pps else 0
        ctypes.memmove(state.header, frame, HEADER_BYTES)
        state.checksum_base = word_sum(frame[14:24]) + word_sum(frame[26:30])
        state.group, state.port = int(ipaddress.IPv4Address(streams.group)), streams.port
        state.streams, state.by_group, state.inputs = streams.count, streams.by_group, len(ifindexes)
        for number, ifindex in enumerate(ifindexes):
            state.ifindexes[number] = ifindex
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
        status = -errno.EINTR
        while status == -errno.EINTR:  # by a signal: the generator goes on from where it was
            status = int(self._libbpf.bpf_prog_test_run_opts(self._programs.generate, ctypes.byref(options)))
        if status:
            raise OSError(-status, f"BPF_PROG_TEST_RUN: {os.strerror(-status)}")

    def arrived(self, interface: str) -> Arrived:
        """What has reached an interface in this trial."""
        ifindex, streams, first = self._sinks[interface]
        sink, table = self._table[b"sinks"][ctypes.c_uint32(ifindex)], self._table[b"orders"]
        rows = [table[ctypes.c_uint32(first + index)] for index in range(streams.count)]
        return Arrived(
            int(sink.packets),
            sum(int(row.missing) for row in rows),
            sum(int(row.late) for row in rows),
            int(sink.first_ns),
            int(sink.last_ns),
        )

    def packets(self, interface: str) -> int:
        """How many packets have reached an interface in this trial."""
        return int(self._table[b"sinks"][ctypes.c_uint32(self._sinks[interface][0])].packets)

    def settle(self, interfaces: Sequence[str], sent: int) -> list[Arrived]:
        """What has reached the interfaces, once each has got what was sent or nothing more comes."""
        quiet_since, before = time.monotonic(), [self.packets(each) for each in interfaces]
        while any(packets < sent for packets in before) and time.monotonic() - quiet_since < QUIET_S:
            time.sleep(POLL_S)
            now = [self.packets(each) for each in interfaces]
            if now != before:
                quiet_since, before = time.monotonic(), now
        return [self.arrived(interface) for interface in interfaces]

    def latency(self) -> Histogram:
        """From the generator's stamp to the sinks, all of them together, in this timed trial."""
        table = self._table[b"latencies"]
        buckets = [sum(table[ctypes.c_uint32(bucket)]) for bucket in range(BUCKETS)]
        return Histogram(tuple(buckets), max(self._table[b"longest_ns"][ctypes.c_uint32(0)]))


def _compile() -> Any:
    """Compiles traffic_kern.c as mcr/loader.py does its own, but in this process, which need not be small."""
    os.environ["BCC_KERNEL_SOURCE"] = str(bpf_source_dir() / "uapi_shim")
    try:
        from bcc import BPF
    except ImportError as error:
        raise McrError(f"the BPF compiler is missing: {error}", "apt install python3-bpfcc") from error
    includes = ["/usr/include", f"/usr/include/{platform.machine()}-linux-gnu"]
    flags = [word for path in includes for word in ("-idirafter", path)]
    return BPF(src_file=bytes(SOURCE_FILE), cflags=flags)


def _load(module: Any, name: bytes, *, stack: bool = False) -> int:
    from bcc import BPF

    return int(module.load_func(name, BPF.SCHED_CLS if stack else BPF.XDP).fd)
