"""Gathers what explain.py looks at: the supervisor's state, its counters, and what the kernel says now.

It only reads. What asks the kernel runs in a thread, so that a slow answer never holds up the supervisor.
This module must never judge what it read; explain.py does.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from mcr import loader, netlink, procfs, views
from mcr.desired import OutputState, RuleState
from mcr.errors import McrError
from mcr.explain import Ingress, Query, RefusedJoin, Situation, Worker, matching
from mcr.explain_output import OutputSeen
from mcr.maps import OutputCounts
from mcr.membership import MembershipFailure
from mcr.reasons import JOIN_LIMITS
from mcr.rule import InterfaceFacts

if TYPE_CHECKING:
    from mcr.supervisor import Supervisor

LOST = ("receive_ring_full", "fill_ring_empty", "socket_dropped")


async def gather(supervisor: "Supervisor", query: Query) -> Situation:
    """Everything that explaining a stream needs, of the rule that takes it and of its interface."""
    stream = query.stream
    rules, facts = supervisor.rules, supervisor.facts
    found = matching(stream, rules.values())
    state = found[0] if found else None
    counts = supervisor.maps.rule_counts(state.rule_id) if state else None
    of_outputs = {
        output.output_id: supervisor.maps.output_counts(output.output_id)
        for output in (state.outputs if state else ())
    }
    rows = [row for row in views.status(supervisor) if row["object"] in ("interface", "worker")]
    rows = [row for row in rows if row["interface"] == stream.interface]
    refused = _of_interface(supervisor.membership.failures, stream.interface, facts)
    seen_ns = counts.last_seen_ns if counts else 0
    return Situation(
        rules=rules,
        facts=facts,
        ingress=await asyncio.to_thread(_ingress, stream.interface, rows) if rows else None,
        refused=[_refused(failure) for failure in refused],
        counts=counts,
        silent_s=round((time.monotonic_ns() - seen_ns) / 1e9, 3) if seen_ns else None,
        outputs=await asyncio.to_thread(_outputs, state, of_outputs, facts),
        redirect_lost=supervisor.redirect_losses(),
        tags=views.tag_problem(supervisor, stream),
    )


def _of_interface(
    failures: Iterable[MembershipFailure], interface: str, facts: Mapping[str, InterfaceFacts]
) -> list[MembershipFailure]:
    """Those on the interface or on a VLAN device of it."""
    if interface not in facts:
        return []
    ifindex = facts[interface].ifindex
    places = {ifindex} | {each.ifindex for each in facts.values() if each.parent == ifindex}
    return [failure for failure in failures if failure.membership.ifindex in places]


def _refused(failure: MembershipFailure) -> RefusedJoin:
    """The remedy names the one limit that is to blame, if it is known which."""
    remedy = failure.remedy
    for name, default in JOIN_LIMITS.items():
        value = procfs.sysctl(name)
        if name in remedy and value is not None and value < 1:
            remedy = f"sysctl -w {name}={default} (it is {value})"
            break
    return RefusedJoin(failure.membership.group, failure.membership.source, failure.cause, remedy)


def _ingress(interface: str, rows: list[dict[str, Any]]) -> Ingress:
    """rows: the interface's, and one for each of its workers."""
    attached = next(row for row in rows if row["object"] == "interface")
    workers = [row for row in rows if row["object"] == "worker" and row["state"] != "idle"]
    pending = attached["reason"]
    return Ingress(
        mode=attached["mode"],
        ingress=attached["ingress"],
        pending=pending,
        workers=tuple(
            Worker(row["pid"], procfs.state(row["pid"]), row["reason"], row["queues"]) for row in workers
        ),
        other_program=_other_program(interface) if pending else "",
        lost={name: attached[name] for name in LOST},
    )


def _other_program(interface: str) -> str:
    """The XDP program on an interface, unless it is one of MCR's."""
    with contextlib.suppress(McrError):
        if program := netlink.xdp_program(interface):
            name = loader.program_name(program.program_id)
            own = name in (loader.PROGRAM_NAME, loader.HELPER_NAME)
            return "" if own else f"{name} (id {program.program_id}, {program.mode})"
    return ""


def _outputs(
    state: RuleState | None, counts: Mapping[int, OutputCounts], facts: Mapping[str, InterfaceFacts]
) -> dict[int, OutputSeen]:
    """Routes and neighbours are asked for where the stack chooses the way: for unicast."""
    if state is None:
        return {}
    return {output.output_id: _output(output, counts[output.output_id], facts) for output in state.outputs}


def _output(output: OutputState, counts: OutputCounts, facts: Mapping[str, InterfaceFacts]) -> OutputSeen:
    to = output.output
    if to.group or (to.interface and to.interface not in facts):
        return OutputSeen(counts)
    with contextlib.suppress(McrError):
        route = netlink.route_to(to.address, facts[to.interface].ifindex if to.interface else 0)
        if route.error or route.local:
            return OutputSeen(counts, route)
        hop = ip_address(route.gateway) if route.gateway else to.address
        return OutputSeen(counts, route, netlink.neighbour(route.ifindex, hop))
    return OutputSeen(counts)
