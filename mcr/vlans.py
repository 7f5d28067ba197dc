"""Rules for tagged streams, and what a NIC does with VLAN tags: pure decisions.

Many NICs drop frames of a VLAN that nobody has registered (`rx-vlan-filter`), and many take the tag out of
the frame before XDP sees it (`rx-vlan-hw-parse`). The first is cured by a VLAN device, the second only by the
user, because it is a setting of the whole interface. This module must never do I/O.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from mcr.reasons import Problem
from mcr.rule import InterfaceFacts, Rule
from mcr.stream import Stream

FILTERS = "rx-vlan-filter"
TAKES_TAGS_OUT = "rx-vlan-hw-parse"


@dataclass(frozen=True, slots=True, order=True)
class Vlan:
    """A VLAN of an interface: the interface's index and the tag, of two the outer one."""

    ifindex: int
    tag: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of the tags of an interface. refused: the tags that could not be registered, and why."""

    offloads: Mapping[str, bool] = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)


def outer_tag(stream: Stream) -> int:
    return stream.vlan_outer or stream.vlan


def vlans_needed(
    rules: Iterable[Rule], attached: Collection[str], facts: Mapping[str, InterfaceFacts]
) -> dict[Vlan, str]:
    """The VLANs that rules take streams from, with the names of their interfaces."""
    needed: dict[Vlan, str] = {}
    for rule in rules:
        name = rule.stream.interface
        if rule.stream.vlan and name in attached and name in facts:
            needed[Vlan(facts[name].ifindex, outer_tag(rule.stream))] = name
    return needed


def devices(facts: Iterable[InterfaceFacts]) -> dict[Vlan, InterfaceFacts]:
    """The VLAN devices that there are, by what they are for; of several one that is up."""
    found = (each for each in facts if each.kind == "vlan" and each.vlan)
    ordered = sorted(found, key=lambda each: each.up)
    return {Vlan(each.parent, each.vlan): each for each in ordered}


def missing(
    needed: Mapping[Vlan, str], facts: Mapping[str, InterfaceFacts], filtering: Collection[str]
) -> list[Vlan]:
    """Those of the needed VLANs that have no device, on interfaces that filter."""
    present = devices(facts.values())
    return sorted(vlan for vlan, name in needed.items() if name in filtering and vlan not in present)


def tag_problem(stream: Stream, facts: InterfaceFacts, seen: Seen) -> Problem | None:
    """Why packets of a tagged stream do not come in with their tag, None if nothing is known against it."""
    name = stream.interface
    if not stream.vlan:
        return None
    if seen.offloads.get(TAKES_TAGS_OUT) and facts.kind != "veth" and facts.ingress != "packet":
        cause = f"{name} takes VLAN tags out before XDP sees them (rxvlan)"
        return Problem("input", cause, f"ethtool -K {name} rxvlan off, or attach with --ingress packet")
    tag = outer_tag(stream)
    if seen.offloads.get(FILTERS) and tag in seen.refused:
        cause = f"{name} drops the frames of VLAN {tag}, which could not be registered: {seen.refused[tag]}"
        return Problem("input", cause, f"ip link add link {name} name {name}.{tag} type vlan id {tag}")
    return None
