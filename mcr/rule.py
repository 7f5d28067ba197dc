"""Rules and every decision about them: whether they make sense, which path one takes, what has changed.

All of it takes values and returns values. This module must never do I/O nor look at the machine it runs on:
what it needs to know about interfaces comes in as `InterfaceFacts`.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, TypeAlias

from mcr.errors import MAX_ERRORS, Faults, McrError, raise_all
from mcr.stream import Address, Output, Stream

# enum mcr_limit of bpf/relay_abi.h, which is compared with this by a test.
MCR_MAX_RULES = 4096
MCR_MAX_OUTPUTS = 8192
MCR_MAX_OUTPUTS_PER_RULE = 64
MCR_MAX_INTERFACES = 64
MCR_MAX_WORKERS = 64
MCR_MAX_EGRESS_THREADS = 8

# enum netdev_xdp_act of linux/netdev.h
XDP_FEATURE_BASIC = 1
XDP_FEATURE_NDO_XMIT = 4
XDP_FEATURE_NDO_XMIT_SG = 64
# The largest MTU whose frames, with two VLAN tags, headroom and skb_shared_info, fit a page.
SINGLE_BUFFER_MTU = 3496
HELD = "held"  # of InterfaceFacts.helper
AGGREGATES = ("bond", "team")  # kinds of device whose XDP programs run in their members
# Drivers whose native mode `auto` leaves alone. This one has no metadata, and received nothing more after the
# link was set down and up (Linux 6.12 with AF_XDP, in QEMU).
FRAIL_NATIVE = ("vmxnet3",)

RulePath: TypeAlias = Literal["kernel", "worker"]
PathChoice: TypeAlias = Literal["auto", "kernel", "worker"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")


@dataclass(frozen=True, slots=True)
class Origin:
    """The place in a file that something came from; line counts from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One input stream and its outputs. Where a rule came from and how long it stays do not count in `==`."""

    name: str
    stream: Stream
    outputs: tuple[Output, ...]
    path: PathChoice = "auto"
    origin: Origin | None = field(default=None, compare=False)
    temporary: bool = field(default=False, compare=False)

    def __hash__(self) -> int:
        """Of the name alone: hashing all of it takes long, and rules that are together differ in name."""
        return hash(self.name)


@dataclass(frozen=True, slots=True)
class InterfaceFacts:
    """What planning needs to know about an interface.

    mtu: bytes. mac: as `02:00:00:00:00:01`, or empty.
    ipv4, ipv6, ipv6_link: the address to send from, of each kind the primary one; ipv6_link is the link-local
        one, ipv6 one of wider scope. None where there is none.
    xdp_features: bits of enum netdev_xdp_act (linux/netdev.h), None where the kernel does not tell.
    mode: how MCR's program is attached now, empty if it is not. ingress: "xsk" or "packet", empty if unknown.
    kind: of a device that is none of the hardware, as `ip -d link` names it: `veth`, `vlan`; else empty.
    helper: what became of an XDP program of MCR's that shall make it transmit redirected frames: "held", or
        why that does not help; empty if it was not tried.
    metadata: whether frames that come in by it can carry XDP metadata, as far as is known.
    parent, vlan: of a VLAN device, the index of the interface below and the tag; else 0. alias: as `ip link
        set alias` gives it, or empty.
    """

    name: str
    ifindex: int
    mtu: int
    up: bool
    ethernet: bool
    mac: str
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    ipv6_link: IPv6Address | None = None
    xdp_features: int | None = None
    mode: Literal["", "native", "generic"] = ""
    ingress: Literal["", "xsk", "packet"] = ""
    kind: str = ""
    helper: str = ""
    metadata: bool = True
    parent: int = 0
    vlan: int = 0
    alias: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The path of a rule's packets, and why that one."""

    path: RulePath
    reason: str


@dataclass(frozen=True, slots=True)
class Diff:
    """What makes new rules of old ones: removed holds the old rules, the others the new ones."""

    added: tuple[Rule, ...]
    changed: tuple[Rule, ...]
    removed: tuple[Rule, ...]
    unchanged: tuple[Rule, ...]


