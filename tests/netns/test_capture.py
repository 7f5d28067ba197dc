"""`mcr capture` on real streams: what is in the file is what came and what left, byte for byte."""

import contextlib
import os
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mcr.datagrams import on_wire
from mcr.netlink import read_interfaces
from mcr.sockets import open_output
from mcr.stream import parse_output
from mcr.tap_egress import EgressTap
from mcr.tap_events import LARGEST_SNAPLEN, decode
from tests.conftest import require
from tests.kernel.packets import IPV4, checksum, ethernet, ipv4, udp
from tests.netns.flows import GROUP_SENT, config, dropped, send, stats
from tests.netns.lab import Lab, RelayTopology
from tests.netns.taps import Captured, begin, read_pcapng
from tests.netns.wire import Capture, Source, send_all

GROUP = bytes.fromhex("01005e02")
KERNEL, WORKER = "239.1.1.1%in0:5000", "239.1.1.2%in0:5000"
KERNEL_OUTPUT, WORKER_OUTPUTS = "239.2.2.2%out0:6000,ttl=8", ["239.2.2.3%out0:6000", "10.2.0.2:7000"]
COUNT = 30
UDP_SEGMENT = 103  # linux/udp.h


@pytest.fixture(scope="module")
def relaying(
    lab_prefixes: Iterator[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Lab, RelayTopology]]:
    """The standard topology, and a running relay with one rule of each path."""
    require("root", os.geteuid() == 0, f"effective user id is {os.geteuid()}")
    with Lab(next(lab_prefixes), tmp_path_factory.mktemp("capture")) as lab:
        topology = lab.topology_relay(gro=True)
        rules = ("kernel", KERNEL, [KERNEL_OUTPUT]), ("worker", WORKER, WORKER_OUTPUTS)
        lab.supervisor(topology.relay, config=config(*rules))
        yield lab, topology


def frames(packets: Sequence[Captured], outbound: bool) -> list[bytes]:
    return [packet.frame for packet in packets if packet.outbound is outbound]


