"""One worker's seat at an interface: who sits there, what it has been told, and what follows when it ends.

A worker that dies or falls silent is replaced with a growing delay, and the next one is told everything
before it takes traffic. This module must never decide what a worker shall do: `attached.py` tells it.
"""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from mcr.background import cause_of, surviving
from mcr.desired import InterfaceSpec, OutputSpec, RuleSpec, WorkerSetup
from mcr.errors import McrError
from mcr.maps import Maps
from mcr.sockets import open_output
from mcr.worker import WorkerGoneError, WorkerProcess

PING_INTERVAL_S = 1.0
BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 10.0
HEALTHY_AFTER_S = 60.0
CRASH_LOOP_ENDS, CRASH_LOOP_WITHIN_S = 5, 60.0
COMMANDS_AT_ONCE = 64

Settle = Callable[[Collection[int], Collection[int]], Awaitable[None]]

log = logging.getLogger(__name__)


async def all_done(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does them side by side, all of them to the end; then raises the first error, if there is one."""
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _pipelined(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Commands to a worker: it is not waited for after each, and other work of the loop gets its turn."""
    remaining = iter(works)
    while group := list(islice(remaining, COMMANDS_AT_ONCE)):
        await all_done(group)


@dataclass(slots=True)
class _Told:
    """What the worker has been told, as far as it acknowledged it."""

    outputs: dict[int, OutputSpec] = field(default_factory=dict)
    rules: dict[int, RuleSpec] = field(default_factory=dict)


class Seat:
    """The seat of one worker. It is taken from `start` to `stop`; between these a worker is replaced.

    index: from 0, among the workers of the interface. slot: of its counters. settle: told the rules and
    outputs, by id, of a worker that has ended. pending: why no worker takes
    traffic, empty if one does. crash_loop: its workers keep ending, see CRASH_LOOP_ENDS. refused: outputs, by
    id, whose socket cannot be opened; their rules do without them until a later `add` can.
    """

    def __init__(
        self, interface: str, index: int, slot: int, xsk_base: int, maps: Maps, settle: Settle
    ) -> None:
        self.index = index
        self.slot = slot
        self.name = f"{interface}/{index}" if index else interface
        self._log = logging.LoggerAdapter(log, {"worker": self.name, "interface": interface})
        self.setup: WorkerSetup | None = None
        self.zero_copy = False
        self.restarts = 0
        self.pending = "not started"
        self.crash_loop = False
        self.refused: dict[int, McrError] = {}
        self._xsk_base = xsk_base
        self._maps = maps
        self._settle = settle
        self._packet: socket.socket | None = None
        self._worker: WorkerProcess | None = None
        self._spec = InterfaceSpec()
        self._told = _Told()
        self._turn = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._backoff_s = BACKOFF_FIRST_S
        self._ends_s: deque[float] = deque(maxlen=CRASH_LOOP_ENDS)

    @property
    def pid(self) -> int | None:
        return self._worker.pid if self._worker else None

    @property
    def queues(self) -> range:
        """The receive queues that are the worker's own, or would be."""
        if self.setup is None:
            return range(0)
        return range(self.setup.queue_first, self.setup.queue_first + self.setup.queue_count)

    async def start(
        self, setup: WorkerSetup, spec: InterfaceSpec, packet: socket.socket | None, patiently: bool = False
    ) -> None:
        """Seats a worker and keeps one seated until `stop`.

        packet: the AF_PACKET socket, the seat's to close; it outlives a worker, so that what arrives
        meanwhile waits for the next. Raises McrError if the worker cannot start; patiently: tries again
        instead.
        """
        async with self._turn:
            self.setup, self._packet, self._spec = setup, packet, spec
            self._forget_ends()
            try:
                await self._seat(setup)
            except Exception as error:
                await self._bury(cause_of(error))
                if not patiently:
                    self._vacate(cause_of(error))
                    if isinstance(error, McrError):
                        raise
                    raise McrError(f"{self.name}: the worker died: {error}", "see the log") from error
            self._keeper = asyncio.create_task(self._keep(), name=f"mcr-keep-{self.name}")

    async def stop(self, reason: str = "stopped") -> None:
        """Drains the worker, and takes its sockets out of the map before."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        async with self._turn:
            self._close_ingress()
            if self._worker is not None:
                if self.pending:  # it takes no traffic, so there is nothing to drain
                    self._worker.kill()
                await self._worker.shut_down()
                self._worker = None
                await self._settle(self._told.rules, self._told.outputs)
            self._vacate(reason)

    async def replace(self) -> None:
        """Ends the worker, upon which the keeper starts another."""
        async with self._turn:
            if self._worker is not None:
                self._worker.kill()

    async def add(self, spec: InterfaceSpec) -> None:
        """Tells the worker what is new or changed in spec; where none sits, the next one. Raises McrError."""
        async with self._turn:
            self._spec = spec
            if self._worker is not None:
                await self._or_replace(self._worker, self._tell_new(self._worker))

    async def retire(self) -> None:
        """Tells the worker what the spec of `add` no longer has: after the last packet that needs it."""
        async with self._turn:
            if self._worker is not None:
                await self._or_replace(self._worker, self._tell_gone(self._worker))

    def _vacate(self, reason: str) -> None:
        self._told = _Told()
        self.setup = None
        self.refused = {}
        if self._packet is not None:
            self._packet.close()
            self._packet = None
        self.pending = reason

    def _close_ingress(self) -> None:
        """What comes from now on drops as `no_worker`."""
        if self.setup is not None and self.setup.ingress == "xsk":
            for queue in self.queues:
                self._maps.delete_xsk(self._xsk_base + queue)

    # --- a worker's start

    async def _seat(self, setup: WorkerSetup) -> None:
        """Starts a worker, tells it every output and rule, and only then lets it take traffic."""
        self._told = _Told()
        self._worker = worker = await WorkerProcess.spawn(self.name, setup.cpus[0] if setup.cpus else None)
        fds = self._maps.counter_fds
        if self._packet is not None:
            fds = (*fds, self._packet.fileno())
        sockets, self.zero_copy = await worker.set_up(setup, fds)
        try:
            await self._tell_new(worker)
            await worker.ping()  # opens the AF_PACKET ingress
            for queue, fd in zip(self.queues, sockets, strict=False):
                self._maps.set_xsk(self._xsk_base + queue, fd)
        finally:
            for fd in sockets:  # only the worker keeps them, so that they end with it
                os.close(fd)
        self.pending = ""
        self._log.info("%s: worker %d takes traffic", self.name, worker.pid)

    async def _or_replace(self, worker: WorkerProcess, telling: Coroutine[Any, Any, None]) -> None:
        try:
            await telling
        except WorkerGoneError as error:
            self._log.error("%s: worker %d: %s", self.name, worker.pid, error)
            worker.kill()  # upon which the keeper starts another

    async def _tell_new(self, worker: WorkerProcess) -> None:
        told = self._told
        self.refused = {}
        await _pipelined(
            self._add_output(worker, spec)
            for output_id, spec in self._spec.outputs.items()
            if differs(told.outputs.get(output_id), spec)
        )
        possible = (self._without_refused(rule) for rule in self._spec.rules.values() if not rule.kernel)
        await _pipelined(
            self._set_rule(worker, rule) for rule in possible if differs(told.rules.get(rule.rule_id), rule)
        )

    def _without_refused(self, rule: RuleSpec) -> RuleSpec:
        if self.refused.keys().isdisjoint(rule.output_ids):
            return rule
        return replace(rule, output_ids=tuple(each for each in rule.output_ids if each not in self.refused))

    async def _tell_gone(self, worker: WorkerProcess) -> None:
        told, rules = self._told, self._spec.rules
        gone = [number for number in told.rules if number not in rules or rules[number].kernel]
        await _pipelined(self._delete_rule(worker, number) for number in gone)
        gone = [number for number in told.outputs if number not in self._spec.outputs]
        await _pipelined(self._delete_output(worker, number) for number in gone)

    async def _add_output(self, worker: WorkerProcess, spec: OutputSpec) -> None:
        try:
            udp = open_output(spec.output, spec.ifindex)
        except McrError as error:
            self.refused[spec.output_id] = error
            return
        with udp:
            await worker.add_output(spec, udp)
        self._told.outputs[spec.output_id] = spec

    async def _set_rule(self, worker: WorkerProcess, rule: RuleSpec) -> None:
        await worker.set_rule(rule)
        self._told.rules[rule.rule_id] = rule

    async def _delete_rule(self, worker: WorkerProcess, rule_id: int) -> None:
        await worker.delete_rule(rule_id)  # after it has relayed what waits in its ring
        del self._told.rules[rule_id]

    async def _delete_output(self, worker: WorkerProcess, output_id: int) -> None:
        await worker.delete_output(output_id)
        del self._told.outputs[output_id]

    # --- a worker's end

    async def _keep(self) -> None:
        """Keeps a worker seated."""
        while True:
            with surviving(self._log, self.name):
                if self._worker is not None:
                    cause = await self._watch(self._worker)
                    async with self._turn:
                        await self._bury(cause)
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(2 * self._backoff_s, BACKOFF_LAST_S)
            with surviving(self._log, self.name):
                async with self._turn:
                    await self._revive()

    async def _watch(self, worker: WorkerProcess) -> str:
        """Pings until the worker ends or falls silent. Returns the cause."""
        loop = asyncio.get_running_loop()
        healthy_s = loop.time() + HEALTHY_AFTER_S
        while True:
            try:
                async with asyncio.timeout(PING_INTERVAL_S):
                    await worker.process.wait()
                return f"ended with status {worker.process.returncode}"
            except TimeoutError:
                pass
            try:
                await worker.ping()
            except (WorkerGoneError, McrError) as error:
                return str(error)
            if loop.time() > healthy_s:
                self._recover()

    def _recover(self) -> None:
        """The worker has lived long enough to forget how the earlier ones ended."""
        if self.crash_loop:
            self._log.info("%s: its worker is stable again", self.name)
        self._forget_ends()

    def _forget_ends(self) -> None:
        self._backoff_s = BACKOFF_FIRST_S
        self._ends_s.clear()
        self.crash_loop = False

    async def _bury(self, cause: str) -> None:
        """Ends what is left of a worker that has failed, and keeps its last words as the reason."""
        worker, self._worker = self._worker, None
        self._close_ingress()
        if worker is not None:
            worker.kill()
            await worker.end()
            self._log.error("%s: worker %d: %s", self.name, worker.pid, cause)
            cause = worker.last_words or cause
            self._count_end(cause)
        elif not self.pending.endswith(cause):  # once for each cause, not for each attempt
            self._log.error("%s: no worker can be started: %s", self.name, cause)
        self.pending = f"its worker is being restarted: {cause}"
        await self._settle(self._told.rules, self._told.outputs)

    def _count_end(self, cause: str) -> None:
        now_s = asyncio.get_running_loop().time()
        self._ends_s.append(now_s)
        often = len(self._ends_s) == CRASH_LOOP_ENDS and now_s - self._ends_s[0] < CRASH_LOOP_WITHIN_S
        if often and not self.crash_loop:
            self.crash_loop = True
            self._log.error(
                "%s: crash loop: its workers ended %d times in %.0f s, the last one with: %s",
                *(self.name, CRASH_LOOP_ENDS, now_s - self._ends_s[0], cause),
            )

    async def _revive(self) -> None:
        assert self.setup is not None  # stop() ends this task before it takes the set-up away
        self.restarts += 1
        try:
            await self._seat(self.setup)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next attempt follows
            await self._bury(cause_of(error))


def differs(old: object, new: object) -> bool:
    """Most of what is compared is the same object, and comparing field by field takes long."""
    return old is not new and old != new
