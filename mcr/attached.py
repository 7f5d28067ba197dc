"""One attached interface: its XDP link, its workers' seats, its part of the maps.

It is told what shall be (`InterfaceSpec`) and makes it so, changing only what differs from what it last put
in place. Its receive queues are shared out among its workers; `seat.py` keeps those alive. This module must
never decide what belongs on the interface; `desired.py` does.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from mcr import ethtool, loader, netlink
from mcr.accounting import settle_worker
from mcr.background import cause_of, in_thread
from mcr.config import Attachment, Mode
from mcr.desired import (
    InterfaceSpec,
    OutputSpec,
    RuleSpec,
    WorkerSetup,
    frame_count,
    frame_size,
    largest_payload,
    share_cpus,
    share_queues,
)
from mcr.errors import McrError
from mcr.maps import MAX_QUEUES, Maps
from mcr.rule import AGGREGATES, FRAIL_NATIVE, InterfaceFacts
from mcr.rule_maps import RuleMaps
from mcr.seat import Seat, all_done, differs
from mcr.sockets import RouteProbe, open_packets

NOBODY = 65534
NO_QUEUE = "no receive queue is left for it"

log = logging.getLogger(__name__)


class AttachedInterface:
    """An interface that shall be attached, whether or not it is there now.

    slots: of the counters of each of its workers. mode is how XDP is attached now ("native", "generic"),
    empty while it is not or where the ingress needs none.
    """

    def __init__(
        self,
        instance: str,
        attachment: Attachment,
        maps: Maps,
        slots: Sequence[int],
        xsk_base: int,
        keep: bool,
        rule_maps: RuleMaps,
    ) -> None:
        self.instance = instance
        self.attachment = attachment
        self.keep = keep
        self.xsk_base = xsk_base
        self.mode: Literal["", "native", "generic"] = ""
        self.ingress: Literal["", "xsk", "packet"] = ""
        self.queue_count = 0  # those that are drained
        self._queues_found = 0  # those that the driver uses
        self.spec = InterfaceSpec()
        self._log = logging.LoggerAdapter(log, {"interface": attachment.interface})
        self.seats = [
            Seat(attachment.interface, index, slot, xsk_base, maps, self._settle)
            for index, slot in enumerate(slots)
        ]
        self._maps = maps
        self._rule_maps = rule_maps
        self._reason = "not started"  # why it is not attached; empty if it is
        self._link: loader.Link | None = None
        self._facts: InterfaceFacts | None = None  # those that it is attached with
        self._tried = 0  # the ifindex that the last attempt to attach failed at
        self._map_rules: dict[bytes, RuleSpec] = {}  # by key
        self._turn = asyncio.Lock()

    @property
    def name(self) -> str:
        return self.attachment.interface

    @property
    def pending(self) -> str:
        """Why it is not working, if it is not, or not wholly."""
        waiting = (seat.pending for seat in self.seats if seat.setup is not None and seat.pending)
        return self._reason or next(waiting, "")

    @property
    def shortfall(self) -> str:
        """What it works without, though it works; empty if nothing is missing."""
        if self.ingress != "xsk" or not self._queues_found:
            return ""
        if self._queues_found > MAX_QUEUES:
            return (
                f"{MAX_QUEUES} of {self._queues_found} receive queues are drained: packets of the worker path"
                f" on the others drop as no_worker (ethtool -L {self.name} combined {MAX_QUEUES})"
            )
        if self.queue_count < len(self.seats):
            queues = "1 queue" if self.queue_count == 1 else f"{self.queue_count} queues"
            return f"{self.queue_count} of {len(self.seats)} workers: {queues}"
        return ""

    @property
    def refused(self) -> dict[int, McrError]:
        """Outputs, by id, whose socket cannot be opened."""
        return {number: error for seat in self.seats for number, error in seat.refused.items()}

    @property
    def worker_pid(self) -> int | None:
        """The process, if there is one worker and it runs."""
        return self.seats[0].pid if len(self.seats) == 1 else None

    @property
    def restarts(self) -> int:
        return sum(seat.restarts for seat in self.seats)

    @property
    def zero_copy(self) -> bool:
        return any(seat.zero_copy for seat in self.seats)

    async def release(self, facts: InterfaceFacts | None) -> None:
        """Detaches what cannot stay as it is: the interface has gone, is another one of that name, or needs
        frames of another size. Facts are None where it is absent."""
        async with self._turn:
            if self._must_restart(facts):
                await self._take_down()

    async def prepare(self, facts: InterfaceFacts | None) -> None:
        """Attaches; to be called after `release`, of all the interfaces, because they may exchange names.

        What is attached here has no rule before `put`. Raises McrError if it cannot be attached; a worker
        that dies later is replaced.
        """
        async with self._turn:
            if facts is None:
                self._reason = f"there is no interface {self.name}"
            elif self._facts is None:
                await self._start(facts)
            elif self.ingress == "xsk":
                await self._follow_queues(facts)

    async def put(self, spec: InterfaceSpec) -> None:
        """Makes the interface what spec says, as far as it is attached: new outputs and rules before the
        packets that need them, old ones after the last that does.

        Raises McrError; if that is for an output whose socket cannot be opened, everything else is in place.
        """
        async with self._turn:
            before = self.refused.keys()
            self.spec = _with_routes(spec, self.spec)
            await all_done(seat.add(self.spec) for seat in self.seats)
            await self._sync_maps()  # the kernel path does not wait for a worker
            await all_done(seat.retire() for seat in self.seats)
            if new := [error for number, error in self.refused.items() if number not in before]:
                raise new[0]

    async def mend_link(self) -> list[str]:
        """Attaches the program again if somebody else has detached it, and pins the link again that has to
        outlive this supervisor. Returns what was found. Raises McrError if it cannot be attached."""
        async with self._turn:
            if self._link is None or self._facts is None:
                return []
            try:
                return await asyncio.to_thread(self._mend_link, self._link, self._facts)
            except McrError as error:
                await self._take_down()
                self._reason = str(error)
                raise

    def _mend_link(self, link: loader.Link, facts: InterfaceFacts) -> list[str]:
        found = []
        if not link.runs(self._maps.program_id, facts.ifindex):
            link.close()
            self._link = None
            self._link = loader.attach(self._maps.program_fd, self.name, facts.ifindex, link.mode)
            found.append(f"{self.name}: the XDP link had been detached: attached again")
        elif link.pin is not None and not link.pin.exists():
            link.pin = None
            found.append(f"{self.name}: the pin of the XDP link had been removed: pinned again")
        self._pin_link(facts)
        return found

    async def replace_workers(self) -> None:
        """Each worker, with its sockets."""
        async with self._turn:
            for seat in self.seats:
                await seat.replace()

    async def has_other_queues(self) -> bool:
        """Whether the driver uses another number of receive queues now: not all of them tell of a change."""
        if self._facts is None or self.ingress != "xsk":
            return False
        with contextlib.suppress(McrError):
            return await asyncio.to_thread(netlink.receive_queues, self.name) != self._queues_found
        return False

    async def stop(self) -> None:
        """Detaches: first the rules, so that packets go to the stack, then the drained workers, then XDP."""
        async with self._turn:
            await self._take_down()
            self._reason = "stopped"

    async def leave(self) -> None:
        """Ends the workers and their rules, and leaves the kernel path as it is."""
        async with self._turn:
            self._map_rules = {key: rule for key, rule in self._map_rules.items() if not rule.kernel}
            if self._link is not None:
                self._link.let_go()
                self._link = None
            await self._take_down()
            self._reason = "stopped"

    @property
    def place(self) -> tuple[Mapping[bytes, RuleSpec], int]:
        """Its rules in the map, by key, and its xsk_base."""
        return self._map_rules, self.xsk_base

    @property
    def steady_workers(self) -> tuple[int, ...] | None:
        """The processes, if each worker that there is to be takes traffic from its AF_XDP sockets."""
        if self._link is None or self.ingress != "xsk" or any(seat.pending for seat in self.seats):
            return None
        return tuple(seat.pid or 0 for seat in self.seats)

    @property
    def map_rules(self) -> Iterable[RuleSpec]:
        """The rules that are in the map because of this interface."""
        return self._map_rules.values()

    # --- up and down

    def _must_restart(self, facts: InterfaceFacts | None) -> bool:
        if self._facts is None:
            return False
        return (
            facts is None
            or facts.ifindex != self._facts.ifindex
            or frame_size(self._with_ingress(facts)) != frame_size(self._with_ingress(self._facts))
        )

    def _with_ingress(self, facts: InterfaceFacts) -> InterfaceFacts:
        return replace(facts, ingress=self.ingress)

    async def _start(self, facts: InterfaceFacts) -> None:
        patiently, self._tried = facts.ifindex != self._tried, facts.ifindex
        try:
            await in_thread(lambda: self._attach(facts, patiently))
            await self._take_seats(facts)
        except Exception as error:
            await all_done(seat.stop() for seat in self.seats)
            self._detach()
            self._reason = cause_of(error)
            raise
        self._facts = facts
        self._reason = ""
        self._tried = 0

    async def _take_seats(self, facts: InterfaceFacts) -> None:
        self._queues_found = await self._count_queues() if self.ingress == "xsk" else 1
        self._choose_queues()
        setups = self._choose_setups(facts)
        packets = open_packets(self.name, facts.ifindex, len(setups)) if self.ingress == "packet" else None
        await all_done(
            seat.start(setup, InterfaceSpec(), packets[seat.index] if packets else None)
            for seat, setup in zip(self.seats, setups, strict=False)
        )

    async def _count_queues(self) -> int:
        return await asyncio.to_thread(netlink.receive_queues, self.name)

    def _choose_queues(self) -> None:
        """Drains those of the queues found that it can, and says once what is missing."""
        self.queue_count = min(self._queues_found, MAX_QUEUES)
        if not self.shortfall:
            return
        self._log.warning("%s: %s", self.name, self.shortfall)
        for seat in self.seats[self.queue_count :]:
            seat.pending = NO_QUEUE

    async def _follow_queues(self, facts: InterfaceFacts) -> None:
        """Replaces the workers whose share of the receive queues has changed. All of these end before the
        first of the new ones begins, because a queue has one socket."""
        queues = await self._count_queues()
        if queues == self._queues_found:
            return
        self._log.info("%s: %d receive queues instead of %d", self.name, queues, self._queues_found)
        self._queues_found = queues
        self._choose_queues()
        setups = dict(enumerate(self._choose_setups(facts)))
        concerned = [seat for seat in self.seats if seat.setup != setups.get(seat.index)]
        await all_done(seat.stop(NO_QUEUE) for seat in concerned)
        try:
            await in_thread(lambda: self._attach_to_new_queues(facts))
        except Exception as error:
            await self._take_down()
            self._reason = cause_of(error)
            raise
        await all_done(
            seat.start(setups[seat.index], self.spec, None, patiently=True)
            for seat in concerned
            if seat.index in setups
        )

    def _attach(self, facts: InterfaceFacts, patiently: bool) -> None:
        """XDP, unless the ingress needs none. Only `auto` falls back to AF_PACKET, where XDP cannot run.

        Blocks. patiently: waits for the link of a process that has just died.
        """
        if self._link is not None:
            return
        self.ingress = "packet" if self.attachment.ingress == "packet" else "xsk"
        if self.ingress == "packet":
            return
        self._maps.forget_metadata(facts.ifindex)
        try:
            offloads = ethtool.features(self.name)
            merges = any(offloads.get(feature) for feature in ethtool.MERGES)
            mode = xdp_mode(self.attachment, facts, ethtool.driver(self.name), merges)
            self._link = self._adopt(facts, mode) or loader.attach(
                self._maps.program_fd, self.name, facts.ifindex, mode, patiently
            )
        except loader.XdpUnsupportedError as error:
            if self.attachment.ingress != "auto" or self.attachment.mode != "auto":
                raise
            self._log.warning("%s; using AF_PACKET", error)
            self.ingress = "packet"
            return
        self.mode = self._link.mode
        self._pin_link(facts)
        self._log.info("%s: attached in %s mode", self.name, self.mode)

    def _pin_link(self, facts: InterfaceFacts) -> None:
        """Only with keep does it outlive this supervisor, also one that an earlier supervisor kept."""
        if self._link is not None and not self.keep:
            self._link.unpin()
        elif self._link is not None and self._link.pin is None:
            self._link.keep(loader.link_dir(self.instance) / str(facts.ifindex))

    def _attach_to_new_queues(self, facts: InterfaceFacts) -> None:
        """A veth device runs a program only on the queues that it had when the program was attached, and
        hands the packets of others to the stack (veth_set_channels in the kernel's drivers/net/veth.c).
        Blocks."""
        if self._link is None or self.mode != "native" or not netlink.is_veth(self.name):
            return
        self._link.close()
        self._link = None
        self._link = loader.attach(self._maps.program_fd, self.name, facts.ifindex, "native")
        self._pin_link(facts)

    def _adopt(self, facts: InterfaceFacts, mode: Mode) -> loader.Link | None:
        """A link that an earlier supervisor left, if it is in a mode that is wanted."""
        link = loader.adopt_link(self.instance, facts.ifindex, self.name)
        if link is not None and mode not in ("auto", link.mode):
            link.close()
            return None
        return link

    def _detach(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        self.mode = ""
        self._facts = None
        self.queue_count = self._queues_found = 0

    def _choose_setups(self, facts: InterfaceFacts) -> list[WorkerSetup]:
        """One for each worker that has a share of the queues."""
        workers, threads = len(self.seats), 1 + self.attachment.egress_threads
        queues = [range(1)] * workers if self.ingress == "packet" else share_queues(self.queue_count, workers)
        _check_cpus(self.attachment.cpus)
        cpus = share_cpus(self.attachment.cpus, workers, threads)
        root = os.geteuid() == 0
        return [
            WorkerSetup(
                interface=self.name,
                ifindex=facts.ifindex,
                slot=seat.slot,
                ingress="xsk" if self.ingress == "xsk" else "packet",
                # Zero-copy sockets bypass the stack, where a program in generic mode runs.
                zero_copy="off" if self.mode == "generic" else self.attachment.zero_copy,
                busy_poll=self.attachment.busy_poll,
                verify_checksums=self.attachment.udp_checksums == "verify",
                queue_first=own.start,
                queue_count=len(own),
                frame_size=frame_size(self._with_ingress(facts)),
                frame_count=frame_count(self._with_ingress(facts)),
                user_id=NOBODY if root else 0,
                group_id=NOBODY if root else 0,
                egress_threads=self.attachment.egress_threads,
                cpus=cpus[seat.index],
            )
            for seat, own in zip(self.seats, queues, strict=False)
        ]

    async def _take_down(self) -> None:
        await self._rule_maps.switch(self._map_rules, (), self.xsk_base)
        await all_done(seat.stop() for seat in self.seats)
        self.spec = InterfaceSpec()
        self._detach()

    # --- making it so

    async def _sync_maps(self) -> None:
        if self._link is None:
            return
        await self._rule_maps.switch(self._map_rules, self.spec.rules.values(), self.xsk_base)

    async def _settle(self, rules: Collection[int], outputs: Collection[int]) -> None:
        """What a worker that has ended had in hand is given up: at once if no other counts for them too."""
        if len(self.seats) == 1:
            await settle_worker(self._maps, rules, outputs)
        else:
            self._rule_maps.resting.watch_workers(rules, outputs)


def xdp_mode(attachment: Attachment, facts: InterfaceFacts, driver: str, merges: bool) -> Mode:
    """The mode to attach in; `auto` is native, or else generic.

    merges: whether GRO merges UDP there. In the stack a program cannot tell a super-packet, of GRO or of a
    sender on this host (UDP_SEGMENT), from one datagram: `auto` takes generic mode only where there are none.
    A program in a bond's or team's driver runs in its members', and is told their index: no rule of the bond
    would match. In the stack it runs on the bond. Raises XdpUnsupportedError.
    """
    aggregate = facts.kind in AGGREGATES
    if attachment.mode == "native" and aggregate:
        raise loader.XdpUnsupportedError(
            f"{facts.name} is a {facts.kind}: in native mode XDP sees its members in its place",
            f"attach the members, or choose --mode generic for {facts.name}",
        )
    if attachment.mode != "auto":
        return attachment.mode
    of_hardware = aggregate or (not facts.kind and facts.name != "lo")
    keeps = attachment.ingress == "xsk" or (of_hardware and not merges)
    if not aggregate and driver not in FRAIL_NATIVE:
        return "auto" if keeps else "native"
    if not keeps:
        raise loader.XdpUnsupportedError(
            f"{facts.name} cannot run XDP in native mode, and GRO merges datagrams before generic mode",
            "choose --ingress packet, which cuts them again",
        )
    return "generic"


def _with_routes(spec: InterfaceSpec, before: InterfaceSpec) -> InterfaceSpec:
    """What routing chooses the way of is limited by the MTU of the route as it is now."""
    routed = [output for output in spec.outputs.values() if not output.ifindex]
    if not routed:
        return spec
    outputs = dict(spec.outputs)
    with RouteProbe() as probe:
        for wanted in routed:
            limit = largest_payload(wanted.output, probe.mtu(wanted.output))
            old = before.outputs.get(wanted.output_id)
            outputs[wanted.output_id] = (
                old if old is not None and _is_like(old, wanted, limit) else replace(wanted, gso_limit=limit)
            )
    return InterfaceSpec(outputs, spec.rules)


def _is_like(old: OutputSpec, wanted: OutputSpec, gso_limit: int) -> bool:
    """Whether old is what wanted becomes with this limit."""
    return not old.ifindex and old.gso_limit == gso_limit and not differs(old.output, wanted.output)


def _check_cpus(cpus: Sequence[int]) -> None:
    allowed = os.sched_getaffinity(0)
    for cpu in cpus:
        if cpu not in allowed:
            listed = ",".join(map(str, sorted(allowed)))
            raise McrError(
                f"CPU {cpu} is not among those that the supervisor may use ({listed})",
                "choose --cpus from these, or start the supervisor with more (taskset, CPUAffinity=)",
            )
