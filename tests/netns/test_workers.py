"""Several workers of one interface: who gets which packets, and what happens when one of them ends.

Every packet is handled once: by the worker whose queue it came in by, or whom the fanout group chose.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mcr._bpf import lib

import mcr
from mcr import procfs, worker
from mcr.control import ControlClient
from mcr.desired import WorkerSetup
from mcr.errors import McrError
from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    Report,
    assert_whole,
    config,
    dropped,
    relay_one,
    send,
    stats,
    wait_until,
)
from tests.netns.lab import Lab, Namespace, RelayTopology
from tests.netns.many_flows import FlowSink, ManyFlows

CAM = ("cam", GROUP_IN, [GROUP_OUT])
POOL_FRAMES = 8192
FOLLOWED_S, ASKING_S = 1.0, 0.5


def control(lab: Lab, relay: Namespace) -> ControlClient:
    return ControlClient(lab.runtime_directory / f"{relay.name}.sock")


def workers(client: ControlClient) -> list[Report]:
    return [row for row in client.call("status") if row["object"] == "worker"]


def pids(client: ControlClient) -> list[int]:
    return [row["pid"] for row in workers(client)]


def interface(client: ControlClient) -> Report:
    return next(row for row in client.call("status") if row["object"] == "interface")


def thread_cpus(pid: int) -> list[str]:
    """The CPUs that each thread may run on."""
    found = []
    for thread in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda each: int(each.name)):
        lines = (thread / "status").read_text().splitlines()
        found += [line.split()[1] for line in lines if line.startswith("Cpus_allowed_list:")]
    return found


def shares(client: ControlClient) -> list[str]:
    """The queues of each worker that runs."""
    return [row["queues"] for row in workers(client) if row["state"] == "running"]


def attachment(ingress: str, workers: int, *more: str) -> str:
    return "\n".join((f'ingress = "{ingress}"', f"workers = {workers}", *more))


def flows(lab: Lab, topology: RelayTopology) -> ManyFlows:
    return ManyFlows(lab, topology.src, "239.1.1.1", 5000)


def flow_sink(lab: Lab, topology: RelayTopology) -> FlowSink:
    return FlowSink(lab, topology.dst, "239.2.2.2", 6000)


def start(lab: Lab, ingress: str, count: int, *more: str) -> tuple[RelayTopology, ControlClient]:
    topology = lab.topology_relay(queues=4 if ingress == "xsk" else 1)
    lab.supervisor(
        topology.relay, config=config(CAM, attach=attachment(ingress, count, *more), path="worker")
    )
    return topology, control(lab, topology.relay)


@pytest.mark.parametrize("ingress", ["xsk", pytest.param("packet", marks=pytest.mark.soak)])
def test_two_workers_on_cpus_of_their_own_relay_every_packet_once_and_in_order(
    lab: Lab, ingress: str
) -> None:
    topology, client = start(lab, ingress, 2, 'cpus = "1,0"')
    rows = workers(client)
    assert [row["queues"] for row in rows] == (["0-1", "2-3"] if ingress == "xsk" else ["", ""])
    assert [row["cpus"] for row in rows] == ["1", "0"]
    assert [set(thread_cpus(row["pid"])) for row in rows] == [{"1"}, {"0"}]
    with flows(lab, topology) as source, flow_sink(lab, topology) as sink:
        for _ in range(100):
            source.send(1)
            sink.take()
        sink.take_all(source.total)
        # What this host itself sends by the interface is not its input.
        send(lab, topology.relay, GROUP_IN, "--count", "100")
        source.send(1)
        sink.take_all(source.total)
        sink.assert_no_doubles()
        sink.assert_in_order()
        assert len(sink.heard) == source.total
    handled = [row["packets"] for row in workers(client)]
    assert sum(handled) == interface(client)["packets"] == source.total
    assert min(handled) > 0


@pytest.mark.parametrize("ingress", [pytest.param("xsk", marks=pytest.mark.soak), "packet"])
def test_a_killed_worker_costs_no_packet_of_the_others(lab: Lab, ingress: str) -> None:
    topology, client = start(lab, ingress, 2)
    before = pids(client)
    with flows(lab, topology) as source, flow_sink(lab, topology) as sink:
        os.kill(before[0], signal.SIGKILL)
        while pids(client)[0] in (before[0], None) or interface(client)["reason"]:
            source.send(5)
            sink.take()
        source.send(20)
        missing = dropped(client.call("stats")[0])
        sink.take_all(source.total - sum(missing.values()), idle_s=2)
        sink.assert_no_doubles()
        sink.assert_in_order()
        in_its_hands = source.total - sum(missing.values()) - len(sink.heard)
        if ingress == "packet":  # what arrives meanwhile waits in the socket
            assert (missing, in_its_hands) == ({}, 0)
        else:
            assert set(missing) <= {"no_worker", "worker_died"}
            assert 0 <= in_its_hands <= POOL_FRAMES
    rows = workers(client)
    assert [row["restarts"] for row in rows] == [1, 0]
    assert rows[1]["pid"] == before[1]


def test_more_receive_queues_are_followed_within_a_second_by_those_whom_they_concern(lab: Lab) -> None:
    topology = lab.topology_relay(queues=4)
    for end, name, queues in ((topology.relay, "in0", "rx"), (topology.src, "eth0", "tx")):
        lab.run(end, ["ethtool", "-L", name, queues, "2"])
    lab.supervisor(topology.relay, config=config(CAM, attach=attachment("xsk", 2), path="worker"))
    client = control(lab, topology.relay)
    assert shares(client) == ["0", "1"]
    first, second = pids(client)
    with flows(lab, topology) as source, flow_sink(lab, topology) as sink:

        def change(queues: str, expected: list[str]) -> None:
            lab.run(topology.relay, ["ethtool", "-L", "in0", "rx", queues])
            lab.run(topology.src, ["ethtool", "-L", "eth0", "tx", queues])
            changed_s = time.monotonic()
            while shares(client) != expected:
                assert time.monotonic() - changed_s < FOLLOWED_S + ASKING_S, workers(client)
                source.send(1)
                sink.take()

        change("3", ["0", "1-2"])
        assert pids(client)[0] == first
        assert pids(client)[1] != second
        change("4", ["0-1", "2-3"])
        before = source.sent[0]
        source.send(20)
        sink.wait_for(source, before)
        sink.assert_no_doubles()
        sink.assert_in_order()
        assert set(dropped(client.call("stats")[0])) <= {"no_worker"}
    assert [row["restarts"] for row in workers(client)] == [0, 0]
    # The kernel takes no queue away that has an AF_XDP socket.
    refused = lab.run(topology.relay, ["ethtool", "-L", "in0", "rx", "2"], check=False)
    assert "AF_XDP" in refused.stderr
    assert shares(client) == ["0-1", "2-3"]


def said_of_workers(lab: Lab, relay: Namespace) -> tuple[int, list[tuple[str, str, str]]]:
    """The exit status of `mcr doctor in0`, and what it says of each worker."""
    asked = lab.mcr(relay, "doctor", "in0", "-j", check=False, timeout_s=120)
    rows = [row for row in json.loads(asked.stdout) if row["interface"] == "in0"]
    found = [(row["check"], row["answer"], row["evidence"]) for row in rows]
    return asked.returncode, [
        each for each in found if each[0] == "attached" or each[0].startswith("worker ")
    ]


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: procfs.state(pid) == "T", "a worker that is stopped")


def test_explain_and_doctor_speak_of_each_worker(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCR_TIME_SCALE", "20")  # a worker is not ended for its silence meanwhile
    topology, client = start(lab, "xsk", 2)
    first, second = pids(client)
    attached = ("attached", "yes", "native XDP, ingress xsk")

    def explained() -> tuple[str, str, list[str]]:
        rows = client.call("explain", stream=GROUP_IN)
        (row,) = [row for row in rows if row["object"] == "input"]
        causes = [row["cause"] for row in rows if row.get("about") == "worker"]
        return rows[0]["verdict"], row["workers"], causes

    assert explained() == ("relayed", f"{first}, {second}", [])
    of_first, of_second = f"{first}, queues 0-1", f"{second}, queues 2-3"
    whole = [attached, ("worker 0", "yes", of_first), ("worker 1", "yes", of_second)]
    assert said_of_workers(lab, topology.relay) == (0, whole)
    try:
        stop(second)
        stopped = f"worker {second} of in0, queues 2-3 is stopped and relays nothing"
        assert explained() == ("partly relayed", f"{first}, {second}", [stopped])
        of_second = f"{second} is stopped"
        partly = [attached, ("worker 0", "yes", of_first), ("worker 1", "no", of_second)]
        assert said_of_workers(lab, topology.relay) == (1, partly)
        stop(first)
        too = f"worker {first} of in0, queues 0-1 is stopped and relays nothing"
        assert explained() == ("dropped", f"{first}, {second}", [too, stopped])
    finally:
        for pid in (first, second):
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: explained()[0] == "relayed", "both workers")
    assert pids(client) == [first, second]


@pytest.mark.soak
def test_queues_that_are_taken_away_while_their_worker_is_down_are_followed(lab: Lab) -> None:
    topology, client = start(lab, "xsk", 2)
    lab.run(topology.src, ["ethtool", "-L", "eth0", "tx", "1"])
    for _ in range(6):  # the delay grows to 3.2 s
        wait_until(lambda: len(shares(client)) == 2, "both workers", timeout_s=30)
        for pid in pids(client):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: shares(client) == [], "their end")
    fewer = ["ethtool", "-L", "in0", "rx", "1"]  # a queue is free a moment after its socket has been closed
    wait_until(lambda: lab.run(topology.relay, fewer, check=False).returncode == 0, "fewer queues")
    wait_until(lambda: shares(client) == ["0"], "one worker", timeout_s=FOLLOWED_S + ASKING_S)
    assert workers(client)[1]["reason"] == "no receive queue is left for it"
    assert interface(client)["state"] == "attached"
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)


def test_what_workers_cannot_have_is_an_error_with_cause_and_remedy(lab: Lab) -> None:
    topology = lab.topology_relay(queues=2)
    lab.supervisor(topology.relay)
    for options, cause in (
        (("--cpus", "0,4095"), "CPU 4095 is not among those that the supervisor may use"),
        (("--cpus", "4095"), "CPU 4095 is not among those that the supervisor may use"),
    ):
        done = lab.mcr(topology.relay, "attach", "in0", *options, check=False)
        assert done.returncode == 1
        assert cause in done.stderr
        assert done.stderr.count("\n") == 2
        assert "xdp" not in lab.ip(topology.relay, "link show in0")
    many = lab.directory / "many.toml"
    many.write_text("".join(f'[[attach]]\ninterface = "{name}"\nworkers = 33\n' for name in ("in0", "out0")))
    other = Namespace(f"{topology.relay.name}-b")
    argv = [sys.executable, "-m", "mcr.cli.main", "--instance", other.name, "run", "-c", str(many)]
    done = lab.run(topology.relay, argv, check=False)
    assert (done.returncode, "more than 64 workers" in done.stderr) == (1, True), done.stderr


def test_rules_that_are_added_at_the_same_time_are_all_kept(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(CAM))
    client = control(lab, topology.relay)

    def add(number: int) -> None:
        stream, to = f"239.1.2.{number}%in0:5000", [f"10.2.0.2:{7000 + number}"]
        control(lab, topology.relay).call("rule.add", **{"name": f"r{number}", "from": stream, "to": to})

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(add, range(1, 25)))
    assert {row["rule"] for row in client.call("rule.show")} == {"cam", *(f"r{n}" for n in range(1, 25))}


SETUP = WorkerSetup(
    interface="lo", ifindex=1, slot=0, ingress="packet", zero_copy="off", busy_poll=False,
    verify_checksums=True, queue_first=0, queue_count=1, frame_size=2048, frame_count=8192,
    user_id=0, group_id=0,
)  # fmt: skip


def test_a_worker_of_another_version_is_refused_with_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "HELLO", "mcr 99.0.0 ABI 99")

    async def session() -> None:
        process = await worker.WorkerProcess.spawn("in0")
        try:
            with pytest.raises(McrError) as refused:
                await process.set_up(SETUP, ())
        finally:
            process.kill()
            await process.end()
        own = f"mcr {mcr.__version__} ABI {lib.MCR_ABI_VERSION:08x}"
        cause = f"the worker is {own}, but the supervisor is mcr 99.0.0 ABI 99"
        assert refused.value == McrError(cause, "restart the supervisor")

    asyncio.run(session())


PARENT = """
import asyncio, os, signal
from mcr.worker import WorkerProcess
async def start():
    process = await WorkerProcess.spawn("in0")
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(start())
"""


def test_a_worker_whose_supervisor_dies_before_its_set_up_ends() -> None:
    parent = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    told = Path(f"/proc/{int(parent.stdout)}/stat")
    wait_until(lambda: not told.exists() or told.read_text().split()[2] == "Z", "its end")


def test_a_crash_loop_is_reported_once_and_everywhere(lab: Lab) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, "--metrics", "127.0.0.1:9931", config=config(CAM))
    client = control(lab, topology.relay)
    for _ in range(5):
        assert not workers(client)[0]["crash_loop"]
        wait_until(lambda: workers(client)[0]["state"] == "running", "a worker")
        os.kill(pids(client)[0], signal.SIGKILL)
        wait_until(lambda: workers(client)[0]["state"] == "pending", "its end")
    assert workers(client)[0]["crash_loop"]
    assert supervisor.output().count("crash loop") == 1
    assert "in0: crash loop of worker 0" in lab.mcr(topology.relay, "status").stdout
    with lab.inside(topology.relay), urllib.request.urlopen("http://127.0.0.1:9931/metrics") as answer:
        assert 'mcr_worker_crash_loop{interface="in0",worker="0"} 1.0' in answer.read().decode()


@pytest.mark.soak
def test_a_crash_loop_is_over_after_a_minute_of_health(lab: Lab) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, config=config(CAM))
    client = control(lab, topology.relay)
    for _ in range(8):
        wait_until(lambda: workers(client)[0]["state"] == "running", "a worker", timeout_s=30)
        os.kill(pids(client)[0], signal.SIGKILL)
        wait_until(lambda: workers(client)[0]["state"] == "pending", "its end")
    assert supervisor.output().count("crash loop") == 1
    wait_until(lambda: not workers(client)[0]["crash_loop"], "stable", timeout_s=100)
    assert supervisor.output().count("stable again") == 1


@pytest.mark.soak
@pytest.mark.parametrize("ingress", ["xsk", "packet"])
def test_a_million_datagrams_arrive_whole_with_two_workers(lab: Lab, ingress: str) -> None:
    topology = lab.topology_relay(queues=2)
    lab.supervisor(topology.relay, config=config(CAM, attach=attachment(ingress, 2)))
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1_000_000, "--rate", "100000")
    assert_whole(heard, sent)
    rule, output = stats(lab, topology.relay)
    assert (rule["relayed_packets"], output["sent_packets"], dropped(rule)) == (1_000_000, 1_000_000, {})