def verbose(path: Path) -> str:
    """What tcpdump says of the file, checksums included."""
    argv = ["tcpdump", "-nvvr", str(path)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_both_sides_of_the_kernel_path_are_what_was_on_the_wire(
    relaying: tuple[Lab, RelayTopology], tmp_path: Path
) -> None:
    lab, topology = relaying
    path = tmp_path / "kernel.pcapng"
    sent = [ethernet(ipv4(udp(bytes([n]) * (n + 1))), IPV4) for n in range(COUNT)]
    with Source(lab, topology.src) as source, Capture(lab, topology.dst) as wire:
        capture = begin(lab, topology.relay, "capture", "kernel", "-w", str(path), "-c", str(COUNT))
        send_all(source, sent)
        assert capture.wait(20) == 0, capture.output()
        arrived = wire.frames(COUNT, GROUP)
    packets = read_pcapng(path)
    assert frames(packets, outbound=False) == sent
    assert frames(packets, outbound=True) == arrived
    assert f"{path}: {COUNT} packets before, {COUNT} after" in capture.output()
    assert {(each.interface, each.comment) for each in packets} == {
        ("in0", "rule kernel, before"),
        ("out0", f"rule kernel, output {KERNEL_OUTPUT}, after"),
    }
    assert [each.time_ns for each in packets] == sorted(each.time_ns for each in packets)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert verbose(path).count("udp sum ok") == 2 * COUNT


def test_what_each_output_of_the_worker_sends_is_captured(
    relaying: tuple[Lab, RelayTopology], tmp_path: Path
) -> None:
    lab, topology = relaying
    path = tmp_path / "worker.pcapng"
    capture = begin(lab, topology.relay, "capture", "worker", "-w", str(path), "-c", str(COUNT))
    send(lab, topology.src, "239.1.1.2%eth0:5000", "--count", str(COUNT), "--size", "1000")
    assert capture.wait(20) == 0, capture.output()
    packets = read_pcapng(path)
    payloads = [frame[42:] for frame in frames(packets, outbound=False)]
    assert len(payloads) == COUNT
    for output in WORKER_OUTPUTS:
        mine = [each for each in packets if each.comment == f"rule worker, output {output}, after"]
        assert [each.frame[42:] for each in mine] == payloads
        assert {each.interface for each in mine} == {"out0"}
    assert verbose(path).count("udp sum ok") >= len(WORKER_OUTPUTS) * COUNT  # all that left


def numbered_alike(frames: Sequence[bytes], version: int) -> list[bytes]:
    """The frames as if the first one's IP identification had been 0."""
    if version == 6:
        return list(frames)
    (first,) = struct.unpack_from("!H", frames[0], 18)
    renumbered = []
    for frame in frames:
        (identification,) = struct.unpack_from("!H", frame, 18)
        header = frame[14:18] + struct.pack("!H", identification - first & 0xFFFF) + frame[20:24]
        header += struct.pack("!H", checksum(header + b"\0\0" + frame[26:34])) + frame[26:34]
        assert checksum(frame[14:34]) == 0
        renumbered.append(frame[:14] + header + frame[34:])
    return renumbered


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("size", "segment"), [(30_000, 1000), (2500, 1201), (100, 0), (1, 0), (0, 0)])
def test_what_is_left_to_the_device_becomes_what_the_kernel_makes_of_it(
    relaying: tuple[Lab, RelayTopology], version: int, size: int, segment: int
) -> None:
    """The same datagrams once by a device that takes several at once and sums up, once by another one."""
    lab, topology = relaying
    output = parse_output("239.2.2.9%out0:6000" if version == 4 else "[ff15::2:9]%out0:6000")
    made = []
    for offload in ("on", "off"):
        options = f"tx-udp-segmentation {offload} tx-checksum-ip-generic {offload}"
        lab.run(topology.relay, ["ethtool", "-K", "out0", *options.split()])
        with lab.inside(topology.relay):
            facts = read_interfaces()["out0"]
            tap = EgressTap(1, 1, output, facts, LARGEST_SNAPLEN)
            with contextlib.closing(tap), open_output(output, facts.ifindex) as udp_socket:
                udp_socket.bind(("", 7777))
                if segment:
                    udp_socket.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
                udp_socket.sendto(
                    bytes(range(256)) * (size // 256) + bytes(size % 256), (str(output.address), 6000)
                )
                events = [event for raw in tap.read(1 << 20) for event in decode(raw)]
        left = {(event.segment, event.checksum_offset > 0) for event in events}
        assert left == ({(segment, True)} if offload == "on" else {(0, False)})
        wire = (
            frame
            for event in events
            for frame in on_wire(event.data, event.segment, event.checksum_offset, ethernet=True)
        )
        made.append(numbered_alike(list(wire), version))
    assert made[0] == made[1]
    assert len(made[0]) == (-(-size // segment) if segment else 1)


@pytest.mark.parametrize(("what", "before", "after"), [("before", 5, 0), ("after", 0, 5)])
def test_one_side_alone_and_cut_off(
    relaying: tuple[Lab, RelayTopology], tmp_path: Path, what: str, before: int, after: int
) -> None:
    lab, topology = relaying
    path = tmp_path / "some.pcapng"
    options = ("-w", str(path), "-c", "5", "--what", what, "--snaplen", "60")
    capture = begin(lab, topology.relay, "capture", "kernel", *options)
    send(lab, topology.src, GROUP_SENT, "--count", "10")
    assert capture.wait(20) == 0, capture.output()
    packets = read_pcapng(path)
    assert (len(frames(packets, outbound=False)), len(frames(packets, outbound=True))) == (before, after)
    assert {(len(each.frame), each.length) for each in packets} == {(60, 1358)}


def test_a_full_disk_is_an_error_with_a_remedy(relaying: tuple[Lab, RelayTopology]) -> None:
    lab, topology = relaying
    capture = begin(lab, topology.relay, "capture", "kernel", "-w", "/dev/full", "-c", "1")
    send(lab, topology.src, GROUP_SENT, "--count", "1")
    assert capture.wait(20) == 1
    assert (
        "mcr: cannot write /dev/full: No space left on device\n  remedy: make room, or write to another disk"
        in capture.output()
    )


def test_capturing_50000_packets_a_second_costs_no_packet(
    relaying: tuple[Lab, RelayTopology], tmp_path: Path
) -> None:
    lab, topology = relaying
    count = 25_000
    path = tmp_path / "flood.pcapng"
    before = stats(lab, topology.relay)[0]
    capture = begin(lab, topology.relay, "capture", "kernel", "-w", str(path), "-c", str(count))
    sent = send(lab, topology.src, GROUP_SENT, "--count", str(count), "--rate", "50000")
    assert sent["packets"] == count
    assert capture.wait(30) == 0, capture.output()
    rule, output, *_ = stats(lab, topology.relay)
    assert rule["received_packets"] - before["received_packets"] == count
    assert (rule["relayed_packets"], dropped(rule)) == (rule["received_packets"], {})
    assert (output["sent_packets"], dropped(output)) == (rule["relayed_packets"], {})
    told = len(read_pcapng(path))
    lost = capture.output().partition(" more are missing")[0].splitlines()[-1]
    assert told + (int(lost) if lost.isdigit() else 0) == 2 * count
