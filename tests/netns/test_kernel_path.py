"""Streams on the kernel path: real sources, real XDP, real sinks; the worker sees none of their packets.

A veth device takes redirected frames only if its peer has GRO on, which is why `gro=True` is said here.
"""

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

import pytest

from mcr.control import ControlClient
from mcr.maps import FAN_OUT_SLOTS
from mcr.traffic.source import payload
from tests.kernel.packets import CUSTOMER_TAG, IPV4, ethernet, ipv4, udp
from tests.netns.flows import (
    GROUP_IN,
    GROUP_SENT,
    Report,
    assert_accounted,
    assert_whole,
    config,
    dropped,
    listen,
    report,
    send,
    spawn_send,
    stats,
    status,
    transfer_tcp,
    wait_until,
)
from tests.netns.lab import Lab, Namespace, Process
from tests.netns.wire import Capture, Source, send_all

IPV6_IN, IPV6_SENT = "[ff15::1]%in0:5000", "[ff15::1]%eth0:5000"
SIZES = "0,1,2,11,12,17,511,512,1316,1451,1452"
REPLAN_S = 1.0
ASKING_S = 0.5  # what a busy machine may add until a change is seen


@dataclass(frozen=True, slots=True)
class Network:
    """The namespaces of `fan_out`."""

    src: Namespace
    relay: Namespace
    sinks: tuple[Namespace, ...]


def fan_out(
    lab: Lab, count: int, *, mtu: int = 1500, mark: str = "", indices: Sequence[int | None] = (None,) * 64
) -> Network:
    """One network in, count networks out, each with an interface of the relay and a host of its own.

    mark: what makes the names of the namespaces differ from those of another such network. indices: of the
    outputs, None for the kernel's choice.

     src                          relay                            d0, d1, ...
    +--------------+             +----------------------+         +---------------+
    | eth0         |    veth     | in0             out0 |  veth   | eth0          |
    | 10.1.0.1/24  |-------------| 10.1.0.2    10.2.0.1 |---------| 10.2.0.2/24   |
    | fd01::1/64   |             | fd01::2    fd02:0::1 |         | fd02:0::2/64  |
    +--------------+             |                 out1 |---------| 10.2.1.2 ...  |
                                 +----------------------+         +---------------+
    """
    src, relay = lab.namespace(f"src{mark}"), lab.namespace(f"relay{mark}")
    lab.veth(
        src, "eth0", relay, "in0", mtu=mtu,
        addresses_a=("10.1.0.1/24", "fd01::1/64"), addresses_b=("10.1.0.2/24", "fd01::2/64"),
    )  # fmt: skip
    sinks = []
    for number in range(count):
        sinks.append(lab.namespace(f"d{number}{mark}"))
        add_output(lab, relay, sinks[-1], number, mtu=mtu, index=indices[number])
    return Network(src, relay, tuple(sinks))


def add_output(
    lab: Lab, relay: Namespace, sink: Namespace, number: int, *, mtu: int = 1500, index: int | None = None
) -> None:
    lab.veth(
        relay, f"out{number}", sink, "eth0", mtu=mtu, gro=True, index_a=index,
        addresses_a=(f"10.2.{number}.1/24", f"fd02:{number}::1/64"),
        addresses_b=(f"10.2.{number}.2/24", f"fd02:{number}::2/64"),
    )  # fmt: skip


def outputs(count: int, options: str = "") -> list[str]:
    """One to each network, each with a group, port, TTL and DSCP of its own."""
    own = (f"239.2.0.{n + 1}%out{n}:{6000 + n},ttl={8 + n},dscp={n + 10}" for n in range(count))
    return [text + options for text in own]


def outputs6(count: int) -> list[str]:
    return [f"[ff15::2:{n + 1}]%out{n}:{6000 + n},ttl={8 + n},dscp={n + 10}" for n in range(count)]


