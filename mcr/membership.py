"""The control-plane worker: a separate small process that holds the IGMP and MLD joins.

The process (`python -m mcr.membership`) reads complete sets of joins from a socket pair and makes the
kernel's memberships equal to them; they end with its sockets, so nothing outlives it. It must never receive a
stream, never keep a privilege, and never import what it does not need. The supervisor's side,
MembershipWorker, must never wait for it longer than REPLY_TIMEOUT_S.

One socket holds a group of an interface at most once. So a group joined from any source and from some sources
never mix on a socket (the kernel refuses that, RFC 3678 section 4.1.3), no socket counts more than one source
against igmp_max_msf, and leaving the group there leaves the source too, even when the interface is gone.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING or __name__ != "__main__":  # only the supervisor's side needs these 8 MB
    import asyncio
    import logging

    from mcr.errors import McrError
    from mcr.stream import Address

MEMBERSHIPS_PER_SOCKET = 20  # the default of net.ipv4.igmp_max_memberships; a smaller one is found out
REPLY_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 2.0
BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.1, 10.0
MAX_LINE_BYTES = 16 << 20
NOBODY = 65534

# linux/in.h: RFC 3678 options, for both families; linux/prctl.h
MCAST_JOIN_GROUP, MCAST_LEAVE_GROUP, MCAST_JOIN_SOURCE_GROUP = 42, 45, 46
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

Join: TypeAlias = tuple[int, str, str | None]  # ifindex, group, source or any


@dataclass(frozen=True, slots=True)
class Membership:
    """A group to receive on an interface, from one source or (None) from any. Sorts in that order."""

    ifindex: int
    group: "Address"
    source: "Address | None"

    def join(self) -> Join:
        """As it goes over the socket pair."""
        return self.ifindex, str(self.group), None if self.source is None else str(self.source)

    def __lt__(self, other: "Membership") -> bool:
        return self._sort_key() < other._sort_key()

    def _sort_key(self) -> tuple[int, int, bytes, bytes]:
        source = b"" if self.source is None else self.source.packed
        return self.ifindex, self.group.version, self.group.packed, source


@dataclass(frozen=True, slots=True)
class MembershipFailure:
    """A membership that the kernel refused, one line of cause and one of remedy."""

    membership: Membership
    cause: str
    remedy: str


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
    return request if source is None else request + _storage(source)


@dataclass(slots=True)
class Holder:
    """A socket that holds up to `room` memberships of one family."""

    socket: socket.socket
    room: int = MEMBERSHIPS_PER_SOCKET
    groups: set[tuple[int, str]] = field(default_factory=set)

    @property
    def level(self) -> int:
        """The level of its multicast options."""
        return socket.IPPROTO_IPV6 if self.socket.family == socket.AF_INET6 else socket.IPPROTO_IP

    def takes(self, join: Join) -> bool:
        """Whether the join may be put on this socket."""
        same_family = self.socket.family == _family(join[1])
        return same_family and len(self.groups) < self.room and join[:2] not in self.groups

    def join(self, join: Join) -> None:
        """Raises OSError; after ENOBUFS the socket takes no more than it holds."""
        option = MCAST_JOIN_GROUP if join[2] is None else MCAST_JOIN_SOURCE_GROUP
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
            self.socket.setsockopt(self.level, MCAST_LEAVE_GROUP, _group_request((*join[:2], None)))


class Holdings:
    """Every membership that this process holds, and on which socket."""

    def __init__(self) -> None:
        self.joins: dict[Join, Holder] = {}
        self.holders: list[Holder] = []

    def apply(self, desired: set[Join]) -> dict[Join, OSError]:
        """Leaves what is not desired, joins what is not held. Returns the joins that the kernel refused."""
        for join in self.joins.keys() - desired:
            self.joins.pop(join).leave(join)
        for holder in [holder for holder in self.holders if not holder.groups]:
            holder.socket.close()
            self.holders.remove(holder)
        failed: dict[Join, OSError] = {}
        for join in sorted(desired - self.joins.keys(), key=lambda join: (*join[:2], join[2] or "")):
            try:
                self.joins[join] = self._join(join)
            except OSError as error:
                failed[join] = error
        return failed

    def _join(self, join: Join) -> Holder:
        for holder in self.holders:
            if holder.takes(join):
                try:
                    holder.join(join)
                    return holder
                except OSError as error:
                    if error.errno not in (errno.ENOBUFS, errno.ENOMEM):
                        raise
        holder = Holder(socket.socket(_family(join[1]), socket.SOCK_DGRAM))
        try:
            holder.join(join)
        except OSError:
            holder.socket.close()
            raise
        self.holders.append(holder)
        return holder


def _explain(join: Join, error: OSError) -> tuple[str, str]:
    """Cause and remedy of a refused join (ip(7), ipv6(7), net/ipv4/igmp.c, net/ipv6/mcast.c)."""
    ifindex, group, source = join
    ipv6 = _family(group) == socket.AF_INET6
    name = str(ifindex)
    with contextlib.suppress(OSError):
        name = socket.if_indextoname(ifindex)
    cause = f"cannot join {source + '@' if source else ''}{group} on interface {name}: "
    if error.errno == errno.ENODEV:
        return cause + "there is no such interface, or it has no IP", "see: ip link"
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return cause + f"no more than {limit} files may be open", "raise LimitNOFILE= or ulimit -Hn"
    if error.errno == errno.ENFILE:
        return cause + "the system has too many open files", "raise the sysctl fs.file-max"
    if error.errno in (errno.ENOBUFS, errno.ENOMEM) and ipv6:
        limits = "net.ipv6.mld_max_msf or net.core.optmem_max"
        return cause + "the kernel has no room for it", f"raise the sysctl {limits}"
    if error.errno in (errno.ENOBUFS, errno.ENOMEM):
        limits = "net.ipv4.igmp_max_memberships, net.ipv4.igmp_max_msf or net.core.optmem_max"
        return cause + "the kernel has no room for it", f"raise the sysctl {limits}"
    if error.errno in (errno.EINVAL, errno.EADDRNOTAVAIL) and ipv6:
        return (
            cause + "the interface has no IPv6",
            f"set the sysctl net.ipv6.conf.{name}.disable_ipv6 to 0 and an MTU of at least 1280",
        )
    if error.errno == errno.EAFNOSUPPORT:
        return cause + f"this kernel has no {'IPv6' if ipv6 else 'IPv4'}", "use the other one"
    return cause + (error.strerror or str(error)), "see whether the kernel's log says more: dmesg"


def _reply(holdings: Holdings, line: bytes) -> bytes:
    request = json.loads(line)
    desired: set[Join] = {(ifindex, group, source) for ifindex, group, source in request["joins"]}
    failed = [[*join, *_explain(join, error)] for join, error in holdings.apply(desired).items()]
    reply = {"sequence": request["sequence"], "held": len(holdings.joins), "failed": failed}
    return json.dumps(reply, separators=(",", ":")).encode() + b"\n"


def _drop_privileges(user_id: int, group_id: int) -> None:
    """Becomes that user if this is root, for good, and dies with the supervisor (prctl(2))."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(group_id, group_id, group_id)
        os.setresuid(user_id, user_id, user_id)
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_PDEATHSIG, int(signal.SIGKILL))):
        if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))):
            raise OSError(ctypes.get_errno(), f"prctl {option}")


