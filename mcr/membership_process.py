"""The control-plane worker, `python -m mcr.membership_process`: a small process that holds the joins.

It reads complete sets of joins from its supervisor and makes the kernel's memberships equal to them; they end
with its sockets, so nothing outlives it. It speaks first, `VERSION HELD`. A request is one line, `SEQUENCE
keep|end IFINDEX,GROUP,SOURCE …`, the source being empty for any; the reply is `SEQUENCE HELD
IFINDEX,GROUP,SOURCE,ERRNO …` with the refused joins. After `keep` it outlives the supervisor for as long as
there is what the joins are kept for, and the next supervisor connects to it. It must never receive a stream,
never keep a privilege, and never import what it does not need: not json, not dataclasses. Once it is
confined, anything that it imports or opens kills it.

One socket holds a group of an interface at most once. So a group joined from any source and from some sources
never mix on a socket (the kernel refuses that, RFC 3678 section 4.1.3), no socket counts more than one source
against igmp_max_msf, and leaving the group there leaves the source too, even when the interface is gone.
"""

import contextlib
import errno
import os
import resource
import signal
import socket
import struct
import sys

from mcr import __version__
from mcr.uring_egress._core import lib

LOOK_INTERVAL_S = 5
MEMBERSHIPS_PER_SOCKET = 20  # the default of net.ipv4.igmp_max_memberships; a smaller one is found out

# linux/in.h: RFC 3678 options, for both families
MCAST_JOIN_GROUP, MCAST_LEAVE_GROUP, MCAST_JOIN_SOURCE_GROUP = 42, 45, 46

Join = tuple[int, str, str]  # ifindex, group, source or nothing for any


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _storage(address: str) -> bytes:
    """struct sockaddr_storage: 128 bytes."""
    packed = socket.inet_pton(_family(address), address)
    gap = 6 if len(packed) == 16 else 2  # port and flow information; port
    return struct.pack(f"=H{gap}x", _family(address)) + packed.ljust(126 - gap, b"\0")


def _group_request(join: Join) -> bytes:
    """struct group_req, or group_source_req for a join with a source (linux/in.h)."""
    ifindex, group, source = join
    padding = struct.calcsize("P") - 4  # the addresses are aligned as pointers are
    request = struct.pack(f"=I{padding}x", ifindex) + _storage(group)
    return request + _storage(source) if source else request


class Holder:
    """A socket that holds up to `room` memberships of one family."""

    def __init__(self, family: socket.AddressFamily) -> None:
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.family = family
        self.level = socket.IPPROTO_IPV6 if family == socket.AF_INET6 else socket.IPPROTO_IP
        self.room = MEMBERSHIPS_PER_SOCKET
        self.groups: set[tuple[int, str]] = set()

    def takes(self, join: Join) -> bool:
        """Whether the join, which is of its family, may be put on this socket."""
        return len(self.groups) < self.room and join[:2] not in self.groups

    def join(self, join: Join) -> None:
        """Raises OSError; after ENOBUFS the socket takes no more than it holds."""
        option = MCAST_JOIN_SOURCE_GROUP if join[2] else MCAST_JOIN_GROUP
        try:
            self.socket.setsockopt(self.level, option, _group_request(join))
        except OSError as error:
            if error.errno in (errno.ENOBUFS, errno.ENOMEM):
                self.room = len(self.groups)
            raise
        self.groups.add(join[:2])

    def leave(self, join: Join) -> None:
        """Always succeeds: where the kernel says no, the membership went with its interface."""
        self.groups.discard(join[:2])
        with contextlib.suppress(OSError):
            self.socket.setsockopt(self.level, MCAST_LEAVE_GROUP, _group_request((*join[:2], "")))


