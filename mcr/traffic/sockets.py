"""Opens the ordinary UDP sockets of the test source and the test sink.

Everything that the kernel is asked for is asked here. This module must never send or receive.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from mcr.errors import ExitStatus, McrError
from mcr.stream import Address, Output, Stream

# linux/in.h, linux/in6.h and asm-generic/socket.h; Python's socket module lacks them.
SO_RCVBUFFORCE = 33
IP_RECVERR = 11
IP_RECVTTL = 12
IP_RECVTOS = 13
IP_MULTICAST_ALL = 49
IPV6_RECVERR = 25
IPV6_MULTICAST_ALL = 29
MCAST_JOIN_GROUP = 42
MCAST_JOIN_SOURCE_GROUP = 46

SEND_TIMEOUT_MS = 100
RECEIVE_TIMEOUT_MS = 50


def open_sink_socket(stream: Stream, receive_buffer_bytes: int) -> socket.socket:
    """A socket that receives stream and nothing else; the group is joined by interface index.

    A source is asked of the kernel for a group (RFC 4607), and left to the receiver for a unicast address.
    Raises McrError.
    """
    if stream.port is None:
        raise McrError(
            f"{stream} has no port to listen on", "name one port instead of `*`", status=ExitStatus.USAGE
        )
    if stream.vlan or stream.vlan_outer:
        raise _no_vlan(str(stream))
    index = _interface_index(stream.interface)
    with _opened(stream.address, f"cannot listen to {stream}") as sock:
        _set_receive_buffer(sock, receive_buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(RECEIVE_TIMEOUT_MS))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, stream.interface.encode())
        _ask_for_header_fields(sock)
        if stream.group:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(_socket_address(stream.address, stream.port, index))
        if stream.group:
            _join(sock, stream, index)
    return sock


def open_source_socket(output: Output) -> socket.socket:
    """A socket that is connected to output and sends as its options say. Raises McrError.

    IP_RECVERR makes a full queue an error (ip(7)), which would otherwise lose packets without a word.
    """
    if output.port is None:
        raise McrError(
            f"{output} has no port to send to", "name one port instead of `*`", status=ExitStatus.USAGE
        )
    if output.vlan:
        raise _no_vlan(str(output))
    if output.ttl is None or output.source == "preserve":
        option = "ttl=decrement" if output.ttl is None else "source=preserve"
        raise McrError(
            f"{option} is for relayed packets, and a test source has none",
            f"leave {option.partition('=')[0]} out, or give it a value",
            status=ExitStatus.USAGE,
        )
    index = _interface_index(output.interface) if output.interface else 0
    with _opened(output.address, f"cannot send to {output}") as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SEND_TIMEOUT_MS))
        if sock.family == socket.AF_INET6:
            _set_ipv6_output(sock, output.ttl, (output.dscp or 0) << 2, index)
        else:
            _set_ipv4_output(sock, output.ttl, (output.dscp or 0) << 2, index)
        if index and not output.group:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, output.interface.encode())
        if not isinstance(output.source, str):
            sock.bind(_socket_address(output.source, 0, index))
        sock.connect(_socket_address(output.address, output.port, index))
    return sock


@contextmanager
def _opened(address: Address, failure: str) -> Iterator[socket.socket]:
    """A UDP socket that stays open unless the block fails; an OSError becomes a McrError."""
    sock = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        yield sock
    except OSError as error:
        sock.close()
        raise _explain(error, failure) from error
    except BaseException:
        sock.close()
        raise


def _explain(error: OSError, failure: str) -> McrError:
    status = ExitStatus.NOT_PERMITTED if isinstance(error, PermissionError) else ExitStatus.FAILED
    return McrError(f"{failure}: {error.strerror}", _remedy(error.errno), status=status)


def _remedy(number: int | None) -> str:
    match number:
        case errno.EADDRNOTAVAIL:
            return "use an address that `ip address` shows, or add it: ip address add ADDRESS dev INTERFACE"
        case errno.EADDRINUSE:
            return "stop the program that `ss -ulpn` shows on this port, or use another port"
        case errno.ENETUNREACH | errno.EHOSTUNREACH:
            return "add a route (ip route add), or name the interface with %INTERFACE"
        case errno.EACCES | errno.EPERM:
            return "use a port above 1023, or run it as root"
        case errno.ENOBUFS | errno.ENOMEM:
            return "allow more memberships: sysctl net.ipv4.igmp_max_memberships"
        case _:
            return "check that the interface is up and supports multicast: ip -d link show"


def _no_vlan(stream: str) -> McrError:
    return McrError(
        f"{stream} names a VLAN tag, which an ordinary socket cannot set or see",
        "name the VLAN interface instead, such as %eth0.100 made with `ip link add`",
        status=ExitStatus.USAGE,
    )


def _interface_index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError as error:
        raise McrError(f"there is no interface {interface}", "use one that `ip link` shows") from error


def _timeval(milliseconds: int) -> bytes:
    return struct.pack("@ll", milliseconds // 1000, milliseconds % 1000 * 1000)


def _set_receive_buffer(sock: socket.socket, size_bytes: int) -> None:
    """As large as asked if permitted (CAP_NET_ADMIN), else up to net.core.rmem_max (socket(7))."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size_bytes)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)


def _ask_for_header_fields(sock: socket.socket) -> None:
    """TTL and TOS with every packet; and no packets of memberships that other sockets hold."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MULTICAST_ALL, 0)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 0)


def _join(sock: socket.socket, stream: Stream, index: int) -> None:
    """RFC 3678 section 5: struct group_req and struct group_source_req, the same for both families."""
    level = socket.IPPROTO_IPV6 if sock.family == socket.AF_INET6 else socket.IPPROTO_IP
    if stream.source is None:
        request = struct.pack("@I4x128s", index, _sockaddr_storage(stream.address))
        sock.setsockopt(level, MCAST_JOIN_GROUP, request)
    else:
        storages = _sockaddr_storage(stream.address), _sockaddr_storage(stream.source)
        sock.setsockopt(level, MCAST_JOIN_SOURCE_GROUP, struct.pack("@I4x128s128s", index, *storages))


def _sockaddr_storage(address: Address) -> bytes:
    if address.version == 6:
        return struct.pack("@H2x4x16s", socket.AF_INET6, address.packed)
    return struct.pack("@H2x4s", socket.AF_INET, address.packed)


def _socket_address(address: Address, port: int, index: int) -> tuple[str, int] | tuple[str, int, int, int]:
    if address.version == 4:
        return str(address), port
    scoped = address.is_multicast or address.is_link_local
    return str(address), port, 0, index if scoped else 0


def _set_ipv4_output(sock: socket.socket, ttl: int, tos: int, index: int) -> None:
    sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("@8xi", index))


def _set_ipv6_output(sock: socket.socket, ttl: int, tos: int, index: int) -> None:
    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, ttl)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
