"""What must be there: a small relay of plain values, against which the real one is held.

The theory. A relay is asked for a set of rules and of attachments, and it lives among interfaces that come,
go and change. However it got there, what it has in the kernel is a function of these three alone:

- A rule is *active* while its input interface is there and attached, and *pending* else.
- An active rule takes the kernel path if every output is a group of the input's family, each by another
  Ethernet interface that can transmit redirected frames, is up, has an address to send from, and an MTU no
  smaller than the input's; and if XDP runs at the input, natively unless there is one output. Else the worker
  path, but never where the rule asks for the kernel path: then it is pending.
- The map of rules holds exactly the active ones; a kernel output is what one line of a stream's text says,
  with the addresses of its interface; a worker holds one socket for each output of its rules; each group is
  joined once for each (interface, group, source).
- A request is refused if what it makes of the rules makes no sense, and then it changes nothing.

So the wanted state is computed anew from scratch each time, without a memory of the steps before: that is
what makes it trustworthy, and slow. It is one flat table, `what -> how it is`, because two tables are easily
compared and their difference is easily read. This module must never import the product, nor do I/O.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

State = dict[str, str]

DEFAULT_TTL = 64
ETHERNET_AND_TAGS = 14 + 2 * 4
SMALL_FRAME, LARGE_FRAME, HEADROOM = 2048, 4096, 256


class Readable:
    """Shown as it is written: sequences of steps are read by people."""

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(f"<{self}>")


@dataclass(frozen=True)
class Input(Readable):
    """A stream as a rule takes it. port 0 and an empty source are any; vlan 0 is no tag."""

    address: str
    interface: str
    port: int
    source: str = ""
    vlan: int = 0

    def __str__(self) -> str:
        source = f"{bracketed(self.source)}@" if self.source else ""
        vlan = f",vlan={self.vlan}" if self.vlan else ""
        return f"{source}{bracketed(self.address)}%{self.interface}:{self.port or '*'}{vlan}"


@dataclass(frozen=True)
class Output(Readable):
    """A destination. port 0 keeps the packet's; interface is empty where routing chooses.

    ttl 0 is the packet's own less one, dscp -1 the packet's own; source: `interface`, `preserve` or an
    address.
    """

    address: str
    interface: str
    port: int
    ttl: int = DEFAULT_TTL
    dscp: int = -1
    source: str = "interface"

    def __str__(self) -> str:
        zone = f"%{self.interface}" if self.interface else ""
        text = f"{bracketed(self.address)}{zone}:{self.port or '*'}"
        if self.ttl != DEFAULT_TTL:
            text += f",ttl={self.ttl or 'decrement'}"
        if self.dscp >= 0:
            text += f",dscp={self.dscp}"
        if self.source != "interface":
            text += f",source={bracketed(self.source)}"
        return text


@dataclass(frozen=True)
class Rule(Readable):
    name: str
    input: Input
    outputs: tuple[Output, ...]
    path: str = "auto"

    def __str__(self) -> str:
        path = "" if self.path == "auto" else f" [{self.path}]"
        return f"{self.name}: {self.input} -> {' + '.join(map(str, self.outputs))}{path}"


@dataclass(frozen=True)
class Attachment(Readable):
    """mode: `auto` or `generic`. ingress: `auto` or `packet`. cpus: of its worker, empty for any."""

    interface: str
    mode: str = "auto"
    ingress: str = "auto"
    cpus: str = ""

    def __str__(self) -> str:
        words = ("" if word == "auto" else word for word in (self.mode, self.ingress, self.cpus and "no CPU"))
        return " ".join((self.interface, *filter(None, words)))


@dataclass(frozen=True)
class Link:
    """An interface as it is, seen from outside. transmits: redirected frames. ipv4, ipv6: to send from."""

    name: str
    ifindex: int
    mtu: int
    mac: str
    up: bool
    transmits: bool
    ipv4: str
    ipv6: str


@dataclass(frozen=True)
class Asked:
    """What has been asked for: by the file, and by commands. Rules by name, attachments by interface."""

    file_rules: Mapping[str, Rule] = field(default_factory=dict)
    file_attachments: Mapping[str, Attachment] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    attachments: Mapping[str, Attachment] = field(default_factory=dict)

    @property
    def all_rules(self) -> list[Rule]:
        return [*self.file_rules.values(), *self.rules.values()]

    @property
    def all_attachments(self) -> Mapping[str, Attachment]:
        return {**self.attachments, **self.file_attachments}

    def with_file(self, rules: Iterable[Rule], attachments: Iterable[Attachment]) -> "Asked":
        return replace(
            self,
            file_rules={rule.name: rule for rule in rules},
            file_attachments={each.interface: each for each in attachments},
        )


Links = Mapping[str, Link]


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def is_group(address: str) -> bool:
    return ip_address(address).is_multicast


def version(address: str) -> int:
    return ip_address(address).version


# --- what is refused


def objection(asked: Asked, links: Links, before: Asked | None = None) -> str:
    """What is wrong with it; empty if nothing is. before: what is in place, None at a start."""
    rules = asked.all_rules
    if len({rule.name for rule in rules}) < len(rules):
        return "two rules of one name"
    if len({rule.input for rule in rules}) < len(rules):
        return "two rules of one input"
    for rule in rules:
        if len({(o.address, _port(rule, o), o.interface, o.source) for o in rule.outputs}) < len(
            rule.outputs
        ):
            return f"{rule.name} has an output twice"
        if any(
            o.source == "preserve" and version(o.address) != version(rule.input.address) for o in rule.outputs
        ):
            return f"{rule.name} preserves a source of the other family"
    if _has_loop(rules):
        return "a loop"
    by_interface = asked.all_attachments
    if any(each.cpus and each.interface in links for each in by_interface.values()):
        return "an attachment to a CPU that is not there"
    for rule in rules:
        reason = against_kernel(rule, by_interface, links) if rule.path == "kernel" else ""
        if reason and not (before is not None and _waits(rule, before, links)):
            return f"{rule.name} cannot take the kernel path: {reason}"
    return ""


def _waits(rule: Rule, before: Asked, links: Links) -> bool:
    """Whether an interface has made it impossible since it was accepted: that hinders no other change."""
    return rule in before.all_rules and against_kernel(rule, before.all_attachments, links) != ""


def _port(rule: Rule, output: Output) -> int:
    return output.port or rule.input.port


def _source(rule: Rule, output: Output) -> str:
    """Of what the output sends; empty if it is not known."""
    return {"interface": "", "preserve": rule.input.source}.get(output.source, output.source)


def _feeds(rule: Rule, output: Output, other: Input) -> bool:
    """Whether what the output sends could be taken as the other input."""
    port, source = _port(rule, output), _source(rule, output)
    return (
        output.address == other.address
        and (output.interface == other.interface or not is_group(output.address))
        and other.vlan == 0
        and (port == other.port or not port or not other.port)
        and (source == other.source or not source or not other.source)
    )


def _has_loop(rules: list[Rule]) -> bool:
    """Whether some packet could come back to a rule that it left."""
    after = {r.name: {o.name for o in rules for out in r.outputs if _feeds(r, out, o.input)} for r in rules}
    for start in after:
        reached, ahead = set(), list(after[start])
        while ahead:
            if (name := ahead.pop()) not in reached:
                reached.add(name)
                ahead += after[name]
        if start in reached:
            return True
    return False


# --- the path


def against_kernel(rule: Rule, attachments: Mapping[str, Attachment], links: Links) -> str:
    """Why the kernel path cannot carry the rule at all; empty if it can. Who is absent is not judged."""
    egress = [output.interface for output in rule.outputs]
    if not all(is_group(output.address) for output in rule.outputs):
        return "a unicast output"
    if len(set(egress)) < len(egress):
        return "several outputs by one interface"
    if any(version(output.address) != version(rule.input.address) for output in rule.outputs):
        return "an output of the other family"
    for output in rule.outputs:
        if output.source == "interface" and output.interface in links:
            link = links[output.interface]
            if not (link.ipv4 if version(output.address) == 4 else link.ipv6):
                return f"{output.interface} has no address"
    if rule.input.interface not in links:
        return ""
    attachment = attachments.get(rule.input.interface)
    if attachment is not None and attachment.ingress == "packet":
        return "AF_PACKET at the input"
    generic = attachment is not None and attachment.mode == "generic"
    if generic and len(rule.outputs) > 1:
        return "generic mode and several outputs"
    if not generic and not all(links[name].transmits for name in egress if name in links):
        return "an output that cannot transmit redirected frames"
    return ""


def path_of(rule: Rule, attachments: Mapping[str, Attachment], links: Links) -> str:
    """`kernel` or `worker`, or empty where the rule has to wait."""
    against = against_kernel(rule, attachments, links)
    if rule.path == "kernel":
        return "" if against else "kernel"
    if rule.path == "worker" or against:
        return "worker"
    present = [links[output.interface] for output in rule.outputs if output.interface in links]
    own = links.get(rule.input.interface)
    if any(not link.up or (own is not None and link.mtu < own.mtu) for link in present):
        return "worker"
    return "kernel"


# --- what must be there


@dataclass(frozen=True)
class Placed:
    """An active rule: its path, and those of its outputs that are in use."""

    rule: Rule
    path: str
    outputs: tuple[Output, ...]


def active_rules(asked: Asked, links: Links) -> list[Placed]:
    placed = []
    for rule in asked.all_rules:
        attached = rule.input.interface in links and rule.input.interface in asked.all_attachments
        if attached and (path := path_of(rule, asked.all_attachments, links)):
            outputs = tuple(output for output in rule.outputs if _in_use(output, path, links))
            placed.append(Placed(rule, path, outputs))
    return placed


def _in_use(output: Output, path: str, links: Links) -> bool:
    if not output.interface:
        return True
    return output.interface in links and (path == "worker" or links[output.interface].up)


def wanted(asked: Asked, links: Links) -> State:
    """All of what must be there, and nothing else may be."""
    active = active_rules(asked, links)
    state: State = {}
    for placed in active:
        if asked.all_attachments[placed.rule.input.interface].ingress != "packet":
            state |= _in_map(placed, asked, links)
    state |= _shown(asked, links, active)
    state |= _joined(active)
    state["lookups"] = _listed({_lookup(rule.input) for rule in asked.all_rules})
    state["joins"] = f"process runs, refused 0, held {len(_memberships(active))}"
    for name, attachment in asked.all_attachments.items():
        state |= _attached(name, attachment, links, active)
    return state


def _lookup(stream: Input) -> str:
    return f"{'source' if stream.source else 'any'} {'port' if stream.port else 'star'}"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words)) or "none"


def _in_map(placed: Placed, asked: Asked, links: Links) -> State:
    rule, own = placed.rule, links[placed.rule.input.interface]
    key = f"map {rule.input}"
    longest = own.mtu + ETHERNET_AND_TAGS
    if placed.path == "worker":
        frame = SMALL_FRAME if longest <= SMALL_FRAME - HEADROOM else LARGE_FRAME
        return {key: f"{rule.name}, worker, frames up to {min(longest, frame - HEADROOM)}"}
    generic = ", generic" if asked.all_attachments[own.name].mode == "generic" else ""
    smallest = min((links[output.interface].mtu for output in placed.outputs), default=0)
    state = {key: f"{rule.name}, kernel, frames up to {longest}, smallest MTU {smallest}{generic}"}
    for output in placed.outputs:
        link = links[output.interface]
        state[f"{key} -> {output.address}%{link.name}"] = _kernel_output(output, link)
    return state


def _kernel_output(output: Output, link: Link) -> str:
    address = ip_address(output.address).packed
    start = b"\x01\x00\x5e" + bytes([address[1] & 0x7F]) if len(address) == 4 else b"\x33\x33"
    mac = (start + address[len(start) - 6 :]).hex(":")
    own = link.ipv4 if version(output.address) == 4 else link.ipv6
    source = {"interface": own, "preserve": "the packet's"}.get(output.source, output.source)
    return describe_kernel_output(
        output.port,
        output.ttl,
        max(output.dscp, 0),
        output.dscp < 0,
        source,
        f"{link.mac} to {mac}",
        link.mtu,
    )


def describe_kernel_output(
    port: int, ttl: int, dscp: int, keeps_dscp: bool, source: str, macs: str, mtu: int
) -> str:
    """The words for what the kernel has, and for what it must have. port 0: kept; ttl 0: one less."""
    return (
        f"port {port or 'kept'}, ttl {ttl or 'less one'}, dscp {'kept' if keeps_dscp else dscp}, "
        f"from {source}, {macs}, mtu {mtu}"
    )


def _shown(asked: Asked, links: Links, active: list[Placed]) -> State:
    """What `mcr rule show` must say."""
    by_name = {placed.rule.name: placed for placed in active}
    state: State = {}
    for rule in asked.all_rules:
        placed = by_name.get(rule.name)
        state[f"shown {rule.name}"] = (
            f"active, {placed.path}, {rule.input}" if placed else f"pending, {rule.input}"
        )
        for output in rule.outputs:
            works = placed is not None and output in placed.outputs
            state[f"shown {rule.name} -> {output}"] = "active" if works else "pending"
    return state


def _memberships(active: list[Placed]) -> set[tuple[str, str, str]]:
    inputs = (placed.rule.input for placed in active)
    return {(each.interface, each.address, each.source) for each in inputs if is_group(each.address)}


def _joined(active: list[Placed]) -> State:
    """How many sockets hold each group on each interface: one for each source, and one for any."""
    state: State = {}
    joins = _memberships(active)
    for interface, group in {(interface, group) for interface, group, _ in joins}:
        holders = sum((interface, group) == join[:2] for join in joins)
        state[f"joined {group} on {interface}"] = f"by {holders}"
    return state


def _attached(name: str, attachment: Attachment, links: Links, active: list[Placed]) -> State:
    if name not in links:
        return {f"interface {name}": "pending"}
    xsk = attachment.ingress != "packet"
    mode = "none" if not xsk else "generic" if attachment.mode == "generic" else "native"
    state = {f"interface {name}": f"attached, {mode}, {'xsk' if xsk else 'packet'}"}
    if xsk:
        state[f"xdp {name}"] = f"{mode}, ours"
    own = [placed for placed in active if placed.rule.input.interface == name and placed.path == "worker"]
    state[f"worker {name}"] = f"runs, {sum(len(placed.outputs) for placed in own)} sockets"
    return state


# --- what becomes of a packet


@dataclass(frozen=True, order=True)
class Heard:
    """A datagram at a far end: the interface of the relay that it left by, and what it looked like."""

    interface: str
    address: str
    port: int
    ttl: int
    tos: int
    source: str


@dataclass(frozen=True)
class Sent:
    """A datagram that arrives at the relay."""

    interface: str
    address: str
    port: int
    source: str
    ttl: int = 9
    tos: int = 46 << 2


def takes(active: Iterable[Placed], sent: Sent) -> Placed | None:
    """The rule that takes it: of those that match, the one with source and port, then port, then source."""
    fitting = [
        placed
        for placed in active
        if (placed.rule.input.address, placed.rule.input.interface) == (sent.address, sent.interface)
        and placed.rule.input.vlan == 0
        and placed.rule.input.port in (0, sent.port)
        and placed.rule.input.source in ("", sent.source)
    ]
    return max(fitting, key=lambda p: (bool(p.rule.input.port), bool(p.rule.input.source)), default=None)


def becomes(placed: Placed, sent: Sent, links: Links, routed_by: str) -> list[Heard]:
    """What the rule makes of it. routed_by: the interface that routing chooses for a unicast output."""
    heard = []
    for output in placed.outputs:
        link = links.get(output.interface or routed_by)
        if link is None or not link.up:
            continue
        own = link.ipv4 if version(output.address) == 4 else link.ipv6
        source = {"interface": own, "preserve": sent.source}.get(output.source, output.source)
        tos = sent.tos if output.dscp < 0 else output.dscp << 2
        heard.append(
            Heard(
                link.name, output.address, output.port or sent.port, output.ttl or sent.ttl - 1, tos, source
            )
        )
    return heard


def difference(wanted_state: State, found_state: State) -> str:
    """What differs, a line each; empty if nothing does."""
    lines = []
    for key in sorted(wanted_state.keys() | found_state.keys()):
        want, found = wanted_state.get(key, "nothing"), found_state.get(key, "nothing")
        if want != found:
            lines.append(f"  {key}\n    wanted: {want}\n    found:  {found}")
    return "\n".join(lines)
