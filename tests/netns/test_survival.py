"""The supervisor survives what a system does to it: no IPv6, no descriptors, no CPU time, no socket file.

Each of these is done to a real supervisor by the means of the system; what relays meanwhile must go on, and
what was lost must come back without help.
"""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from mcr._bpf import ffi, lib

from mcr.attached import NOBODY
from mcr.control import ControlClient
from mcr.desired import FRAME_COUNT, InterfaceSpec, WorkerSetup
from mcr.errors import McrError
from mcr.features import PASS_PROGRAM
from mcr.seat import Seat
from mcr.worker import WorkerProcess
from tests.kernel.packets import GROUP, IPV4, ethernet, ipv4, udp
from tests.netns.driven import FRAME_SIZE, loaded
from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    Report,
    assert_accounted,
    config,
    dropped,
    relay_one,
    stats,
    status,
    wait_until,
)
from tests.netns.lab import Lab, Namespace, Process, RelayTopology
from tests.netns.many_flows import FlowSink, ManyFlows
from tests.netns.wire import Source

CAM = ("cam", GROUP_IN, [GROUP_OUT])
HERE = Path(__file__).parent
BURST = 64
PATIENCE_S = 60.0  # for what comes back without help
HELD_UP_S = 4.5  # longer than a worker may be silent


def control(lab: Lab, relay: Namespace) -> ControlClient:
    return ControlClient(lab.runtime_directory / f"{relay.name}.sock", timeout_s=30)


def mcr_run(relay: Namespace, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "mcr.cli.main", "--instance", relay.name, "run", *arguments]


def relays(lab: Lab, topology: RelayTopology, count: int = 1000) -> None:
    """Every packet, whole."""
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, count, "--rate", "5000")
    assert (heard["packets"], heard["lost"], heard["corrupt"]) == (sent["packets"], 0, 0), heard


def settled(lab: Lab, relay: Namespace) -> None:
    """Returns when everything that is under way is in place."""
    with control(lab, relay) as client:
        client.call("reload")


@contextlib.contextmanager
def intruder(lab: Lab, namespace: Namespace, interface: str) -> Iterator[None]:
    """Another XDP program on an interface."""
    code, log = ffi.from_buffer(PASS_PROGRAM), ffi.new("char[]", 4096)
    with lab.inside(namespace):
        program = lib.mcr_load_program(lib.MCR_PROGRAM_XDP, b"intruder", code, 2, log, len(log))
        link = lib.mcr_link_xdp(program, socket.if_nametoindex(interface), 0)
    os.close(program)
    assert link >= 0
    try:
        yield
    finally:
        os.close(link)


@contextlib.contextmanager
def no_descriptors(supervisor: Process) -> Iterator[None]:
    """The supervisor can open nothing more."""
    before = resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, before)


# --- sockets that cannot be opened


def test_an_output_whose_socket_cannot_be_opened_waits_and_the_others_relay(lab: Lab) -> None:
    topology = lab.topology_relay()
    both = ("both", "239.1.1.2%in0:5000", ["239.2.2.3%out0:6000", "[ff3e::2]%out0:6000"])
    path = lab.directory / "mixed.toml"
    path.write_text(config(CAM, both, path="worker"))
    argv = mcr_run(topology.relay, "-c", str(path))
    supervisor = lab.spawn(topology.relay, [sys.executable, str(HERE / "without_ipv6.py"), *argv])
    supervisor.wait_for("mcr: ready", PATIENCE_S)
    relays(lab, topology)
    sent, heard = relay_one(lab, topology, "239.1.1.2%eth0:5000", "239.2.2.3%eth0:6000", 500)
    assert (sent["packets"], heard["packets"]) == (500, 500)

    rows = {row["to"].partition("%")[0]: row for row in lab.ask(topology.relay, "rule.show")}
    refused = rows["[ff3e::2]"]
    assert refused["output_state"] == "pending"
    assert refused["output_reason"].endswith("Address family not supported by protocol")
    assert {row["output_state"] for to, row in rows.items() if to != "[ff3e::2]"} == {"active"}
    assert status(lab, topology.relay)["state"] == "attached"

    words = ("rule", "add", "six", "--from", "239.1.1.3%in0:5000", "--to", "[ff3e::4]%out0:6000")
    done = lab.mcr(topology.relay, *words, "--path", "worker", check=False)
    assert done.returncode == 1
    assert "cannot open output [ff3e::4]%out0:6000: Address family not supported" in done.stderr
    assert "remedy: use IPv4 alone, or start the kernel with IPv6" in done.stderr
    assert "six" not in {row["rule"] for row in lab.ask(topology.relay, "rule.show")}
    assert "Traceback" not in supervisor.output()
    assert supervisor.terminate() == 0


