"""One instance's rules in the maps of the XDP program: the way each takes, and the switch to another.

A rule of the kernel path with one output goes directly, without an egress program; with several it goes
through a fan-out, whose egress program rewrites each clone. The kernel runs on all frames of a bulk the
egress program that the first one asked for, so that frames of both kinds must never meet: a rule whose one
output shares its interface with a fan-out goes through one too, and a change of way takes a step in between.
This module must never decide what a rule is; `desired.py` does.
"""

import asyncio
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from mcr._bpf import ffi, lib
from mcr.accounting import Resting
from mcr.desired import IdPool, KernelOutputSpec, RuleSpec
from mcr.maps import MAX_EGRESS, MAX_FAN_OUTS, Maps

RULES_AT_ONCE = 64  # before other work of the loop gets its turn


def _differs(old: RuleSpec | None, new: RuleSpec) -> bool:
    return old is not new and old != new


def _pairs(rule: RuleSpec) -> list[tuple[int, int]]:
    return [(output.output_id, output.ifindex) for output in rule.kernel_outputs]


def _directly(rule: RuleSpec | None) -> bool:
    return rule is not None and bool(rule.kernel_outputs) and not rule.fan_out


@dataclass(frozen=True, slots=True)
class FanOut:
    """number: in the maps. outputs: pairs of output_id and ifindex."""

    number: int
    outputs: list[tuple[int, int]]


class RuleMaps:
    """What is in the maps for the rules. `resting`: the outputs of retired fan-outs."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self.resting = Resting(maps)
        self._free = IdPool(MAX_FAN_OUTS)
        self._left = maps.fan_outs()
        for fan_out in self._left:
            self._free.reserve(fan_out)
        self._fan_outs: dict[int, FanOut] = {}  # by rule_id
        self._bulks = {ifindex: bulk for ifindex, (bulk, _) in maps.egress_devices().items()}

    async def switch(
        self, in_place: MutableMapping[int, RuleSpec], wanted: dict[int, RuleSpec], xsk_base: int
    ) -> None:
        """Makes an interface's rules, by id, what is wanted, and in_place with them.

        Frames that go directly are stopped, or step aside, before the first fan-out begins, and begin after
        the last one has ended. Between these each fan-out waits for what the kernel had begun.
        """
        for rule_id in in_place.keys() - wanted.keys():
            self.delete(in_place.pop(rule_id))
        changed = [rule for rule_id, rule in wanted.items() if _differs(in_place.get(rule_id), rule)]
        direct = [rule for rule in changed if _directly(rule)]
        others = sorted((rule for rule in changed if not _directly(rule)), key=lambda rule: rule.fan_out)
        for rule in others:
            before = in_place.get(rule.rule_id)
            if before is not None and rule.fan_out and _directly(before):
                self._put(before, before, xsk_base, step=True)
        for number, rule in enumerate(others, 1):
            self._put(rule, in_place.get(rule.rule_id), xsk_base)
            in_place[rule.rule_id] = rule
            if number % RULES_AT_ONCE == 0:
                await asyncio.sleep(0)
        for rule in direct:
            before = in_place.get(rule.rule_id)
            if before is not None and before.fan_out:
                self._put(rule, before, xsk_base, step=True)
                in_place[rule.rule_id] = rule
        for number, rule in enumerate(direct, 1):
            self._put(rule, in_place.get(rule.rule_id), xsk_base)
            in_place[rule.rule_id] = rule
            if number % RULES_AT_ONCE == 0:
                await asyncio.sleep(0)

    def delete(self, rule: RuleSpec) -> None:
        self._maps.delete_rule(ffi.from_buffer(rule.key))
        if rule.rule_id in self._fan_outs:
            self._retire(self._fan_outs.pop(rule.rule_id).number)

    def drop_left(self) -> None:
        """Retires what an earlier supervisor left, once its rules have been replaced or deleted."""
        for fan_out in self._left:
            self._retire(fan_out)
        self._left.clear()

    def watch(self) -> None:
        """The outputs of all fan-outs shall be settled as soon as they are at rest."""
        for fan_out in self._fan_outs.values():
            self.resting.watch(output_id for output_id, _ in fan_out.outputs)

    def _put(self, rule: RuleSpec, before: RuleSpec | None, xsk_base: int, step: bool = False) -> None:
        """Everything that the rule needs is in place before the one update that makes it count."""
        old_outputs = before.kernel_outputs if before is not None else ()
        for output in rule.kernel_outputs:
            if output not in old_outputs:
                self._set_output(output)
        old_fan_out = self._fan_outs.pop(rule.rule_id, None)
        outputs = rule.kernel_outputs
        fan_out = 0
        if rule.fan_out or step:
            self._fan_outs[rule.rule_id] = self._fan_out(_pairs(rule), old_fan_out)
            fan_out = self._fan_outs[rule.rule_id].number
        fields = {
            "rule_id": rule.rule_id,
            "xsk_base": xsk_base,
            "frame_limit": rule.frame_limit,
            "flags": (lib.MCR_RULE_KERNEL if rule.kernel else 0)
            | (lib.MCR_RULE_GENERIC if rule.generic else 0),
            "output_id": outputs[0].output_id if len(outputs) == 1 and (step or not rule.fan_out) else 0,
            "smallest_mtu": min((output.mtu for output in outputs), default=0),
            "fan_out": fan_out,
        }
        self._maps.set_rule(ffi.from_buffer(rule.key), fields)
        if before is not None and before.key != rule.key:
            self._maps.delete_rule(ffi.from_buffer(before.key))
        if old_fan_out is not None and old_fan_out.number != fan_out:
            self._retire(old_fan_out.number)

    def _fan_out(self, pairs: list[tuple[int, int]], old: "FanOut | None") -> "FanOut":
        if old is not None and old.outputs == pairs:
            return old
        fan_out = self._free.take()
        self._maps.create_fan_out(fan_out, pairs)
        return FanOut(fan_out, pairs)

    def _retire(self, fan_out: int) -> None:
        self.resting.watch(self._maps.retire_fan_out(fan_out))
        self._free.give(fan_out)

    def _set_output(self, output: KernelOutputSpec) -> None:
        fields: dict[str, int | bytes] = {**output.fields(), "bulk": self._bulk(output.ifindex)}
        self._maps.set_kernel_output(output.output_id, fields)

    def _bulk(self, ifindex: int) -> int:
        """The interface's own number; 0, which accounts for nothing, if there are none left."""
        if ifindex in self._bulks:
            return self._bulks[ifindex]
        if len(self._bulks) == MAX_EGRESS - 1:
            self._forget_gone()
        used = set(self._bulks.values())
        free = next((bulk for bulk in range(1, MAX_EGRESS) if bulk not in used), 0)
        if free:
            self._maps.set_egress_device(ifindex, free)
            self._bulks[ifindex] = free
        return free

    def _forget_gone(self) -> None:
        present = {ifindex for ifindex, _ in socket.if_nameindex()}
        for ifindex in self._bulks.keys() - present:
            self._maps.delete_egress_device(ifindex)
            del self._bulks[ifindex]
