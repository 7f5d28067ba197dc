"""What MCR tells Prometheus: a supervisor's state and maps as text, at the moment of a scrape.

It runs in a thread of its own and only reads: it asks neither a worker nor the event loop. docs/OPERATIONS.md
lists every metric.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mcr._bpf import lib
from mcr.maps import WorkerCounts
from mcr.metrics.rules import RuleText
from mcr.metrics.text import Family, label_text

if TYPE_CHECKING:
    from mcr.attached import AttachedInterface
    from mcr.seat import Seat
    from mcr.supervisor import Supervisor

Samples = Iterable[tuple[str, float]]

FRAME_STATES = ("fill", "receive", "in_flight", "free")
WORKER_LOSSES = ("receive_ring_full", "fill_ring_empty", "socket_dropped")


def _gauge(name: str, help_text: str, samples: Samples) -> str:
    return Family(name, "gauge", help_text).text(samples)


def _counter(name: str, help_text: str, samples: Samples) -> str:
    return Family(name, "counter", help_text).text(samples)


class RelayCollector:
    """Writes everything that is known about a supervisor. client_count: of its control socket."""

    def __init__(self, supervisor: "Supervisor", client_count: Callable[[], int]) -> None:
        self._supervisor = supervisor
        self._client_count = client_count
        self._rules = RuleText()
        self._started_s = _process_start_s()

    def text(self) -> Iterator[str]:
        """The metrics, in pieces."""
        yield from self._process()
        maps = self._supervisor.maps
        yield from self._rules.text(self._supervisor.desired, maps)
        interfaces = list(self._supervisor.attached.values())
        yield from self._interfaces(interfaces)
        yield from self._workers(
            [
                (label_text(interface=each.name, worker=str(seat.index)), seat, maps.worker_counts(seat.slot))
                for each in interfaces
                for seat in each.seats
            ]
        )
        yield from self._joins()
        yield from self._reloads()

    def _process(self) -> Iterator[str]:
        build = label_text(version=version("mcr"), kernel=os.uname().release, abi=str(lib.MCR_ABI_VERSION))
        yield _gauge("mcr_build_info", "What runs, on which kernel; 1.", [(build, 1)])
        yield _gauge(
            "process_start_time_seconds", "Unix time of the supervisor's start.", [("", self._started_s)]
        )
        yield _gauge(
            "mcr_control_clients", "Clients connected to the control socket.", [("", self._client_count())]
        )

    def _interfaces(self, interfaces: list["AttachedInterface"]) -> Iterator[str]:
        labelled = [(label_text(interface=each.name), each) for each in interfaces]
        yield _gauge(
            "mcr_interface_info",
            "How an interface is attached, and how it was asked for; 1.",
            ((f"{labels},{_how(each)}", 1) for labels, each in labelled),
        )
        yield _gauge(
            "mcr_interface_attached",
            "Whether the interface works; 0 while it is pending.",
            ((labels, int(not each.pending)) for labels, each in labelled),
        )
        yield _gauge(
            "mcr_interface_receive_queues",
            "Receive queues that are drained.",
            ((labels, each.queue_count) for labels, each in labelled),
        )
        losses = self._supervisor.redirect_losses()
        yield _counter(
            "mcr_redirect_lost_packets_total",
            "Kernel path: packets that an egress device did not take, after they counted as sent.",
            ((label_text(interface=name), count) for name, count in losses.items()),
        )

    def _workers(self, workers: list[tuple[str, "Seat", WorkerCounts]]) -> Iterator[str]:
        yield _gauge(
            "mcr_worker_up",
            "Whether the worker runs.",
            ((labels, int(seat.pid is not None)) for labels, seat, _ in workers),
        )
        yield _counter(
            "mcr_worker_restarts_total",
            "Times the worker was replaced.",
            ((labels, seat.restarts) for labels, seat, _ in workers),
        )
        yield _gauge(
            "mcr_worker_crash_loop",
            "Whether the worker keeps ending: 5 times within a minute.",
            ((labels, int(seat.crash_loop)) for labels, seat, _ in workers),
        )
        yield _gauge(
            "mcr_worker_frames",
            "Frames of the worker's pool, by state.",
            (
                (f"{labels},{label_text(state=state)}", getattr(counts, f"frames_{state}"))
                for labels, _, counts in workers
                for state in FRAME_STATES
            ),
        )
        yield _counter(
            "mcr_worker_batches_total",
            "Batches of packets that the worker took.",
            ((labels, counts.batches) for labels, _, counts in workers),
        )
        yield _counter(
            "mcr_worker_packets_total",
            "Packets that the worker took.",
            ((labels, counts.packets) for labels, _, counts in workers),
        )
        yield _counter(
            "mcr_worker_waits_total",
            "Times the worker slept.",
            ((labels, counts.waits) for labels, _, counts in workers),
        )
        yield _counter(
            "mcr_worker_lost_packets_total",
            "Packets lost before the worker saw them, by reason.",
            (
                (f"{labels},{label_text(reason=reason)}", getattr(counts, reason))
                for labels, _, counts in workers
                for reason in WORKER_LOSSES
            ),
        )

    def _joins(self) -> Iterator[str]:
        membership = self._supervisor.membership
        wanted = len(self._supervisor.desired.memberships)
        yield _gauge("mcr_joins_wanted", "Groups that rules need joined.", [("", wanted)])
        yield _gauge("mcr_joins_held", "Groups that are joined.", [("", membership.held)])
        yield _gauge("mcr_joins_failed", "Groups that could not be joined.", [("", len(membership.failures))])
        yield _counter(
            "mcr_membership_restarts_total",
            "Times the process that holds the joins was replaced.",
            [("", membership.restarts)],
        )

    def _reloads(self) -> Iterator[str]:
        reloads = self._supervisor.reloads
        results = {"success": reloads.done, "failure": reloads.failed}
        yield _counter(
            "mcr_config_reloads_total",
            "Reloads of the files, by result.",
            ((label_text(result=result), count) for result, count in results.items()),
        )
        yield _gauge(
            "mcr_config_last_reload_successful",
            "Whether the files as last read are in place.",
            [("", int(reloads.last_successful))],
        )
        yield _gauge(
            "mcr_config_last_reload_success_timestamp_seconds",
            "Unix time when the files were last put in place.",
            [("", round(reloads.last_success_s, 3))],
        )


def _how(interface: "AttachedInterface") -> str:
    wanted = interface.attachment
    return label_text(
        mode=interface.mode or "none",
        ingress=interface.ingress or "none",
        zero_copy="on" if interface.zero_copy else "off",
        wanted_mode=wanted.mode,
        wanted_ingress=wanted.ingress,
        wanted_zero_copy=wanted.zero_copy,
    )


def _process_start_s() -> float:
    """Unix time of this process' start, from its ticks since boot (proc(5), field 22 of stat)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    boot_s = next(
        int(line.split()[1])
        for line in Path("/proc/stat").read_text().splitlines()
        if line.startswith("btime")
    )
    return round(boot_s + ticks / os.sysconf("SC_CLK_TCK"), 2)
