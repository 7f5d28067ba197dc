"""What would happen to a packet of a stream now: which rule takes it, by which path, what each output does.

All of it takes values (`Situation`, gathered by situation.py) and returns rows. This module must never do
I/O, and never repeat a decision that `rule.py` or `desired.py` has made: it reads what they decided.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from mcr.desired import (
    ETHERNET_BYTES,
    IPV4_UDP_BYTES,
    IPV6_UDP_BYTES,
    VLAN_TAG_BYTES,
    RuleState,
    frame_limit,
)
from mcr.explain_output import OutputSeen, explain_output
from mcr.maps import RuleCounts
from mcr.reasons import RULE_DROPS, Problem
from mcr.rule import InterfaceFacts, Rule
from mcr.stream import Address, Stream

Row: TypeAlias = dict[str, Any]

MAX_NEAR_MISSES = 5
MAX_PAYLOAD_BYTES = 65527  # of UDP over IPv6 (RFC 8200)
# By precedence: what of a packet a rule looks at.
WHY = ("source and port", "port, from any source", "source, at any port", "any source and any port")


@dataclass(frozen=True, slots=True)
class Query:
    """A stream, and what is known of its packets: the TTL they arrive with, their UDP payload in bytes."""

    stream: Stream
    ttl: int | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker of an interface; process_state is the letter of proc_pid_stat(5), empty if it is not known."""

    pid: int | None
    process_state: str = ""
    reason: str = ""
    queues: str = ""


@dataclass(frozen=True, slots=True)
class Ingress:
    """An interface that shall be attached, as `mcr status` shows it, and what is in its way.

    other_program: an XDP program that is not MCR's. lost: packets that no worker saw, by reason.
    """

    mode: str
    ingress: str
    pending: str
    workers: tuple[Worker, ...]
    other_program: str = ""
    lost: Mapping[str, int] = field(default_factory=dict)

    @property
    def attached(self) -> bool:
        """Whether packets reach MCR at all; without a worker only XDP's still do."""
        return not self.pending or self.mode in ("native", "generic")


@dataclass(frozen=True, slots=True)
class RefusedJoin:
    """A membership that the kernel refused, and why."""

    group: Address
    source: Address | None
    cause: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything that an explanation looks at, as it was at one moment.

    ingress is None where the stream's interface shall not be attached. counts and outputs (by output_id) are
    those of the rule that takes the stream. silent_s: since its last packet, None for never. tags: why its
    packets do not come in with their VLAN tag.
    """

    rules: Mapping[str, RuleState]
    facts: Mapping[str, InterfaceFacts]
    ingress: Ingress | None = None
    refused: Sequence[RefusedJoin] = ()
    counts: RuleCounts | None = None
    silent_s: float | None = None
    outputs: Mapping[int, OutputSeen] = field(default_factory=dict)
    redirect_lost: Mapping[str, int] = field(default_factory=dict)
    tags: Problem | None = None


# --- which rule


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which a rule's input is not the stream that was asked for.

    partial: the rule takes some packets of that stream, but not all.
    """

    what: Literal["port", "source", "VLAN tag", "interface", "group"]
    words: str
    remedy: str
    partial: bool = False


def differences(asked: Stream, rule: Stream) -> tuple[Difference, ...]:
    """In what the input of a rule is not the stream asked for; empty if the rule matches all of it."""
    found: list[Difference] = []
    if rule.address != asked.address:
        found.append(Difference("group", f"for {rule.address}", f"send to {rule.address}"))
    if rule.interface != asked.interface:
        words = f"on {rule.interface}, not on {asked.interface}"
        found.append(Difference("interface", words, f"let the stream come in by {rule.interface}"))
    if (rule.vlan, rule.vlan_outer) != (asked.vlan, asked.vlan_outer):
        words = f"with {_tags(rule)}, not with {_tags(asked)}"
        found.append(Difference("VLAN tag", words, f"send it with {_tags(rule)}"))
    if rule.port is not None and rule.port != asked.port:
        other = " only" if asked.port is None else f", not at {asked.port}"
        remedy = f"send to port {rule.port}"
        found.append(Difference("port", f"at port {rule.port}{other}", remedy, asked.port is None))
    if rule.source is not None and rule.source != asked.source:
        other = " only" if asked.source is None else f", not from {asked.source}"
        remedy = f"send from {rule.source}, or leave {rule.source}@ out of the rule"
        found.append(Difference("source", f"from {rule.source}{other}", remedy, asked.source is None))
    return tuple(found)


