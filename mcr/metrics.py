"""The Prometheus endpoint: reads the maps at each scrape, on its own registry, in its own thread.

A scrape never asks a worker nor the event loop, so that it cannot delay the relay.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mcr.errors import McrError

if TYPE_CHECKING:
    from mcr.supervisor import Supervisor


class RelayCollector(Collector):
    """Turns a supervisor's state and maps into metrics at the moment of a scrape."""

    def __init__(self, supervisor: "Supervisor") -> None:
        self._supervisor = supervisor

    def describe(self) -> Iterable[Metric]:
        return ()  # registration then does not scrape

    def collect(self) -> Iterable[Metric]:
        yield from self._rules()
        yield from self._outputs()
        yield from self._interfaces()

    def _rules(self) -> Iterable[Metric]:
        rule = ["rule"]
        received = CounterMetricFamily(
            "mcr_rule_received_packets", "Packets that matched the rule", labels=rule
        )
        received_bytes = CounterMetricFamily(
            "mcr_rule_received_bytes", "Their UDP payload, bytes", labels=rule
        )
        relayed = CounterMetricFamily(
            "mcr_rule_relayed_packets", "Packets handed to every output", labels=rule
        )
        dropped = CounterMetricFamily(
            "mcr_rule_dropped_packets", "Packets not relayed, by reason", labels=["rule", "reason"]
        )
        for state in list(self._supervisor.desired.rules.values()):
            counts, name = self._supervisor.maps.rule_counts(state.rule_id), state.rule.name
            received.add_metric([name], counts.received_packets)
            received_bytes.add_metric([name], counts.received_bytes)
            relayed.add_metric([name], counts.relayed_packets)
            for reason, count in counts.dropped.items():
                dropped.add_metric([name, reason], count)
        return received, received_bytes, relayed, dropped

    def _outputs(self) -> Iterable[Metric]:
        output = ["rule", "output"]
        sent = CounterMetricFamily("mcr_output_sent_packets", "Packets that the output sent", labels=output)
        sent_bytes = CounterMetricFamily("mcr_output_sent_bytes", "Their UDP payload, bytes", labels=output)
        dropped = CounterMetricFamily(
            "mcr_output_dropped_packets", "Relayed packets not sent, by reason", labels=[*output, "reason"]
        )
        for state in list(self._supervisor.desired.rules.values()):
            for each in state.outputs:
                counts, labels = (
                    self._supervisor.maps.output_counts(each.output_id),
                    [state.rule.name, str(each.output)],
                )
                sent.add_metric(labels, counts.sent_packets)
                sent_bytes.add_metric(labels, counts.sent_bytes)
                for reason, count in counts.dropped.items():
                    dropped.add_metric([*labels, reason], count)
        return sent, sent_bytes, dropped

    def _interfaces(self) -> Iterable[Metric]:
        info = GaugeMetricFamily(
            "mcr_interface_info",
            "How an interface is attached",
            labels=["interface", "mode", "ingress", "zero_copy"],
        )
        worker = ["interface", "worker"]
        up = GaugeMetricFamily("mcr_worker_up", "Whether the worker runs", labels=worker)
        restarts = CounterMetricFamily("mcr_worker_restarts", "Times the worker was replaced", labels=worker)
        crash_loop = GaugeMetricFamily(
            "mcr_worker_crash_loop", "Whether the worker keeps ending: 5 times within a minute", labels=worker
        )
        lost = CounterMetricFamily(
            "mcr_ingress_lost_packets",
            "Packets lost before the worker saw them",
            labels=[*worker, "reason"],
        )
        for each in list(self._supervisor.attached.values()):
            zero_copy = "on" if each.zero_copy else "off"
            info.add_metric([each.name, each.mode or "none", each.ingress or "none", zero_copy], 1)
            for seat in each.seats:
                labels = [each.name, str(seat.index)]
                counts = self._supervisor.maps.worker_counts(seat.slot)
                up.add_metric(labels, 0 if seat.pid is None else 1)
                restarts.add_metric(labels, seat.restarts)
                crash_loop.add_metric(labels, int(seat.crash_loop))
                for reason in ("receive_ring_full", "fill_ring_empty", "socket_dropped"):
                    lost.add_metric([*labels, reason], getattr(counts, reason))
        redirect_lost = CounterMetricFamily(
            "mcr_redirect_lost_packets",
            "Kernel path: packets that an egress device did not take",
            labels=["interface"],
        )
        for name, count in self._supervisor.redirect_losses().items():
            redirect_lost.add_metric([name], count)
        return info, up, restarts, crash_loop, lost, redirect_lost


@contextlib.contextmanager
def serve(supervisor: "Supervisor", address: str, port: int) -> Iterator[None]:
    """Serves /metrics at address:port. Raises McrError if it cannot listen there."""
    registry = CollectorRegistry()
    registry.register(RelayCollector(supervisor))
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise McrError(
            f"cannot serve metrics at {address}:{port}: {error.strerror}",
            "choose another --metrics ADDR:PORT, or off",
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