def diff(old: Mapping[str, Rule], new: Mapping[str, Rule]) -> Diff:
    """Compares two sets of rules, each by name. Each part of the answer keeps the order of its mapping."""
    return Diff(
        added=tuple(rule for name, rule in new.items() if name not in old),
        changed=tuple(rule for name, rule in new.items() if name in old and old[name] != rule),
        removed=tuple(rule for name, rule in old.items() if name not in new),
        unchanged=tuple(rule for name, rule in new.items() if name in old and old[name] == rule),
    )


def plan(rule: Rule, facts: Mapping[str, InterfaceFacts]) -> Plan:
    """The path of rule, given the facts of each interface by name.

    An interface that facts does not hold is not judged: its rule is pending until it appears. Raises McrError
    if the path that the rule asks for, or the only one that is left, cannot carry it.
    """
    against_kernel = list(dict.fromkeys(_reasons_against_kernel(rule, facts)))
    if rule.path == "kernel" and against_kernel:
        raise McrError(
            f"rule {rule.name!r} cannot take the kernel path: {'; '.join(against_kernel)}",
            'choose the path "auto" or "worker"',
            _where(rule),
        )
    if rule.path == "kernel":
        return Plan("kernel", "asked for")
    if rule.path == "auto":
        against_kernel += _reasons_for_worker(rule, facts)
    if rule.path == "auto" and not against_kernel:
        return Plan("kernel", "nothing stands against it")
    _check_worker_path(rule)
    return Plan("worker", "asked for" if rule.path == "worker" else against_kernel[0])


def _reasons_against_kernel(rule: Rule, facts: Mapping[str, InterfaceFacts]) -> Iterator[str]:
    for output in rule.outputs:
        if not output.group:
            yield f"output {output} is unicast where a group is needed"
    egress = [output.interface for output in rule.outputs if output.group]
    for interface in dict.fromkeys(egress):
        if egress.count(interface) > 1:
            yield f"{egress.count(interface)} outputs leave by {interface}"
    family = rule.stream.address.version
    for output in rule.outputs:
        if output.address.version != family:
            yield f"output {output} is IPv{output.address.version} but the input is IPv{family}"
        elif (
            output.group
            and output.source == "interface"
            and output.interface in facts
            and source_address(output, facts[output.interface]) is None
        ):
            yield f"{output.interface} has no IPv{family} address to send from"
    for interface in dict.fromkeys([rule.stream.interface, *egress]):
        if interface in facts and not facts[interface].ethernet:
            yield f"{interface} is not Ethernet"
    if rule.stream.interface in facts:
        ingress = facts[rule.stream.interface]
        yield from _reasons_of_ingress(rule, ingress)
        for interface in dict.fromkeys(egress):
            if interface in facts and ingress.mode != "generic":
                yield from _reasons_of_egress(ingress, facts[interface])


def _reasons_of_ingress(rule: Rule, ingress: InterfaceFacts) -> Iterator[str]:
    if ingress.ingress == "packet":
        yield f"{ingress.name} uses AF_PACKET, where no XDP program runs"
    if ingress.mode == "generic" and len(rule.outputs) > 1:
        yield f"{ingress.name} is attached in generic mode, where clones cannot be told apart"
    if not ingress.metadata and len(rule.outputs) > 1:
        yield f"the driver of {ingress.name} has no XDP metadata, by which clones are told apart"
    if ingress.mtu > SINGLE_BUFFER_MTU and len(rule.outputs) > 1:
        yield f"frames of {ingress.name}'s MTU {ingress.mtu} take several buffers, which cannot be cloned"


def _reasons_of_egress(ingress: InterfaceFacts, egress: InterfaceFacts) -> Iterator[str]:
    """A native redirect into a device that cannot transmit it is dropped without a word."""
    needed = XDP_FEATURE_NDO_XMIT
    if ingress.mtu > SINGLE_BUFFER_MTU:
        needed |= XDP_FEATURE_NDO_XMIT_SG
    if egress.xdp_features is None:
        yield f"the kernel, before 6.3, does not tell whether {egress.name} can transmit redirected frames"
    elif egress.xdp_features & needed != needed:
        yield f"{egress.name} cannot transmit redirected frames ({why_no_transmit(egress)})"


