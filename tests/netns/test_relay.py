"""Streams through the whole relay: a real source, real XDP or AF_PACKET, a real worker, real sinks."""

import json
import re
import socket
from collections.abc import Sequence

import pytest

from mcr.traffic.source import payload
from tests.kernel import packets
from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    assert_accounted,
    assert_whole,
    config,
    dropped,
    listen,
    relay_one,
    report,
    send,
    stats,
    status,
    transfer_tcp,
    wait_until,
)
from tests.netns.lab import Lab, Namespace, RelayTopology

IPV6_IN, IPV6_SENT = "[ff15::1]%in0:5000", "[ff15::1]%eth0:5000"
IPV6_OUT, IPV6_HEARD = "[ff15::2]%out0:6000,ttl=8", "[ff15::2]%eth0:6000"

SIZES = ["0", "1", "17", "512", "1472", "0,1,17,512,1316,1472"]


@pytest.mark.parametrize(
    ("attach", "mode"),
    [
        ('ingress = "xsk"', "native"),
        ('ingress = "xsk"\nmode = "generic"', "generic"),
        ('ingress = "packet"', "none"),
        ("busy_poll = true", "native"),
    ],
    ids=["xsk-native", "xsk-generic", "packet", "busy-poll"],
)
def test_stream_arrives_whole_and_in_order(lab: Lab, attach: str, mode: str) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT]), attach=attach))
    assert status(lab, topology.relay)["mode"] == mode
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 100_000, "--rate", "50000")
    assert_whole(heard, sent)
    assert (heard["ttls"], heard["sources"]) == ([8], ["10.2.0.1"])
    assert_accounted(lab, topology.relay, 100_000)


@pytest.mark.soak
@pytest.mark.parametrize("ingress", ["xsk", "packet"])
def test_a_million_datagrams_arrive_whole_and_in_order(lab: Lab, ingress: str) -> None:
    topology = lab.topology_relay()
    lab.supervisor(
        topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT]), attach=f'ingress = "{ingress}"')
    )
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1_000_000, "--rate", "100000")
    assert_whole(heard, sent)
    assert_accounted(lab, topology.relay, 1_000_000)


@pytest.mark.parametrize("ingress", ["xsk", "packet"])
def test_ipv6_stream_arrives_whole(lab: Lab, ingress: str) -> None:
    topology = lab.topology_relay()
    attach = f'ingress = "{ingress}"'
    lab.supervisor(topology.relay, config=config(("cam", IPV6_IN, [IPV6_OUT]), attach=attach))
    sent, heard = relay_one(lab, topology, IPV6_SENT, IPV6_HEARD, 100_000, "--rate", "50000")
    assert_whole(heard, sent)
    assert (heard["ttls"], heard["sources"]) == ([8], ["fd02::1"])


@pytest.mark.parametrize("ingress", ["xsk", "packet"])
def test_every_payload_size_arrives_whole(lab: Lab, ingress: str) -> None:
    topology = lab.topology_relay()
    attach = f'ingress = "{ingress}"'
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT]), attach=attach))
    for sizes in SIZES:
        sent, heard = relay_one(
            lab, topology, GROUP_SENT, GROUP_HEARD, 20_000, "--rate", "50000", "--size", sizes
        )
        assert_whole(heard, sent)
    assert_accounted(lab, topology.relay, 20_000 * len(SIZES))


def test_one_stream_reaches_multicast_unicast_and_ipv6_outputs(lab: Lab) -> None:
    topology = lab.topology_relay()
    outputs = [GROUP_OUT, "10.2.0.2:6001", "[fd02::2]:6002", IPV6_OUT]
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, outputs)))
    heard_at = [GROUP_HEARD, "10.2.0.2%eth0:6001", "[fd02::2]%eth0:6002", IPV6_HEARD]
    sinks = [
        listen(lab, topology.dst, stream, "--expect", "20000", "--idle", "5", "--digest")
        for stream in heard_at
    ]
    sent = send(lab, topology.src, GROUP_SENT, "--count", "20000", "--rate", "20000", "--digest")
    for sink in sinks:
        assert_whole(report(sink), sent)
    assert_accounted(lab, topology.relay, 20_000)