def listen_all(lab: Lab, network: Network, *options: str, version: int = 4) -> list[Process]:
    groups = "239.2.0.{}%eth0:{}" if version == 4 else "[ff15::2:{}]%eth0:{}"
    return [
        listen(lab, sink, groups.format(n + 1, 6000 + n), "--digest", *options)
        for n, sink in enumerate(network.sinks)
    ]


def paths(lab: Lab, relay: Namespace) -> set[str]:
    rows = lab.ask(relay, "rule.show")
    assert {row["state"] for row in rows} == {"active"}, rows
    return {row["path"] for row in rows}


def assert_nothing_lost_on_the_way(lab: Lab, relay: Namespace) -> None:
    """No redirect failed, and no packet went through the worker."""
    rows = lab.ask(relay, "status")
    assert {row["redirect_lost"] for row in rows if row["object"] == "egress"} == {0}, rows
    assert [row["packets"] for row in rows if row["object"] == "interface"] == [0]


def assert_headers(heard: Report, number: int, version: int = 4) -> None:
    source = f"10.2.{number}.1" if version == 4 else f"fd02:{number}::1" if number else "fd02::1"
    told = heard["ttls"], heard["dscps"], heard["sources"]
    assert told == ([8 + number], [10 + number], [source])


def relay_to_all(lab: Lab, network: Network, count: int, *options: str, version: int = 4) -> None:
    """One stream through a running relay: whole at every sink, and accounted for."""
    sinks = listen_all(lab, network, "--expect", str(count), "--idle", "8", version=version)
    sent_to = GROUP_SENT if version == 4 else IPV6_SENT
    sent = send(lab, network.src, sent_to, "--count", str(count), "--digest", *options)
    reports = [report(sink) for sink in sinks]
    assert_accounted(lab, network.relay, count)  # first, because it says where a packet was lost
    for number, heard in enumerate(reports):
        assert_whole(heard, sent)
        assert_headers(heard, number, version)


# Whole, in order, with the right headers


def test_a_stream_to_one_output_arrives_whole_and_in_order(lab: Lab) -> None:
    network = fan_out(lab, 1)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(1))))
    assert paths(lab, network.relay) == {"kernel"}
    relay_to_all(lab, network, 100_000, "--rate", "50000")
    assert_nothing_lost_on_the_way(lab, network.relay)


@pytest.mark.parametrize(("count", "rate"), [(2, 40_000), (4, 20_000)])
def test_a_stream_to_several_outputs_arrives_whole_at_each(lab: Lab, count: int, rate: int) -> None:
    network = fan_out(lab, count)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(count))))
    assert paths(lab, network.relay) == {"kernel"}
    relay_to_all(lab, network, 2 * rate, "--rate", str(rate))
    assert_nothing_lost_on_the_way(lab, network.relay)


def test_interfaces_whose_indices_want_the_same_slot_each_get_what_is_theirs(lab: Lab) -> None:
    """The egress program finds a clone's output by the interface's index, modulo the slots of a fan-out."""
    network = fan_out(lab, 4, indices=[1000, 1000 + FAN_OUT_SLOTS, 1001, 1000 + 2 * FAN_OUT_SLOTS])
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(4))))
    assert paths(lab, network.relay) == {"kernel"}
    relay_to_all(lab, network, 10_000, "--rate", "20000")
    assert_nothing_lost_on_the_way(lab, network.relay)


@pytest.mark.parametrize(("count", "rate"), [(1, 50_000), (2, 25_000)])
def test_an_ipv6_stream_arrives_whole(lab: Lab, count: int, rate: int) -> None:
    network = fan_out(lab, count)
    lab.supervisor(network.relay, config=config(("cam", IPV6_IN, outputs6(count))))
    assert paths(lab, network.relay) == {"kernel"}
    relay_to_all(lab, network, 2 * rate, "--rate", str(rate), version=6)
    assert_nothing_lost_on_the_way(lab, network.relay)


