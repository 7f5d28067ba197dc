"""The wire of the laboratory, frame by frame: raw sources and captures over AF_PACKET (packet(7)).

A capture sees what arrives, before the stack has judged it. This module must never interpret a frame beyond
putting back the VLAN tag that the kernel took out of it.
"""

import socket
import struct
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from tests.netns.lab import Lab, Namespace

SOL_PACKET = 263
PACKET_AUXDATA, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 8, 15, 23  # linux/if_packet.h
TP_STATUS_CSUMNOTREADY, TP_STATUS_VLAN_VALID = 0x8, 0x10
AUXDATA = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata
NEEDS_CHECKSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM of linux/virtio_net.h
ETH_P_ALL = 3
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER_BYTES = 64 << 20
LARGEST_FRAME = 1 << 16


class Source:
    """Sends frames as they are by an interface."""

    def __init__(self, lab: Lab, namespace: Namespace, interface: str = "eth0") -> None:
        with lab.inside(namespace):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._socket.bind((interface, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, frame: bytes, *, udp_offset: int | None = None) -> None:
        """udp_offset: of a UDP header whose checksum is partial, for the device to complete."""
        needs = (0, 0) if udp_offset is None else (udp_offset, 6)
        flags = 0 if udp_offset is None else NEEDS_CHECKSUM
        self._socket.send(struct.pack("=BBHHHH", flags, 0, 0, 0, *needs) + frame)  # struct virtio_net_hdr


class Capture:
    """Everything that arrives at an interface from the moment that this exists."""

    def __init__(self, lab: Lab, namespace: Namespace, interface: str = "eth0") -> None:
        with lab.inside(namespace):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        self._socket.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        self._socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self._socket.bind((interface, ETH_P_ALL))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def frames(
        self, count: int, group: bytes, *, timeout_s: float = 10.0, grace_s: float = 0.2
    ) -> list[bytes]:
        """The next count frames whose Ethernet destination begins with group, and what comes soon after.

        Tags are where they were on the wire. Fewer than count if the time is over.
        """
        taken: list[bytes] = []
        deadline = time.monotonic() + timeout_s
        while True:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                frame = self._receive()
            except TimeoutError:
                return taken
            if frame.startswith(group):
                taken.append(frame)
            if len(taken) == count:
                deadline = min(deadline, time.monotonic() + grace_s)

    def all_frames(self, group: bytes) -> list[bytes]:
        """As `frames`, of what has arrived already."""
        taken: list[bytes] = []
        self._socket.settimeout(0.0)
        while True:
            try:
                frame = self._receive()
            except BlockingIOError:
                return taken
            if frame.startswith(group):
                taken.append(frame)

    def _receive(self) -> bytes:
        frame, ancillary, _, _ = self._socket.recvmsg(LARGEST_FRAME, socket.CMSG_SPACE(AUXDATA.size))
        ((_, _, data),) = ancillary
        status, _, _, _, _, tag, ethertype = AUXDATA.unpack(data)
        assert not status & TP_STATUS_CSUMNOTREADY, "the sender's device does not complete checksums"
        if status & TP_STATUS_VLAN_VALID:
            return frame[:12] + struct.pack("!HH", ethertype, tag) + frame[12:]
        return frame


def send_all(source: Source, frames: Iterable[bytes], pause_s: float = 0.0) -> None:
    """One after the other, with a pause after each."""
    for frame in frames:
        source.send(frame)
        if pause_s:
            time.sleep(pause_s)
