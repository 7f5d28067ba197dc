"""The far ends of the model test: plain sockets that send every stream, and hear every group and port.

What is heard comes with its destination, TTL, DSCP and source, as the kernel reports them. This module must
never know what ought to be heard.
"""

import contextlib
import select
import socket
import struct
import sys
from collections.abc import Iterator
from ipaddress import IPv6Address

from tests.netns.lab import Lab, Namespace
from tests.netns.model_reference import Heard, Sent

SOURCES = ("10.9.0.1", "10.9.0.2")
SOURCE6 = "fd09::1"
HEARD_PORTS = (5000, 5001, 6000, 6001)
NUMBER = struct.Struct("=Q")
IP_PKTINFO, IP_RECVTTL = 8, 12  # linux/in.h
SO_RCVBUFFORCE = 33
IN_PKTINFO, IN6_PKTINFO = struct.Struct("=i4s4s"), struct.Struct("=16si")


class FarEnd:
    """The sockets at the far end of an interface: they hear every group and port of the test, and send."""

    def __init__(self, lab: Lab, namespace: Namespace, groups: list[str]) -> None:
        self._lab, self._namespace, self._groups = lab, namespace, groups
        self._sinks: list[socket.socket] = []
        self._sources: dict[str, socket.socket] = {}

    def open(self) -> None:
        """Anew: joins end with their interface."""
        self.close()
        with self._lab.inside(self._namespace):
            ifindex = socket.if_nametoindex("eth0")
            self._sinks = [
                _sink(family, port, ifindex, self._groups)
                for family in (socket.AF_INET, socket.AF_INET6)
                for port in HEARD_PORTS
            ]
            self._sources = {
                source: _source(source, ifindex)
                for source in (*SOURCES, SOURCE6)
                if source in self._lab.ip(self._namespace, "address show dev eth0")
            }

    def close(self) -> None:
        for each in (*self._sinks, *self._sources.values()):
            each.close()

    def send(self, stream: Sent, payload: bytes) -> None:
        self._sources[stream.source].sendto(payload, (stream.address, stream.port))

    def hear(self, interface: str) -> Iterator[tuple[int, Heard]]:
        ready, _, _ = select.select(self._sinks, [], [], 0)
        for sink in ready:
            with contextlib.suppress(BlockingIOError):
                while True:
                    yield _receive(sink, interface)


def _sink(family: socket.AddressFamily, port: int, ifindex: int, groups: list[str]) -> socket.socket:
    sink = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    if family == socket.AF_INET:
        for option in (IP_PKTINFO, IP_RECVTTL, socket.IP_RECVTOS):
            sink.setsockopt(socket.IPPROTO_IP, option, 1)
    else:
        sink.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for option in (socket.IPV6_RECVPKTINFO, socket.IPV6_RECVHOPLIMIT, socket.IPV6_RECVTCLASS):
            sink.setsockopt(socket.IPPROTO_IPV6, option, 1)
    sink.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
    sink.bind(("", port))
    for group in groups:
        if family == socket.AF_INET and ":" not in group:
            request = struct.pack("=4s4si", socket.inet_aton(group), bytes(4), ifindex)
            sink.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        if family == socket.AF_INET6 and ":" in group:
            request = struct.pack("=16si", IPv6Address(group).packed, ifindex)
            sink.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
    return sink


def _source(address: str, ifindex: int) -> socket.socket:
    if ":" in address:
        source = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        settings = {
            socket.IPV6_MULTICAST_IF: ifindex,
            socket.IPV6_MULTICAST_LOOP: 0,
            socket.IPV6_MULTICAST_HOPS: Sent.ttl,
            socket.IPV6_TCLASS: Sent.tos,
        }
        for option, value in settings.items():
            source.setsockopt(socket.IPPROTO_IPV6, option, value)
    else:
        source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        source.setsockopt(
            socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("=4s4si", bytes(4), bytes(4), ifindex)
        )
        settings = {socket.IP_MULTICAST_LOOP: 0, socket.IP_MULTICAST_TTL: Sent.ttl, socket.IP_TOS: Sent.tos}
        for option, value in settings.items():
            source.setsockopt(socket.IPPROTO_IP, option, value)
    source.bind((address, 0))
    return source


def _receive(sink: socket.socket, interface: str) -> tuple[int, Heard]:
    data, ancillary, _, sender = sink.recvmsg(512, 512)
    told = {kind: value for _, kind, value in ancillary}
    port = sink.getsockname()[1]
    if sink.family == socket.AF_INET:
        address = socket.inet_ntoa(IN_PKTINFO.unpack(told[IP_PKTINFO])[2])
        ttl, tos = _number(told[socket.IP_TTL]), told[socket.IP_TOS][0]
    else:
        address = str(IPv6Address(IN6_PKTINFO.unpack(told[socket.IPV6_PKTINFO])[0]))
        ttl, tos = _number(told[socket.IPV6_HOPLIMIT]), _number(told[socket.IPV6_TCLASS])
    number: int = NUMBER.unpack(data[: NUMBER.size])[0]
    return number, Heard(interface, address, port, ttl, tos, sender[0])


def _number(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)
