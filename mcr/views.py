"""What a supervisor shows: its state as lists of flat JSON objects, for `-j`, for tables and for metrics.

Nouns only read: nothing here changes anything, and nothing asks a worker.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mcr import vlans
from mcr.desired import OutputState, RuleState
from mcr.errors import McrError
from mcr.maps import OutputCounts, RuleCounts, WorkerCounts
from mcr.membership import Membership
from mcr.reasons import Problem
from mcr.stream import Stream

if TYPE_CHECKING:
    from mcr.attached import AttachedInterface
    from mcr.seat import Seat
    from mcr.supervisor import Supervisor

Row = dict[str, Any]

MAX_JOINS_IN_STATUS = 100
ROWS_AT_ONCE = 200


def status(supervisor: "Supervisor") -> list[Row]:
    """One row for each attached interface and each of its workers, each egress interface of the kernel path,
    drift if there was any, and the joins. What the workers count is summed up in their interface's row.

    Of the joins that are refused there is one each, too, up to MAX_JOINS_IN_STATUS: `joins` has all of them.
    """
    rows: list[Row] = []
    facts = supervisor.facts
    for interface in supervisor.attached.values():
        workers = [_worker_row(supervisor, interface, seat) for seat in interface.seats]
        rows.append(
            {
                "object": "interface",
                "interface": interface.name,
                "ifindex": facts[interface.name].ifindex if interface.name in facts else None,
                "state": "pending" if interface.pending else "attached",
                "reason": interface.pending,
                "shortfall": interface.shortfall,
                "mode": interface.mode or "none",
                "ingress": interface.ingress,
                "zero_copy": interface.zero_copy,
                "queues": interface.queue_count,
                "rules": len(interface.spec.rules),
                "worker_pid": interface.worker_pid,
                "worker_restarts": interface.restarts,
                "workers": len(workers),
                **{name: sum(row[name] for row in workers) for name in WorkerCounts.__slots__},
            }
        )
        rows.extend(workers)
    for name, lost in supervisor.redirect_losses().items():
        rows.append({"object": "egress", "interface": name, "redirect_lost": lost})
    drifts = supervisor.drifts
    if drifts.total:
        ago_s = round(time.time() - drifts.last_s, 1)
        rows.append({"object": "drift", "mended": drifts.total, "last": drifts.last, "seconds_ago": ago_s})
    membership = supervisor.membership
    rows.append(
        {
            "object": "membership",
            "pid": membership.pid,
            "wanted": len(supervisor.desired.memberships),
            "held": membership.held,
            "failed": len(membership.failures),
            "reason": membership.failures[0].cause if membership.failures else "",
            "restarts": membership.restarts,
        }
    )
    refused = (failure.membership for failure in membership.failures[:MAX_JOINS_IN_STATUS])
    rows.extend({"object": "join", **row} for row in _join_rows(supervisor, refused))
    return rows


def joins(supervisor: "Supervisor") -> list[Row]:
    """One row for each join that is held or wanted."""
    return _join_rows(supervisor, sorted(supervisor.desired.memberships))


def _join_rows(supervisor: "Supervisor", memberships: Iterable[Membership]) -> list[Row]:
    names = {facts.ifindex: name for name, facts in supervisor.facts.items()}
    failures = {failure.membership: failure for failure in supervisor.membership.failures}
    rows: list[Row] = []
    for membership in memberships:
        failure = failures.get(membership)
        rows.append(
            {
                "interface": names.get(membership.ifindex, str(membership.ifindex)),
                "ifindex": membership.ifindex,
                "group": str(membership.group),
                "source": None if membership.source is None else str(membership.source),
                "state": "refused" if failure else "joined",
                "reason": failure.cause if failure else "",
                "remedy": failure.remedy if failure else "",
            }
        )
    return rows


def _worker_row(supervisor: "Supervisor", interface: "AttachedInterface", seat: "Seat") -> Row:
    counts = supervisor.maps.worker_counts(seat.slot)
    return {
        "object": "worker",
        "interface": interface.name,
        "worker": seat.index,
        "pid": seat.pid,
        "state": ("idle" if seat.setup is None else "pending") if seat.pending else "running",
        "reason": seat.pending,
        "restarts": seat.restarts,
        "crash_loop": seat.crash_loop,
        "queues": _listed(seat.queues) if interface.ingress == "xsk" else "",
        "cpus": ",".join(map(str, seat.setup.cpus)) if seat.setup else "",
        **{name: getattr(counts, name) for name in counts.__slots__},
    }


def _listed(numbers: range) -> str:
    """`0-2`, `3`, or empty."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    return f"{numbers[0]}-{numbers[-1]}"


def tag_problem(supervisor: "Supervisor", stream: Stream) -> Problem | None:
    """Why packets of a tagged stream do not come in, None if nothing is known against it."""
    facts = supervisor.facts.get(stream.interface)
    return None if facts is None else vlans.tag_problem(stream, facts, supervisor.vlans.seen(facts))


