"""The speed that MCR must show (docs/PERFORMANCE.md), as sentences with a number each, and whether it does.

Pure: figures come from a run's results. A ratio compares two relays that took turns in one run; one whose
parts were refused or not measured has no figure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bench.lanes import Setting
from bench.results import PEER_LABEL, PEER_METRIC, USUAL_METRIC, Results

BASE = Setting()
FOUR_OUTPUTS = Setting(outputs=4)
CHAIN = Setting(hops=3)
SMCROUTE, SOCAT = PEER_LABEL, "socat"
KERNEL, XSK, PACKET = "MCR kernel", "MCR xsk", "MCR packet"
BUSY_POLL = "MCR xsk busy-poll"

Figure = Callable[[Results], float | None]
Direction = Literal["at least", "at most"]


@dataclass(frozen=True, slots=True)
class Target:
    """One promise. unit: as it is written behind the number. name: a word for the regression guard."""

    name: str
    what: str
    direction: Direction
    value: float
    unit: str
    figure: Figure

    def met(self, figure: float) -> bool:
        return figure >= self.value if self.direction == "at least" else figure <= self.value


def of_smcroute(relay: str, setting: Setting, metric: str = "throughput_pps") -> Figure:
    """As a share of smcroute's throughput, which was measured next to it."""
    return lambda results: results.share(relay, setting, metric, PEER_METRIC)


def ratio(relay: str, other: str, setting: Setting, metric: str) -> Figure:
    """Of two relays in one setting, by what share of smcroute's throughput each has."""

    def divided(results: Results) -> float | None:
        one, two = (of_smcroute(each, setting, metric)(results) for each in (relay, other))
        return one / two if one is not None and two else None

    return divided


def absolute(relay: str, setting: Setting, metric: str) -> Figure:
    return lambda results: results.metric(relay, setting, metric)


def _most(*figures: Figure) -> Figure:
    """The largest of those that there are."""

    def largest(results: Results) -> float | None:
        known = [figure for each in figures if (figure := each(results)) is not None]
        return max(known) if known else None

    return largest


def growth(relay: str, setting: Setting) -> Figure:
    """Throughput in a setting as a share of that in the usual one, in the same rounds."""
    return lambda results: results.share(relay, setting, "throughput_pps", USUAL_METRIC)


TARGETS = (
    Target(
        "kernel-1", "kernel path, 1 output, of smcroute", "at least", 5, "x", of_smcroute(KERNEL, BASE)
    ),
    Target(
        "kernel-4", "kernel path, 4 outputs, of smcroute", "at least", 4, "x",
        of_smcroute(KERNEL, FOUR_OUTPUTS),
    ),
    Target(
        "worker-1", "worker path (AF_XDP), 1 output, of smcroute", "at least", 1.8, "x",
        of_smcroute(XSK, BASE),
    ),
    Target(
        "packet-1", "worker path, AF_PACKET ingress, at overload, of socat", "at least", 3, "x",
        ratio(PACKET, SOCAT, BASE, "overload_delivered_pps"),
    ),
    Target(
        "kernel-chain", "chain of 3, kernel path, of a chain of smcroute", "at least", 12, "x",
        of_smcroute(KERNEL, CHAIN),
    ),
    Target(
        "worker-chain", "chain of 3, worker path, of a chain of smcroute", "at least", 2, "x",
        of_smcroute(XSK, CHAIN),
    ),
    Target(
        "worker-chain-rate", "chain of 3, worker path", "at least", 200_000, "packets/s",
        absolute(XSK, CHAIN, "throughput_pps"),
    ),
    Target(
        "latency", "relay latency p99, 50,000 packets/s, --busy-poll, best of 5", "at most", 10, "µs",
        absolute(BUSY_POLL, BASE, "relay_latency_p99_best_us"),
    ),
    Target(
        "frames", "frames exhausted at 80 % of throughput", "at most", 0, "frames",
        _most(
            absolute(XSK, BASE, "frames_exhausted"),
            absolute(PACKET, BASE, "frames_exhausted"),
            absolute(XSK, CHAIN, "frames_exhausted"),
        ),
    ),
    Target(
        "memory-supervisor", "resident memory, supervisor", "at most", 60, "MB",
        _most(absolute(KERNEL, BASE, "supervisor_mb"), absolute(XSK, BASE, "supervisor_mb")),
    ),
    Target(
        "memory-worker", "resident memory, worker beside its pool", "at most", 30, "MB",
        absolute(XSK, BASE, "worker_mb"),
    ),
    Target(
        "attach", "mcr attach to first relayed packet", "at most", 1, "s",
        _most(absolute(KERNEL, BASE, "attach_s"), absolute(XSK, BASE, "attach_s")),
    ),
)  # fmt: skip

GROWTH_TARGETS = (
    Target(
        "kernel-rules", "kernel path, 1,000 rules installed, of 1 rule", "at least", 0.9, "x",
        growth(KERNEL, Setting(rules=1000)),
    ),
    Target(
        "worker-rules", "worker path, 1,000 rules installed, of 1 rule", "at least", 0.9, "x",
        growth(XSK, Setting(rules=1000)),
    ),
    Target(
        "kernel-streams", "kernel path, 100 concurrent streams, of 1 stream", "at least", 0.9, "x",
        growth(KERNEL, Setting(streams=100, rules=100)),
    ),
)  # fmt: skip