def test_unicast_input_is_relayed_to_a_group(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cloud", "10.1.0.2%in0:5000", [GROUP_OUT])))
    sent, heard = relay_one(lab, topology, "10.1.0.2:5000", GROUP_HEARD, 10_000, "--rate", "20000")
    assert_whole(heard, sent)


def send_tagged(lab: Lab, topology: RelayTopology, tags: Sequence[tuple[int, int]], count: int) -> None:
    """Test packets to 239.1.1.1:5000 in frames that carry these VLAN tags."""
    with lab.inside(topology.src):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with raw:
        raw.bind(("eth0", 0))
        for sequence in range(count):
            datagram = packets.udp(payload(sequence, 1, 512))
            raw.send(packets.ethernet(packets.ipv4(datagram), packets.IPV4, tags))


@pytest.mark.parametrize("ingress", ["xsk", "packet"])
@pytest.mark.parametrize(
    ("vlan", "tags"),
    [("100", ((0x8100, 100),)), ("10.100", ((0x88A8, 10), (0x8100, 100)))],
    ids=["802.1Q", "802.1ad"],
)
def test_tagged_stream_is_told_from_the_untagged_one(
    lab: Lab, ingress: str, vlan: str, tags: Sequence[tuple[int, int]]
) -> None:
    topology = lab.topology_relay()
    rules = (("tagged", f"{GROUP_IN},vlan={vlan}", [GROUP_OUT]), ("plain", GROUP_IN, ["10.2.0.2:7000"]))
    lab.supervisor(topology.relay, config=config(*rules, attach=f'ingress = "{ingress}"'))
    sink = listen(lab, topology.dst, GROUP_HEARD, "--expect", "10000", "--idle", "5")
    send_tagged(lab, topology, tags, 10_000)
    heard = report(sink)
    assert (heard["packets"], heard["lost"], heard["reordered"], heard["corrupt"]) == (10_000, 0, 0, 0)
    plain = next(row for row in stats(lab, topology.relay) if row["rule"] == "plain")
    assert plain["received_packets"] == 0


def test_payload_larger_than_the_output_mtu_is_fragmented(lab: Lab) -> None:
    topology = lab.topology_relay(mtu=3400)
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT, "10.2.0.2:6001"])))
    lab.ip(topology.relay, "link set out0 mtu 1500")
    unicast = listen(lab, topology.dst, "10.2.0.2%eth0:6001", "--expect", "9000", "--idle", "5", "--digest")
    sent, heard = relay_one(
        lab, topology, GROUP_SENT, GROUP_HEARD, 9000, "--rate", "20000", "--size", "3300,100,1473"
    )
    assert_whole(heard, sent)
    assert_whole(report(unicast), sent)
    assert_accounted(lab, topology.relay, 9000)


def test_ttl_dscp_and_source_follow_the_output_options(lab: Lab) -> None:
    topology = lab.topology_relay()
    outputs = {
        "239.2.0.1%out0:6000,ttl=decrement,source=preserve": (30, 46, "10.1.0.1"),
        "239.2.0.2%out0:6000,ttl=5,dscp=10,source=192.0.2.9": (5, 10, "192.0.2.9"),
        "239.2.0.3%out0:*": (64, 46, "10.2.0.1"),
        "10.2.0.2:6000,ttl=7,dscp=0": (7, 0, "10.2.0.1"),
    }
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, list(outputs))))
    heard_at = [f"239.2.0.{n}%eth0:{port}" for n, port in ((1, 6000), (2, 6000), (3, 5000))]
    sinks = [
        listen(lab, topology.dst, stream, "--expect", "5000", "--idle", "5", "--digest")
        for stream in [*heard_at, "10.2.0.2%eth0:6000"]
    ]
    send_options = ("--count", "5000", "--rate", "10000", "--digest")
    sent = send(lab, topology.src, f"{GROUP_SENT},ttl=31,dscp=46", *send_options)
    for sink, (ttl, dscp, source) in zip(sinks, outputs.values(), strict=True):
        heard = report(sink)
        assert_whole(heard, sent)
        assert (heard["ttls"], heard["dscps"], heard["sources"]) == ([ttl], [dscp], [source])


def test_expired_ttl_is_a_drop_of_that_output_alone(lab: Lab) -> None:
    topology = lab.topology_relay()
    outputs = ["239.2.2.3%out0:6000,ttl=decrement", GROUP_OUT]
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, outputs)))
    sent, heard = relay_one(lab, topology, f"{GROUP_SENT},ttl=1", GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)
    _, expired, relayed = stats(lab, topology.relay)
    assert (expired["sent_packets"], dropped(expired)) == (0, {"ttl_expired": 1000})
    assert (relayed["sent_packets"], dropped(relayed)) == (1000, {})


def test_any_port_rule_takes_what_no_port_rule_wants(lab: Lab) -> None:
    topology = lab.topology_relay()
    rules = (
        ("one", GROUP_IN, ["10.2.0.2:6001"]),
        ("rest", "239.1.1.1%in0:*", ["10.2.0.2:*"]),
    )
    lab.supervisor(topology.relay, config=config(*rules))
    sinks = {
        port: listen(
            lab, topology.dst, f"10.2.0.2%eth0:{port}", "--expect", "3000", "--idle", "5", "--digest"
        )
        for port in (6001, 5001, 5002)
    }
    for sent_port, heard_port in ((5000, 6001), (5001, 5001), (5002, 5002)):
        options = ("--count", "3000", "--rate", "20000", "--digest")
        sent = send(lab, topology.src, f"239.1.1.1%eth0:{sent_port}", *options)
        assert_whole(report(sinks[heard_port]), sent)
    counts = {
        row["rule"]: row["received_packets"] for row in stats(lab, topology.relay) if row["object"] == "rule"
    }
    assert counts == {"one": 3000, "rest": 6000}


