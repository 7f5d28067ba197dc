"""Latency histograms: where their buckets lie, and what quantiles they give."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcr.latency import BUCKETS, UPPER_BOUNDS_NS, Latency, lower_bound_ns


def bucket_of(time_ns: int) -> int:
    return next((index for index, end in enumerate(UPPER_BOUNDS_NS) if time_ns < end), BUCKETS - 1)


def histogram(times_ns: list[int]) -> Latency:
    buckets = [0] * BUCKETS
    for time_ns in times_ns:
        buckets[bucket_of(time_ns)] += 1
    return Latency(len(times_ns), sum(times_ns), max(times_ns, default=0), tuple(buckets))


def test_buckets_are_those_that_the_abi_describes() -> None:
    assert UPPER_BOUNDS_NS[:10] == (512, 576, 640, 704, 768, 832, 896, 960, 1024, 1152)
    assert [lower_bound_ns(bucket) for bucket in (0, 1, 9, 17)] == [0, 512, 1024, 2048]
    assert lower_bound_ns(BUCKETS) == 1 << 32
    assert len(UPPER_BOUNDS_NS) == BUCKETS - 1


def test_no_bucket_is_wider_than_an_eighth_of_where_it_begins() -> None:
    for bucket in range(1, BUCKETS):
        width = lower_bound_ns(bucket + 1) - lower_bound_ns(bucket)
        assert 0 < width <= lower_bound_ns(bucket) / 8


def test_a_bucket_that_is_none_is_refused() -> None:
    for bucket in (-1, BUCKETS + 1):
        with pytest.raises(IndexError):
            lower_bound_ns(bucket)


def test_nothing_measured_has_no_quantile() -> None:
    assert histogram([]).quantile_ns(0.5) is None


@pytest.mark.parametrize("quantile", [-0.1, 1.1, float("nan")])
def test_a_quantile_outside_0_to_1_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        histogram([1000]).quantile_ns(quantile)


def test_a_quantile_is_interpolated_within_its_bucket() -> None:
    buckets = [0] * BUCKETS
    buckets[bucket_of(1024)] = 100  # 1024 to 1151
    measured = Latency(100, 110_000, 1_000_000, tuple(buckets))
    assert measured.quantile_ns(0.25) == 1024 + 128 * 0.25
    assert measured.quantile_ns(1) == 1152


def test_the_last_bucket_ends_at_the_longest_time() -> None:
    assert histogram([10_000_000_000]).quantile_ns(1) == 10_000_000_000


@given(st.lists(st.integers(512, 4_000_000_000), min_size=1, max_size=200), st.floats(0.01, 1))
def test_a_quantile_is_within_an_eighth_of_the_exact_one(times_ns: list[int], quantile: float) -> None:
    exact = sorted(times_ns)[max(0, -int(-quantile * len(times_ns) // 1) - 1)]
    estimated = histogram(times_ns).quantile_ns(quantile)
    assert estimated is not None
    assert exact * 7 / 8 <= estimated <= exact * 9 / 8


def test_what_came_after_an_earlier_reading() -> None:
    earlier, later = histogram([600, 2000]), histogram([600, 2000, 3000, 700])
    added = later.since(earlier)
    assert (added.count, added.sum_ns, added.max_ns) == (2, 3700, 3000)
    assert added.buckets == histogram([3000, 700]).buckets
