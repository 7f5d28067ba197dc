"""Interfaces are read as the kernel has them, and no change of them goes unnoticed."""

import asyncio
import ctypes
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mcr import netlink
from mcr.errors import McrError
from mcr.netlink import LinkMonitor, XdpProgram, read_interfaces, receive_queues, xdp_program
from mcr.rule import InterfaceFacts
from tests.netns.lab import Lab, Namespace

BPF_PROG_TYPE_XDP = 6
XDP_PASS = bytes.fromhex("b700000002000000 9500000000000000")  # r0 = 2; exit
XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE = 2, 4
MAC = "02:00:00:00:00:07"


@pytest.fixture
def host(lab: Lab) -> Namespace:
    """A namespace with eth0 and eth1, a veth pair."""
    namespace = lab.namespace("host")
    lab.veth(namespace, "eth0", namespace, "eth1")
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


def test_interfaces_are_read_as_they_are(lab: Lab, host: Namespace) -> None:
    lab.ip(host, f"link set eth0 mtu 9000 address {MAC}")
    lab.ip(host, "link add down0 type veth peer name down1")
    told = {link["ifname"]: link for link in json.loads(lab.ip(host, "-j link show"))}
    with lab.inside(host):
        facts = read_interfaces()
    assert set(facts) == {"lo", "eth0", "eth1", "down0", "down1"}
    assert facts["eth0"] == InterfaceFacts("eth0", told["eth0"]["ifindex"], 9000, True, True, MAC)
    assert facts["lo"] == InterfaceFacts("lo", 1, 65536, True, False, "")
    for name in ("eth1", "down0", "down1"):
        assert (facts[name].mtu, facts[name].mac) == (1500, told[name]["address"])
        assert facts[name].up == (name == "eth1")


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
        ("address add 10.1.0.1/24 dev eth0", lambda facts: "eth0" in facts),
        ("address add fd01::1/64 dev eth0", lambda facts: "eth0" in facts),
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
