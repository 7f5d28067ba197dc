"""The supervisor's side of the joins: what shall be joined, told to a process that holds it.

The process (membership_process.py) is started again when it dies, and refused joins are tried again. This
module must never wait for it longer than REPLY_TIMEOUT_S.
"""

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import _cffi_backend

from mcr.errors import McrError
from mcr.line_log import LineLog
from mcr.stream import Address

REPLY_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 2.0
RETRY_INTERVAL_S = 3.0
BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.1, 10.0
MAX_LINE_BYTES = 16 << 20
REFUSALS_LOGGED = 10
NOBODY = 65534
# All that the process finds modules in: it starts without site packages, to be small.
IMPORT_PATHS = (Path(__file__).resolve().parent.parent, Path(_cffi_backend.__file__).resolve().parent)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Membership:
    """A group to receive on an interface, from one source or (None) from any. Sorts in that order."""

    ifindex: int
    group: Address
    source: Address | None

    def join(self) -> str:
        """As it goes over the socket pair."""
        return f"{self.ifindex},{self.group},{'' if self.source is None else self.source}"

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


def _refusal(membership: Membership, number: int) -> MembershipFailure:
    cause, remedy = _explain(membership, number)
    return MembershipFailure(membership, cause, remedy)


def _explain(membership: Membership, number: int) -> tuple[str, str]:
    """Cause and remedy of a refused join (ip(7), ipv6(7), net/ipv4/igmp.c, net/ipv6/mcast.c)."""
    ipv6 = membership.group.version == 6
    name = str(membership.ifindex)
    with contextlib.suppress(OSError, OverflowError):
        name = socket.if_indextoname(membership.ifindex)
    source = f"{membership.source}@" if membership.source is not None else ""
    cause = f"cannot join {source}{membership.group} on interface {name}: "
    if number == errno.ENODEV:
        return cause + "there is no such interface, or it has no IP", "see: ip link"
    if number == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return cause + f"no more than {limit} files may be open", "raise LimitNOFILE= or ulimit -Hn"
    if number == errno.ENFILE:
        return cause + "the system has too many open files", "raise the sysctl fs.file-max"
    if number in (errno.ENOBUFS, errno.ENOMEM) and ipv6:
        limits = "net.ipv6.mld_max_msf or net.core.optmem_max"
        return cause + "the kernel has no room for it", f"raise the sysctl {limits}"
    if number in (errno.ENOBUFS, errno.ENOMEM):
        limits = "net.ipv4.igmp_max_memberships, net.ipv4.igmp_max_msf or net.core.optmem_max"
        return cause + "the kernel has no room for it", f"raise the sysctl {limits}"
    if number in (errno.EINVAL, errno.EADDRNOTAVAIL) and ipv6:
        return (
            cause + "the interface has no IPv6",
            f"set the sysctl net.ipv6.conf.{name}.disable_ipv6 to 0 and an MTU of at least 1280",
        )
    if number == errno.EAFNOSUPPORT:
        return cause + f"this kernel has no {'IPv6' if ipv6 else 'IPv4'}", "use the other one"
    return cause + os.strerror(number), "see whether the kernel's log says more: dmesg"


class _Process:
    """One life of the process: its socket, its standard error and its end."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.process = process
        self.reader, self.writer = streams
        assert process.stderr is not None
        lines = LineLog(log, logging.WARNING, worker="membership")
        self.logging = asyncio.create_task(lines.follow(process.stderr), name="mcr-membership-stderr")
        self.sequence = 0

    @classmethod
    async def spawn(cls, user_id: int, group_id: int) -> "_Process":
        """Raises OSError if the process cannot be started."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-s", "-S", "-P", "-m", "mcr.membership_process"),
                    *(str(theirs.fileno()), str(user_id), str(group_id)),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    env={"PYTHONPATH": os.pathsep.join(map(str, IMPORT_PATHS))},
                )
            return cls(process, await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES))
        except BaseException:
            ours.close()
            raise

    async def request(self, joins: Iterable[str]) -> tuple[int, dict[str, int]]:
        """Sends the complete set, returns how many are held and the refused ones with their errno.

        Raises OSError (TimeoutError if it is silent) or ValueError when the process is dead or broken.
        """
        self.sequence += 1
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            self.writer.write(" ".join((str(self.sequence), *joins)).encode() + b"\n")
            await self.writer.drain()
            while True:
                sequence, held, *refused = (await self.reader.readline()).decode().split()
                if int(sequence) == self.sequence:  # an older one answers a request that was cancelled
                    pairs = (text.rpartition(",") for text in refused)
                    return int(held), {join: int(number) for join, _, number in pairs}

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

    `held` is the number of memberships held, `failures` are those that were refused at the last attempt, one
    every RETRY_INTERVAL_S, and `restarts` counts how often the process had to be started again.
    """

    def __init__(self, user_id: int = NOBODY, group_id: int = NOBODY) -> None:
        self.held = 0
        self.failures: list[MembershipFailure] = []
        self.restarts = 0
        self._user = user_id, group_id
        self._desired: frozenset[Membership] = frozenset()
        self._process: _Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._turn = asyncio.Lock()
        self._refused: set[Membership] = set()

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
        self._tasks = [
            asyncio.create_task(self._keep(), name="mcr-membership"),
            asyncio.create_task(self._retry(), name="mcr-membership-retry"),
        ]
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
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
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
            self.held, refused = await process.request(desired)
            failures = [_refusal(desired[join], number) for join, number in refused.items()]
            self.failures = sorted(failures, key=lambda failure: failure.membership)
            self._log_refusals()
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, TimeoutError):
                log.error("no answer for %g s, killing pid %d", REPLY_TIMEOUT_S, process.process.pid)
                process.kill()
            await process.end()
            self._lost(desired.values())

    def _log_refusals(self) -> None:
        """Those that are new, and how many of the old ones have been joined after all."""
        before, self._refused = self._refused, {failure.membership for failure in self.failures}
        new = [failure for failure in self.failures if failure.membership not in before]
        for failure in new[:REFUSALS_LOGGED]:
            log.error("%s (%s)", failure.cause, failure.remedy)
        if len(new) > REFUSALS_LOGGED:
            log.error("%d more joins were refused: mcr joins", len(new) - REFUSALS_LOGGED)
        if joined := (before - self._refused) & self._desired:
            log.info("joined %d groups that had been refused", len(joined))

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

    async def _retry(self) -> None:
        """What was in the way of a refused join may have gone without an event."""
        while True:
            await asyncio.sleep(RETRY_INTERVAL_S)
            async with self._turn:
                if self.failures and self._process is not None:
                    await self._apply()

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
                log.error("pid %d ended with status %d, restarting", process.process.pid, status)
            if loop.time() - started_s > BACKOFF_LAST_S:
                backoff_s = BACKOFF_FIRST_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_LAST_S)
            self.restarts += 1
            try:
                self._process = await _Process.spawn(*self._user)
            except OSError as error:
                log.error("cannot start the process that joins groups: %s", error)
                continue
            await self.set(self._desired)