def _input_problem(supervisor: "Supervisor", stream: Stream) -> Row:
    problem = tag_problem(supervisor, stream) if stream.vlan else None
    return {
        "input_problem": problem.cause if problem else "",
        "input_remedy": problem.remedy if problem else "",
    }


async def rules(supervisor: "Supervisor", name: str | None = None) -> list[Row]:
    """One row for each output of each rule, or of one rule. Other work gets its turn as in `stats`."""
    rows: list[Row] = []
    for states in _shares(_chosen(supervisor, name)):
        rows.extend(
            _shown(state, output) | problem
            for state in states
            for problem in [_input_problem(supervisor, state.rule.stream)]
            for output in state.outputs
        )
        await asyncio.sleep(0)
    return rows


def _shown(state: RuleState, output: OutputState) -> Row:
    return {
        "rule": state.rule.name,
        "rule_id": state.rule_id,
        "from": str(state.rule.stream),
        "path": state.path,
        "path_reason": state.reason,
        "state": "pending" if state.pending else "active",
        "reason": state.pending,
        "to": str(output.output),
        "output_id": output.output_id,
        "output_state": "pending" if output.pending else "active",
        "output_reason": output.pending,
        "origin": str(state.rule.origin or ("temporary" if state.rule.temporary else "command")),
    }


async def stats(supervisor: "Supervisor", name: str | None = None, latency: bool = False) -> list[Row]:
    """For each rule, or for one, a row of what it received and relayed and a row for each output.

    latency: with `latency_buckets`, which are not flat; see cli/streams.py. Other work of the loop gets its
    turn after about ROWS_AT_ONCE rows.
    """
    rows: list[Row] = []
    for states in _shares(_chosen(supervisor, name)):
        rows.extend(_stats(supervisor, states, latency))
        await asyncio.sleep(0)
    return rows


def _shares(states: list[RuleState]) -> Iterator[list[RuleState]]:
    share: list[RuleState] = []
    rows = 0
    for state in states:
        share.append(state)
        rows += 1 + len(state.outputs)
        if rows >= ROWS_AT_ONCE:
            yield share
            share, rows = [], 0
    yield share


def _stats(supervisor: "Supervisor", states: list[RuleState], latency: bool) -> Iterator[Row]:
    maps = supervisor.maps
    of_rules = maps.all_rule_counts([state.rule_id for state in states])
    of_outputs = iter(maps.all_output_counts([each.output_id for state in states for each in state.outputs]))
    for state, counts in zip(states, of_rules, strict=True):
        yield _rule_row(state, counts) | _latency(supervisor, state, latency)
        yield from (_output_row(state, output, next(of_outputs)) for output in state.outputs)


def _chosen(supervisor: "Supervisor", name: str | None) -> list[RuleState]:
    states = supervisor.rules
    if name is None:
        return list(states.values())
    if name not in states:
        raise McrError(f"there is no rule {name!r}", "see which there are: mcr rule show")
    return [states[name]]


def _rule_row(state: RuleState, counts: RuleCounts) -> Row:
    silent_s = (time.monotonic_ns() - counts.last_seen_ns) / 1e9 if counts.last_seen_ns else None
    return {
        "object": "rule",
        "rule": state.rule.name,
        "stream": str(state.rule.stream),
        "path": state.path,
        "pending": state.pending,
        "received_packets": counts.received_packets,
        "received_bytes": counts.received_bytes,
        "relayed_packets": counts.relayed_packets,
        "relayed_bytes": counts.relayed_bytes,
        "last_seen_seconds": None if silent_s is None else round(silent_s, 3),
        **{f"dropped_{reason}": count for reason, count in counts.dropped.items()},
    }


def _output_row(state: RuleState, output: OutputState, counts: OutputCounts) -> Row:
    return {
        "object": "output",
        "rule": state.rule.name,
        "output": str(output.output),
        "relayed_packets": counts.relayed_packets,
        "sent_packets": counts.sent_packets,
        "sent_bytes": counts.sent_bytes,
        "last_errno": counts.last_error,
        **{f"dropped_{reason}": count for reason, count in counts.dropped.items()},
    }


def _latency(supervisor: "Supervisor", state: RuleState, with_buckets: bool) -> Row:
    """Since the rule is there; None where nothing was measured, as on the kernel path."""
    measured = supervisor.maps.rule_latency(state.rule_id)
    if not measured.count:
        return dict.fromkeys(("latency_p50_seconds", "latency_p99_seconds", "latency_max_seconds"))
    p50_ns, p99_ns = measured.quantile_ns(0.5), measured.quantile_ns(0.99)
    row: Row = {
        "latency_p50_seconds": None if p50_ns is None else round(p50_ns / 1e9, 9),
        "latency_p99_seconds": None if p99_ns is None else round(p99_ns / 1e9, 9),
        "latency_max_seconds": measured.max_ns / 1e9,
    }
    if with_buckets:
        row["latency_buckets"] = {
            str(bucket): count for bucket, count in enumerate(measured.buckets) if count
        }
    return row