class Holdings:
    """Every membership that this process holds, and on which socket."""

    def __init__(self) -> None:
        self.lasting = False  # whether they outlive the supervisor
        self.joins: dict[Join, Holder] = {}
        self.holders: list[Holder] = []

    def apply(self, desired: set[Join]) -> dict[Join, int]:
        """Leaves what is not desired, joins what is not held. Returns the refused joins with their errno."""
        for join in self.joins.keys() - desired:
            self.joins.pop(join).leave(join)
        for holder in [holder for holder in self.holders if not holder.groups]:
            holder.socket.close()
            self.holders.remove(holder)
        failed: dict[Join, int] = {}
        for join in sorted(desired - self.joins.keys()):
            try:
                self.joins[join] = self._join(join)
            except OSError as error:
                failed[join] = error.errno or errno.EIO
        return failed

    def _join(self, join: Join) -> Holder:
        family = _family(join[1])
        for holder in self.holders:
            if holder.family == family and holder.takes(join):
                try:
                    holder.join(join)
                    return holder
                except OSError as error:
                    if error.errno not in (errno.ENOBUFS, errno.ENOMEM):
                        raise
        holder = Holder(family)
        try:
            holder.join(join)
        except OSError:
            holder.socket.close()
            raise
        self.holders.append(holder)
        return holder


def parse_join(text: str) -> Join:
    """`IFINDEX,GROUP,SOURCE`."""
    ifindex, group, source = text.split(",")
    return int(ifindex), group, source


class Succession:
    """How the next supervisor finds this process, and whether there is something for it to adopt.

    Descriptors of a socket that is bound, of the directory of kept links and of the socket's file.
    """

    def __init__(self, listener: int, links: int, address: int) -> None:
        self.listener = socket.socket(fileno=listener)
        self.listener.listen()  # here, so that who connects learns this process's id, unix(7)
        look = struct.pack("ll", LOOK_INTERVAL_S, 0)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, look)
        self.links, self.address = links, address
        self.users = {0, os.getuid()}

    def next_supervisor(self) -> socket.socket | None:
        """Waits for it; None once the kept path has gone, or the file by which this process is found."""
        while lib.mcr_core_is_kept(self.links, self.address):
            with contextlib.suppress(BlockingIOError):  # it is time to look again
                connection, _ = self.listener.accept()
                peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                if struct.unpack("3i", peer)[1] in self.users:
                    return connection
                connection.close()
        return None


def _reply(holdings: Holdings, line: bytes) -> bytes:
    sequence, afterwards, *joins = line.decode().split()
    failed = holdings.apply({parse_join(text) for text in joins})
    holdings.lasting = afterwards == "keep"
    refused = ("{},{},{},{}".format(*join, number) for join, number in failed.items())
    return " ".join((sequence, str(len(holdings.joins)), *refused)).encode() + b"\n"


def _serve(supervisor: socket.socket, holdings: Holdings) -> None:
    """Answers until the supervisor's end is closed."""
    lines = supervisor.makefile("rb")
    with contextlib.suppress(ConnectionError):
        supervisor.sendall(f"{__version__} {len(holdings.joins)}\n".encode())
        for line in lines:
            if line.endswith(b"\n"):  # else the supervisor died while it sent a set
                supervisor.sendall(_reply(holdings, line))
    lines.close()  # only here: after an error the last words come before the supervisor learns of the end
    supervisor.close()


def _hold(supervisor: socket.socket | None, succession: Succession | None) -> None:
    """Serves one supervisor after the other for as long as each wants the joins to outlive it."""
    holdings = Holdings()
    while supervisor is not None:
        _serve(supervisor, holdings)
        supervisor = succession.next_supervisor() if succession and holdings.lasting else None


def main(arguments: list[str]) -> None:
    """`membership_process USER_ID GROUP_ID SOCKET_FD [LISTENER_FD LINKS_FD ADDRESS_FD]`.

    Ends with 0 when the supervisor's end is closed, and nothing is kept.
    """
    user_id, group_id, descriptor, *kept = map(int, arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    supervisor = socket.socket(fileno=descriptor)
    succession = Succession(*kept) if kept else None
    status = lib.mcr_core_confine_joins(user_id, group_id)
    if status:
        os.write(2, f"cannot drop privileges: {os.strerror(-status)}\n".encode())
        os._exit(1)
    try:
        _hold(supervisor, succession)
    except BaseException as error:  # noqa: BLE001 - a traceback would read source files, which kills
        kind = type(error)
        with contextlib.suppress(OSError):  # the supervisor that would have read it may have gone
            os.write(2, f"{kind.__module__}.{kind.__qualname__}: {error}\n".encode(errors="replace"))
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
