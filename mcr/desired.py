"""From desired state to what has to be where: pure functions from rules and interface facts to the specs of
maps, workers and memberships.

The supervisor compares these specs with what it last put in place and changes only what differs. This module
must never do I/O.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from ipaddress import IPv4Address
from itertools import cycle
from typing import Literal

from mcr._bpf import ffi, lib
from mcr.config import Attachment
from mcr.errors import McrError
from mcr.maps import MAX_OUTPUTS, MAX_RULES, address_bytes, rule_key
from mcr.membership import Membership
from mcr.rule import InterfaceFacts, Plan, Rule, plan, source_address
from mcr.stream import Address, Output
from mcr.vlans import Vlan, devices

ETHERNET_BYTES = 14
VLAN_TAG_BYTES = 4
IPV4_UDP_BYTES = 28
IPV6_UDP_BYTES = 48
LARGEST_PAYLOAD = 65487
# XDP_PACKET_HEADROOM and metadata, before every packet in a frame of an AF_XDP pool; AF_PACKET needs less.
FRAME_HEADROOM = 256 + int(ffi.sizeof("struct mcr_metadata"))
FRAME_COUNT = 8192
SMALL_FRAME, LARGE_FRAME = 2048, 4096
# AF_PACKET hands over super-packets: each of its frames holds the largest IP packet.
PACKET_FRAME, PACKET_FRAME_COUNT = int(lib.MCR_PACKET_FRAME), 512


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker is told once. A worker whose set-up changes is replaced.

    queue_first, queue_count: the receive queues that are its own; AF_PACKET knows only one.
    cpus: of the ingress thread, then of each egress thread; empty where the kernel may choose.
    """

    interface: str
    ifindex: int
    slot: int
    ingress: Literal["xsk", "packet"]
    zero_copy: Literal["auto", "on", "off"]
    busy_poll: bool
    verify_checksums: bool
    queue_first: int
    queue_count: int
    frame_size: int
    frame_count: int
    user_id: int
    group_id: int
    egress_threads: int = 0
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """An output as a worker has it. gso_limit: the largest payload in bytes that leaves unfragmented."""

    output_id: int
    output: Output
    ifindex: int
    gso_limit: int


@dataclass(frozen=True, slots=True)
class KernelOutputSpec:
    """An output as the kernel path has it: the fields of `struct mcr_kernel_output`, and its id."""

    output_id: int
    ifindex: int
    mtu: int
    flags: int
    dport: int
    vlan: int
    ttl: int
    dscp: int
    mac_destination: bytes
    mac_source: bytes
    saddr: bytes
    daddr: bytes

    def fields(self) -> dict[str, int | bytes]:
        """All of them but the id."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "output_id"}


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A rule as the rules map has it, and a worker if it takes the worker path.

    key: the bytes of its `struct mcr_rule_key`. output_ids: of the worker path. generic: XDP runs in generic
    mode where the packets come in.
    """

    rule_id: int
    key: bytes
    frame_limit: int
    output_ids: tuple[int, ...] = ()
    kernel: bool = False
    generic: bool = False
    kernel_outputs: tuple[KernelOutputSpec, ...] = ()

    @property
    def fan_out(self) -> bool:
        """Its packets are cloned: they go through a device map and the egress program."""
        return len(self.kernel_outputs) > 1


@dataclass(slots=True)
class InterfaceSpec:
    """Everything that belongs on one attached interface, by id."""

    outputs: dict[int, OutputSpec] = field(default_factory=dict)
    rules: dict[int, RuleSpec] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutputState:
    """What became of one output of a rule; an empty pending says that it is in use."""

    output: Output
    output_id: int
    pending: str = ""


@dataclass(frozen=True, slots=True)
class RuleState:
    """What became of a rule: its ids, its path and the reason for it, and why it waits, if it does."""

    rule: Rule
    rule_id: int
    path: str
    reason: str
    pending: str
    outputs: tuple[OutputState, ...]