def test_source_specific_rule_takes_only_its_source(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.ip(topology.src, "address add 10.1.0.9/24 dev eth0")
    rules = (("ssm", "10.1.0.9@232.1.1.1%in0:5000", [GROUP_OUT]),)
    lab.supervisor(topology.relay, config=config(*rules))
    sink = listen(lab, topology.dst, GROUP_HEARD, "--expect", "1000", "--idle", "5", "--digest")
    options = ("--count", "1000", "--rate", "10000", "--digest")
    send(lab, topology.src, "232.1.1.1%eth0:5000", *options)
    sent = send(lab, topology.src, "232.1.1.1%eth0:5000,source=10.1.0.9", *options)
    heard = report(sink)
    assert_whole(heard, sent)
    assert stats(lab, topology.relay)[0]["received_packets"] == 1000
    memberships = lab.run(topology.relay, ["cat", "/proc/net/mcfilter"]).stdout
    assert re.search(r"in0 +0xe8010101 0x0a010009", memberships), memberships


def test_one_worker_drains_every_queue(lab: Lab) -> None:
    topology = lab.topology_relay(queues=2)
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    row = status(lab, topology.relay)
    assert (row["queues"], row["state"]) == (2, "attached")
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 20_000, "--rate", "20000")
    assert heard["packets"] == sent["packets"]
    assert (heard["lost"], heard["duplicates"], heard["corrupt"]) == (0, 0, 0)


def test_other_traffic_is_untouched(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    other = listen(lab, topology.relay, "239.9.9.9%in0:5000", "--expect", "5000", "--idle", "5", "--digest")
    same_group = listen(
        lab, topology.relay, "239.1.1.1%in0:5001", "--expect", "500", "--idle", "5", "--digest"
    )
    sink = listen(lab, topology.dst, GROUP_HEARD, "--expect", "20000", "--idle", "5", "--digest")
    options = ("--rate", "10000", "--digest", "--count")
    others = [send(lab, topology.src, "239.9.9.9%eth0:5000", *options, "5000")]
    others.append(send(lab, topology.src, "239.1.1.1%eth0:5001", *options, "500"))
    sent = send(lab, topology.src, GROUP_SENT, *options, "20000")
    ping = lab.run(topology.src, ["ping", "-c", "20", "-i", "0.01", "-s", "1400", "10.1.0.2"]).stdout
    assert "20 packets transmitted, 20 received" in ping
    assert transfer_tcp(lab, topology.src, topology.relay, 8 << 20) == 8 << 20
    assert_whole(report(other), others[0])
    assert_whole(report(same_group), others[1])
    assert_whole(report(sink), sent)
    assert_accounted(lab, topology.relay, 20_000)


@pytest.mark.parametrize("ingress", ["xsk", "packet"])
def test_random_frames_on_the_wire_harm_nothing(lab: Lab, ingress: str) -> None:
    import random

    topology = lab.topology_relay()
    attach = f'ingress = "{ingress}"'
    lab.supervisor(topology.relay, config=config(("cam", "239.1.1.1%in0:*", [GROUP_OUT]), attach=attach))
    worker = status(lab, topology.relay)["worker_pid"]
    generator = random.Random(7)
    with lab.inside(topology.src):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with raw:
        raw.bind(("eth0", 0))
        for number in range(20_000):
            datagram = packets.udp(payload(number, 1, generator.randrange(200)), with_checksum=False)
            frame = bytearray(packets.ethernet(packets.ipv4(datagram), packets.IPV4))
            for _ in range(generator.randrange(1, 4)):
                frame[generator.randrange(12, len(frame))] = generator.randrange(256)
            if number % 2:  # whole, because a fragment that is cut off counts as truncated
                frame[20:21] = bytes([generator.choice((0, 0x20, 0x40))])
                if generator.randrange(4):  # else what was changed in the header is seen as damage
                    frame[24:26] = bytes(2)
                    frame[24:26] = packets.checksum(bytes(frame[14:34])).to_bytes(2)
            else:
                del frame[generator.randrange(14, len(frame) + 1) :]
            raw.send(frame)
    row = status(lab, topology.relay)
    assert (row["worker_pid"], row["worker_restarts"], row["state"]) == (worker, 0, "attached")
    wait_until(lambda: _balanced(lab, topology.relay), "received = relayed + dropped")
    assert dropped(stats(lab, topology.relay)[0]).keys() >= {
        *("fragment", "truncated", "bad_length", "bad_checksum")
    }


def _balanced(lab: Lab, relay: Namespace) -> bool:
    rule, output = stats(lab, relay)
    relayed: int = rule["relayed_packets"]
    received: int = relayed + sum(dropped(rule).values())
    sent: int = relayed - sum(dropped(output).values())
    return (rule["received_packets"], output["sent_packets"]) == (received, sent)


def test_bpftool_reads_the_maps_by_field_name(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    pinned = f"/sys/fs/bpf/mcr/{topology.relay.name}/rules"
    (entry,) = json.loads(lab.run(topology.relay, ["bpftool", "-j", "map", "dump", "pinned", pinned]).stdout)
    assert entry["formatted"]["key"]["dport"] == 5000
    assert entry["formatted"]["value"]["rule_id"] == 1
    programs = json.loads(lab.run(topology.relay, ["bpftool", "-j", "prog", "show"]).stdout)
    assert "mcr_relay" in {program.get("name") for program in programs}