def main(arguments: list[str]) -> int:
    """`membership SOCKET_FD USER_ID GROUP_ID`; ends with 0 when the supervisor's end is closed."""
    descriptor, user_id, group_id = map(int, arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _drop_privileges(user_id, group_id)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    holdings = Holdings()
    with (
        socket.socket(fileno=descriptor) as supervisor,
        supervisor.makefile("rb") as lines,
        contextlib.suppress(ConnectionError),
    ):
        for line in lines:
            supervisor.sendall(_reply(holdings, line))
    return 0


class _Process:
    """One life of the process: its socket, its standard error and its end."""

    def __init__(
        self,
        process: "asyncio.subprocess.Process",
        streams: "tuple[asyncio.StreamReader, asyncio.StreamWriter]",
    ) -> None:
        self.process = process
        self.reader, self.writer = streams
        self.logging = asyncio.create_task(self._log_stderr(), name="mcr-membership-stderr")
        self.sequence = 0

    @classmethod
    async def spawn(cls, user_id: int, group_id: int) -> "_Process":
        """Raises OSError if the process cannot be started."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-s", "-S", "-P", "-m", "mcr.membership"),
                    *(str(theirs.fileno()), str(user_id), str(group_id)),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
                )
            return cls(process, await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES))
        except BaseException:
            ours.close()
            raise

    async def _log_stderr(self) -> None:
        log = logging.getLogger("mcr.membership")
        assert self.process.stderr is not None
        while True:
            with contextlib.suppress(ValueError):  # a line longer than the reader's limit
                line = await self.process.stderr.readline()
                if not line:
                    return
                log.warning("%s", line.decode(errors="replace").rstrip())

    async def request(self, joins: list[Join]) -> dict[str, Any]:
        """Sends the complete set, returns the reply.

        Raises OSError (TimeoutError if it is silent) or ValueError when the process is dead or broken.
        """
        self.sequence += 1
        message = {"joins": joins, "sequence": self.sequence}
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            self.writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            await self.writer.drain()
            while True:
                reply: dict[str, Any] = json.loads(await self.reader.readline())
                if reply["sequence"] == self.sequence:  # an older one answers a request that was cancelled
                    return reply

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def end(self) -> int:
        """Closes its socket, upon which it leaves everything and exits; reaps it, returns its exit status.

        It is killed if it has not ended after STOP_TIMEOUT_S.
        """
        self.writer.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()
        await self.logging
        return self.process.returncode or 0


class MembershipWorker:
    """The supervisor's side: keeps the process alive and tells it what to join.

    `held` is the number of memberships held, `failures` are those of the last set that were refused, and
    `restarts` counts how often the process had to be started again.
    """

    def __init__(self, user_id: int = NOBODY, group_id: int = NOBODY) -> None:
        self.held = 0
        self.failures: list[MembershipFailure] = []
        self.restarts = 0
        self._user = user_id, group_id
        self._desired: frozenset[Membership] = frozenset()
        self._process: _Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._log = logging.getLogger("mcr.membership")

    @property
    def pid(self) -> int | None:
        """The process, None while there is none."""
        return self._process.process.pid if self._process else None

    async def start(self) -> None:
        """Starts the process and keeps it running until stop(). Raises McrError if it does not start."""
        try:
            self._process = await _Process.spawn(*self._user)
        except OSError as error:
            raise McrError(
                f"cannot start the process that joins groups: {error.strerror or error}",
                "free memory or processes (ulimit -u), then try again",
            ) from error
        self._keeper = asyncio.create_task(self._keep(), name="mcr-membership")
        await self.set(self._desired)

    async def set(self, desired: frozenset[Membership]) -> list[MembershipFailure]:
        """Makes the memberships equal to the desired ones; returns those that could not be joined, in order.

        Never raises for a dead or silent process: then every membership is a failure, the process is started
        again, and it gets the last desired set.
        """
        self._desired = desired
        async with self._turn:
            await self._apply()
            return self.failures

    async def stop(self) -> None:
        """Leaves every group and reaps the process, within STOP_TIMEOUT_S and a little."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        async with self._turn:
            process, self._process = self._process, None
            if process is not None:
                await process.end()
            self.held, self.failures, self._desired = 0, [], frozenset()

    async def _apply(self) -> None:
        desired = {membership.join(): membership for membership in self._desired}
        process = self._process
        if process is None:
            self._lost(desired.values())
            return
        try:
            reply = await process.request(list(desired))
            self.held = int(reply["held"])
            failures = [
                MembershipFailure(desired[ifindex, group, source], cause, remedy)
                for ifindex, group, source, cause, remedy in reply["failed"]
            ]
            self.failures = sorted(failures, key=lambda failure: failure.membership)
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, TimeoutError):
                self._log.error("no answer for %g s, killing pid %d", REPLY_TIMEOUT_S, process.process.pid)
                process.kill()
            await process.end()
            self._lost(desired.values())

    def _lost(self, desired: Iterable[Membership]) -> None:
        self.held = 0
        self.failures = [
            MembershipFailure(
                membership,
                f"cannot join {membership.group}: the process that joins groups is being restarted",
                "none is needed: it joins the group as soon as it runs",
            )
            for membership in sorted(desired)
        ]

    async def _keep(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            if self._process is not None:
                await self._process.process.wait()
                process, self._process = self._process, None
                status = await process.end()
                self._lost(self._desired)
                self._log.error("pid %d ended with status %d, restarting", process.process.pid, status)
            if loop.time() - started_s > BACKOFF_LAST_S:
                backoff_s = BACKOFF_FIRST_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_LAST_S)
            self.restarts += 1
            try:
                self._process = await _Process.spawn(*self._user)
            except OSError as error:
                self._log.error("cannot start the process that joins groups: %s", error)
                continue
            await self.set(self._desired)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
