"""The supervisor's side of the joins: what is to be joined, and that a process holds it.

The process (membership_process.py) is started again when it dies, and refused joins are tried again. A
supervisor that keeps the kernel path leaves it to the next one. This module must never wait for an answer of
it longer than membership_life.REPLY_TIMEOUT_S.
"""

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from mcr import __version__
from mcr.errors import McrError
from mcr.membership_life import Life, Refuge
from mcr.stream import Address

RETRY_INTERVAL_S = 3.0
BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.1, 10.0
REFUSALS_LOGGED = 10
NOBODY = 65534

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Membership:
    """A group to receive on an interface, from one source or (None) from any. Sorts in that order."""

    ifindex: int
    group: Address
    source: Address | None

    def join(self) -> str:
        """As it is sent to the process."""
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


class MembershipWorker:
    """The supervisor's side: keeps a process alive and gives it what to join.

    keep: whether the process outlives the supervisor. `held` is the number of memberships held, `failures`
    are those that were refused at the last attempt, one every RETRY_INTERVAL_S, and `restarts` counts how
    often the process had to be started again.
    """

    def __init__(
        self, refuge: Refuge, keep: bool = False, user_id: int = NOBODY, group_id: int = NOBODY
    ) -> None:
        self.held = 0
        self.failures: list[MembershipFailure] = []
        self.restarts = 0
        self._refuge = refuge
        self._keeps = keep
        self._user = user_id, group_id
        self._desired: frozenset[Membership] = frozenset()
        self._process: Life | None = None
        self._earlier: Life | None = None  # until the process has what this one holds
        self._in_charge = False  # whether the process has been given a complete set
        self._tasks: list[asyncio.Task[None]] = []
        self._turn = asyncio.Lock()
        self._refused: set[Membership] = set()

    @property
    def pid(self) -> int | None:
        """The process, None while there is none."""
        return self._process.pid if self._process else None

    async def find(self) -> None:
        """Looks for the process that an earlier supervisor left; it keeps its joins at least until start().

        To be called before anything is done to the kernel path that the joins are kept for.
        """
        self._refuge.aside.unlink(missing_ok=True)  # of a supervisor that died while it started
        self._earlier = await Life.find(self._refuge)
        if self._earlier is not None:
            try:
                await self._earlier.meet()
            except (OSError, ValueError) as error:
                log.error("pid %d, which holds joins, cannot be adopted: %r", self._earlier.pid, error)

    async def start(self, adopt: bool = False) -> None:
        """Takes over the process that was found, or starts one, and keeps one running until stop().

        adopt: whether the kernel path that the joins of the found one are kept for goes on. One that is not
        adopted ends when the new one holds the first set. Raises McrError if no process starts.
        """
        if adopt and self._earlier is not None and self._earlier.version == __version__:
            self._process, self._earlier = self._earlier, None
            self.held = self._process.held
            log.info("adopting pid %d and its %d joins", self._process.pid, self.held)
        else:
            await self._start_first()
        self._tasks = [
            asyncio.create_task(self._keep(), name="mcr-membership"),
            asyncio.create_task(self._retry(), name="mcr-membership-retry"),
        ]

    async def set(self, desired: frozenset[Membership]) -> list[MembershipFailure]:
        """Makes the memberships equal to the desired ones; returns those that could not be joined, in order.

        Never raises for a dead or silent process: then every membership is a failure, the process is started
        again, and it gets the last desired set.
        """
        same, self._desired = desired == self._desired, desired
        async with self._turn:
            if not (same and self._in_charge and self.held == len(desired)):
                await self._apply()
            return self.failures

    async def join_again(self, lost: frozenset[Membership]) -> None:
        """Leaves and joins what the kernel has lost, though the process holds it."""
        desired = self._desired
        await self.set(desired - lost)
        await self.set(desired)

    async def stop(self) -> None:
        """Leaves every group and reaps the process, within STOP_TIMEOUT_S and a little; or lets it go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        async with self._turn:
            process, self._process = self._process, None
            earlier, self._earlier = self._earlier, None
            if earlier is not None:
                earlier.let_go()
            if process is not None and self._keeps:
                process.let_go()
                self._refuge.aside.unlink(missing_ok=True)
            elif process is not None:
                self._refuge.withdraw()
                await process.end()
            self.held, self.failures, self._desired = 0, [], frozenset()

    async def _start_first(self) -> None:
        try:
            self._process = await self._start()
        except OSError as error:
            raise McrError(
                f"cannot start the process that joins groups: {error.strerror or error}",
                "see the log; free memory or processes (ulimit -u), then try again",
            ) from error

    async def _start(self) -> Life:
        """Raises OSError."""
        self._in_charge = False
        return await Life.start(*self._user, self._refuge if self._keeps else None)

    async def _apply(self) -> None:
        desired = {membership.join(): membership for membership in self._desired}
        process = self._process
        if process is None:
            self._lost(desired.values())
            return
        try:
            self.held, refused = await process.request(desired, self._keeps)
            failures = [_refusal(desired[join], number) for join, number in refused.items()]
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, TimeoutError):
                log.error("killing pid %d: %s", process.pid, error)
            process.kill()  # upon which _keep starts another
            self._lost(desired.values())
            return
        self.failures = sorted(failures, key=lambda failure: failure.membership)
        self._log_refusals()
        if not self._in_charge:
            await self._take_charge()

    async def _take_charge(self) -> None:
        """The process holds a complete set: from now on it is the one to be found, an earlier one ends."""
        self._in_charge = True
        if self._keeps:
            self._refuge.publish()
        else:
            self._refuge.withdraw()
        earlier, self._earlier = self._earlier, None
        if earlier is not None:
            log.info("pid %d, which another MCR or kernel path left, gives up its joins", earlier.pid)
            await earlier.end()

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
                await self._process.wait()
                await self._bury()
            if loop.time() - started_s > BACKOFF_LAST_S:
                backoff_s = BACKOFF_FIRST_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_LAST_S)
            self.restarts += 1
            try:
                self._process = await self._start()
            except OSError as error:
                log.error("cannot start the process that joins groups: %s", error)
                continue
            await self.set(self._desired)

    async def _bury(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        status = await process.end()
        self._lost(self._desired)
        how = "" if status is None else f" with status {status}"
        log.error("pid %d ended%s, restarting", process.pid, how)
