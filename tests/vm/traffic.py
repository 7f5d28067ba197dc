"""Streams through the relay, all at once and from one process, and what arrived of each.

A machine without KVM takes seconds to start a process, so that a sender and a listener for each stream would
cost hours. The sockets are real ones, opened in the namespaces. It must never be more patient than it is
with what works: what is late counts as lost.
"""

import contextlib
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from tests.netns.lab import Lab, Namespace

RATE = 400  # packets/s of all streams together
STREAM_RATE = 50  # and of one
QUIET_S = 5.0
IN_PORT = 5000
SMALL, LARGE = 1316, 8000
RECEIVE_BUFFER = 16 << 20
# linux/in.h, linux/in6.h: only the groups that this socket joined itself
IP_MULTICAST_ALL, IPV6_MULTICAST_ALL = 49, 29
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2
SO_RCVBUFFORCE = 33


@dataclass(frozen=True, slots=True)
class Place:
    """An interface and an address there."""

    interface: str
    address: str


@dataclass(frozen=True, slots=True)
class Stream:
    """What a rule relays: where gen sends it, and where and at which port snk must receive it."""

    rule: str
    source: Place
    sinks: tuple[Place, ...]
    port: int


@dataclass(slots=True)
class Sink:
    """One receiver of a stream. seen: how often each number came; wrong: datagrams not as they were sent."""

    socket: socket.socket
    stream: Stream
    mark: int
    seen: dict[int, int] = field(default_factory=dict)
    wrong: int = 0

    def drain(self, size: int) -> bool:
        """Takes what is there. Returns whether there was something."""
        taken = False
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self.socket.recv(65535)
                taken = True
                number = struct.unpack_from("!I", data)[0]
                self.seen[number] = self.seen.get(number, 0) + 1
                self.wrong += data != _payload(number, self.mark, size)
        return taken

    def words(self, count: int) -> str:
        """Empty if exactly what was sent has arrived."""
        duplicates = sum(self.seen.values()) - len(self.seen)
        if len(self.seen) == count and not duplicates and not self.wrong:
            return ""
        missing = next((number for number in range(count) if number not in self.seen), None)
        first = "" if missing is None else f", the first missing one is {missing}"
        return f"{len(self.seen)} of {count}, {duplicates} twice, {self.wrong} wrong{first}"


def _payload(number: int, mark: int, size: int) -> bytes:
    head = struct.pack("!II", number, mark)
    return head + bytes([number + mark & 255]) * (size - len(head))


def run(
    lab: Lab, gen: Namespace, snk: Namespace, streams: Sequence[Stream], count: int, size: int = SMALL
) -> dict[str, str]:
    """Sends count datagrams of each stream. Returns by rule what is wrong, if anything is."""
    with contextlib.ExitStack() as stack:
        with lab.inside(snk):
            sinks = [
                Sink(stack.enter_context(_sink(place, stream.port)), stream, mark)
                for mark, stream in enumerate(streams)
                for place in stream.sinks
            ]
        with lab.inside(gen):
            sources = [stack.enter_context(_source(stream.source)) for stream in streams]
        errors = _send(sources, streams, sinks, count, size)
        _receive(sinks, count, size)
        found = dict(errors)
        for sink in sinks:
            if words := sink.words(count):
                found[sink.stream.rule] = f"{found.get(sink.stream.rule, '')} {words}".strip()
        return found


def _send(
    sources: Sequence[socket.socket],
    streams: Sequence[Stream],
    sinks: Sequence[Sink],
    count: int,
    size: int,
) -> dict[str, str]:
    errors: dict[str, str] = {}
    begun = time.monotonic()
    for number in range(count):
        for mark, (source, stream) in enumerate(zip(sources, streams, strict=True)):
            try:
                source.sendto(_payload(number, mark, size), (stream.source.address, IN_PORT))
            except OSError as error:
                errors[stream.rule] = f"cannot send: {error.strerror}"
        for sink in sinks:
            sink.drain(size)
        due = begun + (number + 1) * max(len(streams) / RATE, 1 / STREAM_RATE)
        time.sleep(max(0.0, due - time.monotonic()))
    return errors


def _receive(sinks: Sequence[Sink], count: int, size: int) -> None:
    """Until everything is there, or nothing comes any more."""
    last = time.monotonic()
    while time.monotonic() - last < QUIET_S and any(len(sink.seen) < count for sink in sinks):
        ready = select.select([sink.socket for sink in sinks], [], [], 0.5)[0]
        if sum(sink.drain(size) for sink in sinks if sink.socket in ready):
            last = time.monotonic()


def _sink(place: Place, port: int) -> socket.socket:
    address = ip_address(place.address)
    ifindex = socket.if_nametoindex(place.interface)
    if address.version == 4:
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sink.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 0)
        if address.is_multicast:
            request = address.packed + bytes(4) + struct.pack("@i", ifindex)
            sink.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    else:
        sink = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sink.setsockopt(socket.IPPROTO_IPV6, IPV6_MULTICAST_ALL, 0)
        sink.setsockopt(
            socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, address.packed + struct.pack("@I", ifindex)
        )
    sink.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sink.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    sink.bind((place.address, port))
    sink.setblocking(False)
    return sink


def _source(place: Place) -> socket.socket:
    ifindex = socket.if_nametoindex(place.interface)
    if ":" in place.address:
        source = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        source.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, ifindex)
        source.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 8)
    else:
        source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        source.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, bytes(8) + struct.pack("@i", ifindex))
        source.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
        source.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
    return source
