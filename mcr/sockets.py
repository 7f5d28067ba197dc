"""Opens the sockets that a worker uses: one for each output, and the AF_PACKET socket of an ingress.

Whatever needs privilege or addressing is set here, by the supervisor; the worker only sends and receives.
This module must never keep a socket: the caller passes it on and closes its own copy.
"""

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Self

from mcr.errors import McrError
from mcr.stream import Output

SEND_BUFFER_BYTES = 8 << 20
RECEIVE_BUFFER_BYTES = 32 << 20

# linux/in.h, linux/in6.h, linux/if_packet.h, asm-generic/socket.h: names that Python's socket module lacks
IP_RECVERR = 11
IP_MTU = 14
IPV6_MTU = 24
IPV6_RECVERR = 25
IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_BINDTOIFINDEX = 62
SOL_PACKET = 263
PACKET_AUXDATA = 8
PACKET_VNET_HDR = 15
PACKET_FANOUT = 18
PACKET_FANOUT_HASH = 0
PACKET_FANOUT_FLAG_UNIQUEID = 0x2000
PACKET_IGNORE_OUTGOING = 23
ETH_P_ALL = 3
SO_ATTACH_FILTER = 26

# linux/filter.h, as (code, jump if true, jump if false, operand)
DROP_EVERYTHING = ((0x06, 0, 0, 0),)  # return 0
DROP_OUTGOING = (
    (0x20, 0, 0, 0xFFFFF004),  # load the packet type, SKF_AD_OFF + SKF_AD_PKTTYPE
    (0x15, 0, 1, socket.PACKET_OUTGOING),
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0x40000),  # return everything
)


def _set_buffer(target: socket.socket, forced: int, plain: int, size: int) -> None:
    """The forced option ignores net.core.wmem_max and rmem_max, but needs CAP_NET_ADMIN."""
    try:
        target.setsockopt(socket.SOL_SOCKET, forced, size)
    except PermissionError:
        target.setsockopt(socket.SOL_SOCKET, plain, size)


def _remedy(number: int | None, otherwise: str) -> str:
    """What to do where a socket cannot be opened, whatever it is for."""
    remedies = {
        errno.EAFNOSUPPORT: "use IPv4 alone, or start the kernel with IPv6 (without ipv6.disable=1)",
        errno.EMFILE: "raise the limit of open files (ulimit -n, LimitNOFILE=)",
        errno.ENFILE: "raise the sysctl fs.file-max",
        errno.ENOMEM: "free memory",
        errno.ENOBUFS: "free memory",
        errno.EADDRNOTAVAIL: "check its addresses with: ip address",
        errno.ENODEV: "see which interfaces there are: ip link",
    }
    return remedies.get(number or 0, otherwise)


def open_output(output: Output, ifindex: int) -> socket.socket:
    """The UDP socket of an output: unconnected, so that each send takes the route and address of its moment.

    ifindex: the egress interface, 0 where routing chooses. A source address that is not the host's own is
    allowed (IP_TRANSPARENT, ip(7)). A send to a group tells when the egress qdisc drops the packet
    (IP_RECVERR, ip(7); the kernel keeps it to itself else). Not so to a host: there the same option would
    make a later send fail for each ICMP error that an earlier one met. Raises McrError.
    """
    family = socket.AF_INET if isinstance(output.address, IPv4Address) else socket.AF_INET6
    with contextlib.ExitStack() as opened:
        try:
            udp = opened.enter_context(socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
            _set_up_output(udp, output, ifindex)
        except OSError as error:
            raise McrError(
                f"cannot open output {output}: {os.strerror(error.errno or 0)}",
                _remedy(error.errno, "run the supervisor as root, or with CAP_NET_ADMIN and CAP_NET_RAW"),
            ) from error
        opened.pop_all()
    return udp


def _set_up_output(udp: socket.socket, output: Output, ifindex: int) -> None:
    udp.setblocking(False)
    _set_buffer(udp, SO_SNDBUFFORCE, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # nothing that comes back is of interest
    if udp.family == socket.AF_INET:
        _set_ipv4(udp, output, ifindex)
    else:
        _set_ipv6(udp, output, ifindex)
    if ifindex and not output.group:
        udp.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, ifindex)
    if not isinstance(output.source, str):
        udp.bind((str(output.source), 0))


class RouteProbe:
    """The MTU of routes as they are now. A context manager, so that many probes share one socket."""

    def __init__(self) -> None:
        self._probes: dict[int, socket.socket] = {}
        self._known: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for probe in self._probes.values():
            probe.close()

    def mtu(self, output: Output) -> int:
        """The MTU, in bytes, of the route to an output that names no interface; 0 if there is no route, or
        none can be asked for."""
        address = str(output.address)
        if address not in self._known:
            self._known[address] = self._probe(output.address.version, address)
        return self._known[address]

    def _probe(self, version: int, address: str) -> int:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        try:
            if family not in self._probes:
                self._probes[family] = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            probe = self._probes[family]
            probe.connect((address, 9))  # only looks up the route; any port will do
            if family == socket.AF_INET:
                return probe.getsockopt(socket.IPPROTO_IP, IP_MTU)
            return probe.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU)
        except OSError:
            return 0


