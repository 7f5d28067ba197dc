"""How long changes take with a stream flowing: attach, and a group joined and left.

Delays are from the moment a command is given to the first packet that arrives, or to the last one. RFC 3918
section 5 measures a router that hosts ask by IGMP; a relay is asked by command, and asks its own router by
IGMP: so the report of the group on the input's wire is timed as well. This module must never time a
benchmark's own start-up.
"""

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.lanes import Setting
from bench.measure import Bench, Comparison, Job
from bench.relays import Mcr, Relay, Smcroute
from bench.results import Results
from bench.streams import SOURCE_ADDRESS
from mcr.errors import McrError

RATE_PPS = 20_000
WAIT_LIMIT_S = 20.0
QUIET_S = 0.1
POLL_S = 0.001
ETH_P_IP = 0x0800
IGMPV3_REPORT = 0x22  # RFC 3376 section 4.2, as are the record types
JOINS, LEAVES = frozenset({4, 5}), frozenset({3, 6})
SO_TIMESTAMPNS = 35  # asm-generic/socket.h


def measure_attach(bench: Bench, path: str, trials: int, results: Results) -> None:
    """From the start of `mcr attach` to the first relayed packet, the rule being there already."""
    relay = Mcr("kernel" if path == "kernel" else "xsk", without_attachment=True)
    with Comparison(bench, Job(Setting(), (relay,)), results) as comparison:
        if relay.label not in comparison.relays:
            return
        runner = comparison.runners[relay.label]
        node = runner.lane.nodes[0]
        sink = runner.lane.sinks
        taken = []
        for _ in range(trials):
            comparison.traffic.begin_trial(sink, timed=True)
            with comparison.traffic.flowing(runner.lane.sources, runner.streams, RATE_PPS):
                started_ns = time.monotonic_ns()
                comparison.lab.mcr(node.namespace, "attach", node.inputs[0], "--mode", "native")
                first_ns = _first_ns(comparison, sink[0])
            taken.append((first_ns - started_ns) / 1e9)
            comparison.lab.mcr(node.namespace, "detach", node.inputs[0])
        comparison.record(relay.label).put("attach_s", taken)
        comparison.say(relay.label, f"attach to first packet {min(taken):.3f} to {max(taken):.3f} s")


def measure_joins(bench: Bench, trials: int, results: Results) -> None:
    """A rule added and deleted, or a route, in turn for each relay."""
    relays: tuple[Relay, ...] = (
        Smcroute(without_rules=True),
        Mcr("kernel", without_rules=True),
        Mcr("xsk", without_rules=True),
    )
    with Comparison(bench, Job(Setting(), relays), results) as comparison:
        taken: dict[str, dict[str, list[float]]] = {label: {} for label in comparison.relays}
        for _ in range(trials):
            for label in comparison.relays:
                for metric, delay_ms in _join_and_leave(comparison, label).items():
                    taken[label].setdefault(metric, []).append(delay_ms)
        for label, metrics in taken.items():
            for metric, delays_ms in metrics.items():
                comparison.record(label).put(metric, delays_ms)
            told = {metric: round(sum(each) / len(each), 2) for metric, each in metrics.items()}
            comparison.say(label, f"delays {told}")


def _join_and_leave(comparison: Comparison, label: str) -> dict[str, float]:
    """Milliseconds: join and leave until the traffic changes, and until IGMP tells of it."""
    relay, runner = comparison.relays[label], comparison.runners[label]
    sink, group, delays = runner.lane.sinks, runner.streams.group, {}
    join, leave = _commands(comparison, relay, label)
    comparison.traffic.begin_trial(sink, timed=True)
    with (
        comparison.traffic.flowing(runner.lane.sources, runner.streams, RATE_PPS),
        _igmp_socket(comparison, runner.lane.sources[0]) as igmp,
    ):
        started_ns = time.monotonic_ns()
        join()
        delays["join_ms"] = (_first_ns(comparison, sink[0]) - started_ns) / 1e6
        delays["join_report_ms"] = _report_ms(igmp, started_ns, group, JOINS)
        started_ns = time.monotonic_ns()
        leave()
        delays["leave_ms"] = max(0.0, (_last_ns(comparison, sink[0]) - started_ns) / 1e6)
        delays["leave_report_ms"] = _report_ms(igmp, started_ns, group, LEAVES)
    return delays


