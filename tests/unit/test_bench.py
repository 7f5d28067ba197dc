"""The benchmark's decisions: the search for a throughput, ratios and recorded ones, quantiles, results."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import guard, histogram, report
from bench.histogram import Histogram
from bench.lanes import Setting
from bench.plan import PARTS, plan
from bench.results import PEER_METRIC, USUAL_METRIC, Results, paired
from bench.search import MIN_RATE_PPS, Method, Trial, confirm, search, throughput
from bench.streams import Streams, frame_header, word_sum
from bench.targets import BASE, GROWTH_TARGETS, KERNEL, SMCROUTE, TARGETS, XSK, ratio
from mcr.errors import McrError

METHOD = Method(
    rounds=3, trials=3, seconds=1, packets=1, resolution=0.02, steps=20, attempts=2, cost_seconds=1
)
LIMIT_PPS = 3_000_000.0


def device(capacity_pps: float, offered: list[float] | None = None) -> Callable[[float], Trial]:
    """A relay that loses everything above its capacity, behind a generator that reaches LIMIT_PPS."""

    def offer(rate_pps: float) -> Trial:
        if offered is not None:
            offered.append(rate_pps)
        reached = min(rate_pps, LIMIT_PPS)
        delivered = min(reached, capacity_pps)
        return Trial(round(reached), reached, delivered, round(reached - delivered), 0)

    return offer


@pytest.mark.parametrize("capacity_pps", [12_345.0, 200_000.0, 987_654.0, 2_950_000.0])
def test_search_finds_the_capacity_from_below(capacity_pps: float) -> None:
    offer = device(capacity_pps)
    found = search(offer, offer(LIMIT_PPS), METHOD)
    assert (1 - 2 * METHOD.resolution) * capacity_pps <= found <= capacity_pps


def test_search_counts_the_rate_reached_and_not_the_rate_asked_for() -> None:
    def offer(rate_pps: float) -> Trial:
        reached = 0.8 * rate_pps
        return Trial(round(reached), reached, min(reached, 1e6), max(0, round(reached - 1e6)), 0)

    found = search(offer, offer(LIMIT_PPS), METHOD)
    assert 0.9e6 <= found <= 1e6


def test_a_rate_is_given_up_only_when_every_attempt_lost_packets() -> None:
    offered: list[float] = []
    steady = device(1_000_000, offered)

    def unlucky_every_other_time(rate_pps: float) -> Trial:
        trial = steady(rate_pps)
        lost = trial.lost + len(offered) % 2
        return Trial(trial.sent, trial.offered_pps, trial.delivered_pps, lost, 0)

    assert search(unlucky_every_other_time, steady(LIMIT_PPS), METHOD) > 950_000


def test_a_relay_that_relays_nothing_has_no_throughput() -> None:
    offer = device(0)
    assert search(offer, offer(LIMIT_PPS), METHOD) == 0
    assert confirm(offer, 100_000, METHOD) == ()


def test_a_trial_whose_packets_wait_in_a_buffer_is_not_lossless() -> None:
    assert Trial(1000, 500_000, 499_000, 0, 0).lossless
    assert not Trial(1000, 500_000, 300_000, 0, 0).lossless
    assert not Trial(1000, 500_000, 500_000, 1, 0).lossless


def test_a_throughput_is_confirmed_by_lossless_trials_in_a_row() -> None:
    offered: list[float] = []
    trials = confirm(device(1_000_000, offered), 1_030_000, METHOD)
    assert len(trials) == METHOD.trials and all(trial.lossless for trial in trials)
    assert 950_000 < trials[0].offered_pps <= 1_000_000
    assert offered[: METHOD.attempts] == [1_030_000] * METHOD.attempts


def test_the_throughput_of_a_round_is_what_trials_in_a_row_confirm() -> None:
    offer = device(1_000_000)
    assert 0.95e6 < throughput(offer, offer(LIMIT_PPS), METHOD) <= 1e6
    assert 0.95e6 < throughput(offer, offer(LIMIT_PPS), METHOD, guess_pps=300_000) <= 1e6
    assert 0.95e6 < throughput(offer, offer(LIMIT_PPS), METHOD, guess_pps=2_900_000) <= 1e6
    assert throughput(offer, offer(800_000), METHOD) == 800_000
    assert throughput(device(0), device(0)(LIMIT_PPS), METHOD) == 0


def test_below_the_slowest_pace_nothing_is_offered() -> None:
    offered: list[float] = []
    offer = device(MIN_RATE_PPS / 2, offered)
    assert search(offer, offer(LIMIT_PPS), METHOD) == 0
    assert confirm(offer, MIN_RATE_PPS * 2, METHOD) == ()
    assert min(offered) >= MIN_RATE_PPS


@pytest.mark.parametrize(
    ("now", "fallen"), [(1.0, False), (0.81, False), (0.79, True), (None, True), (3.0, False)]
)
def test_a_ratio_falls_by_more_than_a_fifth_or_vanishes(now: float | None, fallen: bool) -> None:
    (verdict,) = guard.compare({"kernel-1": 1.0}, {} if now is None else {"kernel-1": now})
    assert verdict.fallen is fallen
    assert ("FALLEN" in str(verdict)) is fallen


def measured(throughputs: dict[tuple[str, Setting], float]) -> Results:
    results = Results({"cpu": "a", "cpus": 2, "kernel": "6.18", "load": 0.0, "mcr": "1"}, {})
    for (relay, setting), throughput_pps in throughputs.items():
        results.record(relay, setting).put("throughput_pps", [throughput_pps])
        if relay != SMCROUTE and (SMCROUTE, setting) in throughputs:
            results.record(relay, setting).put(PEER_METRIC, [throughputs[SMCROUTE, setting]])
    return results


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_medians() -> None:
    """The machine was twice as fast in the first round."""
    results = measured({})
    results.record(KERNEL, BASE).put("throughput_pps", [1000.0, 550.0, 500.0])
    results.record(KERNEL, BASE).put(PEER_METRIC, [200.0, 100.0, 100.0])
    assert results.share(KERNEL, BASE, "throughput_pps", PEER_METRIC) == 5
    results.record(XSK, BASE).put("throughput_pps", [50.0])
    results.record(XSK, BASE).put(PEER_METRIC, [100.0])
    assert ratio(KERNEL, XSK, BASE, "throughput_pps")(results) == 10
    assert ratio(KERNEL, SMCROUTE, BASE, "throughput_pps")(results) is None
    assert paired([1.0, 2.0], [1.0]) is None and paired([], []) is None
    assert paired([1.0, 3.0], [0.0, 1.0]) == 3  # a round without a throughput


def test_growth_is_measured_in_the_rounds_of_both_settings() -> None:
    results, setting = measured({}), Setting(rules=1000)
    results.record(KERNEL, setting).put("throughput_pps", [90.0, 50.0])
    results.record(KERNEL, setting).put(USUAL_METRIC, [100.0, 50.0])
    growth = next(target for target in GROWTH_TARGETS if target.name == "kernel-rules")
    assert growth.figure(results) == pytest.approx(0.95)
    assert growth.figure(measured({(KERNEL, setting): 90.0, (KERNEL, BASE): 100.0})) is None


def test_only_ratios_are_guarded() -> None:
    slow = measured({(SMCROUTE, BASE): 100.0, (KERNEL, BASE): 550.0, (XSK, BASE): 180.0})
    fast = measured({(SMCROUTE, BASE): 1000.0, (KERNEL, BASE): 5500.0, (XSK, BASE): 1800.0})
    assert guard.ratios(slow) == guard.ratios(fast) == {"kernel-1": 5.5, "worker-1": 1.8}


def test_a_run_that_lacks_a_ratio_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(McrError, match="kernel-4"):
        guard.write(tmp_path / "recorded.json", measured({(SMCROUTE, BASE): 1.0, (KERNEL, BASE): 5.0}))
    assert not (tmp_path / "recorded.json").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"ratios": {}}', '{"ratios": {"kernel-1": 0}}', '{"ratios": []}']
)
def test_a_spoiled_record_is_an_error_with_a_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recorded.json"
    path.write_text(content)
    with pytest.raises(McrError, match="cannot read"):
        guard.read(path)


def test_what_is_recorded_in_the_tree_is_of_targets_that_exist() -> None:
    assert guard.read(guard.RECORDED).keys() <= guard.GUARDED.keys()


def test_results_survive_being_written_and_read(tmp_path: Path) -> None:
    results = measured({(KERNEL, Setting(outputs=4)): 5.0})
    results.record(KERNEL, BASE).refused["throughput_pps"] = "the generator's limit is 1/s"
    results.write(tmp_path / "results.json")
    read = Results.read(tmp_path / "results.json")
    assert list(read) == list(results) and read.machine == results.machine
    spoiled = json.loads((tmp_path / "results.json").read_text()) | {"format": 0}
    (tmp_path / "results.json").write_text(json.dumps(spoiled))
    with pytest.raises(McrError, match="format 0"):
        Results.read(tmp_path / "results.json")


def test_a_refused_figure_is_told_and_gives_no_ratio() -> None:
    results = measured({(SMCROUTE, BASE): 1.0})
    results.record(KERNEL, BASE).refused["throughput_pps"] = "the generator's limit is 1/s"
    assert guard.ratios(results) == {}
    assert "refused: the generator's limit is 1/s" in report.setting_table(results, BASE)
    assert report.target_table(results, TARGETS).count("not measured") == len(TARGETS)


def test_the_document_is_changed_only_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text(f"before\n{report.BEGIN}\nold \\1\n{report.END}\nafter\n")
    report.update_document(path, "new \\1 figures")
    report.update_document(path, "newer \\1 figures")
    assert path.read_text() == f"before\n{report.BEGIN}\n\nnewer \\1 figures\n{report.END}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(ValueError, match="no place"):
        report.update_document(path, "figures")


def test_every_part_is_planned_with_each_setting_once() -> None:
    jobs = plan(PARTS, ("kernel", "xsk", "packet")).jobs
    assert len({job.setting for job in jobs}) == len(jobs) > 10
    assert [job.latency for job in jobs].count(True) == 1
    grown = {job.setting for job in jobs if job.usual}
    assert grown == {Setting(streams=n, rules=n) for n in (10, 100, 1000)} | {
        Setting(rules=n) for n in (10, 100, 1000)
    }


@pytest.mark.parametrize("latency_ns", [0, 1, 15, 16, 17, 255, 256, 1000, 4095, 4096, 10**6, 2**40 + 12345])
def test_a_latency_lies_in_its_bucket_and_quantiles_are_within_a_sixteenth(latency_ns: int) -> None:
    bucket = next(
        index for index in range(histogram.BUCKETS) if latency_ns < histogram.lower_bound_ns(index + 1)
    )
    assert histogram.lower_bound_ns(bucket) <= latency_ns
    buckets = [0] * histogram.BUCKETS
    buckets[bucket] = 100
    found = Histogram(tuple(buckets), latency_ns).quantile_ns(0.99)
    assert abs(found - latency_ns) <= latency_ns / 16


def test_quantiles_of_two_kinds_of_packets() -> None:
    buckets = [0] * histogram.BUCKETS
    buckets[10], buckets[100] = 99, 1
    both = Histogram(tuple(buckets), histogram.lower_bound_ns(100))
    assert both.packets == 100
    assert 10 <= both.quantile_ns(0.5) <= 11
    assert both.quantile_ns(0.999) == histogram.lower_bound_ns(100)
    assert Histogram((0,) * histogram.BUCKETS, 0).quantile_ns(0.99) == 0


def test_a_frame_header_has_the_lengths_and_the_checksum_of_its_stream() -> None:
    header = frame_header(Streams("239.1.2.3", 5000, payload_bytes=512))
    assert header[:6] == bytes.fromhex("01005e010203")
    total = word_sum(header[14:34])
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF
    assert struct.unpack_from("!H", header, 16)[0] == 512 + 28
    assert struct.unpack_from("!HHHH", header, 34) == (40000, 5000, 520, 0)


@pytest.mark.parametrize(
    ("group", "port", "count", "payload_bytes"),
    [
        ("10.0.0.1", 5000, 1, 64),
        ("239.1.0.1", 65535, 2, 64),
        ("239.1.0.1", 5000, 1, 15),
        ("239.1.0.1", 0, 1, 64),
    ],
)
def test_streams_that_do_not_exist_are_refused(group: str, port: int, count: int, payload_bytes: int) -> None:
    with pytest.raises(McrError):
        Streams(group, port, count, payload_bytes)
