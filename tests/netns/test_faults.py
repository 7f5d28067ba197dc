"""Each classic fault is named by `mcr doctor` or `mcr explain`, in one line, with its remedy in the next.

One relay serves all of them; each fault is made for real, and taken away again:

     src                          relay                          dst
    +------------------+         +--------------------+         +------------------+
    | eth0 10.1.0.1    |---------| in0           out0 |---------| eth0 10.2.0.2    |
    +------------------+         | spare0 -- spare1   |         +------------------+
                                 +--------------------+
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
from mcr._bpf import ffi, lib

from mcr.control import ControlClient
from mcr.errors import McrError
from mcr.features import PASS_PROGRAM
from tests.conftest import require
from tests.netns.flows import Report, dropped, send, stats, status, wait_until
from tests.netns.lab import Lab, RelayTopology

CAM = "239.1.1.1%in0:5000"
SENT = "239.1.1.1%eth0:5000"
COUNT = 20
DOCTOR_S = 120.0  # it compiles, which takes long on a busy machine


@dataclass(frozen=True, slots=True)
class Bench:
    """A relay that attaches in0 and has no rule."""

    lab: Lab
    topology: RelayTopology

    def ask(self, *arguments: str) -> str:
        """What a command prints."""
        return self.lab.mcr(self.topology.relay, *arguments, check=False).stdout

    def rows(self, *arguments: str) -> list[Report]:
        """What a command prints with -j."""
        rows: list[Report] = json.loads(self.ask(*arguments, "-j"))
        return rows

    def sh(self, *argv: str) -> None:
        self.lab.run(self.topology.relay, argv)

    @contextlib.contextmanager
    def rule(self, stream: str, *outputs: str, path: str = "auto") -> Iterator[None]:
        to = [word for output in outputs for word in ("--to", output)]
        self.lab.mcr(
            self.topology.relay,
            *("rule", "add", "cam", "--from", stream, *to, "--path", path, "--temporary"),
        )
        try:
            yield
        finally:
            self.lab.mcr(self.topology.relay, "rule", "del", "cam")

    def send(self, stream: str, *options: str) -> None:
        send(self.lab, self.topology.src, stream, "--rate", "2000", "--count", str(COUNT), *options)

    def wait_for_drops(self, reason: str) -> None:
        """Until the one output has dropped everything that was sent, for that reason and no other."""
        wait_until(
            lambda: dropped(stats(self.lab, self.topology.relay)[1]) == {reason: COUNT}, f"{reason} drops"
        )


@pytest.fixture(scope="module")
def bench(lab_prefixes: Iterator[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    require("root", os.geteuid() == 0, f"effective user id is {os.geteuid()}")
    with Lab(next(lab_prefixes), tmp_path_factory.mktemp("faults")) as lab:
        topology = lab.topology_relay(gro=True)
        lab.veth(topology.relay, "spare0", topology.relay, "spare1", gro=False)
        lab.supervisor(topology.relay, config='[[attach]]\ninterface = "in0"\n')
        yield Bench(lab, topology)


# --- the faults


@contextlib.contextmanager
def wrong_port(bench: Bench) -> Iterator[None]:
    with bench.rule(CAM, "239.2.2.2%out0:6000"):
        bench.send("239.1.1.1%eth0:5001")
        yield


@contextlib.contextmanager
def wrong_source(bench: Bench) -> Iterator[None]:
    with bench.rule("10.1.0.9@232.1.1.1%in0:5000", "239.2.2.2%out0:6000"):
        bench.send("232.1.1.1%eth0:5000")
        yield


@contextlib.contextmanager
def not_joined(bench: Bench) -> Iterator[None]:
    bench.sh("sysctl", "-qw", "net.ipv4.igmp_max_memberships=0")
    try:
        with bench.rule(CAM, "239.2.2.2%out0:6000"):
            yield
    finally:
        bench.sh("sysctl", "-qw", "net.ipv4.igmp_max_memberships=20")


@contextlib.contextmanager
def interface_down(bench: Bench) -> Iterator[None]:
    with bench.rule(CAM, "239.2.2.2%out0:6000"):
        bench.sh("ip", "link", "set", "dev", "in0", "down")
        try:
            yield
        finally:
            bench.sh("ip", "link", "set", "dev", "in0", "up")


@contextlib.contextmanager
def no_route(bench: Bench) -> Iterator[None]:
    with bench.rule(CAM, "10.9.9.9:6000"):
        bench.send(SENT)
        bench.wait_for_drops("unreachable")
        yield


@contextlib.contextmanager
def ttl_expired(bench: Bench) -> Iterator[None]:
    with bench.rule(CAM, "239.2.2.2%out0:6000,ttl=decrement"):
        bench.send(f"{SENT},ttl=1")
        bench.wait_for_drops("ttl_expired")
        yield


@contextlib.contextmanager
def mtu_too_small(bench: Bench) -> Iterator[None]:
    bench.sh("ip", "link", "set", "dev", "out0", "mtu", "1000")
    try:
        with bench.rule(CAM, "239.2.2.2%out0:6000", path="kernel"):
            bench.send(SENT, "--size", "1200")
            bench.wait_for_drops("too_large")
            yield
    finally:
        bench.sh("ip", "link", "set", "dev", "out0", "mtu", "1500")


@contextlib.contextmanager
def firewall_drop(bench: Bench) -> Iterator[None]:
    bench.sh("nft", "add table inet guard")
    bench.sh("nft", "add chain inet guard out { type filter hook output priority 0 ; }")
    bench.sh("nft", "add rule inet guard out udp dport 6000 drop")
    try:
        with bench.rule(CAM, "10.2.0.2:6000"):
            bench.send(SENT)
            bench.wait_for_drops("denied")
            yield
    finally:
        bench.sh("nft", "delete table inet guard")


@contextlib.contextmanager
def other_xdp_program(bench: Bench) -> Iterator[None]:
    code, log = ffi.from_buffer(PASS_PROGRAM), ffi.new("char[]", 4096)
    with bench.lab.inside(bench.topology.relay):
        program = lib.mcr_load_program(lib.MCR_PROGRAM_XDP, b"intruder", code, 2, log, len(log))
        link = lib.mcr_link_xdp(program, socket.if_nametoindex("spare0"), 0)
    os.close(program)
    assert link >= 0
    try:
        yield
    finally:
        os.close(link)


@contextlib.contextmanager
def nothing(bench: Bench) -> Iterator[None]:
    yield


@dataclass(frozen=True, slots=True)
class Question:
    """A command, and what must be in one line of its answer and in the next; verdict: in the first one."""

    ask: Sequence[str]
    cause: str
    remedy: str
    verdict: str = ""
    prefix: Sequence[str] = ()


FAULTS: dict[str, tuple[Callable[[Bench], AbstractContextManager[None]], list[Question]]] = {
    "wrong port": (wrong_port, [Question(
        ("explain", "239.1.1.1%in0:5001"),
        "rule cam takes 239.1.1.1%in0:5000: at port 5000, not at 5001",
        "send to port 5000",
        "no rule takes it",
    )]),
    "wrong source": (wrong_source, [Question(
        ("explain", "10.1.0.1@232.1.1.1%in0:5000"),
        "rule cam takes 10.1.0.9@232.1.1.1%in0:5000: from 10.1.0.9, not from 10.1.0.1",
        "send from 10.1.0.9",
        "no rule takes it",
    )]),
    "not joined": (not_joined, [Question(
        ("explain", CAM),
        "cannot join 239.1.1.1 on interface in0",
        "sysctl -w net.ipv4.igmp_max_memberships=20 (it is 0)",
        "its group is not joined",
    )]),
    "interface down": (interface_down, [Question(
        ("explain", CAM), "in0 is down", "ip link set dev in0 up", "it does not come in",
    )]),
    "no route": (no_route, [Question(
        ("explain", CAM),
        "10.9.9.9:6000: no route to 10.9.9.9 (ENETUNREACH, no route leads there) "
        f"(dropped {COUNT} so far as unreachable)",
        "ip route add 10.9.9.9 via GATEWAY",
        "drops it",
    )]),
    "TTL expired": (ttl_expired, [
        Question(
            ("explain", CAM, "--ttl", "1"),
            f"TTL 1 less one is 0 (ttl=decrement, and the packets came with TTL 1) (dropped {COUNT} so far",
            "name a TTL in the output",
            "drops it",
        ),
        Question(
            ("explain", CAM),
            f"dropped {COUNT} so far as ttl_expired",
            "name a TTL in the output",
            "drops it",
        ),
    ]),
    "MTU too small": (mtu_too_small, [
        Question(
            ("explain", CAM),
            f"dropped {COUNT} so far as too_large: the datagrams do not fit the MTU 1000 of out0",
            "raise the MTU of the egress interface",
            "drops it",
        ),
        Question(
            ("explain", CAM, "--size", "1200"),
            "1200 bytes do not fit the MTU 1000",
            "raise the MTU of the egress interface",
            "drops it",
        ),
    ]),
    "firewall drop on output": (firewall_drop, [
        Question(
            ("explain", CAM),
            f"dropped {COUNT} so far as denied: the firewall of this host or a policy refused it; "
            "the last error was EPERM",
            "nft list ruleset",
            "drops it",
        ),
        Question(("doctor", "out0"), "table inet guard, chain out has a rule that drops", ""),
    ]),
    "XDP taken by another program": (other_xdp_program, [Question(
        ("doctor", "spare0"),
        "another XDP program is attached: intruder (id",
        "ip link set dev spare0 xdp off",
    )]),
    "veth peer without NAPI": (nothing, [Question(
        ("doctor", "spare0"),
        "its veth peer spare1 has no NAPI: neither GRO nor XDP",
        "ethtool -K spare1 gro on",
    )]),
    "missing capability": (nothing, [Question(
        ("doctor", "in0"),
        "this process lacks CAP_NET_RAW",
        "run mcr as root",
        prefix=("env", "MCR_RUNTIME_DIR=/nowhere", "setpriv", "--bounding-set", "-net_raw"),
    )]),
}  # fmt: skip


def answers(bench: Bench, question: Question) -> tuple[bool, str]:
    """Whether the answer is the one that is wanted, and the answer."""
    relay = bench.topology.relay
    argv = [*question.prefix, sys.executable, "-m", "mcr.cli.main", "--instance", relay.name, *question.ask]
    said = bench.lab.run(relay, argv, check=False, timeout_s=DOCTOR_S).stdout
    lines = said.splitlines()
    found = [number for number, line in enumerate(lines) if question.cause in line]
    if len(found) != 1 or question.verdict not in lines[0]:
        return False, said
    following = lines[found[0] + 1]
    named = following.startswith("  remedy: ") and question.remedy in following
    return named or not question.remedy, said


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_with_its_remedy(bench: Bench, name: str) -> None:
    make, questions = FAULTS[name]
    with make(bench):
        for question in questions:
            deadline_s = time.monotonic() + 5  # the supervisor hears of a link a moment later
            named, said = answers(bench, question)
            while not named and time.monotonic() < deadline_s:
                named, said = answers(bench, question)
            assert named, said


@pytest.mark.parametrize(
    ("number", "cause", "remedy"),
    [
        (signal.SIGSTOP, "of in0 is stopped and relays nothing", "it is replaced after some seconds"),
        (signal.SIGKILL, "in0: its worker is being restarted: ", "it is started again by itself"),
    ],
)
def test_dead_worker_is_named_with_its_remedy(
    bench: Bench, number: signal.Signals, cause: str, remedy: str
) -> None:
    relay = bench.topology.relay
    socket_file = bench.lab.runtime_directory / f"{relay.name}.sock"
    with bench.rule(CAM, "10.2.0.2:6000"), ControlClient(socket_file, timeout_s=30) as client:
        rows: list[Report] = []
        for _ in range(5):  # after a kill the delay doubles, so that even a slow machine looks in time
            if rows := _end_and_explain(client, number, cause):
                break
        (problem,) = [row for row in rows if row["object"] == "problem" and row["about"] == "worker"]
        assert cause in problem["cause"]
        assert remedy in problem["remedy"]
        assert rows[0]["verdict"] == "dropped"
        if number == signal.SIGSTOP and (pid := _worker(client)) is not None:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: status(bench.lab, relay)["state"] == "attached", "a worker that runs")


def _end_and_explain(client: ControlClient, number: signal.Signals, cause: str) -> list[Report]:
    """The explanation that names the cause; nothing if the next worker came too soon."""
    pid = _worker(client)
    if pid is not None:
        os.kill(pid, number)
    while _worker(client) in (pid, None):
        rows: list[Report] = client.call("explain", stream=CAM)
        if any(cause in row.get("cause", "") for row in rows):
            return rows
    return []


def _worker(client: ControlClient) -> int | None:
    (row,) = [row for row in client.call("status") if row["object"] == "interface"]
    pid: int | None = row["worker_pid"]
    return pid


def test_stream_that_is_relayed_is_explained_without_a_problem(bench: Bench) -> None:
    with bench.rule(CAM, "239.2.2.2%out0:6000", "10.2.0.2:6000"):
        bench.send(SENT)
        wait_until(
            lambda: (
                [row.get("sent_packets") for row in stats(bench.lab, bench.topology.relay)[1:]]
                == [COUNT, COUNT]
            ),
            "relayed",
        )
        verdict, *others = bench.rows("explain", CAM, "--size", "1316", "--ttl", "8")
        assert (verdict["verdict"], verdict["rule"]) == ("relayed", "cam")
        assert verdict["text"] == "rule cam takes it, and all 2 outputs send it"
        outputs = [row for row in others if row["object"] == "output"]
        group, unicast = outputs
        assert (group["next_hop"], group["source"], group["fits"]) == (
            "01:00:5e:02:02:02",
            "10.2.0.1",
            "whole",
        )
        assert unicast["next_hop"].startswith("10.2.0.2 (") and unicast["interface"] == "out0"
        assert (unicast["source"], unicast["ttl"], unicast["mtu"]) == ("10.2.0.1", "64", 1500)
        assert [row for row in others if row["object"] == "problem"] == []


def test_doctor_finds_nothing_missing_and_changes_nothing(bench: Bench) -> None:
    relay = bench.topology.relay
    before = bench.lab.ip(relay, "-d -j link show"), bench.lab.leftovers(relay)
    asked = bench.lab.mcr(relay, "doctor", "-j", timeout_s=DOCTOR_S)
    rows: list[Report] = json.loads(asked.stdout)
    assert asked.returncode == 0
    assert {row["interface"] for row in rows} == {"", "in0"}
    assert {row["answer"] for row in rows} <= {"yes", "no", "can't tell"}
    found = {(row["check"], row["interface"]): row["answer"] for row in rows}
    for check in ("supervisor", "BPF programs load", "XDP attaches", "AF_XDP", "io_uring", "capabilities"):
        assert found[check, ""] == "yes"
    for check in ("attached", "link is up", "XDP hook is free", "native XDP", "queues", "MTU"):
        assert found[check, "in0"] == "yes"
    assert [row for row in rows if row["answer"] == "no" and not row["remedy"]] == []
    assert (bench.lab.ip(relay, "-d -j link show"), bench.lab.leftovers(relay)) == before


def test_doctor_without_privilege_or_supervisor_ends_with_answers(bench: Bench) -> None:
    relay = bench.topology.relay
    argv = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", sys.executable]
    argv += ["-m", "mcr.cli.main", "--instance", "none", "doctor"]
    asked = bench.lab.run(relay, argv, check=False, timeout_s=DOCTOR_S)
    assert (asked.returncode, asked.stderr) == (1, "")
    assert "MCR needs: capabilities" in asked.stdout
    assert "can't tell" in asked.stdout


def test_explaining_what_is_no_stream_is_refused(bench: Bench) -> None:
    refused = bench.lab.mcr(bench.topology.relay, "explain", "239.1.1.1:5000", check=False)
    assert refused.returncode == 1
    assert "it names no interface" in refused.stderr
    socket_file = bench.lab.runtime_directory / f"{bench.topology.relay.name}.sock"
    with ControlClient(socket_file, timeout_s=30) as client, pytest.raises(McrError, match="ttl must be"):
        client.call("explain", stream=CAM, ttl=True)