def _tags(stream: Stream) -> str:
    if stream.vlan_outer:
        return f"VLAN tags {stream.vlan_outer}.{stream.vlan}"
    return f"VLAN tag {stream.vlan}" if stream.vlan else "no VLAN tag"


def precedence(stream: Stream) -> int:
    """The place of an input in the order of lookups (find_rule in relay_kern.c)."""
    return (0 if stream.port is not None else 2) + (0 if stream.source is not None else 1)


def matching(asked: Stream, rules: Iterable[RuleState]) -> list[RuleState]:
    """The rules that match all of a stream, the one that takes it first."""
    same_group = (state for state in rules if state.rule.stream.address == asked.address)
    found = [state for state in same_group if not differences(asked, state.rule.stream)]
    # A rule that waits is not in the map: another one that matches takes the packet meanwhile.
    return sorted(found, key=lambda state: (bool(state.pending), precedence(state.rule.stream)))


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A rule that does not match, but would but for these differences."""

    rule: Rule
    differences: tuple[Difference, ...]


def near_misses(asked: Stream, rules: Iterable[RuleState]) -> list[NearMiss]:
    """The rules that come nearest to a stream that none takes, the nearest first.

    Those for its group, or, if there are none, those that differ in nothing but the group.
    """
    version = asked.address.version
    family = [state.rule for state in rules if state.rule.stream.address.version == version]
    near = [rule for rule in family if rule.stream.address == asked.address] or [
        rule for rule in family if not differences(replace(asked, address=rule.stream.address), rule.stream)
    ]
    nearest = [NearMiss(rule, differences(asked, rule.stream)) for rule in near]
    nearest.sort(key=lambda miss: (len(miss.differences), miss.rule.name))
    return nearest[:MAX_NEAR_MISSES]


def _miss_problem(asked: Stream, miss: NearMiss) -> Problem:
    words = " and ".join(difference.words for difference in miss.differences)
    remedy = f"add a rule: mcr rule add NAME --from {asked} --to OUTPUT"
    if len(miss.differences) == 1:
        remedy = f"{miss.differences[0].remedy}, or {remedy}"
    return Problem("rule", f"rule {miss.rule.name} takes {miss.rule.stream}: {words}", remedy)


# --- its way in


def _frame_bytes(asked: Stream, size: int) -> int:
    """The frame of a datagram that comes whole, from the Ethernet header."""
    tags = bool(asked.vlan) + bool(asked.vlan_outer)
    return size + _overhead(asked) + ETHERNET_BYTES + VLAN_TAG_BYTES * tags


def _overhead(stream: Stream) -> int:
    return IPV4_UDP_BYTES if stream.address.version == 4 else IPV6_UDP_BYTES


def _interface_problems(situation: Situation, interface: str) -> Iterator[Problem]:
    """Why no packet at all comes in by an interface."""
    facts, ingress = situation.facts.get(interface), situation.ingress
    if facts is None:
        yield Problem("input", f"there is no interface {interface}", "see which there are: ip link")
        return
    if not facts.up:
        yield Problem(
            "input", f"{interface} is down",
            f"ip link set dev {interface} up; if it is up, its other end has no carrier",
        )  # fmt: skip
    if ingress is None:
        yield Problem("input", f"{interface} is not attached", f"mcr attach {interface}")
    elif not ingress.attached and ingress.other_program:
        yield Problem(
            "input", f"another XDP program is attached to {interface}: {ingress.other_program}",
            f"ip link set dev {interface} xdp off, or stop the program that holds it, "
            "or attach with --ingress packet",
        )  # fmt: skip
    elif not ingress.attached:
        yield Problem("input", f"{interface}: {ingress.pending}", f"mcr doctor {interface}, and see the log")


def _worker_problems(interface: str, ingress: Ingress) -> Iterator[Problem]:
    """One for each worker that relays nothing now."""
    again = "it is started again by itself within 10 s; if it dies again, the log says of what"
    if ingress.pending and not any(worker.reason for worker in ingress.workers):
        yield Problem("worker", f"{interface}: {ingress.pending}", again)
        return
    for worker in ingress.workers:
        several = len(ingress.workers) > 1 and worker.queues
        where = f"{interface}, queues {worker.queues}" if several else interface
        if worker.reason:
            yield Problem("worker", f"{where}: {worker.reason}", again)
        elif worker.process_state in ("T", "t"):
            yield Problem(
                "worker", f"worker {worker.pid} of {where} is stopped and relays nothing",
                f"none is needed: it is replaced after some seconds; or at once: kill -CONT {worker.pid}",
            )  # fmt: skip
        elif worker.process_state in ("Z", "X"):
            yield Problem("worker", f"worker {worker.pid} of {where} is dead", again)


def _join_problems(situation: Situation, stream: Stream) -> Iterator[Problem]:
    for refused in situation.refused:
        if (refused.group, refused.source) == (stream.address, stream.source):
            yield Problem("join", refused.cause, refused.remedy)


def _size_problems(situation: Situation, query: Query, state: RuleState) -> Iterator[Problem]:
    """What the size asked for costs before there is an output."""
    facts = situation.facts[query.stream.interface]
    if query.size is None or state.path == "kernel":
        return
    if query.size + _overhead(query.stream) > facts.mtu:
        yield Problem(
            "input", f"{query.size} bytes come in fragments, which the worker path does not relay: "
            f"the MTU of {facts.name} is {facts.mtu}",
            "let the sender send smaller datagrams, or use the kernel path, or raise the MTU of the network",
        )  # fmt: skip
    elif _frame_bytes(query.stream, query.size) > (limit := frame_limit(facts)):
        yield Problem(
            "input", f"{query.size} bytes make a frame of more than {limit} bytes: the worker path drops it",
            "let the sender send smaller datagrams, or use the kernel path",
        )  # fmt: skip


def _counted_problems(situation: Situation, state: RuleState, blocked: bool) -> Iterator[Problem]:
    """What has been lost so far, or never come though nothing known blocks it."""
    counts, stream = situation.counts, state.rule.stream
    if counts is None:
        return
    if not blocked and not counts.received_packets:
        if situation.tags is not None:
            yield situation.tags
        else:
            yield Problem(
                "input", "no packet of it has come yet",
                f"see what comes and no rule takes: tcpdump -ni {stream.interface} udp",
            )  # fmt: skip
    for reason, count in counts.dropped.items():
        if count:
            meaning, remedy = RULE_DROPS[reason]
            yield Problem(
                f"drop {reason}", f"dropped {count} so far as {reason}: {meaning}", _of(stream, remedy)
            )
    for reason, count in (situation.ingress.lost if situation.ingress else {}).items():
        if count and not counts.dropped.get(reason):
            yield Problem(
                f"lost {reason}", f"{stream.interface} lost {count} packets so far as {reason}",
                "give the worker more of a CPU, or attach with more workers",
            )  # fmt: skip


def _of(stream: Stream, remedy: str) -> str:
    return remedy.replace("IFACE", stream.interface)


# --- the whole


def explain(query: Query, situation: Situation) -> list[Row]:
    """The rows of an explanation; the first is the verdict."""
    found = matching(query.stream, situation.rules.values())
    rows = _explain_rule(query, situation, found) if found else _explain_none(query, situation)
    return [{"stream": str(query.stream), **row} for row in rows]


def _explain_none(query: Query, situation: Situation) -> list[Row]:
    asked = query.stream
    problems = [*_interface_problems(situation, asked.interface)]
    misses = near_misses(asked, situation.rules.values())
    problems += [_miss_problem(asked, miss) for miss in misses]
    if not misses:
        problems.append(
            Problem(
                "rule", f"no rule names {asked.address}", f"mcr rule add NAME --from {asked} --to OUTPUT"
            )
        )  # fmt: skip
    partly = [miss for miss in misses if all(difference.partial for difference in miss.differences)]
    text = f"no rule takes {'all of it' if partly else 'it'}: the packets go to this host's stack"
    verdict = {"object": "verdict", "verdict": "not taken", "rule": None, "text": text}
    return [verdict, *map(_problem_row, problems)]


def _explain_rule(query: Query, situation: Situation, found: Sequence[RuleState]) -> list[Row]:
    state, *others = found
    blocking, lossy = _entrance(query, situation, state)
    away = _workers_away(situation, state, blocking)
    outputs = [explain_output(query.ttl, query.size, output, state, situation) for output in state.outputs]
    sending = sum(not output.blocked for output in outputs)
    problems = [*blocking, *away, *lossy, *_counted_problems(situation, state, bool(blocking))]
    for output in outputs:
        problems += output.problems
    return [
        _verdict(state, blocking, lossy, sending, _relaying(situation, away)),
        _rule_row(state, others),
        *_input_rows(situation, state.rule.stream.interface),
        {"object": "path", "path": state.path, "text": f"{state.path}: {state.reason}"},
        *_received_rows(situation),
        *(output.row for output in outputs),
        *map(_problem_row, problems),
    ]


def _entrance(query: Query, situation: Situation, state: RuleState) -> tuple[list[Problem], list[Problem]]:
    """Why packets of a rule do not come in, and why those that do are dropped before any output."""
    interface = state.rule.stream.interface
    blocking = [*_interface_problems(situation, interface)]
    if state.pending and not blocking:
        blocking.append(Problem("rule", state.pending, 'let MCR choose the path: path = "auto"'))
    joins = [*_join_problems(situation, state.rule.stream)]
    lossy = [*_size_problems(situation, query, state)] if interface in situation.facts else []
    return blocking + joins, lossy


def _workers_away(situation: Situation, state: RuleState, blocking: Sequence[Problem]) -> list[Problem]:
    """What the rule's packets meet once they have come in, where it needs a worker."""
    if situation.ingress is None or state.path != "worker" or any(each.about != "join" for each in blocking):
        return []
    return [*_worker_problems(state.rule.stream.interface, situation.ingress)]


