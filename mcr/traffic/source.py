"""The test source: sends known packets to one output at a given rate.

The payloads are described in traffic.h. What the socket does not take is sent again until it is taken, so
that every packet in the report has left. This module must never count a packet that the kernel refused.
"""

import hashlib
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mcr.errors import ExitStatus, McrError
from mcr.stream import Output
from mcr.traffic._traffic import ffi, lib
from mcr.traffic.sockets import open_source_socket

MAX_BURST: int = lib.MCR_MAX_BURST
MAX_PAYLOAD: int = lib.MCR_MAX_PAYLOAD
MAX_SIZES: int = lib.MCR_MAX_SIZES

_SLICE_NS = 100_000_000


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    rate: packets per second, 0 for as fast as possible. sizes: payload bytes, used in turn. count: packets,
    None for no limit. duration_s: seconds, None for no limit. burst: packets per system call at most; a
    source that fell behind catches up in bursts, at no more than twice its rate. digest: SHA-256 over all
    payloads.
    """

    rate: float = 1000.0
    sizes: Sequence[int] = (1316,)
    count: int | None = None
    duration_s: float | None = None
    burst: int = 32
    digest: bool = False


@dataclass(frozen=True, slots=True)
class SendReport:
    """What a source sent.

    bytes: of payload. rate: packets per second that were reached. retries: times that a full socket or queue
    made the source wait; no packet was lost by it. unreachable: times that the network answered that nobody
    is there; the packets answered so are lost. digest: SHA-256 over the payloads in the order sent, None if
    not asked for. interrupted: ended by `stop`.
    """

    stream: str
    packets: int
    bytes: int
    seconds: float
    rate: float
    retries: int
    unreachable: int
    digest: str | None
    interrupted: bool


def payload(sequence: int, time_ns: int, size: int) -> bytes:
    """The payload of size bytes with this sequence number and this CLOCK_REALTIME."""
    memory = ffi.new("uint8_t[]", max(size, 1))
    lib.mcr_payload_write(memory, size, sequence, time_ns)
    return bytes(ffi.buffer(memory, size))


def send(
    output: Output,
    *,
    rate: float = 1000.0,
    sizes: Sequence[int] = (1316,),
    count: int | None = None,
    duration_s: float | None = None,
    burst: int = 32,
    digest: bool = False,
    stop: threading.Event | None = None,
) -> SendReport:
    """Sends to output until count packets have left, duration_s is over, or stop is set.

    The parameters are those of Load. Raises McrError.
    """
    load = Load(rate, sizes, count, duration_s, burst, digest)
    with open_source_socket(output) as sock:
        return transmit(sock, str(output), load, stop)


def transmit(sock: socket.socket, stream: str, load: Load, stop: threading.Event | None = None) -> SendReport:
    """`send` over a connected datagram socket of any kind, which stream names in the report.

    Raises McrError.
    """
    _check(load)
    source = _open(sock, load)
    sha256 = hashlib.sha256() if load.digest else None
    try:
        more = load.count != 0
        while more and not (stop and stop.is_set()):
            status = lib.mcr_source_run(source, _SLICE_NS)
            if status < 0:
                raise _explain(-status, stream, lib.mcr_source_counts(source).packets)
            if sha256:
                _hash_sent(source, sha256)
            more = status > 0
        digest = sha256.hexdigest() if sha256 else None
        return _report(stream, lib.mcr_source_counts(source), digest, interrupted=more)
    finally:
        lib.mcr_source_close(source)


def _check(load: Load) -> None:
    """Raises McrError unless the source can do it."""
    problem, remedy = "", ""
    if not load.sizes or len(load.sizes) > MAX_SIZES:
        problem, remedy = f"{len(load.sizes)} payload sizes", f"give 1 to {MAX_SIZES} sizes"
    elif not all(0 <= size <= MAX_PAYLOAD for size in load.sizes):
        problem = f"payload sizes {', '.join(map(str, load.sizes))}"
        remedy = f"a UDP payload has 0 to {MAX_PAYLOAD} bytes"
    elif not 1 <= load.burst <= MAX_BURST:
        problem, remedy = f"a burst of {load.burst} packets", f"give 1 to {MAX_BURST}"
    elif not 0 <= load.rate <= 1e9:
        problem, remedy = (
            f"a rate of {load.rate} packets/s",
            "give a positive rate, or 0 for as fast as possible",
        )
    elif (load.count or 0) < 0 or (load.duration_s is not None and not 0 < load.duration_s <= 1e9):
        problem, remedy = "a negative count or no duration", "give positive numbers, or leave them out"
    if problem:
        raise McrError(f"cannot send {problem}", remedy, status=ExitStatus.USAGE)


def _open(sock: socket.socket, load: Load) -> Any:
    config = ffi.new("struct mcr_source_config *")
    config.rate = load.rate
    config.count = load.count or 0
    config.duration_ns = round((load.duration_s or 0) * 1e9)
    config.burst = load.burst
    config.digest = load.digest
    config.size_count = len(load.sizes)
    config.sizes[0 : len(load.sizes)] = list(load.sizes)
    out = ffi.new("struct mcr_source **")
    status = lib.mcr_source_open(sock.fileno(), config, out)
    if status:
        raise McrError(
            f"cannot start a test source: {os.strerror(-status)}", "use smaller payloads or bursts"
        )
    return out[0]


def _hash_sent(source: Any, sha256: Any) -> None:
    start = ffi.new("const uint8_t **")
    length = lib.mcr_source_sent(source, start)
    sha256.update(ffi.buffer(start[0], length))


def _explain(number: int, stream: str, packets: int) -> McrError:
    return McrError(
        f"sending to {stream} failed after {packets} packets: {os.strerror(number)}",
        "check the interface (ip link), the route (ip route get) and the firewall (nft list ruleset)",
    )


def _report(stream: str, counts: Any, digest: str | None, *, interrupted: bool) -> SendReport:
    seconds = (counts.last_ns - counts.started_ns) / 1e9
    return SendReport(
        stream=stream,
        packets=counts.packets,
        bytes=counts.bytes,
        seconds=seconds,
        # The first packet leaves at the very start: n packets span n - 1 intervals.
        rate=(counts.packets - 1) / seconds if counts.packets > 1 and seconds else 0.0,
        retries=counts.retries,
        unreachable=counts.unreachable,
        digest=digest,
        interrupted=interrupted,
    )