@pytest.mark.soak
@pytest.mark.parametrize(("count", "rate"), [(1, 100_000), (2, 50_000), (8, 25_000)])
@pytest.mark.parametrize("version", [4, 6])
def test_a_million_datagrams_arrive_whole_and_in_order(lab: Lab, count: int, rate: int, version: int) -> None:
    network = fan_out(lab, count)
    rule = ("cam", GROUP_IN, outputs(count)) if version == 4 else ("cam", IPV6_IN, outputs6(count))
    lab.supervisor(network.relay, config=config(rule))
    assert paths(lab, network.relay) == {"kernel"}
    relay_to_all(lab, network, 1_000_000, "--rate", str(rate), version=version)
    assert_nothing_lost_on_the_way(lab, network.relay)


@pytest.mark.parametrize("version", [4, pytest.param(6, marks=pytest.mark.soak)])
@pytest.mark.parametrize(("mode", "count"), [("native", 1), ("native", 2), ("generic", 1)])
def test_every_payload_size_arrives_whole(lab: Lab, mode: str, count: int, version: int) -> None:
    """The source is on this machine, so that its checksums are partial."""
    network = fan_out(lab, count)
    rule = ("cam", GROUP_IN, outputs(count)) if version == 4 else ("cam", IPV6_IN, outputs6(count))
    lab.supervisor(network.relay, config=config(rule, attach=f'mode = "{mode}"'))
    assert paths(lab, network.relay) == {"kernel"}
    relay_to_all(lab, network, 22_000, "--rate", "20000", "--size", SIZES, version=version)
    assert_nothing_lost_on_the_way(lab, network.relay)


def test_a_stream_in_generic_mode_arrives_whole_and_in_order(lab: Lab) -> None:
    network = fan_out(lab, 1)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(1)), attach='mode = "generic"'))
    assert paths(lab, network.relay) == {"kernel"}
    relay_to_all(lab, network, 60_000, "--rate", "30000")


def test_several_outputs_in_generic_mode_take_the_worker_path(lab: Lab) -> None:
    network = fan_out(lab, 2)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(2)), attach='mode = "generic"'))
    assert paths(lab, network.relay) == {"worker"}
    relay_to_all(lab, network, 20_000, "--rate", "10000")


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_options_of_the_outputs_are_followed(lab: Lab, count: int) -> None:
    network = fan_out(lab, count)
    to = [
        "239.2.0.1%out0:*,ttl=decrement,source=preserve",
        "239.2.0.2%out1:6001,ttl=5,dscp=10,source=192.0.2.9",
    ][:count]
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, to)))
    heard_at = ["239.2.0.1%eth0:5000", "239.2.0.2%eth0:6001"]
    sinks = [
        listen(lab, sink, stream, "--expect", "5000", "--idle", "5", "--digest")
        for sink, stream in zip(network.sinks, heard_at, strict=False)
    ]
    options = ("--count", "5000", "--rate", "10000", "--digest")
    sent = send(lab, network.src, f"{GROUP_SENT},ttl=31,dscp=46", *options)
    for sink, expected in zip(sinks, [(30, 46, "10.1.0.1"), (5, 10, "192.0.2.9")], strict=False):
        heard = report(sink)
        assert_whole(heard, sent)
        assert (heard["ttls"], heard["dscps"], heard["sources"]) == tuple([each] for each in expected)
    assert paths(lab, network.relay) == {"kernel"}


# VLAN tags


def stream_frames(count: int, tags: Sequence[tuple[int, int]] = (), size: int = 512) -> Iterator[bytes]:
    """Test packets of the stream, as frames."""
    for sequence in range(count):
        yield ethernet(ipv4(udp(payload(sequence, 1, size))), IPV4, tags)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.soak), 2])
