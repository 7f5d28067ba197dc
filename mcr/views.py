"""What a supervisor shows: its state as lists of flat JSON objects, for `-j`, for tables and for metrics.

Nouns only read: nothing here changes anything, and nothing asks a worker.
"""

import time
from typing import TYPE_CHECKING, Any

from mcr.desired import OutputState, RuleState
from mcr.errors import McrError

if TYPE_CHECKING:
    from mcr.supervisor import Supervisor

Row = dict[str, Any]


def status(supervisor: "Supervisor") -> list[Row]:
    """One row for each attached interface, each egress interface of the kernel path, and the joins."""
    rows: list[Row] = []
    for interface in supervisor.attached.values():
        counts = supervisor.maps.worker_counts(interface.slot)
        facts = supervisor.facts.get(interface.name)
        rows.append(
            {
                "object": "interface",
                "interface": interface.name,
                "ifindex": facts.ifindex if facts else None,
                "state": "pending" if interface.pending else "attached",
                "reason": interface.pending,
                "mode": interface.mode or "none",
                "ingress": interface.ingress,
                "zero_copy": interface.zero_copy,
                "queues": interface.queue_count,
                "rules": len(interface.spec.rules),
                "worker_pid": interface.worker_pid,
                "worker_restarts": interface.restarts,
                **{name: getattr(counts, name) for name in counts.__slots__},
            }
        )
    for name, lost in supervisor.redirect_losses().items():
        rows.append({"object": "egress", "interface": name, "redirect_lost": lost})
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
    return rows


def rules(supervisor: "Supervisor", name: str | None = None) -> list[Row]:
    """One row for each output of each rule, or of one rule."""
    return [
        {
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
        for state in _chosen(supervisor, name)
        for output in state.outputs
    ]


def stats(supervisor: "Supervisor", name: str | None = None) -> list[Row]:
    """For each rule, or for one, a row of what it received and relayed and a row for each output."""
    rows: list[Row] = []
    for state in _chosen(supervisor, name):
        rows.append(_rule_row(supervisor, state))
        rows.extend(_output_row(supervisor, state, output) for output in state.outputs)
    return rows


def _chosen(supervisor: "Supervisor", name: str | None) -> list[RuleState]:
    states = supervisor.desired.rules
    if name is None:
        return list(states.values())
    if name not in states:
        raise McrError(f"there is no rule {name!r}", "see which there are: mcr rule show")
    return [states[name]]


def _rule_row(supervisor: "Supervisor", state: RuleState) -> Row:
    counts = supervisor.maps.rule_counts(state.rule_id)
    silent_s = (time.monotonic_ns() - counts.last_seen_ns) / 1e9 if counts.last_seen_ns else None
    return {
        "object": "rule",
        "rule": state.rule.name,
        "stream": str(state.rule.stream),
        "received_packets": counts.received_packets,
        "received_bytes": counts.received_bytes,
        "relayed_packets": counts.relayed_packets,
        "relayed_bytes": counts.relayed_bytes,
        "last_seen_seconds": None if silent_s is None else round(silent_s, 3),
        **{f"dropped_{reason}": count for reason, count in counts.dropped.items()},
    }


def _output_row(supervisor: "Supervisor", state: RuleState, output: OutputState) -> Row:
    counts = supervisor.maps.output_counts(output.output_id)
    return {
        "object": "output",
        "rule": state.rule.name,
        "output": str(output.output),
        "sent_packets": counts.sent_packets,
        "sent_bytes": counts.sent_bytes,
        "last_errno": counts.last_error,
        **{f"dropped_{reason}": count for reason, count in counts.dropped.items()},
    }
