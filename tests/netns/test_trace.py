"""`mcr trace` on real streams: what it says of a packet is what became of that packet, on either path."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.conftest import require
from tests.netns.flows import config, dropped, send, stats, wait_until
from tests.netns.lab import Lab, Namespace, RelayTopology
from tests.netns.taps import begin

Row = dict[str, Any]
KERNEL, WORKER, NO_RULE = "239.1.1.1%in0:5000", "239.1.1.2%in0:5000", "239.1.1.2%in0:5001"
KERNEL_SENT, WORKER_SENT, NO_RULE_SENT = (
    stream.replace("in0", "eth0") for stream in (KERNEL, WORKER, NO_RULE)
)
KERNEL_OUTPUTS = ["239.2.2.2%out0:6000,ttl=8", "239.2.2.2%out1:6000,ttl=decrement"]
WORKER_OUTPUTS = ["239.2.2.3%out0:6000", "10.2.0.2:7000,ttl=decrement", "10.99.0.2:7000"]
COUNT = 5


@dataclass(frozen=True, slots=True)
class Network:
    """A running relay with one rule of each path."""

    lab: Lab
    topology: RelayTopology

    @property
    def relay(self) -> Namespace:
        return self.topology.relay

    def trace(self, stream: str, sent_to: str, *options: str) -> list[Row]:
        """The rows of a trace of COUNT packets, of which a few more are sent."""
        trace = begin(self.lab, self.relay, "trace", stream, "-c", str(COUNT), "-j")
        send(self.lab, self.topology.src, sent_to, "--count", str(2 * COUNT), "--rate", "1000", *options)
        assert trace.wait(20) == 0, trace.output()
        rows: list[Row] = json.loads(trace.stdout.read_text())
        return rows

    def is_tracing(self) -> bool:
        """What the XDP program is told."""
        path = f"/sys/fs/bpf/mcr/{self.relay.name}/settings"
        argv = ["bpftool", "-j", "map", "dump", "pinned", path]
        ((entry,),) = [json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)]
        return bool(entry["formatted"]["value"]["lookups"] & 16)


@pytest.fixture(scope="module")
def network(lab_prefixes: Iterator[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """The standard topology with a second network behind the relay.

     src          relay               dst
    eth0 ------ in0   out0 ------ eth0
                      out1 ------ eth1
    """
    require("root", os.geteuid() == 0, f"effective user id is {os.geteuid()}")
    with Lab(next(lab_prefixes), tmp_path_factory.mktemp("trace")) as lab:
        topology = lab.topology_relay(gro=True)
        lab.veth(topology.relay, "out1", topology.dst, "eth1", addresses_a=("10.3.0.1/24",), gro=True)
        rules = ("kernel", KERNEL, KERNEL_OUTPUTS), ("worker", WORKER, WORKER_OUTPUTS)
        # Egress threads, so that several writers report side by side.
        lab.supervisor(topology.relay, config=config(*rules, attach="egress_threads = 2"))
        yield Network(lab, topology)


def fates(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Output, verdict and reason of each output's row."""
    return [(row["output"], row["verdict"], row["reason"]) for row in rows if row["object"] == "output"]


def test_a_packet_that_no_rule_takes_is_shown_with_the_rule_that_came_near(network: Network) -> None:
    rows = network.trace(NO_RULE, NO_RULE_SENT)
    assert {(row["verdict"], row["reason"]) for row in rows} == {
        ("passed", "rule worker is at port 5000, not at 5001")
    }
    assert len(rows) == COUNT
    assert {row["stream"] for row in rows} == {f"10.1.0.1@{NO_RULE}"}


def test_the_kernel_path_tells_of_each_output(network: Network) -> None:
    rows = network.trace(KERNEL, KERNEL_SENT + ",ttl=1", "--size", "100")
    packets = [row for row in rows if row["object"] == "packet"]
    assert {(row["verdict"], row["rule"], row["path"]) for row in packets} == {
        ("relayed", "kernel", "kernel")
    }
    assert {(row["ttl"], row["bytes"]) for row in packets} == {(1, 142)}
    each = [(KERNEL_OUTPUTS[0], "sent", ""), (KERNEL_OUTPUTS[1], "dropped", "ttl_expired")]
    assert fates(rows) == each * COUNT


