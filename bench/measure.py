"""How relays are measured against each other in one setting: lanes, rounds, and when a figure is refused.

Every relay has a lane of its own, all alike, as long as relays are compared, so that trials alternate among
them. One more lane has no relay: it tells what generator and sink do by themselves, in the same rounds. This
module must never take a figure for a relay's when the generator or a sink was the limit.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

from bench.histogram import Histogram
from bench.lanes import Ground, Lane, Setting
from bench.machine import CpuTime
from bench.relays import Relay, RelayRefusedError
from bench.results import DIRECT_LABEL, LATENCY_SHARES, PEER_LABEL, PEER_METRIC, USUAL_METRIC, Record, Results
from bench.search import MIN_RATE_PPS, Method, Trial, throughput
from bench.streams import Streams
from bench.traffic import Programs, Sent, Traffic, burst_packets
from mcr.errors import McrError
from tests.netns.lab import Lab

LIMIT_SHARE = 0.9  # of what generator and sink do without a relay: from there on a figure is theirs
REACHED_SHARE = 0.9  # of the rate asked for: below it a figure at that rate is refused
PROBE_PACKETS = 100_000
LOSSLESS_REPEATS = 3  # in a round, of relays that lose nothing at overload, whose throughput is one trial
MAX_PACKETS = 50_000_000
LONGEST_TRIAL_S = 1.0  # that the least number of packets makes
GROUP, PORT = "239.1.0.1", 5000
COST_SHARE = 0.8  # of throughput, at which CPU time is measured and no worker may run out of frames
COUNTERS_FRESH_S = 1.2  # a worker's counters are brought up to date every second
LATENCY_BURSTS_S = (1e-6, 1e-5, 1e-4)  # tried in turn until the generator reaches the rate
QUANTILES = (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure in one setting.

    latency: also at shares of the throughput. usual: relays that run in the usual setting beside the others,
    of which they are, to tell what the setting makes of a throughput.
    """

    setting: Setting
    relays: tuple[Relay, ...]
    latency: bool = False
    usual: tuple[Relay, ...] = ()


def streams_of(setting: Setting) -> Streams:
    """What is sent. Several differ in group, since kernel multicast routing knows nothing else."""
    return Streams(GROUP, PORT, setting.streams, setting.payload_bytes, setting.rules > 1)


def installed_of(setting: Setting) -> Streams:
    """What there are rules for."""
    return Streams(GROUP, PORT, setting.rules, setting.payload_bytes, setting.rules > 1)


class Runner:
    """Offers rates on one lane and counts what arrives at its sinks."""

    def __init__(self, traffic: Traffic, lane: Lane, streams: Streams, method: Method) -> None:
        self.traffic, self.lane, self.streams, self.method = traffic, lane, streams, method
        self.last_pps = 0.0  # the throughput of the last round
        self._flat_out_pps = 0.0

    def trial(self, count: int, rate_pps: float, *, timed: bool = False) -> Trial:
        """Offers count packets; rate_pps 0 is flat out. Raises McrError if more arrive than were sent."""
        before = CpuTime.now()
        self.traffic.begin_trial(self.lane.sinks, timed)
        sent = self.traffic.send(self.lane.sources, self.streams, count, rate_pps)
        arrived = self.traffic.settle(self.lane.sinks, sent.packets)
        used = CpuTime.now().since(before)
        if any(each.packets > sent.packets for each in arrived):
            raise McrError("more packets arrived than were sent", "this is a bug of the relay or of bench")
        received = sum(each.packets for each in arrived)
        return Trial(
            sent=sent.packets,
            offered_pps=sent.rate_pps,
            delivered_pps=received / len(arrived) / _span_s(sent, [each.last_ns for each in arrived]),
            lost=sent.packets * len(arrived) - received,
            late=sum(each.late for each in arrived),
            busy_ns=max(0, used.busy_ns - sent.waited_ns),
            stolen_ns=used.stolen_ns,
        )

    def offer(self, rate_pps: float) -> Trial:
        """A rate for as long as a trial takes, and long enough that buffers do not pass for throughput."""
        count = max(self._count(rate_pps), min(self.method.packets, int(rate_pps * LONGEST_TRIAL_S)))
        return self.trial(count, rate_pps)

    def flat_out(self) -> Trial:
        """All that the generator can, for as long as a trial takes."""
        if not self._flat_out_pps:
            self._flat_out_pps = self.trial(min(PROBE_PACKETS, self._count(1e7)), 0).offered_pps
        trial = self.trial(self._count(self._flat_out_pps), 0)
        self._flat_out_pps = trial.offered_pps
        return trial

    def timed(self, rate_pps: float, burst_s: float) -> tuple[Trial, Histogram]:
        """A rate, with the latency of each packet from the generator, where it waits burst_s, to the sink."""
        usual, self.traffic.burst_s = self.traffic.burst_s, burst_s
        try:
            return self.trial(self._count(rate_pps), rate_pps, timed=True), self.traffic.latency()
        finally:
            self.traffic.burst_s = usual

    def _count(self, rate_pps: float) -> int:
        return min(MAX_PACKETS, max(1000, int(rate_pps * self.method.seconds)))