def test_a_worker_that_dies_while_no_descriptor_is_free_is_replaced_when_there_are(lab: Lab) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, config=config(CAM, path="worker"))
    with control(lab, topology.relay) as client:  # connected before there are no descriptors

        def worker() -> Report:
            return next(row for row in client.call("status") if row["object"] == "worker")

        before = worker()["pid"]
        with no_descriptors(supervisor):
            os.kill(before, signal.SIGKILL)
            wait_until(lambda: "Too many open files" in worker()["reason"], "its reason", PATIENCE_S)
        wait_until(lambda: worker()["state"] == "running", "another worker", PATIENCE_S)
        assert worker()["pid"] != before
    relays(lab, topology)
    assert "Traceback" not in supervisor.output()
    assert supervisor.terminate() == 0


def test_what_was_pending_is_attached_after_a_time_without_descriptors(lab: Lab) -> None:
    topology = lab.topology_relay()
    with contextlib.ExitStack() as stack:
        stack.enter_context(intruder(lab, topology.relay, "in0"))
        supervisor = lab.supervisor(topology.relay, config=config(CAM))
        assert "intruder" in status(lab, topology.relay)["reason"]
        with no_descriptors(supervisor):
            supervisor.wait_for("Too many open files", PATIENCE_S)
        stack.close()
    wait_until(lambda: status(lab, topology.relay)["state"] == "attached", "attached", PATIENCE_S)
    settled(lab, topology.relay)
    relays(lab, topology)
    assert "never retrieved" not in supervisor.output()


def test_a_worker_whose_cpu_has_gone_is_replaced_when_it_is_back(lab: Lab) -> None:
    topology = lab.topology_relay()

    with lab.inside(topology.relay):
        ifindex = socket.if_nametoindex("in0")
    possible = WorkerSetup(
        interface="in0",
        ifindex=ifindex,
        slot=1,
        ingress="xsk",
        zero_copy="auto",
        busy_poll=False,
        verify_checksums=True,
        queue_first=0,
        queue_count=1,
        frame_size=FRAME_SIZE,
        frame_count=FRAME_COUNT,
        user_id=NOBODY,
        group_id=NOBODY,
        egress_threads=0,
        cpus=(),
    )

    async def session(seat: Seat) -> None:
        with pytest.raises(McrError, match="cannot run on CPU 4095: Invalid argument"):
            await WorkerProcess.spawn("in0", 4095)
        await seat.start(replace(possible, cpus=(4095,)), InterfaceSpec(), None, patiently=True)
        assert seat.pending.endswith("a worker cannot run on CPU 4095: Invalid argument")
        seat.setup = possible  # the CPU is back
        async with asyncio.timeout(PATIENCE_S):
            while seat.pending:
                await asyncio.sleep(0.01)
        await seat.stop()

    async def nothing(*_: object) -> None:
        pass

    with loaded(lab, topology.relay) as maps:
        asyncio.run(session(Seat("in0", 0, 1, 0, maps, nothing)))


@pytest.mark.parametrize("limit", [20, 30, 36, 40])
def test_a_limit_of_open_files_that_is_too_low_is_one_clear_error(lab: Lab, limit: int) -> None:
    relay = lab.namespace("relay")
    argv = ["prlimit", f"--nofile={limit}:{limit}", *mcr_run(relay)]
    done = lab.run(relay, argv, check=False, timeout_s=PATIENCE_S)
    assert done.returncode == 1
    cause, remedy = done.stderr.splitlines()[-2:]
    assert cause.startswith("mcr: ")
    assert cause.endswith("Too many open files")
    assert "raise the limit of open files (ulimit -n" in remedy
    assert lab.leftovers(relay) == []