@pytest.mark.parametrize(
    ("vlan", "tags"),
    [("100", [(CUSTOMER_TAG, 100)]), ("10.100", [(0x88A8, 10), (CUSTOMER_TAG, 100)])],
    ids=["802.1Q", "802.1ad"],
)
def test_a_tagged_stream_leaves_untagged(
    lab: Lab, count: int, vlan: str, tags: list[tuple[int, int]]
) -> None:
    network = fan_out(lab, count)
    lab.supervisor(network.relay, config=config(("cam", f"{GROUP_IN},vlan={vlan}", outputs(count))))
    assert paths(lab, network.relay) == {"kernel"}
    sinks = listen_all(lab, network, "--expect", "5000", "--idle", "5")
    with Source(lab, network.src) as source:
        send_all(source, stream_frames(5000, tags))
    for number, sink in enumerate(sinks):
        heard = report(sink)
        assert (heard["packets"], heard["lost"], heard["reordered"], heard["corrupt"]) == (5000, 0, 0, 0)
        assert_headers(heard, number)
    assert_accounted(lab, network.relay, 5000)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("tags", [[], [(CUSTOMER_TAG, 0xE064)]], ids=["untagged", "tagged"])
def test_a_stream_leaves_with_the_tag_of_its_output(
    lab: Lab, count: int, tags: list[tuple[int, int]]
) -> None:
    network = fan_out(lab, count)
    stream = f"{GROUP_IN},vlan=100" if tags else GROUP_IN
    to = [f"{text},vlan={200 + n}" for n, text in enumerate(outputs(count))]
    lab.supervisor(network.relay, config=config(("cam", stream, to)))
    captures = [Capture(lab, sink) for sink in network.sinks]
    with Source(lab, network.src) as source:
        send_all(source, stream_frames(500, tags))
    for number, capture in enumerate(captures):
        with capture:
            seen = capture.frames(500, bytes.fromhex("01005e0200"))
        mac = macs(lab, network.relay)[f"out{number}"]
        addresses = IPv4Address(f"10.2.{number}.1"), IPv4Address(f"239.2.0.{number + 1}")
        packed = addresses[0].packed + addresses[1].packed
        for sequence, frame in enumerate(seen):
            datagram = udp(payload(sequence, 1, 512), packed, port=6000 + number)
            packet = ipv4(
                datagram, source=addresses[0], destination=addresses[1],
                ttl=8 + number, tos=(10 + number) << 2,
            )  # fmt: skip
            group_mac = bytes.fromhex(f"01005e0200{number + 1:02x}")
            assert frame == ethernet(packet, IPV4, [(CUSTOMER_TAG, 200 + number)], group_mac + mac)
        assert len(seen) == 500
    assert_accounted(lab, network.relay, 500)


def macs(lab: Lab, namespace: Namespace) -> dict[str, bytes]:
    links = json.loads(lab.ip(namespace, "-j link show"))
    return {link["ifname"]: bytes.fromhex(link["address"].replace(":", "")) for link in links}


# Fragments


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("version", [4, 6])
def test_a_fragmented_stream_is_put_together_by_the_receiver(lab: Lab, count: int, version: int) -> None:
    network = fan_out(lab, count)
    rule = ("cam", GROUP_IN, outputs(count)) if version == 4 else ("cam", IPV6_IN, outputs6(count))
    lab.supervisor(network.relay, config=config(rule))
    assert paths(lab, network.relay) == {"kernel"}
    sinks = listen_all(lab, network, "--expect", "10000", "--idle", "5", version=version)
    sent_to = GROUP_SENT if version == 4 else IPV6_SENT
    options = ("--count", "10000", "--rate", "5000", "--size", "4000", "--digest")
    sent = send(lab, network.src, sent_to, *options)
    for number, sink in enumerate(sinks):
        heard = report(sink)
        assert_whole(heard, sent)
        assert_headers(heard, number, version)
    assert_accounted(lab, network.relay, 30_000)  # three fragments each


# What is not sent, and why


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_an_expired_ttl_is_a_drop_of_that_output_alone(lab: Lab, count: int) -> None:
    network = fan_out(lab, count)
    to = ["239.2.0.1%out0:6000,ttl=decrement", *outputs(2)[1:]][:count]
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, to)))
    sinks = listen_all(lab, network, "--idle", "1", "--timeout", "5")
    options = ("--rate", "10000", "--count", "1000", "--digest")
    sent = send(lab, network.src, f"{GROUP_SENT},ttl=1", *options)
    heard = [report(sink) for sink in sinks]
    assert heard[0]["packets"] == 0
    rule, expired, *others = stats(lab, network.relay)
    assert (rule["relayed_packets"], dropped(rule)) == (1000, {})
    assert (expired["sent_packets"], dropped(expired)) == (0, {"ttl_expired": 1000})
    for other, whole in zip(others, heard[1:], strict=True):
        assert_whole(whole, sent)
        assert (other["sent_packets"], dropped(other)) == (1000, {})
    assert_nothing_lost_on_the_way(lab, network.relay)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("tags", [[], [(CUSTOMER_TAG, 100)]], ids=["untagged", "tagged"])
