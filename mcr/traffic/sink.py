"""The test sink: receives one stream and gives an exact account of it.

Loss, duplicates and order come from the sequence numbers, integrity from the fill (see traffic.h), latency
from the timestamps. One run of a test source is one measurement: a source that starts again from sequence
number 0 looks like duplicates. This module must never blame the network for what the sink's own socket threw
away.
"""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Self

from mcr.errors import McrError
from mcr.stream import Address, Stream
from mcr.traffic._traffic import ffi, lib
from mcr.traffic.sockets import open_sink_socket

DEFAULT_RECEIVE_BUFFER_BYTES = 128 * 1024 * 1024

_SLICE_NS = 100_000_000
_PROGRESS_NS = 1_000_000_000
_NO_LIMIT = 2**64 - 1


@dataclass(frozen=True, slots=True)
class ListenReport:
    """What a sink received. Latencies are from the source's timestamp to the sink having the packet.

    packets: all that arrived, duplicates too; bytes: of payload. expected: None if no number was given.
    lost: sequence numbers missing between the lowest and the highest, and not less than what `expected`
    misses. reordered: as RFC 4737 section 3 defines it. stale: more than 4 million sequence numbers late, so
    that nothing tells whether it is a duplicate. corrupt: the fill does not belong to the sequence number;
    these count as lost too. unsequenced: payloads of fewer than 8 bytes. ignored: from another source than
    the stream's. socket_dropped: thrown away because the sink was too slow, or for a bad checksum;
    checksum_errors tells the latter, for all UDP sockets of the network namespace. latency_negative: packets
    from the future, so that the clocks disagree. other_sources: packets from sources beyond the 8 listed.
    digest: SHA-256 over the payloads in order of arrival. interrupted: ended by `stop`.
    """

    stream: str
    packets: int
    bytes: int
    expected: int | None
    lost: int
    duplicates: int
    reordered: int
    stale: int
    corrupt: int
    unsequenced: int
    ignored: int
    socket_dropped: int
    checksum_errors: int
    seconds: float
    rate: float
    size_min: int
    size_max: int
    latency_min_ns: int | None
    latency_p50_ns: int | None
    latency_p99_ns: int | None
    latency_max_ns: int | None
    latency_negative: int
    ttls: tuple[int, ...]
    dscps: tuple[int, ...]
    sources: tuple[str, ...]
    other_sources: int
    receive_buffer_bytes: int
    digest: str | None
    interrupted: bool

    @property
    def complete(self) -> bool:
        """Whether exactly what was expected arrived: nothing lost, duplicated, corrupt or thrown away."""
        wanted = self.packets > 0 if self.expected is None else self.packets == self.expected
        faults = self.lost + self.duplicates + self.stale + self.corrupt + self.socket_dropped
        return wanted and not faults