class IdPool:
    """Numbers from 1 below a limit. The one that was freed the longest ago is given out first.

    what: they are numbers of, for an error.
    """

    def __init__(self, limit: int, what: str) -> None:
        self._limit, self._what = limit, what
        self._free = deque(range(1, limit))

    def __len__(self) -> int:
        return len(self._free)

    def copy(self) -> "IdPool":
        copy = IdPool(1, self._what)
        copy._limit, copy._free = self._limit, self._free.copy()
        return copy

    def take(self) -> int:
        """Raises McrError if all are in use."""
        if not self._free:
            raise McrError(
                f"no number for another {self._what} is left: all {self._limit - 1} are in use",
                "change fewer at once, or share them out among several instances",
            )
        return self._free.popleft()

    def give(self, number: int) -> None:
        self._free.append(number)

    def reserve(self, number: int) -> None:
        """Takes one that is known. Raises ValueError if it is not free."""
        self._free.remove(number)


@lru_cache(MAX_RULES)
def _output_keys(rule: Rule) -> tuple[tuple[str, str], ...]:
    """What the output_ids of a rule are found by."""
    return tuple((rule.name, str(output)) for output in rule.outputs)


@dataclass(slots=True)
class Ids:
    """rule_id and output_id of everything that is desired; what is unchanged keeps its ids.

    They follow names. A rule that is only renamed, with the same input and outputs, takes its ids along.
    """

    rules: dict[str, int] = field(default_factory=dict)
    outputs: dict[tuple[str, str], int] = field(default_factory=dict)
    _free_rules: IdPool = field(default_factory=lambda: IdPool(MAX_RULES, "rule"))
    _free_outputs: IdPool = field(default_factory=lambda: IdPool(MAX_OUTPUTS, "output"))
    _known: dict[str, Rule] = field(default_factory=dict)

    @classmethod
    def of(cls, rules: dict[str, int], outputs: dict[tuple[str, str], int]) -> "Ids":
        """Ids that were given out before. Raises ValueError if two are alike or one is out of range."""
        ids = cls(rules, outputs)
        for number in rules.values():
            ids._free_rules.reserve(number)
        for number in outputs.values():
            ids._free_outputs.reserve(number)
        return ids

    def equal(self, other: "Ids") -> bool:
        """Whether the same is known by the same ids."""
        return self.rules == other.rules and self.outputs == other.outputs

    def assign(self, rules: Iterable[Rule]) -> "Assigned":
        """Ids for exactly these rules and their outputs; these here stay as they are.

        An id that is given back can be taken by the next change, not by this one, whose packets may still
        be on their way by it. Only where no other is left, a changed output takes the place of one that its
        rule had before. Raises McrError if there are not enough.
        """
        wanted = {rule.name: rule for rule in rules}
        ids = Ids({}, {}, self._free_rules.copy(), self._free_outputs.copy(), wanted)
        before = self._names_before(wanted)
        new_rules, new_outputs = [], []
        for name, rule in wanted.items():
            old = before.get(name, name)
            number = self.rules.get(old)
            if number is None:
                number = ids._free_rules.take()
                new_rules.append(number)
            ids.rules[name] = number
            keys = [(old, text) for _, text in _output_keys(rule)]
            spare = self._unused_outputs(old, keys) if len(ids._free_outputs) < len(keys) else []
            for key, key_before in zip(_output_keys(rule), keys, strict=True):
                number = self.outputs.get(key_before)
                if number is None and spare:
                    number = spare.pop(0)
                elif number is None:
                    number = ids._free_outputs.take()
                    new_outputs.append(number)
                ids.outputs[key] = number
        _give_unused(ids._free_rules, self.rules.values(), ids.rules.values())
        _give_unused(ids._free_outputs, self.outputs.values(), ids.outputs.values())
        return Assigned(ids, new_rules, new_outputs)

    def _unused_outputs(self, name: str, keys: Collection[tuple[str, str]]) -> list[int]:
        rule = self._known.get(name)
        old = _output_keys(rule) if rule is not None else ()
        return [self.outputs[key] for key in old if key in self.outputs and key not in keys]

    def _names_before(self, wanted: Mapping[str, Rule]) -> dict[str, str]:
        """The names of before of the rules that are only renamed."""
        gone = {
            (rule.stream, rule.outputs): name
            for name, rule in self._known.items()
            if name in self.rules and name not in wanted
        }
        new = {name: rule for name, rule in wanted.items() if name not in self.rules} if gone else {}
        return {
            name: gone[rule.stream, rule.outputs]
            for name, rule in new.items()
            if (rule.stream, rule.outputs) in gone
        }


