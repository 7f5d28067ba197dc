"""The half of an explanation that is about one output: where it leaves, from what address, with what TTL,
whether a datagram fits, what it sent, and everything that is in its way.

Pure, as explain.py is. This module must never do I/O.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mcr.desired import OutputState, RuleState, group_mac
from mcr.maps import OutputCounts
from mcr.netlink import Neighbour, Route
from mcr.reasons import OUTPUT_DROPS, Problem, error_words
from mcr.rule import InterfaceFacts, source_address
from mcr.stream import Address, Output

IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, UDP_BYTES = 20, 40, 8
UNANSWERED = {"failed": "does not answer", "incomplete": "has not answered"}  # linux/neighbour.h
LARGEST_DATAGRAM = 65507  # UDP payload over IPv4, bytes


@dataclass(frozen=True, slots=True)
class OutputSeen:
    """What the kernel and the counters say of one output.

    route is None for a group, which none is asked for; neighbour is None where the next hop is not known.
    """

    counts: OutputCounts
    route: Route | None = None
    neighbour: Neighbour | None = None


class Surroundings(Protocol):
    """What an output's explanation needs of the whole `Situation`."""

    @property
    def facts(self) -> Mapping[str, InterfaceFacts]: ...
    @property
    def outputs(self) -> Mapping[int, OutputSeen]: ...
    @property
    def redirect_lost(self) -> Mapping[str, int]: ...


@dataclass(frozen=True, slots=True)
class Explained:
    """An output's row, its problems, and whether a packet would not be sent by it."""

    row: dict[str, Any]
    problems: tuple[Problem, ...]
    blocked: bool


@dataclass(frozen=True, slots=True)
class _Obstacle:
    """Something in the way now. reason: the drop reason that counts it, empty if none does."""

    reason: str
    cause: str
    remedy: str


def explain_output(
    ttl: int | None, size: int | None, output: OutputState, rule: RuleState, situation: Surroundings
) -> Explained:
    """ttl, size: of the packets that come in, where they are known."""
    seen = situation.outputs.get(output.output_id)
    egress = _egress(output.output, seen, situation.facts)
    obstacles = list(_obstacles(ttl, size, output, rule, seen, egress, situation.facts))
    counted = list(_counted(output, seen, {obstacle.reason for obstacle in obstacles}, egress))
    about = str(output.output)
    problems = [
        Problem(about, f"{about}: {obstacle.cause}{_so_far(seen, obstacle.reason)}", obstacle.remedy)
        for obstacle in obstacles
    ]
    problems += [Problem(about, f"{about}: {counted.cause}", counted.remedy) for counted in counted]
    if egress is not None and rule.path == "kernel" and (lost := situation.redirect_lost.get(egress.name)):
        cause = f"{about}: {egress.name} did not take {lost} redirected frames so far, of all rules together"
        problems.append(Problem(about, cause, f"see: tc -s qdisc show dev {egress.name}; ip -s link"))
    nothing_sent = seen is not None and bool(counted) and not seen.counts.sent_packets
    blocked = bool(obstacles) or nothing_sent
    return Explained(_row(ttl, size, output, rule, seen, egress, blocked), tuple(problems), blocked)


def _egress(
    output: Output, seen: OutputSeen | None, facts: Mapping[str, InterfaceFacts]
) -> InterfaceFacts | None:
    if output.interface:
        return facts.get(output.interface)
    if seen is None or seen.route is None:
        return None
    by_index = (each for each in facts.values() if seen.route and each.ifindex == seen.route.ifindex)
    return next(by_index, None)


def _so_far(seen: OutputSeen | None, reason: str) -> str:
    count = seen.counts.dropped.get(reason, 0) if seen else 0
    return f" (dropped {count} so far as {reason})" if count else ""


# --- what is in the way now


def _obstacles(
    ttl: int | None,
    size: int | None,
    output: OutputState,
    rule: RuleState,
    seen: OutputSeen | None,
    egress: InterfaceFacts | None,
    facts: Mapping[str, InterfaceFacts],
) -> Iterator[_Obstacle]:
    to = output.output
    if to.interface and to.interface not in facts:
        yield _Obstacle("", f"there is no interface {to.interface}", "see which there are: ip link")
        return
    if egress is not None and not egress.up:
        remedy = f"ip link set dev {egress.name} up; if it is up, its other end has no carrier"
        yield _Obstacle("link_down", f"{egress.name} is down", remedy)
        return
    if output.pending and not rule.pending:
        yield _Obstacle("", output.pending, "it is put in place when that has gone")
    if to.group and egress is not None and to.source == "interface" and source_address(to, egress) is None:
        family = f"IPv{to.address.version}"
        yield _Obstacle(
            "unreachable", f"{egress.name} has no {family} address to send from",
            f"ip address add ADDRESS dev {egress.name}, or name one: source=ADDRESS",
        )  # fmt: skip
    if seen is not None and seen.route is not None:
        yield from _way_obstacles(to.address, seen.route, seen.neighbour, egress)
    if to.ttl is None and ttl is not None and ttl <= 1:
        meaning, remedy = OUTPUT_DROPS["ttl_expired"]
        yield _Obstacle("ttl_expired", f"TTL {ttl} less one is 0 ({meaning})", remedy)
    if size is not None and _fits(size, to, rule.path, _mtu(egress, seen)) == "no":
        mtu = _mtu(egress, seen)
        yield _Obstacle(
            "too_large", f"{size} bytes do not fit the MTU {mtu}", OUTPUT_DROPS["too_large"][1]
        )  # fmt: skip


