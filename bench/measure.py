"""How a relay's throughput is measured: lanes, trials, the search of RFC 2544, and when a figure is refused.

             src                 relay, one for each that is measured          dst
            +------------------+         +--------------------+         +----------------------+
            | generator    toN |  veth   | in0           out0 |  veth   | fromNx0         sink |
            | on CPU 0         |---------|               out1 |---------| fromNx1         sink |
            +------------------+         +--------------------+         +----------------------+

Every relay has a lane of its own, all alike, as long as relays are compared, so that trials alternate among
them. Throughput is the highest offered rate at which nothing is lost (RFC 1242 section 3.17); rates are those
that the generator reached, never those that it was asked for. This module must never take a figure for a
relay's when the generator or a sink was the limit.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.relays import Lane, Relay, RelayRefusedError
from bench.traffic import MIN_RATE_PPS, Streams, Traffic
from mcr.errors import McrError
from tests.netns.lab import Lab

GENERATOR_CPU = 0
DIRECT = "direct"
LIMIT_SHARE = 0.9  # of what generator and sink do without a relay: from there on a figure is theirs
PROBE_PACKETS = 100_000
MAX_PACKETS = 50_000_000


@dataclass(frozen=True, slots=True)
class Method:
    """How thoroughly to measure.

    trials: of every relay, in turn. seconds: of one trial at one rate (RFC 2544 says 60). resolution: share
    of the throughput at which the search ends. steps: after which it ends anyway. attempts: a rate is given
    up only when every attempt lost packets, since a machine that shares its CPUs loses some now and then.
    """

    trials: int
    seconds: float
    resolution: float
    steps: int
    attempts: int


FULL = Method(trials=3, seconds=1.0, resolution=0.02, steps=14, attempts=3)
QUICK = Method(trials=3, seconds=0.15, resolution=0.05, steps=6, attempts=2)


@dataclass(frozen=True, slots=True)
class Trial:
    """One rate offered once. Rates are packets/s: offered at the input, delivered at each output (mean)."""

    sent: int
    offered_pps: float
    delivered_pps: float
    lost: int
    late: int

    @property
    def lossless(self) -> bool:
        return self.lost == 0


@dataclass(frozen=True, slots=True)
class Figure:
    """What one relay did in one round; refused says why the figure is not the relay's, if it is not.

    throughput_pps: the highest offered rate without loss. overload: flat out, all that the generator can.
    """

    throughput_pps: float
    overload: Trial
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """A relay's figures, one for each round; refused if it could not be measured at all."""

    relay: str
    outputs: int
    figures: tuple[Figure, ...] = ()
    refused: str = ""

    @property
    def refusal(self) -> str:
        return self.refused or next((figure.refused for figure in self.figures if figure.refused), "")

    @property
    def throughput_pps(self) -> float:
        return statistics.median(figure.throughput_pps for figure in self.figures)

    @property
    def delivered_pps(self) -> float:
        return statistics.median(figure.overload.delivered_pps for figure in self.figures)

    @property
    def spread(self) -> float:
        """Between the least and the most throughput, as a share of the median."""
        rates = [figure.throughput_pps for figure in self.figures]
        return (max(rates) - min(rates)) / self.throughput_pps if self.throughput_pps else 0.0


Progress = Callable[[str], None]


class Bench:
    """One run: a source and a sink namespace, and the traffic between them."""

    def __init__(self, lab: Lab, streams: Streams, method: Method, progress: Progress) -> None:
        self.lab, self.streams, self.method, self.progress = lab, streams, method, progress
        self.source, self.sink = lab.namespace("src"), lab.namespace("dst")
        self.limit_pps = 0.0

    def calibrate(self) -> None:
        """Finds what generator and sink do by themselves, joined by one veth pair."""
        self.lab.veth(self.source, DIRECT, self.sink, DIRECT)
        with Traffic(self.lab, self.source, self.sink) as traffic:
            traffic.expect(DIRECT, self.streams)
            runner = Runner(traffic, self.streams, self.method, DIRECT, (DIRECT,))
            trials = [runner.flat_out() for _ in range(self.method.trials)]
        lost = sum(trial.lost for trial in trials)
        if lost:
            raise McrError(
                f"{lost} packets were lost between generator and sink, without a relay",
                "give the machine more rest",
            )
        self.limit_pps = statistics.median(trial.offered_pps for trial in trials)
        self.progress(f"generator and sink by themselves: {self.limit_pps / 1e6:.2f} M packets/s")

    def compare(self, relays: Sequence[Relay], outputs: int) -> list[Measured]:
        """Measures the relays in turn, round after round, each with so many outputs."""
        refused: dict[str, str] = {}
        with Traffic(self.lab, self.source, self.sink) as traffic:
            try:
                runners = self._start_all(relays, outputs, traffic, refused)
                figures = self._rounds(relays, runners, outputs)
            finally:
                for relay in relays:
                    relay.stop()
        return [
            Measured(relay.label, outputs, tuple(figures[relay.label]), refused.get(relay.label, ""))
            for relay in relays
        ]

    def _start_all(
        self, relays: Sequence[Relay], outputs: int, traffic: Traffic, refused: dict[str, str]
    ) -> dict[str, "Runner"]:
        runners = {}
        for number, relay in enumerate(relays):
            sinks = tuple(f"from{outputs}x{number}x{index}" for index in range(outputs))
            lane = self._lane(f"{outputs}x{number}", sinks)
            for index, interface in enumerate(sinks):
                traffic.expect(interface, relay.destination(self.streams, index))
            try:
                relay.start(self.lab, lane, self.streams)
            except RelayRefusedError as error:
                refused[relay.label] = str(error)
                self.progress(f"{relay.label}, {outputs} outputs: not measured: {error}")
                continue
            runners[relay.label] = Runner(traffic, self.streams, self.method, f"to{outputs}x{number}", sinks)
        return runners

    def _lane(self, number: str, sinks: Sequence[str]) -> Lane:
        """A relay's namespace and its veth pairs.

        GRO gives in0 the NAPI that XDP redirects need. It is switched on when both ends are up: only then
        does veth make the other end one that transmits redirected frames.
        """
        namespace = self.lab.namespace(f"relay{number}")
        self.lab.veth(self.source, f"to{number}", namespace, "in0", addresses_b=("10.1.0.2/24",))
        self.lab.run(namespace, ["ethtool", "-K", "in0", "gro", "on"])
        names = tuple(f"out{index}" for index in range(len(sinks)))
        for index, (name, sink) in enumerate(zip(names, sinks, strict=True)):
            self.lab.veth(namespace, name, self.sink, sink, addresses_a=(f"10.2.{index}.1/24",))
        return Lane(namespace, "in0", names)

    def _rounds(
        self, relays: Sequence[Relay], runners: dict[str, "Runner"], outputs: int
    ) -> dict[str, list[Figure]]:
        figures: dict[str, list[Figure]] = {relay.label: [] for relay in relays}
        for number in range(self.method.trials):
            for relay in relays:
                if relay.label not in runners:
                    continue
                figure = runners[relay.label].figure(self.limit_pps)
                relay.check_alive()
                figures[relay.label].append(figure)
                self.progress(f"round {number + 1}, {relay.label}, {outputs} outputs: {_described(figure)}")
        return figures