def test_what_exceeds_the_egress_mtu_is_too_large_for_that_output_alone(
    lab: Lab, count: int, tags: list[tuple[int, int]]
) -> None:
    """Around the MTU byte by byte: the kernel itself judges by the frame, and with a tag's slack."""
    network = fan_out(lab, count)
    lab.ip(network.relay, "link set out0 mtu 1000")
    stream = f"{GROUP_IN},vlan=100" if tags else GROUP_IN
    lab.supervisor(network.relay, config=config(("cam", stream, outputs(count)), path="kernel"))
    sizes = [*range(1000 - 28 - 2, 1000 - 28 + 11), 1472]
    fitting = [size for size in sizes if size <= 1000 - 28]
    sinks = listen_all(lab, network, "--idle", "2", "--timeout", "10")
    with Source(lab, network.src) as source:
        for _ in range(100):
            for size in sizes:
                source.send(next(stream_frames(1, tags, size)))
    heard = [report(sink) for sink in sinks]
    packets = [100 * len(fitting), 100 * len(sizes)][:count]
    assert [(each["packets"], each["corrupt"]) for each in heard] == [(number, 0) for number in packets]
    assert heard[0]["size_max"] == 972
    rule, *sent = stats(lab, network.relay)
    assert (rule["relayed_packets"], dropped(rule)) == (100 * len(sizes), {})
    too_large = {"too_large": 100 * (len(sizes) - len(fitting))}
    assert [(row["sent_packets"], dropped(row)) for row in sent] == list(
        zip(packets, [too_large, {}], strict=False)
    )
    assert_nothing_lost_on_the_way(lab, network.relay)


def redirect_lost(lab: Lab, relay: Namespace) -> dict[str, int]:
    rows = lab.ask(relay, "status")
    return {row["interface"]: row["redirect_lost"] for row in rows if row["object"] == "egress"}


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_what_the_device_does_not_take_is_counted_for_this_instance_alone(lab: Lab, count: int) -> None:
    """A veth device does not take what exceeds its peer's MTU, which the relay cannot know."""
    network, other = fan_out(lab, count), fan_out(lab, count, mark="x")
    for each in (network, other):
        lab.supervisor(each.relay, config=config(("cam", GROUP_IN, outputs(count))))
        assert paths(lab, each.relay) == {"kernel"}
    sinks = listen_all(lab, network, "--idle", "1", "--timeout", "8")
    lab.ip(network.sinks[0], "link set eth0 mtu 1000")
    sent = send(lab, network.src, GROUP_SENT, "--count", "500", "--rate", "10000", "--digest")
    heard = [report(sink) for sink in sinks]
    assert heard[0]["packets"] == 0
    for whole in heard[1:]:
        assert_whole(whole, sent)
    rest = {f"out{number}": 0 for number in range(count)}
    assert redirect_lost(lab, network.relay) == rest | {"out0": 500}
    assert redirect_lost(lab, other.relay) == rest


# Changes under traffic


def endless(lab: Lab, network: Network, rate: int) -> Process:
    source = spawn_send(lab, network.src, GROUP_SENT, "--rate", str(rate), "--digest")
    wait_until(lambda: stats(lab, network.relay)[0]["received_packets"] > 0, "traffic")
    return source


def ended(source: Process) -> Report:
    source.child.send_signal(signal.SIGINT)
    return report(source)