def _commands(
    comparison: Comparison, relay: Relay, label: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """What makes a relay take the stream, and what makes it stop."""
    runner = comparison.runners[label]
    node, streams = runner.lane.nodes[0], runner.streams
    if isinstance(relay, Mcr):
        rule, client = relay.rules(node, streams)[0], relay.clients[0]
        return (
            lambda: client.call("rule.add", **rule, temporary=True),
            lambda: client.call("rule.del", names=[rule["name"]]),
        )
    assert isinstance(relay, Smcroute)
    group, lab = streams.group, comparison.lab
    route = (node.inputs[0], SOURCE_ADDRESS, group)

    def join() -> None:
        relay.control(lab, node, "join", node.inputs[0], group)
        relay.control(lab, node, "add", *route, *node.outputs)

    def leave() -> None:
        relay.control(lab, node, "leave", node.inputs[0], group)
        relay.control(lab, node, "remove", *route)

    return join, leave


def _first_ns(comparison: Comparison, sink: str) -> int:
    deadline = time.monotonic() + WAIT_LIMIT_S
    while not comparison.traffic.packets(sink):
        if time.monotonic() > deadline:
            raise McrError(f"nothing was relayed within {WAIT_LIMIT_S:g} s", "this is a bug of the relay")
        time.sleep(POLL_S)
    return comparison.traffic.arrived(sink).first_ns


def _last_ns(comparison: Comparison, sink: str) -> int:
    """When the last packet arrived, once nothing more comes."""
    deadline, before = time.monotonic() + WAIT_LIMIT_S, -1
    while (now := comparison.traffic.packets(sink)) != before:
        if time.monotonic() > deadline:
            raise McrError("the relay does not stop", "this is a bug of the relay")
        before = now
        time.sleep(QUIET_S)
    return comparison.traffic.arrived(sink).last_ns


@contextmanager
def _igmp_socket(comparison: Comparison, interface: str) -> Iterator[socket.socket]:
    """What reaches the source's interface as IGMP; the kernel stamps each packet."""
    with (
        comparison.lab.inside(comparison.ground.source),
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.bind((interface, ETH_P_IP))
        sock.settimeout(WAIT_LIMIT_S)
        yield sock


def _report_ms(sock: socket.socket, started_ns: int, group: str, types: frozenset[int]) -> float:
    """From started_ns to the first IGMPv3 report after it with such a record of the group."""
    realtime_less_monotonic_ns = time.time_ns() - time.monotonic_ns()
    while True:
        data, ancillary, _, _ = sock.recvmsg(2048, 64)
        if group not in _reported(data, types):
            continue
        stamp: bytes = next(each for _, kind, each in ancillary if kind == SO_TIMESTAMPNS)
        seconds, nanoseconds = struct.unpack("@ll", stamp[:16])
        delay_ns: int = seconds * 1_000_000_000 + nanoseconds - realtime_less_monotonic_ns - started_ns
        if delay_ns > 0:
            return delay_ns / 1e6


def _reported(packet: bytes, types: frozenset[int]) -> set[str]:
    """Groups of the records of these types in an IPv4 packet, if it is an IGMPv3 report."""
    igmp = packet[(packet[0] & 0xF) * 4 :]
    if packet[9] != socket.IPPROTO_IGMP or len(igmp) < 8 or igmp[0] != IGMPV3_REPORT:
        return set()
    groups, offset = set(), 8
    for _ in range(struct.unpack_from("!H", igmp, 6)[0]):
        kind, words, sources, group = struct.unpack_from("!BBH4s", igmp, offset)
        offset += 8 + 4 * (sources + words)
        if kind in types:
            groups.add(socket.inet_ntoa(group))
    return groups