def _span_s(sent: Sent, last_ns: Sequence[int]) -> float:
    """From the first packet offered to the last one that left or arrived."""
    return max(sent.elapsed_s, (max(last_ns) - sent.first_ns) / 1e9)


class Bench:
    """Measures jobs, one after another, into results."""

    def __init__(
        self, new_lab: Callable[[], Lab], programs: Programs, method: Method, progress: Progress
    ) -> None:
        self.new_lab, self.programs, self.method, self.progress = new_lab, programs, method, progress

    def measure(self, job: Job, results: Results) -> None:
        """Every relay of the job that can do it; the others are refused in the results."""
        with Comparison(self, job, results) as comparison:
            comparison.rounds()
            comparison.cost()
            if job.latency:
                comparison.latency()
            comparison.memory()


class Comparison:
    """One job's lanes, with its relays running in them until the block ends."""

    def __init__(self, bench: Bench, job: Job, results: Results) -> None:
        self.job, self.results, self.method, self.progress = job, results, bench.method, bench.progress
        self._bench = bench
        self._stack = ExitStack()
        self.runners: dict[str, Runner] = {}
        self.relays: dict[str, Relay] = {}
        self._usual: dict[str, Runner] = {}  # of the relays in the usual setting

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.lab = stack.enter_context(self._bench.new_lab())
            self.ground = Ground(self.lab, self.job.setting)
            self.traffic = stack.enter_context(
                Traffic(self._bench.programs, self.lab, self.ground.source, self.ground.sink)
            )
            lane = self.ground.direct()
            self.runners[DIRECT_LABEL] = self._runner(lane, self.job.setting)
            for relay in self.job.relays:
                stack.callback(relay.stop)
                if runner := self._start(relay, self.job.setting):
                    self.runners[relay.label], self.relays[relay.label] = runner, relay
            for relay in self.job.usual:
                stack.callback(relay.stop)
                if relay.label in self.relays and (runner := self._start(relay, Setting())):
                    self._usual[relay.label] = runner
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def record(self, label: str) -> Record:
        return self.results.record(label, self.job.setting)

    def _runner(self, lane: Lane, setting: Setting, relay: Relay | None = None) -> Runner:
        streams = streams_of(setting)
        for index, interface in enumerate(lane.sinks):
            expected = relay.destination(lane, streams, index) if relay else streams
            self.traffic.expect(interface, expected, frames=relay is None or relay.sends_frames)
        return Runner(self.traffic, lane, streams, self.method)

    def _start(self, relay: Relay, setting: Setting) -> Runner | None:
        """Starts it on a lane of its own; None, with the reason in the results, if it cannot do it."""
        lane = self.ground.lane()
        try:
            relay.start(self.lab, lane, installed_of(setting))
        except RelayRefusedError as error:
            self.record(relay.label).refused["throughput_pps"] = str(error)
            self.say(relay.label, f"not measured: {error}")
            return None
        return self._runner(lane, setting, relay)

    def say(self, label: str, text: str) -> None:
        self.progress(f"{self.job.setting.title}: {label}: {text}")

    def rounds(self) -> None:
        """Overload and the search for the throughput, of each relay in turn, round after round."""
        taken = {label: _Taken() for label in self.runners}
        for number in range(self.method.rounds):
            for label in self.runners:
                for _ in range(LOSSLESS_REPEATS):
                    self._take(label, taken[label])
                    if not taken[label].overloads[-1].lossless:
                        break  # its search takes long
                told = _described(taken[label].throughputs, taken[label].overloads[-1])
                self.say(label, f"round {number + 1}: {told}")
        self._check_direct(taken[DIRECT_LABEL].overloads)
        for label, each in taken.items():
            self._put_rounds(label, each)
        for label in self.relays:
            self._refuse_limits(self.record(label), len(self.runners[label].lane.sinks))

    def _take(self, label: str, taken: "_Taken") -> None:
        """Measures a relay once, and the peer before and after it, because the machine's speed changes."""
        runner, relay = self.runners[label], self.relays.get(label)
        peer = self.runners.get(PEER_LABEL) if relay and label != PEER_LABEL else None
        before_pps = _throughput(peer, peer.flat_out()) if peer else 0.0
        if usual := self._usual.get(label):
            taken.usual.append(_throughput(usual, usual.flat_out()))
        overload = runner.flat_out()
        taken.overloads.append(overload)
        if relay is None:
            taken.throughputs.append(overload.offered_pps)
        elif relay.has_throughput:
            taken.throughputs.append(_throughput(runner, overload))
        if peer:
            taken.peer.append((before_pps + _throughput(peer, peer.flat_out())) / 2)
        if relay:
            relay.check_alive()

    def _check_direct(self, trials: list[Trial]) -> None:
        if not any(trial.lossless for trial in trials):
            raise McrError(
                "packets were lost between generator and sink, without a relay", "give the machine more rest"
            )

    def _put_rounds(self, label: str, taken: "_Taken") -> None:
        record, overloads = self.record(label), taken.overloads
        record.put("overload_offered_pps", [trial.offered_pps for trial in overloads])
        record.put("overload_delivered_pps", [trial.delivered_pps for trial in overloads])
        sinks = len(self.runners[label].lane.sinks)
        record.put("overload_loss_share", [trial.lost / (trial.sent * sinks) for trial in overloads])
        record.put("stolen_ms", [trial.stolen_ns / 1e6 for trial in overloads])
        record.put(PEER_METRIC, taken.peer)
        record.put(USUAL_METRIC, taken.usual)
        if not taken.throughputs:
            return
        record.put("throughput_pps", taken.throughputs)
        if not record.metrics["throughput_pps"]:
            del record.metrics["throughput_pps"]
            record.refused["throughput_pps"] = (
                f"in most rounds no rate was lossless in {self.method.trials} trials"
            )
            self.say(label, record.refused["throughput_pps"])

    def _refuse_limits(self, record: Record, sinks: int) -> None:
        """Takes back what was the generator's or the sinks' figure and not the relay's."""
        limit_pps = self.record(DIRECT_LABEL).metrics["throughput_pps"]
        rates = {
            "throughput_pps": record.metrics.get("throughput_pps", 0.0),
            "overload_delivered_pps": record.metrics["overload_delivered_pps"],
        }
        for metric, rate_pps in rates.items():
            if rate_pps > LIMIT_SHARE * limit_pps:
                record.refused[metric] = f"the generator's limit is {limit_pps:,.0f}/s"
            elif rate_pps * sinks > LIMIT_SHARE * limit_pps:
                record.refused[metric] = f"the sinks' limit is {limit_pps:,.0f}/s"
            if metric in record.refused and record.metrics.pop(metric, None) is not None:
                self.say(record.relay, f"{metric} refused: {record.refused[metric]}")

    def cost(self) -> None:
        """At COST_SHARE of the throughput: CPU time for each packet, and how often a worker had no frame."""
        time.sleep(COUNTERS_FRESH_S)
        before = {label: relay.exhausted_frames() for label, relay in self.relays.items()}
        for label, runner in self.runners.items():
            if throughput_pps := self.record(label).metrics.get("throughput_pps"):
                rate_pps = COST_SHARE * throughput_pps
                trial = runner.trial(int(rate_pps * self.method.cost_seconds), rate_pps)
                self.record(label).put("cpu_ns_per_packet", [trial.busy_ns / trial.sent])
        time.sleep(COUNTERS_FRESH_S)
        for label, earlier in before.items():
            later = self.relays[label].exhausted_frames()
            if "cpu_ns_per_packet" in self.record(label).metrics and later is not None:
                self.record(label).put("frames_exhausted", [later - (earlier or 0)])

    def latency(self) -> None:
        """At LATENCY_SHARES of the throughput, the relays in turn."""
        taken: dict[str, dict[str, list[float]]] = {label: {} for label in self.runners}
        for _ in range(self.method.trials):
            for label, runner in self.runners.items():
                throughput_pps = self.record(label).metrics.get("throughput_pps")
                for share in LATENCY_SHARES if throughput_pps else ():
                    self._latency_at(runner, label, share, share / 100 * (throughput_pps or 0), taken[label])
        for label, metrics in taken.items():
            for metric, trials in metrics.items():
                if metric not in self.record(label).refused:
                    self.record(label).put(metric, trials)
            if middle := self.record(label).metrics.get("latency_50_p99_us"):
                self.say(label, f"latency p99 at 50 % of throughput {middle:.1f} µs")

    def _latency_at(
        self, runner: Runner, label: str, share: int, rate_pps: float, taken: dict[str, list[float]]
    ) -> None:
        rate_pps = max(MIN_RATE_PPS, rate_pps)
        for burst_s in LATENCY_BURSTS_S:
            trial, histogram = runner.timed(rate_pps, burst_s)
            if trial.offered_pps >= REACHED_SHARE * rate_pps:
                break
        if trial.offered_pps < REACHED_SHARE * rate_pps:
            reason = f"the generator reached {trial.offered_pps:,.0f} of {rate_pps:,.0f}/s"
            for name in (*(name for name, _ in QUANTILES), "max"):
                self.record(label).refused[f"latency_{share}_{name}_us"] = reason
            return
        for name, quantile in QUANTILES:
            taken.setdefault(f"latency_{share}_{name}_us", []).append(histogram.quantile_ns(quantile) / 1e3)
        taken.setdefault(f"latency_{share}_max_us", []).append(histogram.longest_ns / 1e3)
        taken.setdefault(f"latency_{share}_burst", []).append(burst_packets(rate_pps, burst_s))

    def memory(self) -> None:
        for label, relay in self.relays.items():
            for metric, megabytes in relay.memory().items():
                self.record(label).put(metric, [megabytes])


@dataclass(slots=True)
class _Taken:
    """What was measured of one relay. peer, usual: the throughput of others next to each of its own."""

    overloads: list[Trial] = field(default_factory=list)
    throughputs: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)


def _throughput(runner: Runner, overload: Trial) -> float:
    """In this round, from what it was in the last one on."""
    runner.last_pps = throughput(runner.offer, overload, runner.method, runner.last_pps)
    return runner.last_pps


def _described(throughputs: Sequence[float], overload: Trial) -> str:
    found = f"throughput {throughputs[-1]:,.0f}/s, " if throughputs else ""
    return f"{found}delivered {overload.delivered_pps:,.0f}/s of {overload.offered_pps:,.0f}/s"