@dataclass(frozen=True, slots=True)
class Assigned:
    """What `Ids.assign` makes: the ids, and those among them that were not in use before."""

    ids: Ids
    new_rules: list[int]
    new_outputs: list[int]


def _give_unused(pool: IdPool, before: Iterable[int], after: Iterable[int]) -> None:
    used = set(after)
    for number in before:
        if number not in used:
            pool.give(number)


@dataclass(slots=True)
class Desired:
    """What has to be where, and what became of each rule by name."""

    interfaces: dict[str, InterfaceSpec]
    rules: dict[str, RuleState]
    memberships: frozenset[Membership]


def share_queues(queues: int, workers: int) -> list[range]:
    """The receive queues of each worker: contiguous, and as evenly as possible.

    With fewer queues than workers, the last workers are left out.
    """
    workers = min(queues, workers)
    return [range(queues * n // workers, queues * (n + 1) // workers) for n in range(workers)]


def share_cpus(cpus: Sequence[int], workers: int, threads: int) -> list[tuple[int, ...]]:
    """The CPUs of each worker's threads, taken in turn and from the start again where there are too few."""
    taken = cycle(cpus)
    return [tuple(next(taken) for _ in range(threads)) if cpus else () for _ in range(workers)]


def longest_frame(facts: InterfaceFacts) -> int:
    """The longest Ethernet frame, in bytes, that the interface's MTU and two VLAN tags allow."""
    return facts.mtu + ETHERNET_BYTES + 2 * VLAN_TAG_BYTES


def frame_size(facts: InterfaceFacts) -> int:
    """The frame size, in bytes, of a pool for the interface."""
    if facts.ingress == "packet":
        return PACKET_FRAME
    return SMALL_FRAME if longest_frame(facts) <= SMALL_FRAME - FRAME_HEADROOM else LARGE_FRAME


def frame_count(facts: InterfaceFacts) -> int:
    """How many frames a pool for the interface has."""
    return PACKET_FRAME_COUNT if facts.ingress == "packet" else FRAME_COUNT


def frame_limit(facts: InterfaceFacts) -> int:
    """The longest frame, in bytes, that a worker takes: what the MTU allows and a frame of the pool holds.

    Longer ones were merged by GRO or need jumbo frames, and are counted as oversize. AF_PACKET takes
    super-packets of any length beside it, since it reports what was merged.
    """
    return min(longest_frame(facts), frame_size(facts) - FRAME_HEADROOM)


def largest_payload(output: Output, mtu: int) -> int:
    """The largest payload, in bytes, that an output sends unfragmented through this MTU."""
    overhead = IPV4_UDP_BYTES if output.address.version == 4 else IPV6_UDP_BYTES
    return max(0, min(LARGEST_PAYLOAD, mtu - overhead))


def output_flags(output: Output) -> int:
    """The bits of enum mcr_output_flag."""
    return (
        (lib.MCR_OUTPUT_KEEP_PORT if output.port is None else 0)
        | (lib.MCR_OUTPUT_PRESERVE_DSCP if output.dscp is None else 0)
        | (lib.MCR_OUTPUT_DECREMENT_TTL if output.ttl is None else 0)
        | (lib.MCR_OUTPUT_PRESERVE_SOURCE if output.source == "preserve" else 0)
    )


def group_mac(group: Address) -> bytes:
    """The Ethernet address of a group (RFC 1112 section 6.4, RFC 2464 section 7)."""
    if isinstance(group, IPv4Address):
        low = group.packed[1:]
        return bytes([0x01, 0x00, 0x5E, low[0] & 0x7F, low[1], low[2]])
    return b"\x33\x33" + group.packed[12:]


def _worker_output(output: Output, output_id: int, facts: Mapping[str, InterfaceFacts]) -> OutputSpec:
    if not output.interface:
        return OutputSpec(
            output_id, output, 0, LARGEST_PAYLOAD
        )  # lowered to the route's when it is put in place
    interface = facts[output.interface]
    return OutputSpec(output_id, output, interface.ifindex, largest_payload(output, interface.mtu))


def _kernel_output(output: Output, output_id: int, facts: InterfaceFacts) -> KernelOutputSpec:
    source = source_address(output, facts) if isinstance(output.source, str) else output.source
    return KernelOutputSpec(
        output_id=output_id,
        ifindex=facts.ifindex,
        mtu=facts.mtu,
        flags=output_flags(output),
        dport=output.port or 0,
        vlan=output.vlan,
        ttl=output.ttl or 0,
        dscp=output.dscp or 0,
        mac_destination=group_mac(output.address),
        mac_source=bytes.fromhex(facts.mac.replace(":", "")),
        saddr=address_bytes(source) if source is not None else bytes(16),
        daddr=address_bytes(output.address),
    )


def realise(
    rules: Iterable[Rule],
    attachments: Mapping[str, Attachment],
    facts: Mapping[str, InterfaceFacts],
    ids: Ids,
) -> Desired:
    """What has to be where, for these rules on these attached interfaces as they are now.

    ids must have been assigned for the same rules. A rule whose interface is absent or not attached is
    pending; an output whose interface is absent is left out until it comes.
    """
    return Realiser().realise(rules, attachments, facts, ids)


@dataclass(frozen=True, slots=True)
class _Realised:
    """One rule, what it was realised from, and what came of it."""

    rule: Rule
    facts: tuple[InterfaceFacts | None, ...]
    attached: bool
    rule_id: int
    output_ids: tuple[tuple[tuple[str, str], int], ...]
    state: RuleState
    spec: RuleSpec | None
    outputs: tuple[OutputSpec, ...]
    membership: Membership | None

    def is_of(self, rule: Rule, facts: tuple[InterfaceFacts | None, ...], attached: bool, ids: Ids) -> bool:
        return (
            (self.rule is rule or self.rule == rule)
            and self.facts == facts
            and self.attached == attached
            and ids.rules[rule.name] == self.rule_id
            and all(ids.outputs[key] == output_id for key, output_id in self.output_ids)
        )


class Realiser:
    """`realise`, with a memory: an unchanged rule on unchanged interfaces is not thought about again, and its
    specs are the same objects as before."""

    def __init__(self) -> None:
        self._known: dict[str, _Realised] = {}

    def realise(
        self,
        rules: Iterable[Rule],
        attachments: Mapping[str, Attachment],
        facts: Mapping[str, InterfaceFacts],
        ids: Ids,
    ) -> Desired:
        desired = Desired({name: InterfaceSpec() for name in attachments}, {}, frozenset())
        memberships: set[Membership] = set()
        vlans = devices(facts.values())
        known: dict[str, _Realised] = {}
        for rule in rules:
            known[rule.name] = made = self._realise(rule, attachments, facts, ids)
            same = made.state.rule is rule
            desired.rules[rule.name] = made.state if same else replace(made.state, rule=rule)
            if made.spec is not None:
                interface = desired.interfaces[rule.stream.interface]
                interface.rules[made.rule_id] = made.spec
                interface.outputs.update((output.output_id, output) for output in made.outputs)
            if made.membership is not None:
                memberships.add(_on_vlan(made.membership, rule, vlans))
        self._known = known
        desired.memberships = frozenset(memberships)
        return desired

    def plan(self, rule: Rule, facts: Mapping[str, InterfaceFacts]) -> None:
        """Raises McrError as `plan` does."""
        known = self._known.get(rule.name)
        if (
            known is None
            or known.facts != _involved(rule, facts)
            or known.rule != rule
            or known.state.pending
        ):
            plan(rule, facts)

    def _realise(
        self,
        rule: Rule,
        attachments: Mapping[str, Attachment],
        facts: Mapping[str, InterfaceFacts],
        ids: Ids,
    ) -> _Realised:
        involved, attached = _involved(rule, facts), rule.stream.interface in attachments
        known = self._known.get(rule.name)
        if known is not None and known.is_of(rule, involved, attached, ids):
            return known
        state, spec, outputs = _rule_state(rule, attachments, facts, ids)
        membership = None
        if not state.pending and rule.stream.group:
            ifindex = facts[rule.stream.interface].ifindex
            membership = Membership(ifindex, rule.stream.address, rule.stream.source)
        output_ids = tuple((key, ids.outputs[key]) for key in _output_keys(rule))
        return _Realised(
            *(rule, involved, attached, state.rule_id, output_ids), *(state, spec, outputs, membership)
        )


def _on_vlan(membership: Membership, rule: Rule, vlans: Mapping[Vlan, InterfaceFacts]) -> Membership:
    """The join of a tagged stream is made on the VLAN's device where there is one that is up, so that the
    report bears the tag; elsewhere on the interface itself, without one."""
    if not rule.stream.vlan or rule.stream.vlan_outer:
        return membership
    device = vlans.get(Vlan(membership.ifindex, rule.stream.vlan))
    return replace(membership, ifindex=device.ifindex) if device is not None and device.up else membership


def _involved(rule: Rule, facts: Mapping[str, InterfaceFacts]) -> tuple[InterfaceFacts | None, ...]:
    """The interfaces that the rule names, as they are."""
    return (facts.get(rule.stream.interface), *(facts.get(output.interface) for output in rule.outputs))


def _why_pending(
    rule: Rule, attachments: Mapping[str, Attachment], facts: Mapping[str, InterfaceFacts]
) -> str:
    interface = rule.stream.interface
    if interface not in facts:
        return f"there is no interface {interface}"
    if interface not in attachments:
        return f"{interface} is not attached (mcr attach {interface})"
    return ""


def _why_output_waits(output: Output, chosen: Plan, facts: Mapping[str, InterfaceFacts]) -> str:
    """A redirect into a device that is down is lost without a word; a socket says what became of a send."""
    if output.interface and output.interface not in facts:
        return f"there is no interface {output.interface}"
    if chosen.path == "kernel" and not facts[output.interface].up:
        return f"{output.interface} is down"
    return ""


def _rule_state(
    rule: Rule,
    attachments: Mapping[str, Attachment],
    facts: Mapping[str, InterfaceFacts],
    ids: Ids,
) -> tuple[RuleState, RuleSpec | None, tuple[OutputSpec, ...]]:
    rule_id = ids.rules[rule.name]
    pending = _why_pending(rule, attachments, facts)
    try:
        chosen = plan(rule, facts)
    except McrError as error:  # it could be carried when it was accepted; an interface has changed since
        chosen, pending = Plan("worker" if rule.path == "worker" else "kernel", "asked for"), error.cause
    states: list[OutputState] = []
    present: list[tuple[Output, int]] = []
    for output, key in zip(rule.outputs, _output_keys(rule), strict=True):
        output_id = ids.outputs[key]
        if waits := _why_output_waits(output, chosen, facts):
            states.append(OutputState(output, output_id, waits))
        else:
            states.append(OutputState(output, output_id, pending))
            present.append((output, output_id))
    state = RuleState(rule, rule_id, chosen.path, chosen.reason, pending, tuple(states))
    if pending:
        return state, None, ()
    return state, *_specs(rule, rule_id, chosen, present, facts)


def _specs(
    rule: Rule,
    rule_id: int,
    chosen: Plan,
    present: list[tuple[Output, int]],
    facts: Mapping[str, InterfaceFacts],
) -> tuple[RuleSpec, tuple[OutputSpec, ...]]:
    ingress = facts[rule.stream.interface]
    key = bytes(ffi.buffer(rule_key(rule.stream, ingress.ifindex)))
    if chosen.path == "kernel":
        spec = RuleSpec(
            rule_id,
            key,
            longest_frame(ingress),
            kernel=True,
            generic=ingress.mode == "generic",
            kernel_outputs=tuple(
                _kernel_output(output, output_id, facts[output.interface]) for output, output_id in present
            ),
        )
        return spec, ()
    outputs = tuple(_worker_output(output, output_id, facts) for output, output_id in present)
    output_ids = tuple(output.output_id for output in outputs)
    return RuleSpec(rule_id, key, frame_limit(ingress), output_ids), outputs