def _relaying(situation: Situation, away: Sequence[Problem]) -> tuple[int, int]:
    """How many workers relay, and of how many."""
    total = len(situation.ingress.workers) if situation.ingress else 0
    return max(0, total - len(away)), max(total, len(away))


def _verdict(
    state: RuleState,
    blocking: Sequence[Problem],
    lossy: Sequence[Problem],
    sending: int,
    workers: tuple[int, int],
) -> Row:
    name, total = state.rule.name, len(state.outputs)
    if state.pending:
        verdict, text = "pending", f"rule {name} would take it, but waits"
    elif blocking and all(problem.about == "join" for problem in blocking):
        verdict, text = "not joined", f"rule {name} takes it, but its group is not joined"
    elif blocking:
        verdict, text = "blocked", f"rule {name} would take it, but it does not come in"
    elif lossy or not sending or (workers[1] and not workers[0]):
        verdict, text = "dropped", f"rule {name} takes it, and drops it"
    elif workers[0] < workers[1]:
        verdict = "partly relayed"
        text = f"rule {name} takes it, and {workers[0]} of {workers[1]} workers relay it"
    elif sending < total:
        verdict, text = "partly relayed", f"rule {name} takes it, and {sending} of {total} outputs send it"
    else:
        words = "its output sends it" if total == 1 else f"all {total} outputs send it"
        verdict, text = "relayed", f"rule {name} takes it, and {words}"
    return {"object": "verdict", "verdict": verdict, "rule": name, "text": text}