def rewrite_config(lab: Lab, relay: Namespace, text: str) -> None:
    (lab.directory / f"{relay.name}.toml").write_text(text)
    ControlClient(lab.runtime_directory / f"{relay.name}.sock").call("reload")


def assert_complete(heard: Report, sent: Report) -> None:
    """Everything once; in order or not."""
    assert heard["packets"] == sent["packets"], heard
    counts = ("lost", "duplicates", "corrupt", "socket_dropped", "checksum_errors")
    assert {name: heard[name] for name in counts} == dict.fromkeys(counts, 0), heard


@pytest.mark.parametrize("kept", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_fifty_output_changes_lose_and_double_nothing_at_the_unchanged_outputs(lab: Lab, kept: int) -> None:
    network = fan_out(lab, 3)
    changing = [outputs(3)[:kept], outputs(3)[: kept + 1], outputs(3, ",source=10.9.9.9")[kept : kept + 1]]
    changing[2] = [*outputs(3)[:kept], *changing[2]]
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, changing[0])))
    sinks = listen_all(lab, network, "--idle", "3")[:kept]
    source = endless(lab, network, 10_000)
    for number in range(1, 51):
        rewrite_config(lab, network.relay, config(("cam", GROUP_IN, changing[number % 3])))
    sent = ended(source)
    for sink in sinks:
        assert_whole(report(sink), sent)
    rule, *rows = stats(lab, network.relay)
    assert (rule["received_packets"], rule["relayed_packets"], dropped(rule)) == (
        sent["packets"], sent["packets"], {},
    )  # fmt: skip
    assert [(row["sent_packets"], dropped(row)) for row in rows[:kept]] == [(sent["packets"], {})] * kept
    assert_nothing_lost_on_the_way(lab, network.relay)


@pytest.mark.parametrize("count", [1, 2])
def test_fifty_path_switches_lose_and_double_nothing(lab: Lab, count: int) -> None:
    network = fan_out(lab, count)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(count)), path="kernel"))
    sinks = listen_all(lab, network, "--idle", "3")
    source = endless(lab, network, 10_000)
    for number in range(50):
        path = ("worker", "kernel")[number % 2]
        rewrite_config(lab, network.relay, config(("cam", GROUP_IN, outputs(count)), path=path))
        assert paths_now(lab, network.relay) == {path}
    sent = ended(source)
    for number, sink in enumerate(sinks):
        heard = report(sink)
        assert_complete(heard, sent)
        assert_headers(heard, number)
    assert_accounted(lab, network.relay, sent["packets"])
    assert status(lab, network.relay)["packets"] > 0  # some did go through the worker


def paths_now(lab: Lab, relay: Namespace) -> set[str]:
    """As `paths`, but at once, and of pending rules too."""
    rows = ControlClient(lab.runtime_directory / f"{relay.name}.sock").call("rule.show")
    return {row["path"] for row in rows}


def seconds_until(lab: Lab, relay: Namespace, path: str) -> float:
    """How long it takes until the rule takes that path."""
    start = time.monotonic()
    wait_until(lambda: paths_now(lab, relay) == {path}, f"the {path} path")
    return time.monotonic() - start


def test_a_rule_follows_the_peers_gro_within_a_second(lab: Lab) -> None:
    network = fan_out(lab, 1)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(1))))
    assert paths(lab, network.relay) == {"kernel"}
    for number, (gro, path) in enumerate([("off", "worker"), ("on", "kernel")] * 2, start=1):
        lab.run(network.sinks[0], ["ethtool", "-K", "eth0", "gro", gro])
        assert seconds_until(lab, network.relay, path) < REPLAN_S + ASKING_S
        relay_some(lab, network, 1000 * number)


def relay_some(lab: Lab, network: Network, total: int) -> None:
    """A thousand packets more, whole at every sink; total: how many that makes."""
    sinks = listen_all(lab, network, "--expect", "1000", "--idle", "5")
    sent = send(lab, network.src, GROUP_SENT, "--count", "1000", "--rate", "10000", "--digest")
    for number, sink in enumerate(sinks):
        heard = report(sink)
        assert_whole(heard, sent)
        assert_headers(heard, number)
    assert_accounted(lab, network.relay, total)


