"""Many flows at once, sent and taken by plain sockets: what spreads over the queues of an interface.

Each datagram says which flow it is of and its number in that, so that loss, doubles and order are exact.
"""

import socket
import struct
import time
from types import TracebackType
from typing import Self

from tests.netns.lab import Lab, Namespace

LABEL = struct.Struct("=II")
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER_BYTES = 64 << 20


def _ip_mreqn(group: str, interface: str) -> bytes:
    return struct.pack("=4s4si", socket.inet_aton(group), bytes(4), socket.if_nametoindex(interface))


class ManyFlows:
    """Flows to one group, each from a port of its own, in a namespace."""

    def __init__(self, lab: Lab, namespace: Namespace, group: str, port: int, count: int = 64) -> None:
        self.sent = [0] * count
        self._to = (group, port)
        self._sockets: list[socket.socket] = []
        with lab.inside(namespace):
            for _ in range(count):
                udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, _ip_mreqn("0.0.0.0", "eth0"))
                self._sockets.append(udp)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for udp in self._sockets:
            udp.close()

    @property
    def total(self) -> int:
        return sum(self.sent)

    def send(self, rounds: int) -> None:
        """One datagram of each flow in each round."""
        for _ in range(rounds):
            for flow, udp in enumerate(self._sockets):
                udp.sendto(LABEL.pack(flow, self.sent[flow]), self._to)
                self.sent[flow] += 1


class FlowSink:
    """Takes every datagram of a group at eth0 of a namespace, from the moment that this exists."""

    def __init__(self, lab: Lab, namespace: Namespace, group: str, port: int) -> None:
        with lab.inside(namespace):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
            self._socket.bind((group, port))
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, _ip_mreqn(group, "eth0"))
        self.heard: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def take(self) -> None:
        """Takes what is there."""
        self._take(1 << 62, 0.0)

    def take_all(self, total: int, idle_s: float = 5.0) -> None:
        """Takes until so many have been heard in all, or until nothing comes for idle_s."""
        self._take(total, idle_s)

    def wait_for(self, source: ManyFlows, first: int, timeout_s: float = 10.0) -> None:
        """Takes until everything that was sent since the number first has been heard."""
        missing = {(flow, number) for flow, sent in enumerate(source.sent) for number in range(first, sent)}
        deadline = time.monotonic() + timeout_s
        while missing:
            assert time.monotonic() < deadline, f"{len(missing)} are missing"
            self._take(len(self.heard) + 1, 0.1)
            missing.difference_update(self.heard[-1:])

    def _take(self, total: int, idle_s: float) -> None:
        self._socket.settimeout(idle_s)
        while len(self.heard) < total:
            try:
                self.heard.append(LABEL.unpack(self._socket.recv(LABEL.size)))
            except (TimeoutError, BlockingIOError):
                return

    def assert_no_doubles(self) -> None:
        assert len(self.heard) == len(set(self.heard))

    def assert_in_order(self) -> None:
        last: dict[int, int] = {}
        for flow, number in self.heard:
            assert number > last.get(flow, -1), (flow, number)
            last[flow] = number
