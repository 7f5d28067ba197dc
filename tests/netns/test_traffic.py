"""`mcr send` and `mcr listen` as their users run them: two processes, two network namespaces, one veth pair.

src eth0 10.9.0.1 10.9.0.3 fd09::1  -------  eth0 10.9.0.2 fd09::2 dst
"""

import json
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from mcr.errors import ExitStatus, McrError
from mcr.stream import parse_output, parse_stream
from mcr.traffic.sink import Sink
from mcr.traffic.sockets import open_sink_socket, open_source_socket
from mcr.traffic.source import payload, send
from tests.netns.lab import Lab, Namespace, Process

GROUP = "239.1.1.1%eth0:5000"
UNICAST = "10.9.0.2%eth0:5000"


@dataclass(frozen=True)
class Wire:
    lab: Lab
    src: Namespace
    dst: Namespace

    def listen(self, stream: str, *arguments: str) -> Process:
        """A sink that is ready."""
        program = _program("listen", stream, "-j", "--timeout", "30", *arguments)
        process = self.lab.spawn(self.dst, program)
        process.wait_for("ready\n")
        return process

    def send(self, output: str, *arguments: str) -> tuple[dict[str, Any], int]:
        """What a source reports, and its exit status."""
        done = self.lab.run(self.src, _program("send", output, "-j", *arguments), check=False)
        assert done.stdout, done.stderr
        (report,) = json.loads(done.stdout)
        return report, done.returncode