def test_a_rule_follows_the_egress_mtu_unless_it_insists_on_its_path(lab: Lab) -> None:
    network = fan_out(lab, 1)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(1))))
    insisting = ("rule", "add", "insisting", "--from", "239.1.1.2%in0:5000", "--path", "kernel")
    for number, (mtu, path) in enumerate([(1000, "worker"), (1500, "kernel")], start=1):
        lab.ip(network.relay, f"link set out0 mtu {mtu}")
        assert seconds_until(lab, network.relay, path) < REPLAN_S + ASKING_S
        relay_some(lab, network, 1000 * number)
    lab.mcr(network.relay, *insisting, "--to", "239.2.0.9%out0:6009")
    lab.ip(network.relay, "link set out0 mtu 1000")
    wait_until(lambda: paths_now(lab, network.relay) == {"worker", "kernel"}, "the one that does not insist")
    send(lab, network.src, "239.1.1.2%eth0:5000", "--count", "10", "--size", "1000")
    (_, row) = (row for row in stats(lab, network.relay) if row["rule"] == "insisting")
    assert (row["sent_packets"], dropped(row)) == (0, {"too_large": 10})


def test_a_rule_that_insists_on_the_kernel_path_waits_for_the_peers_gro(lab: Lab) -> None:
    network = fan_out(lab, 1)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(1)), path="kernel"))
    client = ControlClient(lab.runtime_directory / f"{network.relay.name}.sock")
    lab.run(network.sinks[0], ["ethtool", "-K", "eth0", "gro", "off"])
    wait_until(lambda: client.call("rule.show")[0]["state"] == "pending", "pending")
    assert "out0 cannot transmit redirected frames" in client.call("rule.show")[0]["reason"]
    lab.run(network.sinks[0], ["ethtool", "-K", "eth0", "gro", "on"])
    wait_until(lambda: client.call("rule.show")[0]["state"] == "active", "active")
    relay_some(lab, network, 1000)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_changed_mac_address_is_followed(lab: Lab, count: int) -> None:
    network = fan_out(lab, count)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(count))))
    mac = bytes.fromhex("0200000000ee")
    with Capture(lab, network.sinks[0]) as capture, Source(lab, network.src) as source:
        send_all(source, stream_frames(1))
        (before,) = capture.frames(1, bytes.fromhex("01005e020001"))
        lab.ip(network.relay, "link set out0 address 02:00:00:00:00:ee")

        def source_mac() -> bytes:
            send_all(source, stream_frames(1))
            return capture.frames(1, bytes.fromhex("01005e020001"), grace_s=0.02)[-1][6:12]

        assert before[6:12] != mac
        wait_until(lambda: source_mac() == mac, "the new address")
    assert paths(lab, network.relay) == {"kernel"}


def test_a_changed_address_is_followed(lab: Lab) -> None:
    network = fan_out(lab, 1)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(1))))
    with Capture(lab, network.sinks[0]) as capture, Source(lab, network.src) as source:

        def source_address() -> bytes:
            send_all(source, stream_frames(1))
            return capture.frames(1, bytes.fromhex("01005e020001"), grace_s=0.02)[-1][26:30]

        assert source_address() == bytes([10, 2, 0, 1])
        lab.ip(network.relay, "address delete 10.2.0.1/24 dev out0")
        wait_until(lambda: paths_now(lab, network.relay) == {"worker"}, "no address to send from")
        lab.ip(network.relay, "address add 10.2.0.77/24 dev out0")
        wait_until(lambda: paths_now(lab, network.relay) == {"kernel"}, "an address to send from")
        wait_until(lambda: source_address() == bytes([10, 2, 0, 77]), "the new address")


