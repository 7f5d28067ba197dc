"""One instance's rules in the maps of the XDP program, and the switch from those in place to others.

A rule of the kernel path with one output goes to its egress interface's slot in `devices`; one with several
goes through a fan-out, to a device map that all fan-outs by the same interfaces share. The kernel runs on all
frames of a bulk the egress program that the first one asked for: so the slot of an interface asks for it too
for as long as some fan-out leaves there. A rule of one output never learns of that.

The work is done in a thread, because some writes wait until the kernel is through with the packets in hand.
This module must never decide what a rule is; `desired.py` does.
"""

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import ParamSpec

from mcr._bpf import ffi, lib
from mcr.accounting import ASKED_ROUNDS, Resting
from mcr.desired import IdPool, KernelOutputSpec, RuleSpec
from mcr.drift import Kind
from mcr.errors import McrError
from mcr.maps import MAX_EGRESS, MAX_FAN_OUTS, Maps
from mcr.switch import plan_switch

P = ParamSpec("P")
Pairs = tuple[tuple[int, int], ...]
"""The output_id and ifindex of each output of a fan-out: what it is known by."""

DPORT = slice(ffi.offsetof("struct mcr_rule_key", "dport"), ffi.offsetof("struct mcr_rule_key", "dport") + 2)
SADDR = slice(ffi.offsetof("struct mcr_rule_key", "saddr"), ffi.offsetof("struct mcr_rule_key", "saddr") + 16)


def precedence(key: bytes) -> int:
    """The place of a `struct mcr_rule_key` in the order of lookups (find_rule in relay_kern.c)."""
    return 2 * (not any(key[DPORT])) + (not any(key[SADDR]))


def _pairs(rule: RuleSpec) -> Pairs:
    return tuple(sorted((output.output_id, output.ifindex) for output in rule.kernel_outputs))


def _used(rules: Iterable[RuleSpec]) -> set[Pairs]:
    return {_pairs(rule) for rule in rules if rule.fan_out}


def _interfaces(pairs: Pairs) -> tuple[int, ...]:
    return tuple(sorted(ifindex for _, ifindex in pairs))


@dataclass(frozen=True, slots=True)
class FanOut:
    """number: in the maps. device_set: the number of its device map."""

    number: int
    device_set: int