def why_no_transmit(egress: InterfaceFacts) -> str:
    """Why redirected frames, or those of several buffers, do not leave by an interface of known features."""
    features = egress.xdp_features or 0
    if features & XDP_FEATURE_NDO_XMIT:
        return "its driver takes none of several buffers, which the MTU of the input allows"
    if egress.kind == "veth":
        return "it is a veth whose peer has neither GRO nor XDP"
    if not features & XDP_FEATURE_BASIC:
        return "its driver has no XDP transmit"
    return egress.helper or "its driver needs an XDP program of its own for that"


def needs_helper(
    rules: Iterable[Rule], attached: Collection[str], facts: Mapping[str, InterfaceFacts]
) -> frozenset[str]:
    """The egress interfaces that may transmit redirected frames with an XDP program of their own, do not
    without, and are all that keeps some rule from the kernel path. attached: those that are, or shall be.

    A veth is not among them: what it transmits is up to its peer. Being down does not count, because
    attaching a program may take a link down for a moment.
    """
    able = {
        name: replace(each, up=True, xdp_features=XDP_FEATURE_NDO_XMIT | XDP_FEATURE_NDO_XMIT_SG)
        for name, each in facts.items()
        if name not in attached and _may_need_helper(each)
    }
    if not able:
        return frozenset()
    supposed = {**facts, **able}
    needed: set[str] = set()
    for rule in rules:
        egress = able.keys() & {output.interface for output in rule.outputs}
        ingress = facts.get(rule.stream.interface)
        if not egress <= needed and ingress and ingress.name in attached and ingress.mode != "generic":
            with suppress(McrError):
                if plan(rule, supposed).path == "kernel":
                    needed |= egress
    return frozenset(needed)


def _may_need_helper(egress: InterfaceFacts) -> bool:
    if egress.helper:
        return egress.helper == HELD
    features = egress.xdp_features or 0
    return egress.kind != "veth" and features & XDP_FEATURE_BASIC != 0 and not features & XDP_FEATURE_NDO_XMIT


def _reasons_for_worker(rule: Rule, facts: Mapping[str, InterfaceFacts]) -> Iterator[str]:
    """What the kernel path can carry, but only the worker path carries whole."""
    ingress = facts.get(rule.stream.interface)
    for output in rule.outputs:
        egress = facts.get(output.interface)
        if egress and not egress.up:
            yield f"{egress.name} is down, and only the worker path counts what that costs"
        if ingress and egress and egress.mtu < ingress.mtu:
            yield (
                f"{egress.name}'s MTU {egress.mtu} is smaller than {ingress.name}'s {ingress.mtu}, "
                "and only the worker path fragments"
            )


def source_address(output: Output, facts: InterfaceFacts) -> Address | None:
    """The address of an interface to send a group's packets from, None if it has none that fits.

    A group of link-local scope takes the link-local address first (RFC 6724 section 5, rule 2).
    """
    if isinstance(output.address, IPv4Address):
        return facts.ipv4
    link_scope = output.address.packed[1] & 0x0F == 2
    first, second = (facts.ipv6_link, facts.ipv6) if link_scope else (facts.ipv6, facts.ipv6_link)
    return first or second


def _check_worker_path(rule: Rule) -> None:
    for output in rule.outputs:
        if output.vlan:
            parent = output.interface or "eth1"
            raise McrError(
                f"rule {rule.name!r} takes the worker path, which cannot tag output {output}",
                f"remove vlan= and send through the VLAN interface, such as {parent}.{output.vlan}",
                _where(rule),
            )


def check_rule(rule: Rule) -> None:
    """Raises McrError unless the rule, taken alone, makes sense."""
    check_rule_name(rule.name, _where(rule))
    raise_all(_faults_alone(rule))