# --- time


@pytest.mark.parametrize("ingress", ["xsk"])
def test_a_worker_that_answered_while_the_supervisor_was_stopped_is_healthy(lab: Lab, ingress: str) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, config=config(CAM, path="worker"))
    before = status(lab, topology.relay)["worker_pid"]
    os.kill(before, signal.SIGSTOP)
    try:
        time.sleep(2.0)  # a sign of life is asked for every second: now one is
        os.kill(supervisor.pid, signal.SIGSTOP)
    finally:
        os.kill(before, signal.SIGCONT)
    time.sleep(HELD_UP_S)
    os.kill(supervisor.pid, signal.SIGCONT)
    relays(lab, topology)
    assert status(lab, topology.relay)["worker_pid"] == before
    assert_accounted(lab, topology.relay, 1000)
    assert "no answer" not in supervisor.output()


def test_interfaces_that_another_program_holds_delay_no_answer(lab: Lab) -> None:
    topology = lab.topology_relay()
    for number in range(3):
        lab.ip(topology.relay, f"link add held{number} type veth peer name peer{number}")
    attach = "".join(f'[[attach]]\ninterface = "held{number}"\n' for number in range(3))
    with contextlib.ExitStack() as stack:
        for number in range(3):
            stack.enter_context(intruder(lab, topology.relay, f"held{number}"))
        lab.supervisor(topology.relay, config=config(CAM) + attach)
        with control(lab, topology.relay) as client:
            longest_s, until_s = 0.0, time.monotonic() + 12  # two attempts
            while (began_s := time.monotonic()) < until_s:
                rows = [row for row in client.call("status") if row["object"] == "interface"]
                longest_s = max(longest_s, time.monotonic() - began_s)
                time.sleep(0.05)
            assert sum("intruder" in row["reason"] for row in rows) == 3
        assert longest_s < 0.8


def test_a_storm_of_link_events_is_followed_by_few_turns(lab: Lab) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, "--log-level", "debug", config=config(CAM))
    events = 300
    batch = lab.directory / "storm"
    batch.write_text("".join(f"link set in0 promisc {('on', 'off')[n % 2]}\n" for n in range(events)))
    lab.run(topology.relay, ["ip", "-batch", str(batch)], timeout_s=PATIENCE_S)
    relays(lab, topology)
    assert supervisor.output().count("the links have changed") < events / 4


# --- queues


def test_more_workers_than_queues_relay_with_those_that_have_one(lab: Lab) -> None:
    topology = lab.topology_relay(queues=2)
    for end, name, queues in ((topology.relay, "in0", "rx"), (topology.src, "eth0", "tx")):
        lab.run(end, ["ethtool", "-L", name, queues, "1"])
    attach = 'ingress = "xsk"\nworkers = 2'
    supervisor = lab.supervisor(topology.relay, config=config(CAM, attach=attach, path="worker"))
    row = status(lab, topology.relay)
    assert (row["state"], row["reason"], row["shortfall"]) == ("attached", "", "1 of 2 workers: 1 queue")
    assert "in0: 1 of 2 workers: 1 queue\n" in lab.mcr(topology.relay, "status").stdout
    relays(lab, topology)
    assert supervisor.output().count("1 of 2 workers: 1 queue") == 1
    for end, name, queues in ((topology.relay, "in0", "rx"), (topology.src, "eth0", "tx")):
        lab.run(end, ["ethtool", "-L", name, queues, "2"])

    def workers() -> list[tuple[str, str]]:
        rows = (row for row in lab.ask(topology.relay, "status") if row["object"] == "worker")
        return [(row["state"], row["queues"]) for row in rows]

    wait_until(lambda: workers() == [("running", "0"), ("running", "1")], "both workers", PATIENCE_S)
    settled(lab, topology.relay)
    assert status(lab, topology.relay)["shortfall"] == ""
    relays(lab, topology)