class RuleMaps:
    """What is in the maps for the rules. `resting`: the outputs of retired fan-outs."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self.resting = Resting(maps)
        self._turn = threading.Lock()  # held in the thread, which outlives a task that is cancelled
        self._numbers = IdPool(MAX_FAN_OUTS, "fan-out")
        self._set_numbers = IdPool(MAX_FAN_OUTS, "device map")
        self._fan_outs: dict[Pairs, FanOut] = {}
        self._users: dict[bytes, Pairs] = {}  # by key, of all interfaces: a rule moves with its fan-out
        self._sets: dict[tuple[int, ...], int] = {}  # the device maps, by their interfaces
        self._bulks = {ifindex: bulk for ifindex, (bulk, _) in maps.egress_devices().items()}
        self._asking = {ifindex for ifindex, bulk in self._bulks.items() if maps.device_program(bulk)}
        self._left = self._adopt()

    def _adopt(self) -> set[Pairs]:
        """The fan-outs that an earlier supervisor left: a rule that is wanted as it was keeps its own."""
        for rule in self._maps.rules().values():
            if rule["fan_out"]:
                pairs = self._maps.fan_out(rule["fan_out"])
                self._fan_outs[pairs] = FanOut(rule["fan_out"], rule["device_set"])
                self._sets[_interfaces(pairs)] = rule["device_set"]
        for fan_out in self._fan_outs.values():
            self._numbers.reserve(fan_out.number)
        for number in self._sets.values():
            self._set_numbers.reserve(number)
        return set(self._fan_outs)

    async def switch(
        self, in_place: MutableMapping[bytes, RuleSpec], wanted: Iterable[RuleSpec], xsk_base: int
    ) -> None:
        """Makes an interface's rules, by key, what is wanted, and in_place with them.

        Everything that a rule needs is in place before the one update that makes it count, and goes after
        the last packet that needed it.
        """
        rules = {rule.key: rule for rule in wanted}
        self.resting.watch(await asyncio.to_thread(self._in_turn, self._switch, in_place, rules, xsk_base))

    async def drop_left(self, wanted: Collection[bytes]) -> None:
        """Takes away what an earlier supervisor left, once what is wanted, by key, has been put in place."""
        self.resting.watch(await asyncio.to_thread(self._in_turn, self._drop_left, wanted))

    async def mend(self, places: Iterable[tuple[Mapping[bytes, RuleSpec], int]]) -> dict[Kind, list[str]]:
        """Puts right what somebody else has changed in the maps. places: the rules in place, by key, and the
        xsk_base of each interface. Returns what was found, by kind."""
        return await asyncio.to_thread(self._mend_in_turn, list(places))

    def watch(self) -> None:
        """The outputs of all fan-outs shall be settled if they are at rest soon."""
        for pairs in tuple(self._fan_outs):
            self.resting.watch((output_id for output_id, _ in pairs), ASKED_ROUNDS)

    # --- in the thread

    def _in_turn(self, work: Callable[P, list[int]], *args: P.args, **kwargs: P.kwargs) -> list[int]:
        with self._turn:
            return work(*args, **kwargs)

    def _mend_in_turn(self, places: list[tuple[Mapping[bytes, RuleSpec], int]]) -> dict[Kind, list[str]]:
        with self._turn:
            wanted = {key: self._fields(rule, base) for rules, base in places for key, rule in rules.items()}
            outputs = {
                output for rules, _ in places for rule in rules.values() for output in rule.kernel_outputs
            }
            return {
                "devices": list(self._mend_devices()),
                "outputs": list(self._mend_outputs(outputs)),
                "rules": list(self._mend_rules(wanted)),
            }

    def _mend_rules(self, wanted: dict[bytes, dict[str, int]]) -> Iterator[str]:
        found = self._maps.rules()
        for fields in found.values():
            del fields["partial_seen"]  # written by XDP
        for key, put in plan_switch(found, wanted, precedence):
            if put is None:
                self._maps.delete_rule(ffi.from_buffer(key))
                yield f"the map rules had an entry more, of rule_id {found[key]['rule_id']}: deleted"
            else:
                self._maps.set_rule(ffi.from_buffer(key), put)
                state = "was changed in" if key in found else "had gone from"
                yield f"the entry of rule_id {put['rule_id']} {state} the map rules: put back"

    def _mend_outputs(self, outputs: Iterable[KernelOutputSpec]) -> Iterator[str]:
        for output in outputs:
            fields = {**output.fields(), "bulk": self._bulk(output.ifindex)}
            if not self._maps.has_kernel_output(output.output_id, fields):
                self._maps.set_kernel_output(output.output_id, fields)
                yield f"output_id {output.output_id} was changed in the map kernel_outputs: put back"

    def _mend_devices(self) -> Iterator[str]:
        present = {ifindex for ifindex, _ in socket.if_nameindex()}
        for ifindex, bulk in self._bulks.items():
            asks = ifindex in self._asking
            program = self._maps.device_program(bulk)
            if ifindex in present and (program is None or bool(program) != asks):
                self._maps.set_device(bulk, ifindex, asks=asks)
                yield f"interface {ifindex} was changed in the map devices: put back"
        lost = {number: each for each, number in self._sets.items() if not self._maps.has_device_set(number)}
        if lost:
            self._maps.put_device_sets(lost)
            yield f"{len(lost)} device maps had gone from the map device_sets: put back"
        for pairs, fan_out in self._fan_outs.items():
            if self._maps.outputs_of(fan_out.number) != sorted(output_id for output_id, _ in pairs):
                self._maps.restore_fan_out(fan_out.number, pairs)
                yield f"fan-out {fan_out.number} was changed in the map fan_out_outputs: put back"

    def _switch(
        self, in_place: MutableMapping[bytes, RuleSpec], wanted: dict[bytes, RuleSpec], xsk_base: int
    ) -> list[int]:
        """Returns the outputs of the fan-outs that were retired."""
        steps = plan_switch(in_place, wanted, precedence)
        self._fill_devices()
        known = {output for rule in in_place.values() for output in rule.kernel_outputs}
        before = _used(in_place.values())
        needed = _used(wanted.values())
        try:
            for _, rule in steps:
                for output in rule.kernel_outputs if rule is not None else ():
                    if output not in known:
                        self._set_output(output)
            self._add_fan_outs(sorted(needed - self._fan_outs.keys()))
            for key, rule in steps:
                if rule is None:
                    self._maps.delete_rule(ffi.from_buffer(key))
                    self._users.pop(key, None)
                    del in_place[key]
                else:
                    self._maps.set_rule(ffi.from_buffer(key), self._fields(rule, xsk_base))
                    self._users.pop(key, None)
                    if rule.fan_out:
                        self._users[key] = _pairs(rule)
                    in_place[key] = rule
            self._left -= needed
        finally:
            concerned = (before | needed) & self._fan_outs.keys()
            retired = self._retire(concerned - self._left - set(self._users.values()))
        return retired

    def _drop_left(self, wanted: Collection[bytes]) -> list[int]:
        keys = dict.fromkeys(self._maps.rules(), True)
        for key, _ in plan_switch(keys, {key: True for key in keys if key in wanted}, precedence):
            self._maps.delete_rule(ffi.from_buffer(key))
        left, self._left = self._left, set()
        return self._retire(left)

    def _fields(self, rule: RuleSpec, xsk_base: int) -> dict[str, int]:
        """Of its `struct mcr_rule_value`."""
        outputs = rule.kernel_outputs
        fan_out = self._fan_outs[_pairs(rule)] if rule.fan_out else FanOut(0, 0)
        return {
            "rule_id": rule.rule_id,
            "xsk_base": xsk_base,
            "frame_limit": rule.frame_limit,
            "flags": (lib.MCR_RULE_KERNEL if rule.kernel else 0)
            | (lib.MCR_RULE_GENERIC if rule.generic else 0),
            "output_id": outputs[0].output_id if len(outputs) == 1 else 0,
            "smallest_mtu": min((output.mtu for output in outputs), default=0),
            "fan_out": fan_out.number,
            "device_set": fan_out.device_set,
        }

    def _add_fan_outs(self, wanted: list[Pairs]) -> None:
        """The slots of their interfaces ask for the egress program first: writing a device map then waits for
        the last packet that had not asked, before the first clone goes."""
        new_sets = {_interfaces(pairs) for pairs in wanted} - self._sets.keys()
        for ifindex in sorted({ifindex for each in new_sets for ifindex in each} - self._asking):
            self._maps.set_device(self._bulk(ifindex), ifindex, asks=True)
            self._asking.add(ifindex)
        numbers = {interfaces: self._set_numbers.take() for interfaces in sorted(new_sets)}
        self._sets |= numbers
        self._maps.put_device_sets({number: interfaces for interfaces, number in numbers.items()})
        for pairs in wanted:
            fan_out = FanOut(self._numbers.take(), self._sets[_interfaces(pairs)])
            self._fan_outs[pairs] = fan_out
            self._maps.put_fan_out(fan_out.number, pairs)

    def _retire(self, unused: Collection[Pairs]) -> list[int]:
        """Takes away fan-outs that no rule names any more. Returns their outputs."""
        gone = {pairs: self._fan_outs.pop(pairs) for pairs in unused}
        users = Counter(_interfaces(pairs) for pairs in self._fan_outs)
        idle = {interfaces: self._sets.pop(interfaces) for interfaces in set(self._sets) - users.keys()}
        if not gone and not idle:
            return []
        self._maps.put_device_sets(dict.fromkeys(idle.values(), ()) or {0: ()})  # waits for the last packet
        for number in idle.values():
            self._set_numbers.give(number)
        for fan_out in gone.values():
            self._maps.retire_fan_out(fan_out.number)
            self._numbers.give(fan_out.number)
        still = {ifindex for interfaces in self._sets for ifindex in interfaces}
        for ifindex in self._asking - still:
            self._maps.set_device(self._bulks[ifindex], ifindex, asks=False)
        self._asking &= still
        return [output_id for pairs in gone for output_id, _ in pairs]

    # --- egress interfaces

    def _set_output(self, output: KernelOutputSpec) -> None:
        fields: dict[str, int | bytes] = {**output.fields(), "bulk": self._bulk(output.ifindex)}
        self._maps.set_kernel_output(output.output_id, fields)

    def _bulk(self, ifindex: int) -> int:
        """The interface's own number, with its slot in `devices`."""
        if ifindex in self._bulks:
            return self._bulks[ifindex]
        if len(self._bulks) == MAX_EGRESS - 1:
            self._forget_gone()
        used = set(self._bulks.values())
        free = next((bulk for bulk in range(1, MAX_EGRESS) if bulk not in used), 0)
        if not free:
            raise McrError(
                f"more than {MAX_EGRESS - 1} egress interfaces of the kernel path",
                "choose --path worker for some, or share them out among several instances",
            )
        self._maps.set_egress_device(ifindex, free)
        self._maps.set_device(free, ifindex, asks=False)
        self._bulks[ifindex] = free
        return free

    def _fill_devices(self) -> None:
        """The kernel empties the slot of an interface that goes; it may be back, with the same ifindex."""
        for ifindex, bulk in self._bulks.items():
            if self._maps.device_program(bulk) is None:
                self._maps.set_device(bulk, ifindex, asks=ifindex in self._asking)

    def _forget_gone(self) -> None:
        present = {ifindex for ifindex, _ in socket.if_nameindex()}
        for ifindex in self._bulks.keys() - present - self._asking:
            self._maps.delete_egress_device(ifindex)
            del self._bulks[ifindex]
