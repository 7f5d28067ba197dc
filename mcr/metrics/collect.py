"""What MCR tells Prometheus: a supervisor's state and maps, at the moment of a scrape.

It runs in a thread of its own and only reads: it asks neither a worker nor the event loop. prometheus_client
writes everything but rules and outputs (rules.py). docs/OPERATIONS.md lists every metric.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from mcr._bpf import lib
from mcr.drift import KINDS
from mcr.maps import WorkerCounts
from mcr.metrics.rules import RuleText

if TYPE_CHECKING:
    from mcr.attached import AttachedInterface
    from mcr.seat import Seat
    from mcr.supervisor import Supervisor

Samples = Iterable[tuple[Sequence[str], float]]  # values of the labels, and the sample's

FRAME_STATES = ("fill", "receive", "in_flight", "free")
WORKER_LOSSES = ("receive_ring_full", "fill_ring_empty", "socket_dropped")
OF_WORKER = ("interface", "worker")


def _gauge(name: str, help_text: str, labels: Sequence[str], samples: Samples) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, help_text: str, labels: Sequence[str], samples: Samples) -> Metric:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


class Scrape:
    """Writes everything that is known about a supervisor. client_count: of its control socket."""

    def __init__(self, supervisor: "Supervisor", client_count: Callable[[], int]) -> None:
        self._supervisor = supervisor
        self._rules = RuleText()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(RelayCollector(supervisor, client_count))

    def prepare(self) -> None:
        """Does beforehand what the next scrape would have to do because rules have changed."""
        self._rules.prepare(self._supervisor.desired)

    def pieces(self) -> Iterator[bytes]:
        """The metrics as text."""
        yield generate_latest(self._registry)
        self.prepare()
        for text in self._rules.text(self._supervisor.maps):
            yield text.encode()


class RelayCollector(Collector):
    """All but rules and outputs."""

    def __init__(self, supervisor: "Supervisor", client_count: Callable[[], int]) -> None:
        self._supervisor = supervisor
        self._client_count = client_count

    def collect(self) -> Iterator[Metric]:
        abi = f"{lib.MCR_ABI_VERSION:08x}"
        build = {"version": version("mcr"), "kernel": os.uname().release, "abi": abi}
        yield InfoMetricFamily("mcr_build", "What runs, on which kernel; 1.", build)
        clients = self._client_count()
        yield GaugeMetricFamily("mcr_control_clients", "Clients connected to the control socket.", clients)
        maps = self._supervisor.maps
        interfaces = list(self._supervisor.attached.values())
        yield from self._interfaces(interfaces)
        yield from self._workers(
            [
                ((each.name, str(seat.index)), seat, maps.worker_counts(seat.slot))
                for each in interfaces
                for seat in each.seats
            ]
        )
        yield from self._joins()
        yield from self._reloads()
        drifts = self._supervisor.drifts
        yield _counter(
            "mcr_drift_total",
            "Things found changed by somebody else, and put right.",
            ["kind"],
            [([kind], drifts.counts[kind]) for kind in KINDS],
        )

    def _interfaces(self, interfaces: list["AttachedInterface"]) -> Iterator[Metric]:
        info = InfoMetricFamily(
            "mcr_interface",
            "How an interface is attached, and how it was asked for; 1.",
            labels=["interface"],
        )
        for each in interfaces:
            info.add_metric([each.name], _how(each))
        yield info
        labelled = [([each.name], each) for each in interfaces]
        yield _gauge(
            "mcr_interface_attached",
            "Whether the interface works; 0 while it is pending.",
            ["interface"],
            ((labels, int(not each.pending)) for labels, each in labelled),
        )
        yield _gauge(
            "mcr_interface_receive_queues",
            "Receive queues that are drained.",
            ["interface"],
            ((labels, each.queue_count) for labels, each in labelled),
        )
        losses = self._supervisor.redirect_losses()
        yield _counter(
            "mcr_redirect_lost_packets_total",
            "Kernel path: packets that an egress device did not take, after they counted as sent.",
            ["interface"],
            (([name], count) for name, count in losses.items()),
        )

    def _workers(self, workers: list[tuple[tuple[str, str], "Seat", WorkerCounts]]) -> Iterator[Metric]:
        yield _gauge(
            "mcr_worker_up",
            "Whether the worker runs.",
            OF_WORKER,
            ((labels, int(seat.pid is not None)) for labels, seat, _ in workers),
        )
        yield _counter(
            "mcr_worker_restarts_total",
            "Times the worker was replaced.",
            OF_WORKER,
            ((labels, seat.restarts) for labels, seat, _ in workers),
        )
        yield _gauge(
            "mcr_worker_crash_loop",
            "Whether the worker keeps ending: 5 times within a minute.",
            OF_WORKER,
            ((labels, int(seat.crash_loop)) for labels, seat, _ in workers),
        )
        yield _gauge(
            "mcr_worker_frames",
            "Frames of the worker's pool, by state.",
            (*OF_WORKER, "state"),
            (
                ((*labels, state), getattr(counts, f"frames_{state}"))
                for labels, _, counts in workers
                for state in FRAME_STATES
            ),
        )
        yield _counter(
            "mcr_worker_batches_total",
            "Batches of packets that the worker took.",
            OF_WORKER,
            ((labels, counts.batches) for labels, _, counts in workers),
        )
        yield _counter(
            "mcr_worker_packets_total",
            "Packets that the worker took.",
            OF_WORKER,
            ((labels, counts.packets) for labels, _, counts in workers),
        )
        yield _counter(
            "mcr_worker_waits_total",
            "Times the worker slept.",
            OF_WORKER,
            ((labels, counts.waits) for labels, _, counts in workers),
        )
        yield _counter(
            "mcr_worker_lost_packets_total",
            "Packets lost before the worker saw them, by reason.",
            (*OF_WORKER, "reason"),
            (
                ((*labels, reason), getattr(counts, reason))
                for labels, _, counts in workers
                for reason in WORKER_LOSSES
            ),
        )

    def _joins(self) -> Iterator[Metric]:
        membership = self._supervisor.membership
        wanted = len(self._supervisor.desired.memberships)
        yield GaugeMetricFamily("mcr_joins_wanted", "Groups that rules need joined.", wanted)
        yield GaugeMetricFamily("mcr_joins_held", "Groups that are joined.", membership.held)
        failed = len(membership.failures)
        yield GaugeMetricFamily("mcr_joins_failed", "Groups that could not be joined.", failed)
        yield CounterMetricFamily(
            "mcr_membership_restarts_total",
            "Times the process that holds the joins was replaced.",
            membership.restarts,
        )

    def _reloads(self) -> Iterator[Metric]:
        reloads = self._supervisor.reloads
        yield _counter(
            "mcr_config_reloads_total",
            "Reloads of the files, by result.",
            ["result"],
            [(["success"], reloads.done), (["failure"], reloads.failed)],
        )
        yield GaugeMetricFamily(
            "mcr_config_last_reload_successful",
            "Whether the files as last read are in place.",
            int(reloads.last_successful),
        )
        yield GaugeMetricFamily(
            "mcr_config_last_reload_success_timestamp_seconds",
            "Unix time when the files were last put in place.",
            round(reloads.last_success_s, 3),
        )


def _how(interface: "AttachedInterface") -> dict[str, str]:
    wanted = interface.attachment
    return {
        "mode": interface.mode or "none",
        "ingress": interface.ingress or "none",
        "zero_copy": "on" if interface.zero_copy else "off",
        "wanted_mode": wanted.mode,
        "wanted_ingress": wanted.ingress,
        "wanted_zero_copy": wanted.zero_copy,
    }