def test_queues_above_the_most_drop_what_comes_by_them_and_are_said_once(lab: Lab) -> None:
    topology = lab.topology_relay(queues=80)
    for end, name, queues in ((topology.relay, "in0", "rx"), (topology.src, "eth0", "tx")):
        lab.run(end, ["ethtool", "-L", name, queues, "64"])
    second = '[[attach]]\ninterface = "out0"\n'  # whose sockets follow those of in0 in the map
    supervisor = lab.supervisor(topology.relay, config=config(CAM, path="worker") + second)
    for end, name, queues in ((topology.relay, "in0", "rx"), (topology.src, "eth0", "tx")):
        lab.run(end, ["ethtool", "-L", name, queues, "80"])

    def shortfall() -> str:
        rows = lab.ask(topology.relay, "status")
        return next(str(row["shortfall"]) for row in rows if row.get("interface") == "in0")

    wait_until(
        lambda: shortfall().startswith("64 of 80 receive queues are drained"), "the shortfall", PATIENCE_S
    )
    with (
        ManyFlows(lab, topology.src, "239.1.1.1", 5000) as source,
        FlowSink(lab, topology.dst, "239.2.2.2", 6000) as sink,
    ):
        for _ in range(20):
            source.send(1)
            sink.take()
        wait_until(
            lambda: stats(lab, topology.relay)[0]["received_packets"] == source.total,
            "all of them",
            PATIENCE_S,
        )
        missing = dropped(stats(lab, topology.relay)[0])
        sink.take_all(source.total - sum(missing.values()))
        assert set(missing) == {"no_worker"}
    assert supervisor.output().count("in0: 64 of 80 receive queues are drained") == 1
    assert "ERROR" not in supervisor.output()


def test_an_interface_that_is_made_anew_again_and_again_is_no_crash_loop(lab: Lab) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, config=config(CAM, path="worker"))

    def worker() -> Report:
        return next(row for row in lab.ask(topology.relay, "status") if row["object"] == "worker")

    for _ in range(6):
        wait_until(lambda: worker()["state"] == "running", "a worker", PATIENCE_S)
        os.kill(worker()["pid"], signal.SIGKILL)  # as a device that goes may do
        lab.ip(topology.relay, "link delete in0")
        wait_until(lambda: status(lab, topology.relay)["state"] == "pending", "its end", PATIENCE_S)
        lab.veth(topology.src, "eth0", topology.relay, "in0", addresses_a=("10.1.0.1/24",))
        wait_until(lambda: status(lab, topology.relay)["state"] == "attached", "attached", PATIENCE_S)
        settled(lab, topology.relay)
    assert (worker()["state"], worker()["crash_loop"]) == ("running", False)
    assert "crash loop" not in supervisor.output()
    relays(lab, topology)


# --- files


def test_a_control_socket_whose_file_is_removed_comes_back_and_lets_no_second_supervisor_in(lab: Lab) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, config=config(CAM))
    path = lab.runtime_directory / f"{topology.relay.name}.sock"
    pins = sorted(Path(f"/sys/fs/bpf/mcr/{topology.relay.name}").iterdir())
    for everything in (False, True):
        shutil.rmtree(lab.runtime_directory) if everything else path.unlink()
        for namespace in (topology.relay, topology.dst):  # the pins are those of all network namespaces
            second = lab.run(namespace, mcr_run(topology.relay), check=False)
            assert second.returncode == 1
            assert f"a supervisor of instance {topology.relay.name} is already running" in second.stderr
            assert second.stderr.count("\n") == 2, second.stderr
        wait_until(path.exists, "the socket", PATIENCE_S)
        assert status(lab, topology.relay)["state"] == "attached"
    assert sorted(Path(f"/sys/fs/bpf/mcr/{topology.relay.name}").iterdir()) == pins
    relays(lab, topology)
    assert supervisor.terminate() == 0
    assert lab.leftovers(topology.relay) == []


def test_of_two_supervisors_that_start_at_once_exactly_one_runs(lab: Lab) -> None:
    topology = lab.topology_relay()
    racers = [lab.spawn(topology.relay, mcr_run(topology.relay)) for _ in range(2)]
    wait_until(lambda: any("mcr: ready" in racer.output() for racer in racers), "one is ready", PATIENCE_S)
    (winner,) = [racer for racer in racers if "mcr: ready" in racer.output()]
    (loser,) = [racer for racer in racers if racer is not winner]
    assert loser.wait() == 1
    assert loser.output().count("\n") == 2, loser.output()
    assert "is already running" in loser.output()
    assert lab.ask(topology.relay, "status")
    assert winner.terminate() == 0
    assert lab.leftovers(topology.relay) == []