@pytest.mark.parametrize("count", [1, 2, pytest.param(3, marks=pytest.mark.soak)])
def test_an_egress_interface_that_vanishes_and_returns_is_followed(lab: Lab, count: int) -> None:
    network = fan_out(lab, count)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(count))))
    client = ControlClient(lab.runtime_directory / f"{network.relay.name}.sock")

    def states() -> list[str]:
        return [row["output_state"] for row in client.call("rule.show")]

    sinks = listen_all(lab, network, "--idle", "3")[1:]
    source = endless(lab, network, 5000)
    lab.ip(network.relay, "link delete out0")
    wait_until(lambda: states() == ["pending", *["active"] * (count - 1)], "pending")
    add_output(lab, network.relay, network.sinks[0], 0)
    wait_until(lambda: states() == ["active"] * count, "active again")
    sent = ended(source)
    for sink in sinks:
        assert_whole(report(sink), sent)
    # Until its peer's GRO is on, the worker path has to do.
    wait_until(lambda: paths(lab, network.relay) == {"kernel"}, "the kernel path again")
    rule, *_ = stats(lab, network.relay)
    assert rule["received_packets"] == sent["packets"]
    assert rule["relayed_packets"] + sum(dropped(rule).values()) == sent["packets"]
    assert set(dropped(rule)) <= {"no_output"}
    again = listen_all(lab, network, "--expect", "1000", "--idle", "5")
    sent = send(lab, network.src, GROUP_SENT, "--count", "1000", "--rate", "10000", "--digest")
    for number, sink in enumerate(again):
        heard = report(sink)
        assert_whole(heard, sent)
        assert_headers(heard, number)


# The rest of the machine


def test_other_traffic_is_untouched(lab: Lab) -> None:
    network = fan_out(lab, 2)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(2))))
    assert paths(lab, network.relay) == {"kernel"}
    other, same_group, fragmented = (
        listen(lab, network.relay, stream, "--expect", "2000", "--idle", "5", "--digest")
        for stream in ("239.9.9.9%in0:5000", "239.1.1.1%in0:5001", "239.1.1.1%in0:5002")
    )
    sinks = listen_all(lab, network, "--expect", "10000", "--idle", "8")
    source = spawn_send(lab, network.src, GROUP_SENT, "--rate", "5000", "--count", "10000", "--digest")
    options = ("--rate", "5000", "--digest", "--count", "2000")
    sent = [
        send(lab, network.src, "239.9.9.9%eth0:5000", *options),
        send(lab, network.src, "239.1.1.1%eth0:5001", *options),
        send(lab, network.src, "239.1.1.1%eth0:5002", *options, "--size", "4000"),
    ]
    ping = lab.run(network.src, ["ping", "-c", "20", "-i", "0.01", "-s", "1400", "10.1.0.2"]).stdout
    assert "20 packets transmitted, 20 received" in ping
    assert transfer_tcp(lab, network.src, network.relay, 8 << 20) == 8 << 20
    for sink, each in zip(
        (other, same_group, fragmented, *sinks), (*sent, *2 * [report(source)]), strict=True
    ):
        assert_whole(report(sink), each)
    assert_accounted(lab, network.relay, 10_000)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_the_death_of_the_worker_disturbs_no_packet(lab: Lab, count: int) -> None:
    network = fan_out(lab, count)
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(count))))
    sinks = listen_all(lab, network, "--idle", "3")
    source = endless(lab, network, 20_000)
    for restarts in (1, 2, 3):
        worker = status(lab, network.relay)["worker_pid"]
        os.kill(worker, signal.SIGKILL)
        wait_until(
            lambda worker=worker: status(lab, network.relay)["worker_pid"] not in (worker, None),  # type: ignore[misc]
            "a new worker",
        )
        assert status(lab, network.relay)["worker_restarts"] == restarts
    sent = ended(source)
    for sink in sinks:
        assert_whole(report(sink), sent)
    assert_accounted(lab, network.relay, sent["packets"], worker_restarts=3)


def test_nothing_is_left_after_the_end(lab: Lab) -> None:
    network = fan_out(lab, 2)
    supervisor = lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(2))))
    source = endless(lab, network, 20_000)
    assert supervisor.terminate(3) == 0
    assert lab.leftovers(network.relay) == []
    source.child.kill()
