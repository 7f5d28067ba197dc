"""Egress threads: the exact delivery of one thread, full pipes accounted for, no output held up by others."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from mcr.errors import McrError
from mcr.maps import Maps, OutputCounts
from tests.conftest import require
from tests.netns.driven import driven, loaded
from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    assert_accounted,
    assert_whole,
    config,
    listen,
    relay_one,
    report,
    send,
    status,
    wait_until,
)
from tests.netns.lab import Lab, Namespace, RelayTopology
from tests.netns.test_confinement import proc_status

Ingress = Literal["xsk", "packet"]
OUTPUTS = [GROUP_OUT, "10.2.0.2:6001", "[fd02::2]:6002"]
HEARD = [GROUP_HEARD, "10.2.0.2%eth0:6001", "[fd02::2]%eth0:6002"]


def relay_exactly(lab: Lab, ingress: str, threads: int, count: int, rate: int) -> None:
    topology = lab.topology_relay()
    attach = f'ingress = "{ingress}"\negress_threads = {threads}'
    supervisor = lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, OUTPUTS), attach=attach))
    sinks = [
        listen(lab, topology.dst, stream, "--expect", str(count), "--idle", "8", "--digest")
        for stream in HEARD
    ]
    options = ("--rate", str(rate), "--size", "1316,1316,1316,700,0", "--digest")
    sent = send(lab, topology.src, GROUP_SENT, "--count", str(count), *options)
    for sink in sinks:
        assert_whole(report(sink), sent)
    assert_accounted(lab, topology.relay, count)
    assert supervisor.terminate() == 0
    assert "ERROR" not in supervisor.output()


async def relay_by_driven(
    lab: Lab, topology: RelayTopology, maps: Maps, ingress: Ingress, threads: int
) -> None:
    count = 15_000
    async with driven(maps, ingress, egress_threads=threads) as relay:
        for output_id, output in enumerate(OUTPUTS, 1):
            await relay.add_output(output_id, output)
        await relay.set_rule(1, GROUP_IN, range(1, len(OUTPUTS) + 1))
        sinks = [
            listen(lab, topology.dst, stream, "--expect", str(count), "--idle", "8", "--digest")
            for stream in HEARD
        ]
        options = ("--rate", "20000", "--size", "1316,1316,1316,700,0", "--digest")
        sent = send(lab, topology.src, GROUP_SENT, "--count", str(count), *options)
        for sink in sinks:
            assert_whole(report(sink), sent)


@pytest.mark.parametrize(("ingress", "threads"), [("xsk", 1), ("packet", 2)])
def test_stream_arrives_whole_and_in_order_by_egress_threads(
    lab: Lab, ingress: Ingress, threads: int
) -> None:
    topology = lab.topology_relay()
    with loaded(lab, topology.relay) as maps:
        asyncio.run(relay_by_driven(lab, topology, maps, ingress, threads))


@pytest.mark.soak
@pytest.mark.parametrize("ingress", ["xsk", "packet"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_million_datagrams_arrive_whole_by_egress_threads(lab: Lab, ingress: str, threads: int) -> None:
    relay_exactly(lab, ingress, threads, 1_000_000, 25_000)


@pytest.mark.parametrize("ingress", ["xsk", pytest.param("packet", marks=pytest.mark.soak)])
def test_every_thread_is_confined_and_the_worker_is_small(lab: Lab, ingress: str) -> None:
    topology = lab.topology_relay()
    attach = f'ingress = "{ingress}"\negress_threads = 2'
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, OUTPUTS), attach=attach))
    row = status(lab, topology.relay)
    tasks = sorted(Path(f"/proc/{row['worker_pid']}/task").iterdir())
    told = [proc_status(row["worker_pid"], int(task.name)) for task in tasks]
    assert [task["Name"] for task in told][1:] == ["mcr-egress-0", "mcr-egress-1"]
    for task in told:
        assert {int(task[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
        assert (task["NoNewPrivs"], task["Seccomp"]) == ("1", "2")
        assert (task["Uid"].split(), task["Groups"]) == (["65534"] * 4, "")
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 5000, "--rate", "10000")
    assert_whole(heard, sent)
    pool_mb = 8192 * 2048 / 1e6
    resident_mb = int(proc_status(row["worker_pid"])["VmRSS"].split()[0]) * 1024 / 1e6
    assert resident_mb - pool_mb < 30
    assert row["pipe_bytes"] == 8192 // 2 * 32


async def cpus_of_threads(maps: Maps, cpus: tuple[int, ...]) -> list[str]:
    async with driven(maps, "xsk", egress_threads=2, cpus=cpus) as relay:
        pid = relay.worker.pid
        tasks = sorted(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())
        return [proc_status(pid, task)["Cpus_allowed_list"] for task in tasks]


def test_threads_run_on_the_cpus_that_they_are_given(lab: Lab) -> None:
    topology = lab.topology_relay()
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    anywhere = proc_status(os.getpid())["Cpus_allowed_list"]
    with loaded(lab, topology.relay) as maps:
        found = asyncio.run(cpus_of_threads(maps, (first, last, -1)))
        assert found == [str(first), str(last), anywhere]
        with pytest.raises(McrError, match="CPU 1000"):
            asyncio.run(cpus_of_threads(maps, (first, 1000, -1)))


def assert_balanced(counts: OutputCounts, relayed: int) -> None:
    assert counts.relayed_packets == relayed
    assert counts.sent_packets + sum(counts.dropped.values()) == relayed


def youngest_thread(pid: int) -> int:
    return max(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())


@contextmanager
def starved(thread: int, cpu: int) -> Iterator[None]:
    """A thread gets next to nothing of its CPU, because another process wants all of it."""
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    busy = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


async def flood(lab: Lab, src: Namespace, maps: Maps, ingress: Ingress, outputs: int, packets: int) -> None:
    """All that the source can send, to a thread that cannot serve it."""
    last = max(os.sched_getaffinity(0))
    async with driven(maps, ingress, egress_threads=1, cpus=(-1, last)) as relay:
        for output_id in range(1, outputs + 1):
            await relay.add_output(output_id, f"10.2.0.2:{7000 + output_id}")
        await relay.set_rule(1, GROUP_IN, range(1, outputs + 1))
        with starved(youngest_thread(relay.worker.pid), last):
            send(lab, src, GROUP_SENT, "--count", str(packets), "--rate", "1000000")
            if ingress == "xsk":
                wait_until(lambda: maps.rule_counts(1).received_packets == packets, "received by XDP")
        await relay.delete_rule(1, GROUP_IN)  # acknowledged when every thread is done with it
        await relay.worker.ping()
        lost = maps.worker_counts(1)
        counts = maps.rule_counts(1)
        dropped = sum(counts.dropped.values()) + lost.receive_ring_full + lost.fill_ring_empty
        assert counts.received_packets == counts.relayed_packets + dropped
        assert (lost.frames_fill, lost.frames_in_flight) == (8192 - lost.frames_receive, 0)
        every = [maps.output_counts(output_id) for output_id in range(1, outputs + 1)]
        for output in every:
            assert_balanced(output, counts.relayed_packets)
            assert output.dropped["pipe_full"] > 0


@pytest.mark.parametrize("ingress", ["xsk", pytest.param("packet", marks=pytest.mark.soak)])
def test_what_a_full_pipe_drops_is_counted_to_the_packet(lab: Lab, ingress: Ingress) -> None:
    require("two CPUs", len(os.sched_getaffinity(0)) > 1, "one CPU: nothing else could run")
    topology = lab.topology_relay()
    with loaded(lab, topology.relay) as maps:
        asyncio.run(flood(lab, topology.src, maps, ingress, 8, 60_000))


async def relay_beside_starved(lab: Lab, src: Namespace, maps: Maps, packets: int) -> None:
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    async with driven(maps, "xsk", egress_threads=2, cpus=(first, first, last)) as relay:
        await relay.add_output(1, "10.2.0.2:7001")  # of the second thread
        await relay.add_output(2, "10.2.0.2:7002")  # of the first
        await relay.set_rule(1, GROUP_IN, [1, 2])
        with starved(youngest_thread(relay.worker.pid), last):
            send(lab, src, GROUP_SENT, "--count", str(packets), "--rate", "20000")
        await relay.delete_rule(1, GROUP_IN)
    counts = maps.rule_counts(1)
    assert (counts.received_packets, counts.relayed_packets) == (packets, packets)
    held_up, other = maps.output_counts(1), maps.output_counts(2)
    assert_balanced(held_up, packets)
    assert held_up.dropped["pipe_full"] > 0
    assert other.sent_packets == packets, other


def test_a_thread_that_is_behind_holds_up_only_its_own_outputs(lab: Lab) -> None:
    require("two CPUs", len(os.sched_getaffinity(0)) > 1, "one CPU: nothing else could run")
    topology = lab.topology_relay()
    with loaded(lab, topology.relay) as maps:
        asyncio.run(relay_beside_starved(lab, topology.src, maps, 40_000))