def _faults_alone(rule: Rule) -> Iterator[McrError]:
    if not 1 <= len(rule.outputs) <= MCR_MAX_OUTPUTS_PER_RULE:
        yield McrError(
            f"rule {rule.name!r} has {len(rule.outputs)} outputs",
            f"give it 1 to {MCR_MAX_OUTPUTS_PER_RULE} outputs",
            _where(rule),
        )
    seen: dict[tuple[object, ...], Output] = {}
    for output in rule.outputs:
        key = (output.address, _sent_port(rule, output), output.interface, output.source, output.vlan)
        if key in seen:
            yield McrError(
                f"rule {rule.name!r} has the output {output} twice"
                + (f" (first as {seen[key]})" if seen[key] != output else ""),
                "remove one of the two",
                _where(rule),
            )
        seen.setdefault(key, output)
        family = rule.stream.address.version
        if output.source == "preserve" and output.address.version != family:
            yield McrError(
                f"rule {rule.name!r}: output {output} cannot preserve an IPv{family} source",
                "use source=interface, or source= with an address of the output's family",
                _where(rule),
            )


def check_rule_name(name: str, where: str = "") -> None:
    """Raises McrError unless name is 1 to 64 of `A-Za-z0-9._:-`, the first a letter or a digit."""
    if not _NAME.fullmatch(name):
        shown = repr(name) if len(name) <= 64 else f"{name[:32]!r}..."
        raise McrError(
            f"{shown} cannot be the name of a rule",
            "use 1 to 64 letters, digits and . _ : - that start with a letter or a digit",
            where,
        )


def check_rules(rules: Sequence[Rule]) -> None:
    """Raises McrError unless the rules make sense together.

    Refused: whatever `check_rule` refuses, more rules or outputs than relay_abi.h has room for, two rules of
    one name or for one input, an output that is its own rule's input, and a loop among the rules. An error
    points to the rule at fault that comes last. Takes time in proportion to the number of rules and outputs.
    """
    raise_all(rule_faults(rules))


def rule_faults(rules: Sequence[Rule]) -> Iterator[McrError]:
    """What `check_rules` refuses, each by itself."""
    yield from _limit_faults(rules)
    names: dict[str, Rule] = {}
    inputs: dict[Stream, Rule] = {}
    on_their_own: list[Rule] = []
    for rule in rules:
        faults = Faults()
        with faults:
            check_rule(rule)
        yield from faults.found
        named, fed = names.setdefault(rule.name, rule), inputs.setdefault(rule.stream, rule)
        if named is not rule:
            yield McrError(
                f"there are two rules named {rule.name!r}{_first_at(named)}",
                "rename or remove one of them",
                _where(rule),
            )
        if fed is not rule and fed is not named:
            yield McrError(
                f"rules {fed.name!r} and {rule.name!r} have the same input {rule.stream}",
                "make them one rule with the outputs of both",
                _where(rule),
            )
        own = [*_own_input_faults(rule)]
        yield from own
        if not own:
            on_their_own.append(rule)
    yield from _loop_faults(on_their_own)


def _limit_faults(rules: Sequence[Rule]) -> Iterator[McrError]:
    if len(rules) > MCR_MAX_RULES - 1:
        yield McrError(
            f"there are {len(rules)} rules, more than {MCR_MAX_RULES - 1}",
            "share them out among several instances",
            _where(rules[MCR_MAX_RULES - 1]),
        )
    total = 0
    for rule in rules:
        total += len(rule.outputs)
        if total > MCR_MAX_OUTPUTS - 1:
            yield McrError(
                f"the rules have more than {MCR_MAX_OUTPUTS - 1} outputs",
                "share them out among several instances",
                _where(rule),
            )
            return


def _own_input_faults(rule: Rule) -> Iterator[McrError]:
    if _at(rule).isdisjoint(_leads_to(rule)):
        return
    for output in rule.outputs:
        if not _at(rule).isdisjoint(_output_places(rule, output)):
            yield McrError(
                f"rule {rule.name!r} sends to its own input: output {output} returns as {rule.stream}",
                "send it to another group, port or interface",
                _where(rule),
            )