class Sink:
    """A test sink, bound and joined once it exists, so that no packet sent from then on is missed.

    sock: a bound datagram socket with a receive timeout to use, and to close, in place of an own one.
    digest: also compute the SHA-256 over all payloads. Raises McrError.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        digest: bool = False,
        receive_buffer_bytes: int = DEFAULT_RECEIVE_BUFFER_BYTES,
        sock: socket.socket | None = None,
    ) -> None:
        self._stream = stream
        self._sock = sock or open_sink_socket(stream, receive_buffer_bytes)
        self._checksum_errors = _ChecksumErrors(stream.address.version)
        self._sha256 = hashlib.sha256() if digest else None
        out = ffi.new("struct mcr_sink **")
        only_source = ffi.NULL if stream.source is None else _mapped(stream.source)
        status = lib.mcr_sink_open(self._sock.fileno(), only_source, digest, out)
        if status:
            self._sock.close()
            self._checksum_errors.close()
            raise McrError(f"cannot start a test sink: {os.strerror(-status)}", "free some memory")
        self._core = out[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the group and frees the memory."""
        lib.mcr_sink_close(self._core)
        self._core = ffi.NULL
        self._sock.close()
        self._checksum_errors.close()

    def run(
        self,
        *,
        expect: int | None = None,
        idle_s: float | None = None,
        timeout_s: float | None = None,
        grace_s: float = 0.2,
        stop: threading.Event | None = None,
        progress: Callable[[ListenReport], None] | None = None,
    ) -> ListenReport:
        """Receives until one of the ends comes, and reports everything since the sink exists.

        expect: ends grace_s after so many packets in all, to see what comes too much. idle_s: ends so long
        after the latest packet. timeout_s: ends after so long in any case. progress is called every second.
        Raises McrError.
        """
        started_ns = time.monotonic_ns()
        reached = self._receive(expect, started_ns, idle_s, timeout_s, stop, progress)
        if reached:
            self._linger(time.monotonic_ns() + round(grace_s * 1e9))
        return self._report(expect, interrupted=bool(stop and stop.is_set()))

    def _receive(
        self,
        expect: int | None,
        started_ns: int,
        idle_s: float | None,
        timeout_s: float | None,
        stop: threading.Event | None,
        progress: Callable[[ListenReport], None] | None,
    ) -> bool:
        """Returns whether the expected number of packets arrived."""
        limit = _NO_LIMIT if expect is None else expect
        counts = lib.mcr_sink_counts(self._core)
        progress_ns = started_ns + _PROGRESS_NS
        while counts.packets < limit:
            taken = self._take(limit)
            now_ns = time.monotonic_ns()
            if stop and stop.is_set():
                return False
            if timeout_s is not None and now_ns - started_ns >= timeout_s * 1e9:
                return False
            if (
                not taken
                and idle_s is not None
                and counts.packets
                and now_ns - counts.last_ns >= idle_s * 1e9
            ):
                return False
            if progress and now_ns >= progress_ns:
                progress(self._report(expect, interrupted=False))
                progress_ns = now_ns + _PROGRESS_NS
        return True

    def _linger(self, until_ns: int) -> None:
        """Takes what comes too much."""
        while time.monotonic_ns() < until_ns:
            self._take(_NO_LIMIT)

    def _take(self, limit: int) -> int:
        """Up to 100 ms of packets, until limit have arrived in all; returns their number."""
        taken: int = lib.mcr_sink_run(self._core, limit, _SLICE_NS)
        if taken < 0:
            raise McrError(
                f"receiving {self._stream} failed: {os.strerror(-taken)}",
                "check the interface: ip -d link show",
            )
        if self._sha256 and taken:
            start = ffi.new("const uint8_t **")
            length = lib.mcr_sink_received(self._core, start)
            self._sha256.update(ffi.buffer(start[0], length))
        return taken

    def _report(self, expect: int | None, *, interrupted: bool) -> ListenReport:
        counts = lib.mcr_sink_counts(self._core)
        seconds = (counts.last_ns - counts.first_ns) / 1e9
        missing = counts.highest - counts.lowest + 1 - counts.distinct if counts.distinct else 0
        timed = counts.latencies > 0
        return ListenReport(
            stream=str(self._stream),
            packets=counts.packets,
            bytes=counts.bytes,
            expected=expect,
            lost=max(missing, (expect or 0) - (counts.packets - counts.duplicates)),
            duplicates=counts.duplicates,
            reordered=counts.reordered,
            stale=counts.stale,
            corrupt=counts.corrupt,
            unsequenced=counts.unsequenced,
            ignored=counts.ignored,
            socket_dropped=lib.mcr_sink_socket_dropped(self._core),
            checksum_errors=self._checksum_errors.count(),
            seconds=seconds,
            rate=(counts.packets - 1) / seconds if seconds else 0.0,
            size_min=counts.size_min,
            size_max=counts.size_max,
            latency_min_ns=counts.latency_min_ns if timed else None,
            latency_p50_ns=lib.mcr_sink_latency_ns(self._core, 500) if timed else None,
            latency_p99_ns=lib.mcr_sink_latency_ns(self._core, 990) if timed else None,
            latency_max_ns=counts.latency_max_ns if timed else None,
            latency_negative=counts.latency_negative,
            ttls=tuple(ttl for ttl in range(256) if counts.ttl_seen[ttl]),
            dscps=tuple(dscp for dscp in range(64) if counts.dscp_seen[dscp]),
            sources=tuple(_text(bytes(counts.sources[i])) for i in range(counts.source_count)),
            other_sources=counts.other_sources,
            receive_buffer_bytes=self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
            digest=self._sha256.hexdigest() if self._sha256 else None,
            interrupted=interrupted,
        )


def _mapped(address: Address) -> bytes:
    """16 bytes, IPv4 as v4-mapped IPv6 (RFC 4291 section 2.5.5.2)."""
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def _text(mapped: bytes) -> str:
    address = IPv6Address(mapped)
    return str(address.ipv4_mapped or address)


class _ChecksumErrors:
    """UDP datagrams with a bad checksum, of the network namespace in which this was made, since then.

    InCsumErrors of /proc/net/snmp and snmp6 (proc(5)). The file stays open because an open file keeps its
    namespace, whichever one the thread is in later.
    """

    def __init__(self, version: int) -> None:
        self._version = version
        path = Path("/proc/thread-self/net", "snmp6" if version == 6 else "snmp")
        self._file = path.open()
        self._start = self._read()

    def count(self) -> int:
        return self._read() - self._start

    def close(self) -> None:
        self._file.close()

    def _read(self) -> int:
        self._file.seek(0)
        lines = [line.split() for line in self._file]
        if self._version == 6:
            return next(int(line[1]) for line in lines if line[0] == "Udp6InCsumErrors")
        names, values = (line for line in lines if line[0] == "Udp:")
        return int(values[names.index("InCsumErrors")])