def _described(figure: Figure) -> str:
    overload = figure.overload
    text = (
        f"throughput {figure.throughput_pps:,.0f}/s, delivered {overload.delivered_pps:,.0f}/s"
        f" of {overload.offered_pps:,.0f}/s"
    )
    return f"{text}; refused: {figure.refused}" if figure.refused else text


class Runner:
    """Offers rates on one lane and counts what arrives at its sinks."""

    def __init__(
        self, traffic: Traffic, streams: Streams, method: Method, source: str, sinks: tuple[str, ...]
    ) -> None:
        self.traffic, self.streams, self.method = traffic, streams, method
        self.source, self.sinks = source, sinks

    def trial(self, count: int, rate_pps: float) -> Trial:
        """Offers count packets; rate_pps 0 is flat out. Raises McrError if more arrive than were sent."""
        self.traffic.begin_trial()
        sent = self.traffic.send(self.source, self.streams, count, rate_pps, GENERATOR_CPU)
        arrived = self.traffic.settle(self.sinks, sent.packets)
        if any(each.packets > sent.packets for each in arrived):
            raise McrError("more packets arrived than were sent", "this is a bug of the relay or of bench")
        received = sum(each.packets for each in arrived)
        first_ns = min((each.first_ns for each in arrived if each.packets), default=0)
        span_s = (max(each.last_ns for each in arrived) - first_ns) / 1e9
        return Trial(
            sent=sent.packets,
            offered_pps=sent.rate_pps,
            delivered_pps=received / len(arrived) / max(sent.elapsed_s, span_s),
            lost=sent.packets * len(arrived) - received,
            late=sum(each.late for each in arrived),
        )

    def flat_out(self) -> Trial:
        """All that the generator can, for as long as a trial takes."""
        probe = self.trial(PROBE_PACKETS, 0)
        return self.trial(self._count(probe.offered_pps), 0)

    def figure(self, limit_pps: float) -> Figure:
        """Throughput and what is delivered at overload. limit_pps: of generator and sink without a relay."""
        overload = self.flat_out()
        throughput_pps = overload.offered_pps if overload.lossless else self._search(overload)
        outputs = len(self.sinks)
        refused = ""
        if throughput_pps > LIMIT_SHARE * limit_pps:
            refused = f"the generator's limit is {limit_pps:,.0f}/s"
        elif overload.delivered_pps * outputs > LIMIT_SHARE * limit_pps:
            refused = f"the sinks' limit is {limit_pps:,.0f}/s"
        return Figure(throughput_pps, overload, refused)

    def _count(self, rate_pps: float) -> int:
        return min(MAX_PACKETS, max(1000, int(rate_pps * self.method.seconds)))

    def _search(self, overload: Trial) -> float:
        """The highest rate without loss, between none and that of the overload (RFC 2544 section 26.1)."""
        low, high, step = 0.0, overload.offered_pps, 0.1
        rate = min(overload.delivered_pps, 0.95 * high)
        for _ in range(self.method.steps):
            if rate < MIN_RATE_PPS:
                return 0.0
            trial = self._best_of_attempts(rate)
            if trial.lossless:
                low = max(low, trial.offered_pps)
            else:
                high = rate
            if high - low <= self.method.resolution * high:
                break
            rate = max(high * (1 - step), 0) if low == 0 else min(low * (1 + step), (low + high) / 2)
            step = min(2 * step, 0.5)
        return low

    def _best_of_attempts(self, rate_pps: float) -> Trial:
        for _ in range(self.method.attempts):
            trial = self.trial(self._count(rate_pps), rate_pps)
            if trial.lossless:
                break
        return trial
