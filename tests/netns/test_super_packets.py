"""Datagrams keep their borders, also those that a sender hands over many at once (UDP_SEGMENT, udp(7)).

On a veth or tap such a super-packet arrives as one. Each of its datagrams is counted and leaves as it was.
"""

import contextlib
import itertools
import json
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    assert_accounted,
    assert_whole,
    config,
    listen,
    report,
    send,
    stats,
    status,
    wait_until,
)
from tests.netns.lab import Lab, Namespace

UDP_SEGMENT = 103  # linux/udp.h
IP_MULTICAST_IF, IP_ADD_MEMBERSHIP = 32, 35
RECEIVE_BUFFER_BYTES, SO_RCVBUFFORCE = 64 << 20, 33
ROUNDS = 25
# (datagrams in a super-packet, bytes of each, bytes of a shorter last one)
SHAPES = {
    "2x100": (2, 100, 0),
    "4x100": (4, 100, 0),
    "3x100+17": (3, 100, 17),
    "2x1000": (2, 1000, 0),
    "40x1400": (40, 1400, 0),
    "64x1": (64, 1, 0),
}
WAYS = {
    "native": 'mode = "native"',
    "packet": 'ingress = "packet"',
    "packet, 2 workers": 'ingress = "packet"\nworkers = 2',
    "packet, egress threads": 'ingress = "packet"\negress_threads = 2',
}


def super_packets(shape: tuple[int, int, int]) -> Iterator[list[bytes]]:
    """Datagrams of which no two are alike, as far as their size allows."""
    datagrams, size, last = shape
    for number in range(ROUNDS):
        sizes = [size] * datagrams + ([last] if last else [])
        yield [
            (struct.pack("!HH", number, index) + bytes([number ^ index & 0xFF]) * each)[-each:]
            for index, each in enumerate(sizes)
        ]


def open_sink(lab: Lab, namespace: Namespace) -> socket.socket:
    with lab.inside(namespace):
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ifindex = socket.if_nametoindex("eth0")
    sink.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    sink.bind(("239.2.2.2", 6000))
    request = struct.pack("=4s4si", socket.inet_aton("239.2.2.2"), bytes(4), ifindex)
    sink.setsockopt(socket.IPPROTO_IP, IP_ADD_MEMBERSHIP, request)
    return sink


def send_super_packets(lab: Lab, namespace: Namespace, shape: tuple[int, int, int]) -> list[bytes]:
    with lab.inside(namespace):
        source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ifindex = socket.if_nametoindex("eth0")
    sent = []
    with source:
        source.setsockopt(
            socket.IPPROTO_IP, IP_MULTICAST_IF, struct.pack("=4s4si", bytes(4), bytes(4), ifindex)
        )
        segment = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", shape[1]))]
        for datagrams in super_packets(shape):
            source.sendmsg([b"".join(datagrams)], segment, 0, ("239.1.1.1", 5000))
            sent += datagrams
    return sent


def received(sink: socket.socket, count: int) -> list[bytes]:
    """Up to one more than count, so that a datagram too many is seen."""
    taken: list[bytes] = []
    sink.settimeout(20)
    while len(taken) < count:
        try:
            taken.append(sink.recv(65535))
        except TimeoutError:
            break
    sink.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        taken.append(sink.recv(65535))
    return taken


def relay_super_packets(lab: Lab, attach: str, shape: tuple[int, int, int], mtu: int = 1500) -> None:
    topology = lab.topology_relay()
    lab.ip(topology.relay, f"link set out0 mtu {mtu}")
    text = config(("r", GROUP_IN, [GROUP_OUT]), attach=attach, path="worker")
    lab.supervisor(topology.relay, config=text)
    with open_sink(lab, topology.dst) as sink:
        sent = send_super_packets(lab, topology.src, shape)
        heard = received(sink, len(sent))
    assert sorted(map(len, heard)) == sorted(map(len, sent))
    assert heard == sent
    wait_until(lambda: _sent(lab, topology.relay) == len(sent), "every datagram counted", 30)
    assert_accounted(lab, topology.relay, len(sent))


def _sent(lab: Lab, relay: Namespace) -> int:
    return sum(row["sent_packets"] for row in stats(lab, relay) if row["object"] == "output")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_datagram_of_a_super_packet_is_relayed_and_counted(lab: Lab, way: str, shape: str) -> None:
    relay_super_packets(lab, WAYS[way], SHAPES[shape])


@pytest.mark.parametrize("way", ["native", "packet"])
def test_each_leaves_in_fragments_where_it_does_not_fit(lab: Lab, way: str) -> None:
    relay_super_packets(lab, WAYS[way], SHAPES["40x1400"], mtu=1300)


@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_bridge_the_defaults_keep_the_borders_of_datagrams(lab: Lab, shape: str) -> None:
    topology = lab.topology_relay()
    lab.ip(topology.relay, "link add br0 type bridge mcast_snooping 0")
    lab.ip(topology.relay, "link set in0 master br0")
    lab.ip(topology.relay, "link set br0 up")
    text = config(("r", "239.1.1.1%br0:5000", [GROUP_OUT])).replace('"in0"', '"br0"')
    lab.supervisor(topology.relay, config=text)
    assert status(lab, topology.relay)["ingress"] == "packet"
    with open_sink(lab, topology.dst) as sink:
        sent = send_super_packets(lab, topology.src, SHAPES[shape])
        assert received(sink, len(sent)) == sent
    wait_until(lambda: _sent(lab, topology.relay) == len(sent), "every datagram counted", 30)
    assert_accounted(lab, topology.relay, len(sent))


def test_doctor_says_that_generic_mode_cannot_keep_them_apart(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(attach='mode = "generic"'))
    done = lab.mcr(topology.relay, "doctor", "in0", "-j", check=False)
    (row,) = (row for row in json.loads(done.stdout) if row["check"] == "datagrams stay whole")
    assert (row["answer"], row["remedy"]) == ("no", "attach with --ingress packet")


@pytest.mark.parametrize("attach", ['ingress = "packet"', 'mode = "native"'], ids=["packet", "native"])
@pytest.mark.parametrize("size", [100, 1316])
def test_a_relay_behind_a_relay_behind_a_relay_is_exact(lab: Lab, attach: str, size: int) -> None:
    """A worker's own sends are super-packets: src - relay0 - relay1 - relay2 - dst."""
    hosts = [lab.namespace(name) for name in ("src", "relay0", "relay1", "relay2", "dst")]
    for number, (left, right) in enumerate(itertools.pairwise(hosts)):
        names = "eth0" if number == 0 else "out0", "in0" if number < 3 else "eth0"
        addresses = (f"10.{number}.0.1/24",), (f"10.{number}.0.2/24",)
        lab.veth(left, names[0], right, names[1], addresses_a=addresses[0], addresses_b=addresses[1])
    for number, relay in enumerate(hosts[1:4]):
        output = GROUP_OUT if number == 2 else f"239.1.1.{number + 2}%out0:5000,ttl=8"
        rule = "r", f"239.1.1.{number + 1}%in0:5000", [output]
        lab.supervisor(relay, config=config(rule, attach=attach, path="worker"))
    sink = listen(lab, hosts[4], GROUP_HEARD, "--expect", "30000", "--idle", "8", "--digest")
    options = ("--rate", "20000", "--size", str(size), "--count", "30000", "--digest")
    sent = send(lab, hosts[0], GROUP_SENT, *options)
    assert_whole(report(sink), sent)
    for relay in hosts[1:4]:
        assert_accounted(lab, relay, 30000)