def _set_ipv4(udp: socket.socket, output: Output, ifindex: int) -> None:
    if output.group:
        request = struct.pack("=4s4si", bytes(4), bytes(4), ifindex)  # struct ip_mreqn
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
        udp.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)  # see open_output
    if output.ttl is not None:
        option = socket.IP_MULTICAST_TTL if output.group else socket.IP_TTL
        udp.setsockopt(socket.IPPROTO_IP, option, output.ttl)
    udp.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, (output.dscp or 0) << 2)
    if output.source != "interface":
        udp.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)


def _set_ipv6(udp: socket.socket, output: Output, ifindex: int) -> None:
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if output.group:
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, ifindex)
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
        udp.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)  # see open_output
    if output.ttl is not None:
        option = socket.IPV6_MULTICAST_HOPS if output.group else socket.IPV6_UNICAST_HOPS
        udp.setsockopt(socket.IPPROTO_IPV6, option, output.ttl)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, (output.dscp or 0) << 2)
    if output.source != "interface":
        udp.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)


def open_packets(interface: str, ifindex: int, count: int) -> list[socket.socket]:
    """The AF_PACKET sockets of an ingress, bound to an interface: each of its packets reaches exactly one of
    them, and always the same for one stream from one source. The host's own packets reach none.

    Several are one fanout group (packet(7)). A socket that is bound and not in the group yet would get every
    packet as well, so that nothing gets in before all of them are. The ROLLOVER flag is not set, because it
    lets packets overtake each other. Raises McrError.
    """
    with contextlib.ExitStack() as opened:
        try:
            packets = [opened.enter_context(_open_packet()) for _ in range(count)]
            if count > 1:
                _join_fanout(packets, interface)
            else:
                packets[0].bind((interface, ETH_P_ALL))
        except OSError as error:
            raise McrError(
                f"cannot receive from {interface} by AF_PACKET: {os.strerror(error.errno or 0)}",
                "run the supervisor as root, or with CAP_NET_RAW"
                if error.errno == errno.EPERM
                else _remedy(error.errno, f"see that it exists and is up: ip link show {interface}"),
            ) from error
        opened.pop_all()
    return packets


def _open_packet() -> socket.socket:
    """Not bound yet. The auxiliary data hold the VLAN tag that the device took out of the frame, the virtio
    header tells packets that were merged by GRO (packet(7))."""
    with contextlib.ExitStack() as opened:
        packet = opened.enter_context(
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        )
        packet.setblocking(False)
        _set_buffer(packet, SO_RCVBUFFORCE, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        for option in (PACKET_AUXDATA, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING):
            packet.setsockopt(SOL_PACKET, option, 1)
        opened.pop_all()
    return packet


def _join_fanout(packets: Sequence[socket.socket], interface: str) -> None:
    """The kernel chooses a number that no other group of the network namespace has; the others join by it.

    A group does not heed PACKET_IGNORE_OUTGOING, so a filter does that.
    """
    group = PACKET_FANOUT_HASH << 16 | PACKET_FANOUT_FLAG_UNIQUEID << 16
    for packet in packets:
        _set_filter(packet, DROP_EVERYTHING)
        packet.bind((interface, ETH_P_ALL))
        packet.setsockopt(SOL_PACKET, PACKET_FANOUT, group)
        group = PACKET_FANOUT_HASH << 16 | packet.getsockopt(SOL_PACKET, PACKET_FANOUT) & 0xFFFF
    for packet in packets:
        _set_filter(packet, DROP_OUTGOING)


def _set_filter(packet: socket.socket, program: Sequence[tuple[int, int, int, int]]) -> None:
    """Replaces the filter of a socket at once (struct sock_fprog, linux/filter.h)."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    packet.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code))
    )