def _rule_row(state: RuleState, others: Sequence[RuleState]) -> Row:
    stream = state.rule.stream
    text = f"{state.rule.name} ({stream}) matches {WHY[precedence(stream)]}"
    for other in others:
        why = f"waits ({other.pending})" if other.pending else "is less specific"
        text += f"; rule {other.rule.name} matches too, but {why}"
    return {"object": "rule", "rule": state.rule.name, "rule_id": state.rule_id, "text": text}


def _input_rows(situation: Situation, interface: str) -> Iterator[Row]:
    ingress = situation.ingress
    if ingress is None or interface not in situation.facts:
        return
    workers = ", ".join(str(worker.pid) for worker in ingress.workers if worker.pid) or "none"
    state = "attached" if ingress.attached else "not attached"
    mode = f"{ingress.mode} XDP" if ingress.mode in ("native", "generic") else "no XDP"
    text = f"{interface} is {state}: {mode}, ingress {ingress.ingress or 'none'}, worker {workers}"
    yield {
        "object": "input", "interface": interface, "state": state, "mode": ingress.mode,
        "ingress": ingress.ingress, "workers": workers, "text": text,
    }  # fmt: skip


def _received_rows(situation: Situation) -> Iterator[Row]:
    counts = situation.counts
    if counts is None:
        return
    text = f"{counts.received_packets} packets, relayed {counts.relayed_packets}"
    if situation.silent_s is not None:
        text += f"; the last one came {situation.silent_s:.1f} s ago"
    yield {
        "object": "received", "received_packets": counts.received_packets,
        "relayed_packets": counts.relayed_packets, "last_seen_seconds": situation.silent_s, "text": text,
    }  # fmt: skip


def _problem_row(problem: Problem) -> Row:
    return {
        "object": "problem", "about": problem.about, "cause": problem.cause, "remedy": problem.remedy,
        "text": problem.cause,
    }  # fmt: skip