def _way_obstacles(
    address: Address, route: Route, neighbour: Neighbour | None, egress: InterfaceFacts | None
) -> Iterator[_Obstacle]:
    if route.error:
        yield _Obstacle(
            "unreachable", f"no route to {address} ({error_words(route.error)})",
            f"ip route add {address} via GATEWAY; what there is: ip route get {address}",
        )  # fmt: skip
    elif neighbour is not None and neighbour.state in UNANSWERED:
        hop, name = route.gateway or str(address), egress.name if egress else "its interface"
        kind = "ARP" if address.version == 4 else "neighbour discovery"
        yield _Obstacle(
            "unreachable", f"next hop {hop} {UNANSWERED[neighbour.state]} {kind} on {name}",
            f"see that {hop} is up and in that network: ping {hop}",
        )  # fmt: skip


def _counted(
    output: OutputState, seen: OutputSeen | None, explained: set[str], egress: InterfaceFacts | None
) -> Iterator[_Obstacle]:
    """What was dropped so far for another reason than those that are in the way now."""
    if seen is None:
        return
    last = f"; the last error was {error_words(seen.counts.last_error)}" if seen.counts.last_error else ""
    for reason, count in seen.counts.dropped.items():
        if not count or reason in explained:
            continue
        meaning, remedy = OUTPUT_DROPS[reason]
        if reason == "too_large" and egress is not None:
            meaning += f" {egress.mtu} of {egress.name}"
        yield _Obstacle(
            reason, f"dropped {count} so far as {reason}: {meaning}{last}",
            remedy.replace("ADDRESS", str(output.output.address)).replace(
                "IFACE", egress.name if egress else "IFACE"
            ),
        )  # fmt: skip


# --- what is shown of it


def _mtu(egress: InterfaceFacts | None, seen: OutputSeen | None) -> int:
    """Bytes; 0 if it is not known."""
    route_mtu = seen.route.mtu if seen and seen.route else 0
    return route_mtu or (egress.mtu if egress else 0)


def _fits(size: int, output: Output, path: str, mtu: int) -> str:
    """How a payload of that size in bytes leaves: whole, in how many fragments, or not at all."""
    header = IPV4_HEADER_BYTES if output.address.version == 4 else IPV6_HEADER_BYTES
    if not mtu or size + UDP_BYTES + header <= mtu:
        return "whole"
    if path == "kernel" or size > LARGEST_DATAGRAM:
        return "no"
    fragment_header = 8 if output.address.version == 6 else 0
    each = (mtu - header - fragment_header) // 8 * 8
    return f"in {-(-(size + UDP_BYTES) // each)} fragments" if each > 0 else "no"


def _ttl_words(ttl: int | None, output: Output) -> str:
    if output.ttl is not None:
        return str(output.ttl)
    return str(ttl - 1) if ttl is not None else "the packet's less 1"


def _next_hop(output: Output, seen: OutputSeen | None) -> str:
    if output.group:
        return group_mac(output.address).hex(":")
    if seen is None or seen.route is None or seen.route.error:
        return "none"
    if seen.route.local:
        return "this host"
    hop = seen.route.gateway or str(output.address)
    if seen.neighbour is None:
        return f"{hop} (not asked for yet)"
    mac = f" {seen.neighbour.mac}" if seen.neighbour.mac else ""
    return f"{hop} ({seen.neighbour.state}{mac})"


def _source(output: Output, seen: OutputSeen | None, egress: InterfaceFacts | None) -> str:
    if output.source == "preserve":
        return "the packet's"
    if not isinstance(output.source, str):
        return str(output.source)
    if output.group:
        return str(source_address(output, egress) or "none") if egress else "none"
    return seen.route.source if seen and seen.route and seen.route.source else "none"


def _row(
    ttl: int | None,
    size: int | None,
    output: OutputState,
    rule: RuleState,
    seen: OutputSeen | None,
    egress: InterfaceFacts | None,
    blocked: bool,
) -> dict[str, Any]:
    to = output.output
    mtu = _mtu(egress, seen)
    row: dict[str, Any] = {
        "object": "output", "output": str(to), "output_id": output.output_id,
        "interface": egress.name if egress else None, "state": "blocked" if blocked else "sends",
        "next_hop": _next_hop(to, seen), "source": _source(to, seen, egress),
        "ttl": _ttl_words(ttl, to), "mtu": mtu or None,
        "fits": None if size is None else _fits(size, to, rule.path, mtu),
        "sent_packets": seen.counts.sent_packets if seen else 0,
        "last_error": error_words(seen.counts.last_error) if seen and seen.counts.last_error else None,
    }  # fmt: skip
    for reason, count in (seen.counts.dropped if seen else {}).items():
        row[f"dropped_{reason}"] = count
    row["text"] = _row_text(row, size)
    return row


def _row_text(row: dict[str, Any], size: int | None) -> str:
    interface = f"by {row['interface']} " if row["interface"] else ""
    parts = [f"{interface}to {row['next_hop']}", f"from {row['source']}", f"TTL {row['ttl']}"]
    if size is not None:
        parts.append(f"{size} bytes {'do not fit' if row['fits'] == 'no' else 'leave ' + row['fits']}")
    return f"{row['output']}: {', '.join(parts)}; sent {row['sent_packets']}"