def test_the_worker_tells_of_each_output_with_its_errno(network: Network) -> None:
    rows = network.trace(WORKER, WORKER_SENT + ",ttl=1")
    packets = [row for row in rows if row["object"] == "packet"]
    assert {(row["verdict"], row["rule"], row["path"]) for row in packets} == {
        ("relayed", "worker", "worker")
    }
    each = [
        (WORKER_OUTPUTS[0], "sent", ""),
        (WORKER_OUTPUTS[1], "dropped", "ttl_expired"),
        (WORKER_OUTPUTS[2], "dropped", "unreachable"),
    ]
    assert fates(rows) == each * COUNT
    assert {row["errno"] for row in rows if row.get("reason") == "unreachable"} == {101}


def test_tracing_changes_no_count(network: Network) -> None:
    before = stats(network.lab, network.relay)[0]
    network.trace(KERNEL, KERNEL_SENT)
    after = stats(network.lab, network.relay)[0]
    assert after["received_packets"] - before["received_packets"] == 2 * COUNT
    assert after["relayed_packets"] - before["relayed_packets"] == 2 * COUNT
    assert dropped(after) == {}
    wait_until(lambda: not network.is_tracing(), "the end of the trace")


def test_a_packet_and_its_outputs_are_lines_for_people(network: Network) -> None:
    trace = begin(network.lab, network.relay, "trace", WORKER, "-c", "1")
    send(network.lab, network.topology.src, WORKER_SENT, "--count", "1")
    assert trace.wait(20) == 0
    packet, *outputs = trace.stdout.read_text().splitlines()
    assert f" 10.1.0.1@{WORKER} (1358 bytes, TTL 64, DSCP 0, queue 0, CPU " in packet
    assert packet.endswith(": rule worker, worker path")
    assert [line.rpartition(" after ")[0] for line in outputs] == [
        f"    -> {WORKER_OUTPUTS[0]}: sent",
        f"    -> {WORKER_OUTPUTS[1]}: sent",
        f"    -> {WORKER_OUTPUTS[2]}: dropped: unreachable (ENETUNREACH: Network is unreachable)",
    ]


def test_there_is_one_trace_at_a_time_and_a_killed_client_ends_its_own(network: Network) -> None:
    first = begin(network.lab, network.relay, "trace", KERNEL, "--timeout", "60")
    assert network.is_tracing()
    second = network.lab.mcr(network.relay, "trace", KERNEL, check=False)
    assert second.returncode == 1
    assert second.stderr.startswith("mcr: another trace is running\n  remedy: wait until it ends, ")
    first.child.kill()
    wait_until(lambda: not network.is_tracing(), "the end of the killed client's trace")
    network.trace(KERNEL, KERNEL_SENT)


def test_without_a_packet_it_fails_and_says_what_to_look_at(network: Network) -> None:
    silent = network.lab.mcr(network.relay, "trace", KERNEL, "--timeout", "0.1", check=False)
    assert silent.returncode == 1
    assert f"mcr: no packet of {KERNEL} within 0.1 s\n  remedy: " in silent.stderr


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("trace", "239.1.1.1%out0:5000"), "out0 is not attached"),
        (("trace", "239.1.1.1:5000"), "stream '239.1.1.1:5000': it names no interface"),
        (("capture", "nobody", "-w", "/dev/null"), "there is no rule 'nobody'"),
        (
            ("capture", "kernel", "-w", "/nowhere/file"),
            "cannot write /nowhere/file: No such file or directory",
        ),
    ],
    ids=["not_attached", "no_interface", "no_rule", "no_directory"],
)
def test_what_cannot_be_is_an_error_with_a_remedy(
    network: Network, arguments: tuple[str, ...], cause: str
) -> None:
    failed = network.lab.mcr(network.relay, *arguments, check=False)
    assert failed.returncode == 1
    assert f"mcr: {cause}\n  remedy: " in failed.stderr
    assert not network.is_tracing()
