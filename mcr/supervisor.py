"""The supervisor: desired state (files and commands) -> actual state (links, maps, workers, joins).

Every change goes the same way: the new desired state is checked whole, then put in place by `_apply`, which
compares and changes only what differs. This module must never touch a packet, a map's layout or a socket
option; it says what shall be, and to whom.
"""

import asyncio
import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, Self

from mcr import keep, loader, procfs
from mcr.accounting import settle_worker
from mcr.attached import AttachedInterface
from mcr.background import Tasks, every, in_thread, surviving
from mcr.config import Attachment, Config, load_config
from mcr.desired import Desired, IdPool, Ids, Realiser, RuleState
from mcr.drift import Drifts
from mcr.egress_helpers import EgressHelpers
from mcr.errors import Faults, McrError
from mcr.limits import scaled
from mcr.maps import MAX_INTERFACES, MAX_QUEUES, MAX_WORKERS, Maps, lookups_needed
from mcr.membership import MembershipWorker
from mcr.netlink import LinkMonitor, read_interfaces
from mcr.rule import InterfaceFacts, Rule, needs_helper, rule_faults
from mcr.rule_maps import RuleMaps
from mcr.state import drop_staged, load_rules, put_rules, set_aside, stage_rules
from mcr.tap import Tap
from mcr.vlan_devices import VlanDevices
from mcr.vlans import vlans_needed

RETRY_INTERVAL_S = 5.0
QUEUES_INTERVAL_S = 1.0
SETTLE_INTERVAL_S = 1.0
DRIFT_INTERVAL_S = 3.0
CHANGE_TIMEOUT_S = 3.0
IDS_AT_ONCE = 256  # before other work of the loop gets its turn

log = logging.getLogger(__name__)


@dataclass(slots=True)
class DesiredState:
    """What the user wants: from files, and from commands at run time."""

    file_rules: dict[str, Rule] = field(default_factory=dict)
    file_attachments: dict[str, Attachment] = field(default_factory=dict)
    runtime_rules: dict[str, Rule] = field(default_factory=dict)
    runtime_attachments: dict[str, Attachment] = field(default_factory=dict)

    @property
    def rules(self) -> dict[str, Rule]:
        return self.file_rules | self.runtime_rules

    @property
    def attachments(self) -> dict[str, Attachment]:
        return self.runtime_attachments | self.file_attachments

    def copy(self) -> "DesiredState":
        return DesiredState(
            dict(self.file_rules),
            dict(self.file_attachments),
            dict(self.runtime_rules),
            dict(self.runtime_attachments),
        )


@dataclass(slots=True)
class Reloads:
    """What became of the files after the start. last_success_s is Unix time; the start counts there."""

    done: int = 0
    failed: int = 0
    last_successful: bool = True
    last_success_s: float = field(default_factory=time.time)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """One reload."""
        try:
            yield
        except BaseException:
            self.failed += 1
            self.last_successful = False
            raise
        self.done += 1
        self.last_successful, self.last_success_s = True, time.time()


