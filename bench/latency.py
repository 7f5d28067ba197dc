"""Latency beyond the sinks' own: of the relay alone as MCR counts it, and from socket to socket.

This module must never take a figure from a trial in which packets were lost.
"""

import json
import sys
from collections.abc import Callable

from bench.lanes import Ground, Lane, Setting
from bench.machine import GENERATOR_CPU, pin, worker_cpu
from bench.measure import Bench, Comparison, Job, Progress, streams_of
from bench.relays import Mcr, Relay, RelayRefusedError
from bench.results import Results
from bench.search import Method
from mcr.latency import Latency
from mcr.maps import Maps
from tests.netns.lab import Lab

RELAY_RATE_PPS = 50_000
RELAY_TRIALS = 5
RELAY_SECONDS = 0.5
SOCKET_RATE_PPS = 20_000
SOCKET_TIMEOUT_S = 60.0
UNCONFIRMED = "no trial was lossless"


def measure_relay_latency(bench: Bench, busy_poll: bool, results: Results) -> None:
    """From the XDP hook to the completed send at RELAY_RATE_PPS: p99 of the best of RELAY_TRIALS trials."""
    relay = Mcr("xsk", busy_poll=busy_poll)
    job = Job(Setting(), (relay,))
    with Comparison(bench, job, results) as comparison:
        record = comparison.record(relay.label)
        if relay.label not in comparison.relays:
            return
        name = comparison.runners[relay.label].lane.nodes[0].namespace.name
        with Maps(name) as maps:
            rule_id = relay.clients[0].call("rule.show")[0]["rule_id"]
            histograms = [
                found
                for _ in range(RELAY_TRIALS)
                if (found := _relay_trial(comparison, relay, lambda: maps.rule_latency(rule_id)))
            ]
        quantiles = {
            "p50": [each.quantile_ns(0.5) or 0.0 for each in histograms],
            "p99": [each.quantile_ns(0.99) or 0.0 for each in histograms],
        }
        if not histograms:
            record.refused["relay_latency_p99_us"] = f"{UNCONFIRMED} or nothing was counted"
            comparison.say(relay.label, record.refused["relay_latency_p99_us"])
            return
        for quantile, trials_ns in quantiles.items():
            record.put(f"relay_latency_{quantile}_us", [each / 1e3 for each in trials_ns])
            record.metrics[f"relay_latency_{quantile}_best_us"] = min(trials_ns) / 1e3
        best = record.metrics["relay_latency_p99_best_us"]
        comparison.say(relay.label, f"relay latency p99 {best:.1f} µs at {RELAY_RATE_PPS:,}/s, best trial")


def _relay_trial(comparison: Comparison, relay: Mcr, read: Callable[[], Latency]) -> Latency | None:
    """What MCR counted in one trial; None if that was not every packet."""
    count = int(RELAY_RATE_PPS * RELAY_SECONDS)
    before = read()
    trial = comparison.runners[relay.label].trial(count, RELAY_RATE_PPS)
    relay.check_alive()
    counted = read().since(before)
    return counted if trial.lossless and counted.count == count else None


def measure_sockets(
    new_lab: Callable[[], Lab],
    relays: tuple[Relay, ...],
    method: Method,
    results: Results,
    progress: Progress,
) -> None:
    """`mcr send` at SOCKET_RATE_PPS through each relay to `mcr listen`: latency, and that nothing changed."""
    setting = Setting()
    with new_lab() as lab:
        ground = Ground(lab, setting)
        lanes: list[tuple[Relay, Lane]] = []
        try:
            for relay in relays:
                lane = ground.lane()
                try:
                    relay.start(lab, lane, streams_of(setting))
                except RelayRefusedError as error:
                    results.record(relay.label, setting).refused["socket_p99_us"] = str(error)
                    continue
                lanes.append((relay, lane))
            taken: dict[str, list[dict[str, float]]] = {relay.label: [] for relay, _ in lanes}
            for _ in range(method.trials):
                for relay, lane in lanes:
                    taken[relay.label].append(_socket_trial(lab, ground, relay, lane, method.seconds))
        finally:
            for relay in relays:
                relay.stop()
    for label, rows in taken.items():
        record = results.record(label, setting)
        for metric in rows[0]:
            record.put(metric, [row[metric] for row in rows])
        progress(f"socket to socket: {label}: p99 {record.metrics['socket_p99_us']:.1f} µs")


def _socket_trial(lab: Lab, ground: Ground, relay: Relay, lane: Lane, seconds: float) -> dict[str, float]:
    """The listener shares the worker's CPU: the source has the other."""
    streams = streams_of(ground.setting)
    to = relay.destination(lane, streams, 0)
    count = int(SOCKET_RATE_PPS * max(seconds, 0.2))
    command = [sys.executable, "-m", "mcr.cli.main"]
    receive = f"listen {to.group}%{lane.sinks[0]}:{to.port} -j --expect {count} --timeout {SOCKET_TIMEOUT_S}"
    send = (
        f"send {streams.group}%{lane.sources[0]}:{streams.port},ttl=16 -j --rate {SOCKET_RATE_PPS}"
        f" --count {count} --burst 1 --size {streams.payload_bytes}"
    )
    listener = lab.spawn(ground.sink, [*command, *receive.split()])
    listener.wait_for("ready", SOCKET_TIMEOUT_S)
    pin(listener.pid, worker_cpu(0))
    source = lab.spawn(ground.source, [*command, *send.split()])
    pin(source.pid, GENERATOR_CPU)
    source.wait(SOCKET_TIMEOUT_S)
    listener.wait(SOCKET_TIMEOUT_S)
    report = json.loads(listener.stdout.read_text())[0]
    return {
        "socket_p50_us": (report["latency_p50_ns"] or 0) / 1e3,
        "socket_p99_us": (report["latency_p99_ns"] or 0) / 1e3,
        "socket_max_us": (report["latency_max_ns"] or 0) / 1e3,
        "socket_lost": report["lost"],
        "socket_duplicates": report["duplicates"],
        "socket_corrupt": report["corrupt"],
    }
