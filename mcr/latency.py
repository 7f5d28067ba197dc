"""How long packets took: the histogram of a rule, its buckets and its quantiles.

Pure: `maps.py` reads the counters, and this computes what they mean. The buckets are those of
`struct mcr_latency` (relay_abi.h): the first is below 512 ns, then every octave has 8 of equal width, and the
last has no upper bound. This module must never read a map or a clock.
"""

from dataclasses import dataclass

from mcr._bpf import lib

FIRST_BITS: int = lib.MCR_LATENCY_FIRST_BITS
STEP_BITS: int = lib.MCR_LATENCY_STEP_BITS
BUCKETS: int = lib.MCR_LATENCY_BUCKETS


def lower_bound_ns(bucket: int) -> int:
    """The shortest time that the bucket counts, in ns; of bucket `BUCKETS`, the end of them all."""
    if not 0 <= bucket <= BUCKETS:
        raise IndexError(bucket)
    if bucket == 0:
        return 0
    octave, step = divmod(bucket - 1, 1 << STEP_BITS)
    return ((1 << STEP_BITS) + step) << (FIRST_BITS - STEP_BITS + octave)


UPPER_BOUNDS_NS: tuple[int, ...] = tuple(lower_bound_ns(bucket) for bucket in range(1, BUCKETS))
"""Where each bucket ends, itself not included; the last bucket, which has no end, is left out."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Times from the receive to the completed send, of each packet and output. buckets has BUCKETS counts."""

    count: int
    sum_ns: int
    max_ns: int
    buckets: tuple[int, ...]

    def quantile_ns(self, quantile: float) -> float | None:
        """The time that this share (0 to 1) of the packets took at most; None where there were none.

        Interpolated within its bucket, so that it is wrong by an eighth at most; above 4.3 s by more.
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"the quantile {quantile} is not between 0 and 1")
        total = sum(self.buckets)  # not count: a worker may be between the two
        wanted, before = quantile * total, 0
        for bucket, packets in enumerate(self.buckets):
            if packets and before + packets >= wanted:
                start = lower_bound_ns(bucket)
                end = max(start, min(self.max_ns, self._end_ns(bucket)))
                return start + (end - start) * (wanted - before) / packets
            before += packets
        return None

    def since(self, earlier: "Latency") -> "Latency":
        """What was added after an earlier reading. max_ns stays that of the whole time."""
        return Latency(
            self.count - earlier.count,
            self.sum_ns - earlier.sum_ns,
            self.max_ns,
            tuple(now - then for now, then in zip(self.buckets, earlier.buckets, strict=True)),
        )

    def _end_ns(self, bucket: int) -> int:
        return UPPER_BOUNDS_NS[bucket] if bucket < len(UPPER_BOUNDS_NS) else self.max_ns