class Supervisor:
    """One instance, from start to stop. An async context manager; its methods are the control commands."""

    def __init__(
        self,
        instance: str,
        config_paths: Sequence[Path] = (),
        on_exit: Literal["detach", "keep"] = "detach",
        replace_kept: bool = False,
    ) -> None:
        self.instance = instance
        self.config_paths = tuple(config_paths)
        self.keep = on_exit == "keep"
        self._replace_kept = replace_kept
        self._has_pins = False
        self.state = DesiredState()
        self.desired = Desired({}, {}, frozenset())
        self.attached: dict[str, AttachedInterface] = {}
        self.reloads = Reloads()
        self.drifts = Drifts()
        self.membership = MembershipWorker(keep.refuge(instance), self.keep)
        self.maps: Maps
        self.rule_maps: RuleMaps
        self.helpers: EgressHelpers
        self.tap: Tap
        self._monitor = LinkMonitor(self._links_changed)
        self._ids = Ids()
        self._realiser = Realiser()
        self._bases = IdPool(MAX_INTERFACES + 1, "interface")
        self._slots = IdPool(MAX_WORKERS + 1, "worker")
        self._no_metadata: frozenset[int] = frozenset()
        self.vlans = VlanDevices(instance)
        self._turn = asyncio.Lock()
        self._stack = contextlib.AsyncExitStack()
        self._kept_links: dict[str, int] = {}  # of the tracepoints, by pin
        self._mends = False  # only once everything is in place
        self._unserved: dict[str, tuple[tuple[int, ...] | None, int, int]] = {}
        self._background = Tasks(log)
        self._links_moved = asyncio.Event()

    @property
    def facts(self) -> Mapping[str, InterfaceFacts]:
        """The interfaces as they are now, with how they are attached."""
        facts = {name: self.helpers.seen(each) for name, each in self._monitor.facts.items()}
        for name, interface in self.attached.items():
            if name in facts:
                metadata = facts[name].ifindex not in self._no_metadata
                facts[name] = replace(
                    facts[name], mode=interface.mode, ingress=interface.ingress, metadata=metadata
                )
        return facts

    @property
    def rules(self) -> Mapping[str, RuleState]:
        """What became of the rules, by name: outputs whose socket cannot be opened are pending, too."""
        refused = {
            number: error.cause
            for interface in self.attached.values()
            for number, error in interface.refused.items()
        }
        if not refused:
            return self.desired.rules
        return {name: _with_refused(state, refused) for name, state in self.desired.rules.items()}

    def redirect_losses(self) -> dict[str, int]:
        """What devices did not take of the kernel path's packets, by egress interface."""
        names = {facts.ifindex: name for name, facts in self._monitor.facts.items()}
        devices = sorted(self.maps.egress_devices().items())
        return {names[ifindex]: lost for ifindex, (_, lost) in devices if ifindex in names}

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.membership.stop)
            await self.membership.find()
            stack.callback(self._unload)
            given_up = threading.Event()
            adopted = await in_thread(lambda: self._load(given_up), on_cancel=given_up.set)
            self.maps = stack.enter_context(Maps(self.instance))
            self.rule_maps = RuleMaps(self.maps)
            self.helpers = EgressHelpers(self.instance, self.maps.helper_fd, self.keep)
            for program in loader.TRACEPOINTS:
                fd = self.maps.tracepoint_fd(program)
                link = loader.trace_redirects(self.instance, program, fd, self.keep)
                stack.callback(os.close, link)
                if self.keep:
                    self._kept_links[loader.tracepoint_pin(program)] = link
            if adopted:
                rules, outputs = self._ids.rules.values(), self._ids.outputs.values()
                await settle_worker(self.maps, rules, outputs)  # the workers ended with their supervisor
            self.tap = Tap(self.instance, self.maps)
            stack.push_async_callback(self.tap.close)
            await self.membership.start(adopted)
            await stack.enter_async_context(self._monitor)
            self.helpers.adopt(self._monitor.facts)
            stack.push_async_callback(self._stop)
            await self._start_config()
            if adopted:
                await self._drop_unwanted()
            self._mends = True
            self._start_loops()
            self._stack = stack.pop_all()
        gc.freeze()  # what a start makes stays: looking through it held the loop for 50 ms with 2,000 rules
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leaves nothing: interfaces detached, workers drained, groups left, pins gone.

        With on_exit="keep" the kernel path and the joins stay as they are.
        """
        await self._stack.aclose()

    def _load(self, given_up: threading.Event) -> bool:
        """Loads the BPF side, or adopts what was left forwarding. Returns whether it adopted."""
        if keep.is_forwarding(self.instance) and not self._replace_kept:
            keep.check_layout(self.instance)
            self._ids = keep.load_ids(self.instance)
            log.info("adopting the kernel path that is forwarding")
            self._has_pins = True
            return True
        loader.load(self.instance, given_up)
        self._has_pins = True
        return False

    def _unload(self) -> None:
        if self._has_pins and not self.keep:
            loader.unload(self.instance)
            keep.forget(self.instance)

    async def _drop_unwanted(self) -> None:
        """Takes away what the earlier supervisor had and this one does not want."""
        in_place = [rule for interface in self.attached.values() for rule in interface.map_rules]
        await self.rule_maps.drop_left({rule.key for rule in in_place})
        attached = {self.facts[name].ifindex for name in self.attached if name in self.facts}
        loader.drop_links(self.instance, but=attached)

    async def _start_config(self) -> None:
        """What is asked for and cannot be done yet is logged and waits; a wrong configuration ends the start.

        Saved rules that do not go together with the files are set aside.
        """
        _take_config(self.state, load_config(self.config_paths))
        await self._provide_helpers(self.state)
        self._check(self.state)
        saved = self.state.copy()
        saved.runtime_rules = load_rules(self.instance)
        try:
            self._check(saved)
            self.state = saved
        except McrError as error:
            set_aside(self.instance, str(error))
        async with self._turn:
            await self._apply(self.state, quietly=True)

    async def _stop(self) -> None:
        """A change that is under way is finished first, so that what is kept is whole; one that hangs is not
        waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(scaled(CHANGE_TIMEOUT_S)), self._turn:
                await self._background.stop()
        await self._background.stop()
        async with self._turn:
            stops = (each.leave() if self.keep else each.stop() for each in self.attached.values())
            for outcome in await asyncio.gather(*stops, return_exceptions=True):
                with surviving(log, "an interface could not be detached"):
                    if isinstance(outcome, BaseException):
                        raise outcome
            self.attached.clear()
            self.helpers.close()
            if not self.keep:
                await self.vlans.withdraw({}, await asyncio.to_thread(read_interfaces))

    # --- commands

    async def attach(self, attachment: Attachment) -> AttachedInterface:
        """Attaches an interface until it is detached or the supervisor ends."""

        def edit(new: DesiredState) -> None:
            if attachment.interface not in self._monitor.facts:
                raise _no_interface(attachment.interface)
            if attachment.interface in new.attachments:
                raise McrError(
                    f"{attachment.interface} is attached already", f"first: mcr detach {attachment.interface}"
                )
            new.runtime_attachments[attachment.interface] = attachment

        await self._change(edit)
        return self.attached[attachment.interface]

    async def detach(self, interface: str) -> None:
        def edit(new: DesiredState) -> None:
            if interface in new.file_attachments:
                raise McrError(
                    f"{interface} is attached by {new.file_attachments[interface].origin}",
                    "remove it there, then: mcr reload",
                )
            if new.runtime_attachments.pop(interface, None) is None:
                raise McrError(f"{interface} is not attached", "see what is: mcr status")

        await self._change(edit)

    async def add_rule(self, rule: Rule) -> RuleState:
        """Adds a rule; its name must be new, its interfaces must exist."""

        def edit(new: DesiredState) -> None:
            for interface in (rule.stream.interface, *(output.interface for output in rule.outputs)):
                if interface and interface not in self._monitor.facts:
                    raise _no_interface(interface)
            if rule.name in new.rules:
                raise McrError(f"there is a rule {rule.name!r} already", f"first: mcr rule del {rule.name}")
            new.runtime_rules[rule.name] = rule

        await self._change(edit)
        return self.desired.rules[rule.name]

    async def delete_rules(self, names: Sequence[str]) -> None:
        """Deletes all of the rules, or none if one of them cannot be."""

        def edit(new: DesiredState) -> None:
            for name in names:
                if name in new.file_rules:
                    raise McrError(
                        f"rule {name!r} comes from {new.file_rules[name].origin}",
                        "remove it there, then: mcr reload",
                    )
                if new.runtime_rules.pop(name, None) is None:
                    raise McrError(f"there is no rule {name!r}", "see which there are: mcr rule show")

        await self._change(edit)

    async def reload(self) -> None:
        """Reads the files again and applies the difference; a wrong file changes nothing."""
        with self.reloads.counted():
            async with self._turn:  # of two at once, the later one reads the later files
                config = await asyncio.to_thread(load_config, self.config_paths)
                await self._change_in_turn(lambda new: _take_config(new, config))

    # --- desired to actual

    def _check(self, state: DesiredState) -> None:
        """Raises McrError. A rule that waits because its interfaces have changed hinders no other change."""
        faults, facts = Faults(), self._facts_of(state)
        faults.found += _faults_together(state)
        for rule in state.rules.values():
            try:
                self._realiser.plan(rule, facts)
            except McrError as error:
                if not self._waits(rule):
                    faults.found.append(error)
        faults.check()

    def _waits(self, rule: Rule) -> bool:
        """Whether it is in place and cannot be carried by the interfaces as they are."""
        known = self.desired.rules.get(rule.name)
        if known is None or not known.pending or known.rule != rule:
            return False
        try:
            self._realiser.plan(rule, self.facts)
        except McrError:
            return True
        return False

    def _facts_of(self, state: DesiredState) -> Mapping[str, InterfaceFacts]:
        """The interfaces as they are now, attached as state asks for; what `auto` will get is not known."""
        facts = dict(self.facts)
        for name in facts:
            attached, attachment = self.attached.get(name), state.attachments.get(name)
            if attached is None or attached.attachment != attachment:
                generic = attachment is not None and attachment.mode == "generic"
                packet = attachment is not None and attachment.ingress == "packet"
                facts[name] = replace(
                    facts[name], mode="generic" if generic else "", ingress="packet" if packet else ""
                )
        return facts

    async def _change(self, edit: Callable[[DesiredState], None]) -> None:
        async with self._turn:
            await self._change_in_turn(edit)

    async def _change_in_turn(self, edit: Callable[[DesiredState], None]) -> None:
        """All of what edit makes of the state, or the old state again if something in that cannot be done.

        The ids are then those of before too, so that going back touches nothing that was to stay as it is.
        """
        old, new, ids = self.state, self.state.copy(), self._ids
        edit(new)
        try:
            await self._provide_helpers(new)
            await asyncio.to_thread(self._check, new)
        except BaseException:
            await self._withdraw_helpers(old)
            raise
        saves = _lasting(new) != _lasting(old)
        if saves:  # first, because it is what a full disk refuses
            await asyncio.to_thread(stage_rules, self.instance, _lasting(new).values())
        try:
            await self._apply(new)
            if saves:
                await asyncio.to_thread(put_rules, self.instance)
        except BaseException:
            drop_staged(self.instance)
            self._ids = ids
            await self._apply(old, quietly=True)
            raise

    async def _apply(self, state: DesiredState, quietly: bool = False) -> None:
        """Puts a state in place. quietly: what cannot be done is logged and waits instead of raising."""
        self.state = state
        await self._mend(quietly)
        rules = list(state.rules.values())
        before = lookups_needed([each.rule.stream for each in self.desired.rules.values()])
        needed = lookups_needed([rule.stream for rule in rules])
        await self._assign_ids(rules, quietly)
        self.helpers.release(_with_xdp(state))
        await self._attach_interfaces(state, quietly)
        await self._provide_helpers(state)
        vlans = vlans_needed(rules, state.attachments, self._monitor.facts)
        await self.vlans.provide(vlans, self._monitor.facts)
        self.desired = await asyncio.to_thread(
            self._realiser.realise, rules, state.attachments, self.facts, self._ids
        )
        self.maps.set_lookups(before | needed)
        for name, interface in self.attached.items():
            with _logging_errors(name, quietly):
                await interface.put(self.desired.interfaces[name])
        self.maps.set_lookups(needed)
        await self._withdraw_helpers(state)
        await self.vlans.withdraw(vlans, self._monitor.facts)
        await self.membership.set(self.desired.memberships)

    async def _provide_helpers(self, state: DesiredState) -> None:
        await self.helpers.provide(await self._helpers_needed(state), self._monitor.facts)

    async def _withdraw_helpers(self, state: DesiredState) -> None:
        self.helpers.withdraw(await self._helpers_needed(state), self._monitor.facts)

    async def _helpers_needed(self, state: DesiredState) -> frozenset[str]:
        return await asyncio.to_thread(needs_helper, list(state.rules.values()), _with_xdp(state), self.facts)

    async def _assign_ids(self, rules: Sequence[Rule], quietly: bool) -> None:
        before, assigned = self._ids, self._ids.assign(rules)
        self._ids = assigned.ids
        self.rule_maps.resting.forget(assigned.new_rules, assigned.new_outputs)
        for clear, numbers in (
            (self.maps.clear_rule, assigned.new_rules),
            (self.maps.clear_output, assigned.new_outputs),
        ):
            for count, number in enumerate(numbers, 1):
                clear(number)
                if count % IDS_AT_ONCE == 0:
                    await asyncio.sleep(0)
        if self.keep and not self._ids.equal(before):
            with _logging_errors(keep.ids_path(self.instance).name, quietly):
                keep.save_ids(self.instance, self._ids)

    async def _attach_interfaces(self, state: DesiredState, quietly: bool) -> None:
        for name, interface in list(self.attached.items()):
            if state.attachments.get(name) != interface.attachment:
                await interface.stop()
                self._bases.give(interface.xsk_base // MAX_QUEUES + 1)
                for seat in interface.seats:
                    self._slots.give(seat.slot + 1)
                del self.attached[name]
        facts = self._monitor.facts
        for name, interface in self.attached.items():
            await interface.release(facts.get(name))
        for name, attachment in state.attachments.items():
            if name not in self.attached:
                self.attached[name] = self._new_interface(attachment)
            with _logging_errors(name, quietly):
                await self.attached[name].prepare(facts.get(name))

    def _new_interface(self, attachment: Attachment) -> AttachedInterface:
        slots = [self._slots.take() - 1 for _ in range(attachment.workers)]
        for slot in slots:
            self.maps.clear_worker(slot)
        xsk_base = (self._bases.take() - 1) * MAX_QUEUES
        return AttachedInterface(
            self.instance, attachment, self.maps, slots, xsk_base, self.keep, self.rule_maps
        )

    # --- by itself

    def _start_loops(self) -> None:
        for turn, interval_s, name, what in (
            (self._retry, RETRY_INTERVAL_S, "mcr-retry", "trying again what is pending"),
            (self._watch_queues, QUEUES_INTERVAL_S, "mcr-queues", "looking at the receive queues"),
            (self._settle, SETTLE_INTERVAL_S, "mcr-settle", "settling what was lost"),
            (self._watch_drift, DRIFT_INTERVAL_S, "mcr-drift", "looking for drift"),
            (self._follow_links, 0, "mcr-links", "following the links"),
        ):
            self._background.start(partial(every, interval_s, turn, log, what), name)

    def _links_changed(self, _: dict[str, InterfaceFacts]) -> None:
        self._links_moved.set()

    async def _follow_links(self) -> None:
        """However many changes came during the last turn, one follows."""
        await self._links_moved.wait()
        self._links_moved.clear()
        log.debug("the links have changed")
        await self._apply_again()

    async def _apply_again(self) -> None:
        async with self._turn:
            await self._apply(self.state, quietly=True)

    async def _retry(self) -> None:
        """Tries again what could not be attached or opened: what was in its way may have gone without an
        event."""
        facts = self._monitor.facts
        if any(each.name in facts and (each.pending or each.refused) for each in self.attached.values()):
            await self._apply_again()

    async def _settle(self) -> None:
        """Settles what nobody saw getting lost, once its rules and outputs are at rest."""
        await self.rule_maps.resting.settle()

    async def _watch_drift(self) -> None:
        async with self._turn:
            await self._mend(quietly=True)
            await self._mend_sockets()

    async def _mend(self, quietly: bool) -> None:
        """Puts right what somebody else has changed of what is in place."""
        if not self._mends:
            return
        pinned = await asyncio.to_thread(self.maps.pin_again, self._kept_links)
        self.drifts.note("pins", [f"the pin of {name} had been removed: pinned again" for name in pinned])
        for name, interface in self.attached.items():
            with _logging_errors(name, quietly):
                self.drifts.note("link", await interface.mend_link())
        places = [interface.place for interface in self.attached.values()]
        for kind, found in (await self.rule_maps.mend(places)).items():
            self.drifts.note(kind, found)
        if not self.maps.has_settings():
            self.maps.restore_settings()
            self.drifts.note("settings", ["the map settings was changed: put back"])
        await self._mend_joins()

    async def _mend_joins(self) -> None:
        present = await asyncio.to_thread(procfs.joined_groups)
        if present is None:
            return
        held = self.desired.memberships - {failure.membership for failure in self.membership.failures}
        lost = frozenset(each for each in held if (each.ifindex, each.group) not in present)
        if lost:
            await self.membership.join_again(lost)
            words = "the kernel had lost the join of {} on interface {}: joined again"
            self.drifts.note("joins", [words.format(each.group, each.ifindex) for each in sorted(lost)])

    async def _mend_sockets(self) -> None:
        """The map of AF_XDP sockets cannot be read back: packets that find none, though the same workers are
        there at each look, show that an entry has gone."""
        unserved = {}
        for name, interface in self.attached.items():
            workers = interface.steady_workers
            drops = self.maps.no_worker_drops([rule.rule_id for rule in interface.map_rules])
            before = self._unserved.get(name)
            looks = 0
            if workers is not None and before is not None and before[0] == workers and drops > before[1]:
                looks = before[2] + 1
            if looks == 2:
                await interface.replace_workers()
                self.drifts.note("sockets", [f"{name}: packets found no AF_XDP socket: workers replaced"])
                looks = 0
            unserved[name] = workers, drops, looks
        self._unserved = unserved

    async def _watch_queues(self) -> None:
        for interface in list(self.attached.values()):
            if await interface.has_other_queues():
                await self._apply_again()
        if (without := self.maps.no_metadata()) != self._no_metadata:
            self._no_metadata = without
            await self._apply_again()


def _take_config(state: DesiredState, config: Config) -> None:
    """A rule that the files still have, at the same place, stays the same object: comparing it is quick."""
    before = state.file_rules
    state.file_rules = {rule.name: _same(before.get(rule.name), rule) for rule in config.rules}
    state.file_attachments = {attachment.interface: attachment for attachment in config.attachments}


def _same(old: Rule | None, new: Rule) -> Rule:
    return old if old is not None and old == new and old.origin == new.origin else new


def _faults_together(state: DesiredState) -> Iterator[McrError]:
    """What of it cannot be in one instance."""
    for name in sorted(state.file_rules.keys() & state.runtime_rules.keys()):
        yield McrError(
            f"there is a rule {name!r} from a command already",
            f"first: mcr rule del {name}",
            str(state.file_rules[name].origin or ""),
        )
    yield from rule_faults(list(state.rules.values()))
    if len(state.attachments) > MAX_INTERFACES:
        yield McrError(f"more than {MAX_INTERFACES} interfaces", "share them out among several instances")
    if sum(attachment.workers for attachment in state.attachments.values()) > MAX_WORKERS:
        yield McrError(
            f"more than {MAX_WORKERS} workers", "choose fewer, or share them out among several instances"
        )


def _with_xdp(state: DesiredState) -> frozenset[str]:
    """The interfaces where MCR's own program runs, or shall."""
    return frozenset(name for name, each in state.attachments.items() if each.ingress != "packet")


def _lasting(state: DesiredState) -> dict[str, Rule]:
    """The rules from commands that outlive the supervisor."""
    return {name: rule for name, rule in state.runtime_rules.items() if not rule.temporary}


def _logging_errors(interface: str, quietly: bool) -> AbstractContextManager[None]:
    """quietly: an error is logged instead of raised."""
    if not quietly:
        return contextlib.nullcontext()
    return surviving(logging.LoggerAdapter(log, {"interface": interface}), interface)


def _with_refused(state: RuleState, refused: Mapping[int, str]) -> RuleState:
    outputs = tuple(
        replace(output, pending=output.pending or refused.get(output.output_id, ""))
        for output in state.outputs
    )
    return replace(state, outputs=outputs) if outputs != state.outputs else state


def _no_interface(interface: str) -> McrError:
    return McrError(f"there is no interface {interface}", "see which there are: ip link")
