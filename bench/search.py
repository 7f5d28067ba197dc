"""The search for the throughput: the highest offered rate at which nothing is lost (RFC 1242 section 3.17).

Pure: whoever calls offers the rates and counts. What counts is the rate that the generator reached, never
the one that it was asked for. A rate is given up only when every attempt lost packets, because a machine that
shares its CPUs loses some now and then; and a throughput stands only when several trials of it in a row lost
nothing.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

MIN_RATE_PPS = 5_000  # below it the generator does not keep its pace
FIRST_STEP = 0.1
LAST_STEP = 0.5
FIRST_CONFIRM_STEP = 0.04
LAST_CONFIRM_STEP = 0.3
CONFIRM_RATES = 10
KEEP_UP_SHARE = 0.95  # of the rate offered, that must be delivered


@dataclass(frozen=True, slots=True)
class Method:
    """How thoroughly to measure.

    rounds: in which every relay is measured in turn. trials: lossless ones in a row that confirm a
    throughput. seconds: of one trial at one rate (RFC 2544 section 24 says 60). packets: that a search offers
    in a trial at least, many more than a relay's buffers hold, if a second is enough for them. resolution:
    share of the throughput at which the search ends. steps: after which it ends anyway. attempts: see above.
    cost_seconds: of the trial that tells CPU time, which the kernel counts in ticks of 10 ms.
    """

    rounds: int
    trials: int
    seconds: float
    packets: int
    resolution: float
    steps: int
    attempts: int
    cost_seconds: float


FULL = Method(
    rounds=6, trials=3, seconds=0.15, packets=100_000, resolution=0.03, steps=8, attempts=2, cost_seconds=1.0
)
QUICK = Method(
    rounds=5, trials=3, seconds=0.1, packets=50_000, resolution=0.05, steps=5, attempts=2, cost_seconds=0.3
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One rate offered once. Rates are packets/s: offered at the inputs, delivered at each output (mean).

    busy_ns: CPU time of the whole machine, without what the generator waited for due times. stolen_ns: what
    the host took meanwhile.
    """

    sent: int
    offered_pps: float
    delivered_pps: float
    lost: int
    late: int
    busy_ns: int = 0
    stolen_ns: int = 0

    @property
    def lossless(self) -> bool:
        """Nothing was lost, and nothing is owed to buffers that only a short trial does not fill."""
        return self.lost == 0 and self.delivered_pps >= KEEP_UP_SHARE * self.offered_pps


Offer = Callable[[float], Trial]
"""Offers a rate in packets/s once."""


def throughput(offer: Offer, overload: Trial, method: Method, guess_pps: float = 0.0) -> float:
    """What a search finds and trials in a row confirm, in packets/s; 0 if no rate has lossless trials.

    guess_pps: where to begin, 0 to begin with what the overload delivered.
    """
    if overload.lossless:
        return overload.offered_pps
    row = confirm(offer, search(offer, overload, method, guess_pps), method)
    return statistics.median(trial.offered_pps for trial in row) if row else 0.0


def search(offer: Offer, overload: Trial, method: Method, guess_pps: float = 0.0) -> float:
    """The highest rate without loss, between none and that of the overload (RFC 2544 section 26.1)."""
    low, high, reached, step = 0.0, overload.offered_pps, 0.0, FIRST_STEP
    rate = min(guess_pps or overload.delivered_pps, 0.95 * high)
    for _ in range(method.steps):
        if rate < MIN_RATE_PPS:
            break
        trial = _best_of_attempts(offer, rate, method.attempts)
        if trial.lossless:
            low, reached = rate, max(reached, trial.offered_pps)
        else:
            high = rate
        if high - low <= method.resolution * high:
            break
        rate = high * (1 - step) if low == 0 else min(low * (1 + step), (low + high) / 2)
        step = min(2 * step, LAST_STEP)
    return reached


def _best_of_attempts(offer: Offer, rate_pps: float, attempts: int) -> Trial:
    for _ in range(attempts):
        trial = offer(rate_pps)
        if trial.lossless:
            break
    return trial


def confirm(offer: Offer, rate_pps: float, method: Method) -> tuple[Trial, ...]:
    """Lossless trials in a row, at this rate or the next below that has them; none if no rate has."""
    step = FIRST_CONFIRM_STEP
    for _ in range(CONFIRM_RATES):
        if rate_pps < MIN_RATE_PPS:
            break
        for _ in range(method.attempts):
            if row := _all_lossless(offer, rate_pps, method.trials):
                return row
        rate_pps *= 1 - step
        step = min(2 * step, LAST_CONFIRM_STEP)
    return ()


def _all_lossless(offer: Offer, rate_pps: float, trials: int) -> tuple[Trial, ...]:
    row = []
    for _ in range(trials):
        row.append(offer(rate_pps))
        if not row[-1].lossless:
            return ()
    return tuple(row)
