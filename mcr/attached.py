"""One attached interface: its XDP link, its worker, its part of the maps; and the worker's life cycle.

It is told what shall be (`InterfaceSpec`) and makes it so, changing only what differs from what it last put
in place. A worker that dies or falls silent is replaced with a growing delay and gets everything again before
it takes traffic. This module must never decide what belongs on the interface; `desired.py` does.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mcr import loader, netlink
from mcr._bpf import ffi, lib
from mcr.config import Attachment
from mcr.desired import (
    FRAME_COUNT,
    InterfaceSpec,
    KernelOutputSpec,
    OutputSpec,
    RuleSpec,
    WorkerSetup,
    frame_size,
    largest_payload,
)
from mcr.errors import McrError
from mcr.maps import MAX_QUEUES, Maps
from mcr.rule import InterfaceFacts
from mcr.sockets import open_output, open_packet, route_mtu
from mcr.worker import WorkerGoneError, WorkerProcess

PING_INTERVAL_S = 1.0
BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 10.0
HEALTHY_AFTER_S = 60.0
NOBODY = 65534

log = logging.getLogger(__name__)


def _with_route(spec: OutputSpec) -> OutputSpec:
    """What routing chooses the way of is limited by the MTU of the route as it is now."""
    if spec.ifindex:
        return spec
    return replace(spec, gso_limit=largest_payload(spec.output, route_mtu(spec.output)))


@dataclass(slots=True)
class _InPlace:
    """What the worker and the maps have been told, as far as they acknowledged it."""

    outputs: dict[int, OutputSpec] = field(default_factory=dict)
    rules: dict[int, RuleSpec] = field(default_factory=dict)
    map_rules: dict[int, RuleSpec] = field(default_factory=dict)


class AttachedInterface:
    """An interface that shall be attached, whether or not it is there now.

    mode is how XDP is attached now ("native", "generic"), empty while it is not or where the ingress needs
    none; pending says why it is not working, if it is not.
    """

    def __init__(
        self, instance: str, attachment: Attachment, maps: Maps, slot: int, xsk_base: int, keep: bool
    ) -> None:
        self.instance = instance
        self.attachment = attachment
        self.keep = keep
        self.slot = slot
        self.xsk_base = xsk_base
        self.mode: Literal["", "native", "generic"] = ""
        self.ingress: Literal["", "xsk", "packet"] = ""
        self.zero_copy = False
        self.queue_count = 0
        self.restarts = 0
        self.pending = "not started"
        self.spec = InterfaceSpec()
        self._maps = maps
        self._facts: InterfaceFacts | None = None
        self._link: loader.Link | None = None
        self._setup: WorkerSetup | None = None
        self._worker: WorkerProcess | None = None
        self._in_place = _InPlace()
        self._turn = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._backoff_s = BACKOFF_FIRST_S

    @property
    def name(self) -> str:
        return self.attachment.interface

    @property
    def worker_pid(self) -> int | None:
        return self._worker.pid if self._worker else None

    async def prepare(self, facts: InterfaceFacts | None) -> None:
        """Attaches, or detaches what has gone; facts are None where the interface is absent.

        Raises McrError if it cannot be attached; a worker that dies later is replaced.
        """
        async with self._turn:
            if self._must_restart(facts):
                await self._take_down()
            self._facts = facts
            if facts is None:
                self.pending = f"there is no interface {self.name}"
            elif self._keeper is None:
                await self._start(facts)

    async def put(self, spec: InterfaceSpec) -> None:
        """Makes the interface what spec says, as far as it is attached. Raises McrError."""
        async with self._turn:
            self.spec = spec
            if self._worker is not None:
                await self._sync_or_replace(self._worker)
            elif self._link is not None:
                self._sync_maps()  # the kernel path does not wait for a worker

    async def _start(self, facts: InterfaceFacts) -> None:
        try:
            await self._bring_up(facts)
        except (McrError, WorkerGoneError) as error:
            await self._bury(str(error))
            self._detach()
            self.pending = str(error)
            if isinstance(error, McrError):
                raise
            raise McrError(f"{self.name}: the worker died: {error}", "see the log") from error
        self._keeper = asyncio.create_task(self._keep(), name=f"mcr-keep-{self.name}")

    async def _sync_or_replace(self, worker: WorkerProcess) -> None:
        try:
            await self._sync()
        except WorkerGoneError as error:
            log.error("%s: worker %d: %s", self.name, worker.pid, error)
            worker.kill()  # upon which the keeper starts another

    async def stop(self) -> None:
        """Detaches: first the rules, so that packets go to the stack, then the drained worker, then XDP."""
        async with self._turn:
            await self._take_down()
            self.pending = "stopped"

    async def leave(self) -> None:
        """Ends the worker and its rules, and leaves the kernel path as it is."""
        async with self._turn:
            self._in_place.map_rules = {
                rule_id: rule for rule_id, rule in self._in_place.map_rules.items() if not rule.kernel
            }
            if self._link is not None:
                self._link.let_go()
                self._link = None
            await self._take_down()
            self.pending = "stopped"

    @property
    def map_rules(self) -> Iterable[RuleSpec]:
        """The rules that are in the map because of this interface."""
        return self._in_place.map_rules.values()

    # --- up and down

    def _must_restart(self, facts: InterfaceFacts | None) -> bool:
        if self._setup is None:
            return False
        return (
            facts is None
            or facts.ifindex != self._setup.ifindex
            or frame_size(facts) != self._setup.frame_size
        )

    async def _bring_up(self, facts: InterfaceFacts) -> None:
        self._attach(facts)
        self._setup = self._choose_setup(facts)
        await self._start_worker(self._setup)

    def _attach(self, facts: InterfaceFacts) -> None:
        """XDP, unless the ingress needs none. Only `auto` falls back to AF_PACKET, where XDP cannot run."""
        if self._link is not None:
            return
        self.ingress = "packet" if self.attachment.ingress == "packet" else "xsk"
        if self.ingress == "packet":
            return
        mode = self.attachment.mode
        try:
            self._link = self._adopt(facts) or loader.attach(
                self._maps.program_fd, self.name, facts.ifindex, mode
            )
        except loader.XdpUnsupportedError as error:
            if self.attachment.ingress != "auto" or mode != "auto":
                raise
            log.warning("%s; using AF_PACKET", error)
            self.ingress = "packet"
            return
        self.mode = self._link.mode
        if self.keep and self._link.pin is None:
            self._link.keep(loader.link_dir(self.instance) / str(facts.ifindex))
        log.info("%s: attached in %s mode", self.name, self.mode)

    def _adopt(self, facts: InterfaceFacts) -> loader.Link | None:
        """A link that an earlier supervisor left, if it is in a mode that is wanted."""
        link = loader.adopt_link(self.instance, facts.ifindex, self.name)
        if link is not None and self.attachment.mode not in ("auto", link.mode):
            link.close()
            return None
        return link

    def _detach(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        self.mode = ""
        self._setup = None

    def _choose_setup(self, facts: InterfaceFacts) -> WorkerSetup:
        queues = netlink.receive_queues(self.name) if self.ingress == "xsk" else 1
        if queues > MAX_QUEUES:
            raise McrError(
                f"{self.name} has {queues} receive queues, more than {MAX_QUEUES}",
                f"ethtool -L {self.name} combined {MAX_QUEUES}",
            )
        self.queue_count = queues
        root = os.geteuid() == 0
        return WorkerSetup(
            interface=self.name,
            ifindex=facts.ifindex,
            slot=self.slot,
            ingress="xsk" if self.ingress == "xsk" else "packet",
            # Zero-copy sockets bypass the stack, where a program in generic mode runs.
            zero_copy="off" if self.mode == "generic" else self.attachment.zero_copy,
            busy_poll=self.attachment.busy_poll,
            queue_first=0,
            queue_count=queues,
            frame_size=frame_size(facts),
            frame_count=FRAME_COUNT,
            user_id=NOBODY if root else 0,
            group_id=NOBODY if root else 0,
            egress_threads=self.attachment.egress_threads,
        )

    async def _start_worker(self, setup: WorkerSetup) -> None:
        """Starts a worker, gives it every output and rule, and only then traffic."""
        self._in_place = _InPlace(map_rules=self._in_place.map_rules)
        self._worker = await WorkerProcess.spawn(self.name)
        sockets, self.zero_copy = await self._set_up_worker(self._worker, setup)
        try:
            await self._sync()
            for queue, fd in enumerate(sockets):
                self._maps.set_xsk(self.xsk_base + queue, fd)
        finally:
            for fd in sockets:  # only the worker keeps them, so that they end with it
                os.close(fd)
        self.pending = ""
        log.info("%s: worker %d takes traffic", self.name, self._worker.pid)

    async def _set_up_worker(self, worker: WorkerProcess, setup: WorkerSetup) -> tuple[list[int], bool]:
        fds: Sequence[int] = self._maps.counter_fds
        if setup.ingress == "xsk":
            return await worker.set_up(setup, fds)
        with open_packet(setup.interface, setup.ifindex) as packet:
            return await worker.set_up(setup, (*fds, packet.fileno()))

    async def _take_down(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        for rule in self._in_place.map_rules.values():
            self._delete_map_rule(rule)
        for queue in range(self.queue_count):
            self._maps.delete_xsk(self.xsk_base + queue)
        if self._worker is not None:
            await self._worker.shut_down()
            self._worker = None
        self._in_place = _InPlace()
        self._detach()

    # --- making it so

    async def _sync(self) -> None:
        """New outputs and rules before the packets that need them, old ones after the last that does."""
        assert self._worker is not None
        in_place = self._in_place
        wanted = {rule_id: rule for rule_id, rule in self.spec.rules.items() if not rule.kernel}
        await self._add_outputs(self._worker)
        for rule_id, rule in wanted.items():
            if in_place.rules.get(rule_id) != rule:
                await self._worker.set_rule(rule)
                in_place.rules[rule_id] = rule
        self._sync_maps()
        for rule_id in in_place.rules.keys() - wanted.keys():
            await self._worker.delete_rule(rule_id)  # after it has relayed what waits in its ring
            del in_place.rules[rule_id]
        for output_id in in_place.outputs.keys() - self.spec.outputs.keys():
            await self._worker.delete_output(output_id)
            del in_place.outputs[output_id]

    def _sync_maps(self) -> None:
        if self._link is None:
            return
        in_place = self._in_place.map_rules
        for rule_id in in_place.keys() - self.spec.rules.keys():
            self._delete_map_rule(in_place.pop(rule_id))
        for rule_id, rule in self.spec.rules.items():
            if in_place.get(rule_id) != rule:
                self._put_map_rule(rule, in_place.get(rule_id))
                in_place[rule_id] = rule

    async def _add_outputs(self, worker: WorkerProcess) -> None:
        for output_id, wanted in self.spec.outputs.items():
            spec = _with_route(wanted)
            if self._in_place.outputs.get(output_id) == spec:
                continue
            with open_output(spec.output, spec.ifindex) as udp:
                await worker.add_output(spec, udp)
            self._in_place.outputs[output_id] = spec

    def _put_map_rule(self, rule: RuleSpec, before: RuleSpec | None) -> None:
        """Everything that the rule needs is in place before the one update that makes it count."""
        if rule.kernel:
            self._prepare_kernel_path(rule, before)
        outputs = rule.kernel_outputs
        fields = {
            "rule_id": rule.rule_id,
            "xsk_base": self.xsk_base,
            "frame_limit": rule.frame_limit,
            "flags": (lib.MCR_RULE_KERNEL if rule.kernel else 0)
            | (lib.MCR_RULE_GENERIC if rule.generic else 0),
            "output_id": outputs[0].output_id if len(outputs) == 1 else 0,
            "smallest_mtu": min((output.mtu for output in outputs), default=0),
        }
        self._maps.set_rule(ffi.from_buffer(rule.key), fields)
        if before is not None:
            if before.key != rule.key:
                self._maps.delete_rule(ffi.from_buffer(before.key))
            self._retire_kernel_path(before, rule.kernel_outputs)

    def _delete_map_rule(self, rule: RuleSpec) -> None:
        self._maps.delete_rule(ffi.from_buffer(rule.key))
        self._retire_kernel_path(rule, ())

    def _prepare_kernel_path(self, rule: RuleSpec, before: RuleSpec | None) -> None:
        old = before.kernel_outputs if before is not None else ()
        for output in rule.kernel_outputs:
            if output in old:
                continue
            self._maps.set_kernel_output(output.output_id, output.fields())
            self._maps.set_egress(rule.rule_id, output.ifindex, output.output_id)
            self._maps.count_redirects(output.ifindex)
        if len(rule.kernel_outputs) > 1:
            pairs = [(output.output_id, output.ifindex) for output in rule.kernel_outputs]
            if len(old) < 2 or pairs != [(output.output_id, output.ifindex) for output in old]:
                self._maps.set_fan_out(rule.rule_id, pairs)

    def _retire_kernel_path(self, rule: RuleSpec, kept: Sequence[KernelOutputSpec]) -> None:
        still_used = {output.ifindex for output in kept}
        for output in rule.kernel_outputs:
            if output.ifindex not in still_used:
                self._maps.delete_egress(rule.rule_id, output.ifindex)
        if len(rule.kernel_outputs) > 1 and len(kept) < 2:
            self._maps.delete_fan_out(rule.rule_id)

    # --- the worker's life

    async def _watch(self, worker: WorkerProcess) -> str:
        """Pings until the worker ends or falls silent. Returns the cause."""
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

    async def _keep(self) -> None:
        """Keeps a worker running, for as long as the interface stays attached."""
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            if self._worker is not None:
                cause = await self._watch(self._worker)
                async with self._turn:
                    await self._bury(cause)
            if loop.time() - started_s > HEALTHY_AFTER_S:
                self._backoff_s = BACKOFF_FIRST_S
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(2 * self._backoff_s, BACKOFF_LAST_S)
            async with self._turn:
                await self._revive()

    async def _bury(self, cause: str) -> None:
        """Ends what is left of a worker that has failed, and keeps its last words as the reason."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        await worker.end()
        self.pending = f"its worker is being restarted: {worker.last_words or cause}"
        log.error("%s: worker %d: %s", self.name, worker.pid, cause)

    async def _revive(self) -> None:
        self.restarts += 1
        assert self._facts is not None  # apply() takes everything down, this task too, when they go
        try:
            await self._bring_up(self._facts)
        except (McrError, WorkerGoneError) as error:
            await self._bury(str(error))
