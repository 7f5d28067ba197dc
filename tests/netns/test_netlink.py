"""Interfaces are read as the kernel has them, and no change of them goes unnoticed."""

import asyncio
import ctypes
import errno
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from mcr import netlink
from mcr.errors import McrError
from mcr.netlink import (
    LinkMonitor,
    Neighbour,
    Route,
    XdpProgram,
    neighbour,
    read_interfaces,
    receive_queues,
    route_to,
    xdp_program,
)
from mcr.rule import InterfaceFacts
from tests.conftest import require
from tests.netns.lab import Lab, Namespace

BPF_PROG_TYPE_XDP = 6
XDP_PASS = bytes.fromhex("b700000002000000 9500000000000000")  # r0 = 2; exit
XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE = 2, 4
MAC = "02:00:00:00:00:07"
# enum netdev_xdp_act (linux/netdev.h), as drivers/net/veth.c sets them: BASIC, REDIRECT, RX_SG and, if the
# peer can take redirected frames, NDO_XMIT and NDO_XMIT_SG.
VETH_RECEIVES = 1 | 2 | 32
VETH_TRANSMITS = VETH_RECEIVES | 4 | 64


def told_addresses(lab: Lab, namespace: Namespace, interface: str) -> list[dict[str, Any]]:
    """What `ip` tells of the addresses of an interface."""
    links = json.loads(lab.ip(namespace, f"-j address show dev {interface}"))
    told: list[dict[str, Any]] = links[0]["addr_info"]
    return told


def settle(lab: Lab, namespace: Namespace) -> None:
    """Returns once every interface that is up has a link-local address and no tentative one.

    Also without duplicate address detection an address is tentative for a moment.
    """
    deadline = time.monotonic() + 10
    while True:
        links = json.loads(lab.ip(namespace, "-j address show"))
        told = [link["addr_info"] for link in links if link["operstate"] == "UP"]
        if all(addresses and not any(each.get("tentative") for each in addresses) for addresses in told):
            return
        assert time.monotonic() < deadline, told
        time.sleep(0.01)


@pytest.fixture
def host(lab: Lab) -> Namespace:
    """A namespace with eth0 and eth1, a veth pair."""
    namespace = lab.namespace("host")
    lab.veth(namespace, "eth0", namespace, "eth1")
    settle(lab, namespace)
    return namespace


