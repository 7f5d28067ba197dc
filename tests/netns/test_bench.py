"""The benchmark works: its traffic is counted exactly, and a short run with MCR gives every figure."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.lanes import Ground, Setting
from bench.measure import Bench, Job, Runner, streams_of
from bench.relays import Mcr
from bench.report import markdown
from bench.results import DIRECT_LABEL, Results
from bench.search import Method
from bench.traffic import Programs, Traffic
from tests.netns.lab import Lab

SHORT = Method(
    rounds=1, trials=1, seconds=0.02, packets=1, resolution=0.3, steps=3, attempts=3, cost_seconds=0.1
)


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with Programs() as loaded:
        yield loaded


def test_generator_and_sink_count_every_packet_of_every_stream(lab: Lab, programs: Programs) -> None:
    setting = Setting(streams=7, rules=7)
    ground = Ground(lab, setting)
    lane = ground.direct()
    with Traffic(programs, lab, ground.source, ground.sink) as traffic:
        traffic.expect(lane.sinks[0], streams_of(setting), frames=True)
        runner = Runner(traffic, lane, streams_of(setting), SHORT)
        for count in (1, 6, 7, 20_000):
            trial, latencies = runner.timed(50_000, 1e-6) if count == 1 else (runner.trial(count, 0), None)
            assert trial.lost == trial.late == 0
            assert latencies is None or latencies.packets == trial.sent == 1000
        paced = runner.trial(2000, 20_000)
        assert 0 < paced.offered_pps < 1.02 * 20_000
        assert traffic.arrived(lane.sinks[0]).packets == 2000


def test_a_short_run_gives_every_figure_of_the_worker_path(
    lab_prefixes: Iterator[str], tmp_path: Path, lab: Lab, programs: Programs
) -> None:
    del lab  # it has checked that there is root
    said: list[str] = []
    results = Results(
        {"cpu": "-", "cpus": 2, "kernel": "-", "load": 0.0, "mcr": "-"}, {"rounds": 1, "seconds": 0.02}
    )

    def new_lab() -> Lab:
        place = tmp_path / "b"  # short, for the sockets in it
        place.mkdir()
        return Lab(next(lab_prefixes), place)

    job = Job(Setting(), (Mcr("xsk"),), latency=True)
    Bench(new_lab, programs, SHORT, said.append).measure(job, results)
    for label in (DIRECT_LABEL, "MCR xsk"):
        record = results.find(label, Setting())
        assert record is not None and record.metrics["overload_offered_pps"] > 0
        assert record.refused or record.metrics["latency_10_p99_us"] > 0
    worker = results.find("MCR xsk", Setting())
    assert worker is not None and worker.metrics["overload_delivered_pps"] > 0
    assert worker.refused or worker.metrics["frames_exhausted"] == 0
    assert 5 < worker.metrics["worker_mb"] < worker.metrics["supervisor_mb"]
    assert "| MCR xsk |" in markdown(results) and said
