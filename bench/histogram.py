"""The latencies of one trial as the sinks count them (traffic_kern.c), and their quantiles.

Pure: it must never read a map.
"""

from dataclasses import dataclass

STEP_BITS = 4  # this and the next: as in traffic_kern.c
BUCKETS = 1024


def lower_bound_ns(bucket: int) -> int:
    """The shortest latency that a bucket counts."""
    if bucket < 1 << STEP_BITS:
        return bucket
    octave, step = divmod(bucket, 1 << STEP_BITS)
    return ((1 << STEP_BITS) + step) << (octave - 1)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Packets by latency. A quantile is wrong by a sixteenth at most."""

    buckets: tuple[int, ...]
    longest_ns: int

    @property
    def packets(self) -> int:
        return sum(self.buckets)

    def quantile_ns(self, quantile: float) -> float:
        """The latency that this share (0 to 1) of the packets took at most; 0 where there were none."""
        wanted, before = quantile * self.packets, 0
        for bucket, packets in enumerate(self.buckets):
            if packets and before + packets >= wanted:
                start = lower_bound_ns(bucket)
                end = min(lower_bound_ns(bucket + 1), max(start, self.longest_ns))
                return start + (end - start) * (wanted - before) / packets
            before += packets
        return float(self.longest_ns)