# Which output can be which input is decided by places. An output leads to places, an input is found at
# places, and the output can become the input if they share one. An input is found at four of them (its port
# or "any" port, its source or "any" source), so that an output whose port or source is not known leads to one
# place instead of to every input, and the graph of a loop stays linear in the number of rules. None is `*` or
# no source, as in Stream.
_Any: TypeAlias = Literal["any"]
_Place: TypeAlias = tuple[int, int, str, int, int | _Any | None, int | _Any | None]


def _input_places(rule: Rule) -> Iterator[_Place]:
    stream = rule.stream
    if stream.vlan_outer:
        return
    interface = stream.interface if stream.group else ""
    source = int(stream.source) if stream.source is not None else None
    fixed = (stream.address.version, int(stream.address), interface, stream.vlan)
    yield (*fixed, stream.port, source)
    yield (*fixed, stream.port, "any")
    yield (*fixed, "any", source)
    yield (*fixed, "any", "any")


@lru_cache(MCR_MAX_RULES)
def _at(rule: Rule) -> frozenset[_Place]:
    return frozenset(_input_places(rule))


@lru_cache(MCR_MAX_RULES)
def _leads_to(rule: Rule) -> frozenset[_Place]:
    return frozenset(place for output in rule.outputs for place in _output_places(rule, output))


def _output_places(rule: Rule, output: Output) -> Iterator[_Place]:
    interface = output.interface if output.group else ""
    fixed = (output.address.version, int(output.address), interface, output.vlan)
    port = _sent_port(rule, output)
    source = _sent_source(rule, output)
    at_ports: tuple[int | _Any | None, ...] = ("any",) if port is None else (port, None)
    at_sources: tuple[int | _Any | None, ...] = ("any",) if source is None else (source, None)
    for at_port in at_ports:
        for at_source in at_sources:
            yield (*fixed, at_port, at_source)


def _sent_port(rule: Rule, output: Output) -> int | None:
    """The destination port of what output sends, None if the input takes any."""
    return output.port if output.port is not None else rule.stream.port


def _sent_source(rule: Rule, output: Output) -> int | None:
    """The source address of what output sends, None if it is not known: an interface's can be any."""
    if output.source == "interface":
        return None
    if output.source == "preserve":
        return int(rule.stream.source) if rule.stream.source is not None else None
    return int(output.source)


def _loop_faults(rules: Sequence[Rule]) -> Iterator[McrError]:
    """Each loop once: without its last rule, the next one is looked for."""
    remaining = list(rules)
    for _ in range(MAX_ERRORS):
        if not (cycle := _loop(remaining)):
            return
        yield _loop_error(remaining, cycle)
        del remaining[max(cycle)]


def _loop(rules: Sequence[Rule]) -> list[int]:
    """The indices of the rules of a loop, each once, in the order that a packet takes; empty without a loop.

    Most outputs lead to no input, and are left out of the graph.
    """
    inputs: set[_Place] = set().union(*map(_at, rules))
    graph: TopologicalSorter[int | _Place] = TopologicalSorter()
    reached: set[_Place] = set()
    for index, rule in enumerate(rules):
        for place in _leads_to(rule) & inputs:
            graph.add(place, index)
            reached.add(place)
    for index, rule in enumerate(rules):
        graph.add(index, *(_at(rule) & reached))
    try:
        graph.prepare()
    except CycleError as error:
        nodes: list[int | _Place] = error.args[1][1:]
        return [node for node in nodes if isinstance(node, int)]
    return []


def _loop_error(rules: Sequence[Rule], cycle: Sequence[int]) -> McrError:
    """cycle: as `_loop` gives it."""
    start = cycle.index(min(cycle))
    names = [repr(rules[index].name) for index in (*cycle[start:], *cycle[: start + 1])]
    return McrError(
        f"rules form a loop: {' -> '.join(names)}",
        "send one of their outputs to another group, port or interface",
        _where(rules[max(cycle)]),
    )


def _first_at(rule: Rule) -> str:
    return f" (the first is at {rule.origin})" if rule.origin else ""


def _where(rule: Rule) -> str:
    return str(rule.origin) if rule.origin else ""