def _program(verb: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", f"from mcr.cli.{verb} import command; command()", *arguments]


def account(sink: Process) -> tuple[dict[str, Any], int]:
    """What a sink reports, and its exit status."""
    status = sink.wait(60)
    (report,) = json.loads(sink.stdout.read_text())
    return report, status


@pytest.fixture
def wire(lab: Lab) -> Wire:
    src, dst = lab.namespace("src"), lab.namespace("dst")
    lab.veth(
        src,
        "eth0",
        dst,
        "eth0",
        addresses_a=("10.9.0.1/24", "10.9.0.3/24", "fd09::1/64"),
        addresses_b=("10.9.0.2/24", "fd09::2/64"),
    )
    return Wire(lab, src, dst)


@pytest.mark.parametrize(
    ("stream", "output", "source"),
    [
        (GROUP, GROUP, "10.9.0.1"),
        (GROUP, f"{GROUP},source=10.9.0.3", "10.9.0.3"),
        ("10.9.0.3@232.1.1.1%eth0:5000", "232.1.1.1%eth0:5000,source=10.9.0.3", "10.9.0.3"),
        (UNICAST, "10.9.0.2:5000", "10.9.0.1"),
        ("[ff15::1]%eth0:5000", "[ff15::1]%eth0:5000,source=[fd09::1]", "fd09::1"),
        ("[fd09::1]@[ff35::1]%eth0:5000", "[ff35::1]%eth0:5000,source=[fd09::1]", "fd09::1"),
        ("[fd09::2]%eth0:5000", "[fd09::2]:5000", "fd09::1"),
    ],
)
def test_every_packet_arrives_as_it_was_sent(wire: Wire, stream: str, output: str, source: str) -> None:
    sink = wire.listen(stream, "--expect", "5000", "--digest")
    load = ["--rate", "20000", "--count", "5000", "--digest"]
    sent, sent_status = wire.send(f"{output},ttl=8,dscp=46", *load)
    report, status = account(sink)
    assert (sent["packets"], report["packets"], sent_status, status) == (5000, 5000, 0, 0)
    assert report["complete"] is True
    assert report["digest"] == sent["digest"]
    assert (report["ttls"], report["dscps"], report["sources"]) == ([8], [46], [source])
    assert (report["lost"], report["reordered"], report["socket_dropped"]) == (0, 0, 0)


def test_mixed_sizes_arrive_in_one_stream(wire: Wire) -> None:
    sink = wire.listen(GROUP, "--expect", "1000", "--digest")
    sizes = "0,1,7,8,15,16,17,512,1472,65507"
    sent, _ = wire.send(GROUP, "--rate", "2000", "--size", sizes, "--count", "1000", "--digest")
    report, status = account(sink)
    assert (report["packets"], report["bytes"], status) == (1000, sent["bytes"], 0)
    assert (report["unsequenced"], report["size_min"], report["size_max"]) == (300, 0, 65507)
    assert report["digest"] == sent["digest"]


@pytest.mark.parametrize(("first", "second"), [("239.1.1.1", "239.1.1.2"), ("[ff15::1]", "[ff15::2]")])
def test_sink_takes_only_its_own_group_and_port(wire: Wire, first: str, second: str) -> None:
    sinks = [wire.listen(f"{first}%eth0:5000", "--expect", "100")]
    sinks += [wire.listen(f"{second}%eth0:5000", "--expect", "200")]
    wire.send(f"{first}%eth0:5001", "--count", "50")
    wire.send(f"{first}%eth0:5000", "--count", "100")
    wire.send(f"{second}%eth0:5000", "--count", "200")
    assert [account(sink)[0]["packets"] for sink in sinks] == [100, 200]


@pytest.mark.parametrize("address", ["239.1.1.1", "[ff15::1]"])
def test_sink_takes_its_group_from_its_interface_only(wire: Wire, address: str) -> None:
    wire.lab.veth(
        wire.src, "eth1", wire.dst, "eth1", addresses_a=("10.8.0.1/24",), addresses_b=("10.8.0.2/24",)
    )
    sinks = [wire.listen(f"{address}%eth0:5000", "--expect", "100")]
    sinks += [wire.listen(f"{address}%eth1:5000", "--expect", "200")]
    wire.send(f"{address}%eth1:5000", "--count", "200")
    wire.send(f"{address}%eth0:5000", "--count", "100")
    assert [account(sink)[0]["packets"] for sink in sinks] == [100, 200]


@pytest.mark.parametrize(("address", "ignored"), [("239.1.1.1%eth0", 0), ("10.9.0.2%eth0", 50)])
def test_sink_with_a_source_takes_no_other(wire: Wire, address: str, ignored: int) -> None:
    sink = wire.listen(f"10.9.0.1@{address}:5000", "--expect", "100")
    wire.send(f"{address}:5000,source=10.9.0.3", "--count", "50")
    wire.send(f"{address}:5000,source=10.9.0.1", "--count", "100")
    report, status = account(sink)
    assert (report["packets"], report["ignored"], status) == (100, ignored, 0)
    assert report["sources"] == ["10.9.0.1"]


def test_missing_packets_are_lost_and_fail(wire: Wire) -> None:
    sink = wire.listen(GROUP, "--expect", "12", "--idle", "0.5")
    wire.send(GROUP, "--count", "10")
    report, status = account(sink)
    assert (report["packets"], report["lost"], report["complete"], status) == (10, 2, False, 1)


def test_what_the_sink_socket_drops_is_told_apart(wire: Wire) -> None:
    with wire.lab.inside(wire.dst):
        sink = Sink(parse_stream(UNICAST), receive_buffer_bytes=65536)
    with wire.lab.inside(wire.src):
        assert send(parse_output("10.9.0.2:5000"), rate=0, count=1000).packets == 1000
    with sink:
        report = sink.run(expect=1000, timeout_s=0.5)
    assert 0 < report.packets < 1000
    assert report.packets + report.socket_dropped == 1000
    assert (report.lost, report.checksum_errors, report.complete) == (report.socket_dropped, 0, False)


@pytest.mark.parametrize("size", [64, 1316])  # the kernel checks the small ones earlier
def test_bad_checksums_are_told(wire: Wire, size: int) -> None:
    with wire.lab.inside(wire.dst):
        sink = Sink(parse_stream(UNICAST))
    with wire.lab.inside(wire.src), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        data = payload(0, 0, size)
        header = b"".join(number.to_bytes(2, "big") for number in (4000, 5000, 8 + len(data), 0xBAD))
        for _ in range(3):
            raw.sendto(header + data, ("10.9.0.2", 0))
    with sink:
        report = sink.run(timeout_s=0.3)
    assert (report.packets, report.checksum_errors) == (0, 3)


def test_full_queue_makes_the_source_wait_and_loses_nothing(wire: Wire) -> None:
    shaper = "tc qdisc add dev eth0 root tbf rate 50mbit burst 10kb limit 20kb"
    wire.lab.run(wire.src, shaper.split())
    sink = wire.listen(GROUP, "--expect", "2000", "--digest")
    sent, _ = wire.send(GROUP, "--rate", "0", "--count", "2000", "--digest")
    report, status = account(sink)
    assert (report["packets"], report["lost"], report["duplicates"], status) == (2000, 0, 0, 0)
    assert report["digest"] == sent["digest"]
    assert sent["retries"] > 0


def test_source_tells_that_nobody_is_there(wire: Wire) -> None:
    sent, status = wire.send("10.9.0.2:5999", "--count", "50")
    assert (sent["packets"], status) == (50, 1)
    assert sent["unreachable"] >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_sink_still_gives_its_account(wire: Wire, number: signal.Signals) -> None:
    sink = wire.listen(GROUP)
    wire.send(GROUP, "--count", "10")
    sink.child.send_signal(number)
    report, status = account(sink)
    assert (report["packets"], report["interrupted"], status) == (10, True, 0)


def test_an_ended_source_still_gives_its_account(wire: Wire) -> None:
    sink = wire.listen(GROUP, "--idle", "0.5", "--digest")
    source = wire.lab.spawn(wire.src, _program("send", GROUP, "-j", "--rate", "2000", "--digest"))
    wire.lab.run(wire.dst, ["sleep", "0.5"])
    source.child.send_signal(signal.SIGINT)
    sent, _ = account(source)
    report, status = account(sink)
    assert sent["interrupted"] is True
    assert (report["packets"], report["digest"], status) == (sent["packets"], sent["digest"], 0)


def test_sink_leaves_its_group(wire: Wire) -> None:
    sink = wire.listen(GROUP, "--expect", "1")
    assert wire.lab.leftovers(wire.dst) != []
    wire.send(GROUP, "--count", "1")
    account(sink)
    assert wire.lab.leftovers(wire.dst) == []


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("239.1.1.1%eth0:5000,source=10.9.0.77", "Cannot assign requested address"),
        ("192.0.2.1:5000", "Network is unreachable"),
    ],
)
def test_output_that_the_machine_cannot_send_to_is_an_error(wire: Wire, output: str, cause: str) -> None:
    with wire.lab.inside(wire.src), pytest.raises(McrError, match=cause) as caught:
        open_source_socket(parse_output(output))
    assert caught.value.status == ExitStatus.FAILED


def test_unicast_address_of_another_machine_is_an_error(wire: Wire) -> None:
    with wire.lab.inside(wire.dst), pytest.raises(McrError, match="Cannot assign requested address"):
        open_sink_socket(parse_stream("10.9.0.77%eth0:5000"), 65536)