def test_a_log_that_cannot_be_written_ends_no_relay(lab: Lab) -> None:
    topology = lab.topology_relay()
    path = lab.directory / "full.toml"
    path.write_text(config(CAM, path="worker"))
    argv = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh", *mcr_run(topology.relay, "-c", str(path))]
    supervisor = lab.spawn(topology.relay, argv)

    def attached() -> bool:
        with contextlib.suppress(McrError):
            return bool(status(lab, topology.relay)["state"] == "attached")
        return False

    wait_until(attached, "ready", PATIENCE_S)
    os.kill(status(lab, topology.relay)["worker_pid"], signal.SIGKILL)  # which is logged
    wait_until(lambda: status(lab, topology.relay)["worker_restarts"] == 1, "another worker", PATIENCE_S)
    wait_until(attached, "attached", PATIENCE_S)
    relays(lab, topology)
    assert supervisor.terminate() == 0
    assert lab.leftovers(topology.relay) == []


# --- a start that is ended


def started(lab: Lab, relay: Namespace, moment: str) -> bool:
    """Whether a start has come as far as that."""
    pins = Path("/sys/fs/bpf/mcr")
    match moment:
        case "locked":
            return (pins / f"{relay.name}~lock").exists()
        case "compiling":
            return (pins / f"{relay.name}~new").exists()
        case "loaded":
            return (pins / relay.name).exists()
        case _:
            return "xdp" in lab.ip(relay, "link show in0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["locked", "compiling", "loaded", "attached"])
def test_a_signal_during_the_start_ends_it_at_once_and_leaves_nothing(
    lab: Lab, moment: str, number: signal.Signals
) -> None:
    topology = lab.topology_relay()
    path = lab.directory / "start.toml"
    path.write_text(config(CAM, path="worker"))
    supervisor = lab.spawn(topology.relay, mcr_run(topology.relay, "-c", str(path)))
    wait_until(lambda: started(lab, topology.relay, moment), moment, PATIENCE_S)
    supervisor.child.send_signal(number)
    signalled_s = time.monotonic()
    assert supervisor.wait(PATIENCE_S) == 0
    assert time.monotonic() - signalled_s < 4.0
    assert "Traceback" not in supervisor.output()
    assert lab.leftovers(topology.relay) == []


# --- segments that the kernel refuses


def test_a_source_that_is_refused_costs_the_others_no_segments(lab: Lab) -> None:
    """What the kernel refuses for another reason than its size says nothing about segments."""
    topology = lab.topology_relay()
    output = "239.2.2.2%out0:6000,source=preserve"
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [output]), path="worker"))

    def sends() -> int:
        row = json.loads(lab.ip(topology.relay, "-s -j link show dev out0"))[0]
        return int(row["stats64"]["tx"]["packets"])

    def burst(frame: bytes) -> None:
        """Arrives at once."""
        pid = status(lab, topology.relay)["worker_pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(BURST):
                source.send(frame)
        finally:
            os.kill(pid, signal.SIGCONT)

    def sent() -> int:
        return int(stats(lab, topology.relay)[1]["sent_packets"])

    with Source(lab, topology.src) as source:
        before = sends()
        burst(ethernet(ipv4(udp(b"good")), IPV4))
        wait_until(lambda: sent() == BURST, "the first burst", PATIENCE_S)
        assert sends() - before == 1
        refused = IPv4Address("127.0.0.1")
        burst(ethernet(ipv4(udp(b"bad", refused.packed + GROUP.packed), source=refused), IPV4))
        wait_until(
            lambda: dropped(stats(lab, topology.relay)[1]) == {"send_error": BURST}, "the drops", PATIENCE_S
        )
        before = sends()
        burst(ethernet(ipv4(udp(b"good")), IPV4))
        wait_until(lambda: sent() == 2 * BURST, "the last burst", PATIENCE_S)
        assert sends() - before == 1