@contextmanager
def attached(interface: str, flags: int) -> Iterator[int]:
    """An XDP program that passes everything, on an interface of the thread's namespace; gives its id."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    program = libbpf.bpf_prog_load(BPF_PROG_TYPE_XDP, b"pass", b"MIT", XDP_PASS, len(XDP_PASS) // 8, None)
    assert program >= 0
    try:
        assert libbpf.bpf_xdp_attach(socket.if_nametoindex(interface), program, flags, None) == 0
        with Path(f"/proc/self/fdinfo/{program}").open() as information:
            fields = dict(line.split(":", 1) for line in information)
        yield int(fields["prog_id"])
        assert libbpf.bpf_xdp_detach(socket.if_nametoindex(interface), flags, None) == 0
    finally:
        os.close(program)


class Changes:
    """What a LinkMonitor reported, and when."""

    def __init__(self) -> None:
        self.facts: list[dict[str, InterfaceFacts]] = []
        self.times_s: list[float] = []

    def __call__(self, facts: dict[str, InterfaceFacts]) -> None:
        self.facts.append(facts)
        self.times_s.append(time.monotonic())

    async def until(self, condition: Callable[[dict[str, InterfaceFacts]], bool]) -> None:
        deadline = time.monotonic() + 10
        while not (self.facts and condition(self.facts[-1])):
            assert time.monotonic() < deadline, self.facts
            await asyncio.sleep(0.005)


def with_monitor(
    lab: Lab, namespace: Namespace, body: Callable[[LinkMonitor, Changes], Coroutine[Any, Any, None]]
) -> None:
    async def session() -> None:
        changes = Changes()
        async with LinkMonitor(changes) as monitor:
            await body(monitor, changes)

    with lab.inside(namespace):
        asyncio.run(session())


@pytest.fixture
def pair(lab: Lab) -> tuple[Namespace, Namespace]:
    """Two namespaces joined by a veth pair, eth0 and peer0, without GRO."""
    done = lab.run(lab.namespace("probe"), ["genl", "ctrl", "get", "name", "netdev"], check=False)
    require("netdev-family", done.returncode == 0, f"genl: {done.stderr.strip()}")
    here, there = lab.namespace("here"), lab.namespace("there")
    lab.veth(here, "eth0", there, "peer0", gro=False)
    settle(lab, here)
    return here, there


def link_local(lab: Lab, namespace: Namespace, interface: str) -> IPv6Address:
    told = told_addresses(lab, namespace, interface)
    (address,) = [each["local"] for each in told if each["family"] == "inet6" and each["scope"] == "link"]
    return IPv6Address(address)


def chosen_sources(interface: str) -> tuple[IPv4Address, IPv6Address, IPv6Address]:
    """The addresses that the kernel sends from to groups: IPv4, IPv6 of global scope, IPv6 on the link."""
    ifindex = socket.if_nametoindex(interface)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ipv4:
        mreqn = struct.pack("4s4si", bytes(4), bytes(4), ifindex)
        ipv4.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, mreqn)
        ipv4.connect(("239.1.1.1", 9))
        sources = [ipv4.getsockname()[0]]
    for group in ("ff0e::1", "ff02::9"):
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ipv6:
            ipv6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, ifindex)
            ipv6.connect((group, 9))
            sources.append(ipv6.getsockname()[0].partition("%")[0])
    return IPv4Address(sources[0]), IPv6Address(sources[1]), IPv6Address(sources[2])


def test_interfaces_are_read_as_they_are(lab: Lab, host: Namespace) -> None:
    lab.ip(host, "address add 10.1.0.1/24 dev eth0")
    lab.ip(host, "address add fd01::1/64 dev eth0")
    settle(lab, host)
    lab.ip(host, f"link set eth0 mtu 9000 address {MAC}")
    lab.ip(host, "link add down0 type veth peer name down1")
    lab.run(host, ["ip", "link", "set", "eth0", "alias", "to the studio"])
    told = {link["ifname"]: link for link in json.loads(lab.ip(host, "-j link show"))}
    with lab.inside(host):
        facts = read_interfaces()
    assert set(facts) == {"lo", "eth0", "eth1", "down0", "down1"}
    assert facts["eth0"] == InterfaceFacts(
        name="eth0",
        ifindex=told["eth0"]["ifindex"],
        mtu=9000,
        up=True,
        ethernet=True,
        mac=MAC,
        ipv4=IPv4Address("10.1.0.1"),
        ipv6=IPv6Address("fd01::1"),
        ipv6_link=link_local(lab, host, "eth0"),
        xdp_features=facts["eth0"].xdp_features,
        kind="veth",
        alias="to the studio",
    )
    assert facts["lo"] == InterfaceFacts(
        "lo", 1, 65536, True, False, "", xdp_features=facts["lo"].xdp_features
    )
    for name in ("eth1", "down0", "down1"):
        assert (facts[name].mtu, facts[name].mac) == (1500, told[name]["address"])
        assert facts[name].up == (name == "eth1")
        assert (facts[name].ipv4, facts[name].ipv6) == (None, None)


@pytest.mark.parametrize(
    ("commands", "ipv4", "ipv6"),
    [
        (["10.1.0.1/24", "10.1.0.2/24", "fd01::1/64"], "10.1.0.1", "fd01::1"),
        (["10.1.0.9/24", "10.2.0.1/24", "fd01::1/64"], "10.1.0.9", "fd01::1"),
        (["10.9.0.1/24 scope link", "10.1.0.1/24", "fd01::1/64"], "10.1.0.1", "fd01::1"),
        (["10.1.0.1 peer 10.1.0.2", "fd01::1 peer fd01::2"], "10.1.0.1", "fd01::1"),
        (["10.1.0.1/24", "fd01::1/64", "fd02::1/64 preferred_lft 0"], "10.1.0.1", "fd01::1"),
        (["10.1.0.1/24 preferred_lft 0", "10.2.0.1/24", "fd01::1/64"], "10.1.0.1", "fd01::1"),
        (["10.1.0.1/24", "fd01::1/64 preferred_lft 0"], "10.1.0.1", "fd01::1"),
        (["10.1.0.1/24", "2001:db8::1/64"], "10.1.0.1", "2001:db8::1"),
    ],
)
def test_the_primary_addresses_are_those_that_the_kernel_sends_from(
    lab: Lab, host: Namespace, commands: list[str], ipv4: str, ipv6: str
) -> None:
    for command in commands:
        lab.ip(host, f"address add {command} dev eth0")
    settle(lab, host)
    with lab.inside(host):
        facts = read_interfaces()["eth0"]
        assert (facts.ipv4, facts.ipv6) == (IPv4Address(ipv4), IPv6Address(ipv6))
        assert facts.ipv6_link == link_local(lab, host, "eth0")
        assert (facts.ipv4, facts.ipv6, facts.ipv6_link) == chosen_sources("eth0")


def test_a_temporary_address_is_not_the_primary_one(lab: Lab, host: Namespace) -> None:
    lab.run(host, ["sysctl", "-qw", "net.ipv6.conf.eth0.use_tempaddr=1"])
    lab.ip(host, "address add 2001:db8::1/64 dev eth0 mngtmpaddr")
    assert any(each.get("temporary") for each in told_addresses(lab, host, "eth0"))
    settle(lab, host)
    with lab.inside(host):
        assert read_interfaces()["eth0"].ipv6 == IPv6Address("2001:db8::1")


def test_an_ipv6_address_counts_once_it_is_known_to_be_unique(lab: Lab, host: Namespace) -> None:
    lab.run(
        host, ["sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=1", "net.ipv6.conf.eth0.dad_transmits=100"]
    )
    lab.ip(host, "address add fd01::1/64 dev eth0")
    with lab.inside(host):
        assert read_interfaces()["eth0"].ipv6 is None
    lab.ip(host, "address add fd02::1/64 dev eth0 nodad")
    lab.ip(host, "address add fd03::1/64 dev eth0")
    with lab.inside(host):
        assert read_interfaces()["eth0"].ipv6 == IPv6Address("fd02::1")


def test_an_ipv6_address_that_another_host_has_does_not_count(
    lab: Lab, pair: tuple[Namespace, Namespace]
) -> None:
    here, there = pair
    lab.ip(there, "address add fd01::1/64 dev peer0")
    lab.run(here, ["sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=1"])
    lab.ip(here, "address add fd01::1/64 dev eth0")
    deadline = time.monotonic() + 10
    while not any(each.get("dadfailed") for each in told_addresses(lab, here, "eth0")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with lab.inside(here):
        assert read_interfaces()["eth0"].ipv6 is None


def test_a_veth_can_transmit_while_its_peer_has_gro_or_native_xdp(
    lab: Lab, pair: tuple[Namespace, Namespace]
) -> None:
    here, there = pair

    def features() -> int | None:
        with lab.inside(here):
            return read_interfaces()["eth0"].xdp_features

    assert features() == VETH_RECEIVES
    lab.run(there, ["ethtool", "-K", "peer0", "gro", "on"])
    assert features() == VETH_TRANSMITS
    lab.run(there, ["ethtool", "-K", "peer0", "gro", "off"])
    assert features() == VETH_RECEIVES
    with lab.inside(there):
        with attached("peer0", XDP_FLAGS_DRV_MODE):
            assert features() == VETH_TRANSMITS
        assert features() == VETH_RECEIVES
        with attached("peer0", XDP_FLAGS_SKB_MODE):
            assert features() == VETH_RECEIVES


def test_without_the_netdev_family_the_features_are_unknown_and_changes_are_reported(
    lab: Lab, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netlink, "NETDEV_FAMILY", "mcr-none")  # as the kernel answers before 6.3

    async def body(monitor: LinkMonitor, changes: Changes) -> None:
        lab.ip(host, "link set eth0 mtu 1600")
        await changes.until(lambda facts: facts["eth0"].mtu == 1600)
        assert {facts.xdp_features for facts in monitor.facts.values()} == {None}

    with_monitor(lab, host, body)


def test_an_interface_without_carrier_is_not_up(lab: Lab, host: Namespace) -> None:
    lab.ip(host, "link set eth1 down")
    deadline = time.monotonic() + 10
    while json.loads(lab.ip(host, "-j link show dev eth0"))[0]["operstate"] == "UP":
        assert time.monotonic() < deadline  # the kernel tells it up to a second later
        time.sleep(0.01)
    with lab.inside(host):
        assert not read_interfaces()["eth0"].up


def test_a_thousand_interfaces_are_all_read(lab: Lab, host: Namespace) -> None:
    batch = lab.directory / "batch"
    batch.write_text("".join(f"link add many{n} type veth peer name peer{n}\n" for n in range(500)))
    lab.ip(host, f"-batch {batch}")
    with lab.inside(host):
        facts = read_interfaces()
    names = {f"{end}{n}" for n in range(500) for end in ("many", "peer")}
    assert set(facts) == names | {"lo", "eth0", "eth1"}


def test_a_name_that_is_not_utf_8_is_read_as_file_names_are(lab: Lab, host: Namespace) -> None:
    lab.ip(host, "link add odd\udcff type veth peer name odd1")
    with lab.inside(host):
        assert set(read_interfaces()) == {"lo", "eth0", "eth1", "odd\udcff", "odd1"}


def test_interfaces_can_be_read_inside_a_running_loop(lab: Lab, host: Namespace) -> None:
    async def session() -> None:
        assert set(read_interfaces()) == {"lo", "eth0", "eth1"}
        assert receive_queues("eth0") == 1
        assert xdp_program("eth0") is None

    with lab.inside(host):
        asyncio.run(session())


def test_receive_queues_are_those_in_use_now(lab: Lab, host: Namespace) -> None:
    lab.veth(host, "four0", host, "four1", queues=4)
    lab.run(host, ["ethtool", "-L", "four0", "rx", "4"])
    with lab.inside(host):
        assert receive_queues("four0") == 4
        assert receive_queues("eth0") == 1
        assert receive_queues("lo") == 1
        lab.run(host, ["ethtool", "-L", "four0", "rx", "3"])
        assert receive_queues("four0") == 3


def test_an_absent_interface_is_one_clear_error(lab: Lab, host: Namespace) -> None:
    with lab.inside(host):
        for read in (receive_queues, xdp_program):
            for name in ("nothere0", "a-name-that-no-interface-can-have", ""):
                with pytest.raises(McrError) as failed:
                    read(name)
                assert failed.value == McrError(
                    f"there is no interface {name}", "see which there are: ip link"
                )


def test_the_xdp_program_and_its_mode_are_told(lab: Lab, host: Namespace) -> None:
    with lab.inside(host):
        assert xdp_program("eth0") is None
        with attached("eth0", XDP_FLAGS_DRV_MODE) as program_id:
            assert xdp_program("eth0") == XdpProgram("native", program_id)
        with attached("eth0", XDP_FLAGS_SKB_MODE) as program_id:
            assert xdp_program("eth0") == XdpProgram("generic", program_id)
        assert xdp_program("eth0") is None


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("link add new0 type veth peer name new1", lambda facts: "new0" in facts),
        ("link delete eth0", lambda facts: "eth0" not in facts and "eth1" not in facts),
        ("link set eth0 mtu 4000", lambda facts: facts["eth0"].mtu == 4000),
        (f"link set eth0 address {MAC}", lambda facts: facts["eth0"].mac == MAC),
        ("link set eth0 down", lambda facts: not facts["eth0"].up and not facts["eth1"].up),
        ("link set eth0 name other0", lambda facts: "other0" in facts and "eth0" not in facts),
        ("address add 10.1.0.1/24 dev eth0", lambda facts: facts["eth0"].ipv4 == IPv4Address("10.1.0.1")),
        ("address add fd01::1/64 dev eth0", lambda facts: facts["eth0"].ipv6 == IPv6Address("fd01::1")),
        ("address flush dev eth0", lambda facts: facts["eth0"].ipv6_link is None),
    ],
)
def test_every_change_is_reported(
    lab: Lab, host: Namespace, command: str, expected: Callable[[dict[str, InterfaceFacts]], bool]
) -> None:
    async def body(monitor: LinkMonitor, changes: Changes) -> None:
        assert set(monitor.facts) == {"lo", "eth0", "eth1"}
        lab.ip(host, command)
        await changes.until(expected)
        assert monitor.facts == changes.facts[-1]

    with_monitor(lab, host, body)


def test_changes_of_the_primary_address_and_of_further_ones_are_reported(lab: Lab, host: Namespace) -> None:
    async def body(_: LinkMonitor, changes: Changes) -> None:
        lab.ip(host, "address add 10.1.0.1/24 dev eth0")
        await changes.until(lambda facts: facts["eth0"].ipv4 == IPv4Address("10.1.0.1"))
        reports = len(changes.facts)
        lab.ip(host, "address add 10.2.0.1/24 dev eth0")
        await changes.until(lambda _: len(changes.facts) > reports)
        assert changes.facts[-1] == changes.facts[-2]
        lab.ip(host, "address delete 10.1.0.1/24 dev eth0")
        await changes.until(lambda facts: facts["eth0"].ipv4 == IPv4Address("10.2.0.1"))
        lab.ip(host, "address delete 10.2.0.1/24 dev eth0")
        await changes.until(lambda facts: facts["eth0"].ipv4 is None)

    with_monitor(lab, host, body)


def test_the_end_of_duplicate_address_detection_is_reported(lab: Lab, host: Namespace) -> None:
    lab.run(host, ["sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=1"])

    async def body(_: LinkMonitor, changes: Changes) -> None:
        lab.ip(host, "address add fd01::1/64 dev eth0")
        await changes.until(lambda facts: facts["eth0"].ipv6 == IPv6Address("fd01::1"))
        assert changes.facts[0]["eth0"].ipv6 is None

    with_monitor(lab, host, body)


def test_changes_of_xdp_features_are_reported_within_a_second(
    lab: Lab, pair: tuple[Namespace, Namespace]
) -> None:
    here, there = pair

    async def body(monitor: LinkMonitor, changes: Changes) -> None:
        async def reported(features: int) -> None:
            changed_s = time.monotonic()
            await changes.until(lambda facts: facts["eth0"].xdp_features == features)
            assert changes.times_s[-1] - changed_s < 1

        assert monitor.facts["eth0"].xdp_features == VETH_RECEIVES
        lab.run(there, ["ethtool", "-K", "peer0", "gro", "on"])
        await reported(VETH_TRANSMITS)
        lab.run(there, ["ethtool", "-K", "peer0", "gro", "off"])
        await reported(VETH_RECEIVES)
        with ExitStack() as stack:
            with lab.inside(there):
                stack.enter_context(attached("peer0", XDP_FLAGS_DRV_MODE))
            await reported(VETH_TRANSMITS)
            with lab.inside(there):
                stack.close()
            await reported(VETH_RECEIVES)

    with_monitor(lab, here, body)


def test_an_interface_made_anew_under_its_old_index_is_reported(lab: Lab, host: Namespace) -> None:
    def make() -> None:
        lab.ip(
            host, f"link add same0 index 99 address {MAC} type veth peer name same1 index 98 address {MAC}"
        )

    make()

    async def body(monitor: LinkMonitor, changes: Changes) -> None:
        before = monitor.facts
        lab.ip(host, "link delete same0")
        make()  # the loop has not run meanwhile
        await changes.until(bool)
        assert changes.facts[0] == before

    with_monitor(lab, host, body)


def test_a_monitor_leaves_no_descriptor_and_no_task(lab: Lab, host: Namespace) -> None:
    async def session() -> None:
        before = sorted(Path("/proc/self/fd").iterdir())
        async with LinkMonitor(Changes()):
            lab.ip(host, "link set eth0 mtu 1600")
            assert receive_queues("eth0") == 1
        assert sorted(Path("/proc/self/fd").iterdir()) == before
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with lab.inside(host):
        asyncio.run(session())


def test_a_burst_of_changes_makes_few_reports_and_the_last_is_true(lab: Lab, host: Namespace) -> None:
    batch = lab.directory / "batch"
    batch.write_text("".join(f"link set eth0 mtu {mtu}\n" for mtu in range(1600, 2600)))

    async def body(_: LinkMonitor, changes: Changes) -> None:
        began_s = time.monotonic()
        await asyncio.to_thread(lab.ip, host, f"-batch {batch}")
        await changes.until(lambda facts: facts["eth0"].mtu == 2599)
        elapsed_s = time.monotonic() - began_s
        assert 1 <= len(changes.facts) <= elapsed_s / netlink.COALESCE_S
        gaps = [later - earlier for earlier, later in zip(changes.times_s, changes.times_s[1:], strict=False)]
        assert all(gap >= netlink.COALESCE_S for gap in gaps)

    with_monitor(lab, host, body)


def test_an_overrun_of_the_event_socket_loses_no_change(
    lab: Lab, host: Namespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(netlink, "EVENT_BUFFER_BYTES", 2048)
    batch = lab.directory / "batch"
    batch.write_text("".join(f"link set eth0 mtu {mtu}\n" for mtu in range(1600, 1700)))

    async def body(_: LinkMonitor, changes: Changes) -> None:
        lab.ip(host, f"-batch {batch}")  # the loop does not run meanwhile
        await changes.until(lambda facts: facts["eth0"].mtu == 1699)
        lab.ip(host, "link set eth0 mtu 1800")
        await changes.until(lambda facts: facts["eth0"].mtu == 1800)

    with caplog.at_level(logging.INFO, "mcr.netlink"):
        with_monitor(lab, host, body)
    assert any(record.message.startswith("link events were lost") for record in caplog.records)


def test_a_callback_that_fails_does_not_end_the_monitor(
    lab: Lab, host: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    changes = Changes()

    def fail_first(facts: dict[str, InterfaceFacts]) -> None:
        changes(facts)
        if len(changes.facts) == 1:
            raise ZeroDivisionError

    async def session() -> None:
        async with LinkMonitor(fail_first):
            lab.ip(host, "link set eth0 mtu 1600")
            await changes.until(lambda facts: facts["eth0"].mtu == 1600)
            lab.ip(host, "link set eth0 mtu 1700")
            await changes.until(lambda facts: facts["eth0"].mtu == 1700)

    with lab.inside(host):
        asyncio.run(session())
    assert "ZeroDivisionError" in caplog.text


def test_routes_are_told_as_a_send_would_find_them(lab: Lab, host: Namespace) -> None:
    for address in ("10.1.0.1/24", "fd01::1/64"):
        lab.ip(host, f"address add {address} dev eth0")
    settle(lab, host)
    for route in (
        "10.7.0.0/16 via 10.1.0.7 mtu 1000", "unreachable 10.8.0.0/16", "prohibit 10.9.0.0/16",
        "blackhole 10.10.0.0/16", "unreachable fd08::/16",
    ):  # fmt: skip
        lab.ip(host, f"route add {route}")
    with lab.inside(host):
        eth0, eth1 = map(socket.if_nametoindex, ("eth0", "eth1"))
        wanted = {
            ("10.1.0.2", 0): Route(eth0, source="10.1.0.1"),
            ("10.7.0.1", 0): Route(eth0, "10.1.0.7", "10.1.0.1", 1000),
            ("10.1.0.1", 0): Route(socket.if_nametoindex("lo"), source="10.1.0.1", local=True),
            ("fd01::2", 0): Route(eth0, source="fd01::1"),
            ("10.8.0.1", 0): Route(error=errno.EHOSTUNREACH),
            ("10.9.0.1", 0): Route(error=errno.EACCES),
            ("10.10.0.1", 0): Route(error=errno.EINVAL),
            ("192.0.2.1", 0): Route(error=errno.ENETUNREACH),
            ("fd08::1", 0): Route(error=errno.EHOSTUNREACH),
            ("fd09::1", 0): Route(error=errno.ENETUNREACH),
            ("fd01::2", eth1): Route(error=errno.ENETUNREACH),
        }
        assert {key: route_to(ip_address(key[0]), key[1]) for key in wanted} == wanted


def test_neighbours_are_told_as_the_kernel_knows_them(lab: Lab, host: Namespace) -> None:
    lab.ip(host, f"neigh add 10.1.0.2 lladdr {MAC} dev eth0 nud permanent")
    lab.ip(host, "neigh add fd01::2 dev eth0 nud failed")
    with lab.inside(host):
        eth0 = socket.if_nametoindex("eth0")
        assert neighbour(eth0, ip_address("10.1.0.2")) == Neighbour("permanent", MAC)
        assert neighbour(eth0, ip_address("fd01::2")) in (Neighbour("failed", ""), None)
        assert neighbour(eth0, ip_address("10.1.0.3")) is None
