"""The control-plane worker holds exactly the memberships it is told to, in the kernel's own tables."""

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from mcr.errors import McrError
from mcr.membership import NOBODY, Membership, MembershipWorker
from tests.netns.lab import KERNEL_GROUPS, SOLICITED_NODES, Lab, Namespace

Groups = set[tuple[str, str]]
ORPHANED_SUPERVISOR = """
import asyncio, ipaddress, socket
from mcr.membership import Membership, MembershipWorker
async def main():
    worker = MembershipWorker()
    await worker.start()
    group = ipaddress.ip_address("239.9.9.9")
    print(await worker.set(frozenset({Membership(socket.if_nametoindex("eth0"), group, None)})), worker.pid)
    print("joined", flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


@pytest.fixture
def host(lab: Lab) -> Namespace:
    """A namespace with the interfaces eth0 and eth1."""
    namespace = lab.namespace("host")
    lab.veth(namespace, "eth0", namespace, "eth1", addresses_a=("10.1.0.1/24",), addresses_b=("10.2.0.1/24",))
    return namespace


def joined(lab: Lab, namespace: Namespace) -> Groups:
    """(interface, group) of every membership that the kernel does not hold by itself."""
    groups: Groups = set()
    for link in json.loads(lab.ip(namespace, "-j maddress show")):
        for entry in link["maddr"]:
            address = ip_address(entry["address"]) if "address" in entry else None
            if address and address not in KERNEL_GROUPS and address not in SOLICITED_NODES:
                groups.add((link["ifname"], str(address)))
    return groups


def filters(lab: Lab, namespace: Namespace) -> dict[tuple[str, str], tuple[int, int]]:
    """(group, source) -> how many sockets include and exclude it (net/mcfilter, net/mcfilter6: proc(5))."""
    found = {}
    for line in lab.run(namespace, ["tail", "-qn+2", "/proc/net/mcfilter"]).stdout.splitlines():
        _, _, group, source, included, excluded = line.split()
        key = str(IPv4Address(int(group, 16))), str(IPv4Address(int(source, 16)))
        found[key] = int(included), int(excluded)
    for line in lab.run(namespace, ["cat", "/proc/net/mcfilter6"]).stdout.splitlines()[1:]:
        _, _, group, source, included, excluded = line.split()
        key = str(IPv6Address(int(group, 16))), str(IPv6Address(int(source, 16)))
        found[key] = int(included), int(excluded)
    return found


def membership(interface: str, group: str, source: str | None = None) -> Membership:
    ifindex = socket.if_nametoindex(interface)
    return Membership(ifindex, ip_address(group), None if source is None else ip_address(source))


def with_worker(
    lab: Lab, namespace: Namespace, body: Callable[[MembershipWorker], Coroutine[Any, Any, None]]
) -> None:
    """Runs the body with a worker that lives in the namespace, which has no membership of it afterwards."""

    async def session() -> None:
        worker = MembershipWorker()
        await worker.start()
        try:
            await body(worker)
        finally:
            pid = worker.pid
            await worker.stop()
            assert pid is None or not Path(f"/proc/{pid}").exists()

    with lab.inside(namespace):
        asyncio.run(session())
    assert joined(lab, namespace) == set()
    assert filters(lab, namespace) == {}


def add_interface(lab: Lab, namespace: Namespace, name: str, ifindex: int) -> None:
    lab.ip(namespace, f"link add {name} index {ifindex} up type veth peer name {name}peer")


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_three_hundred_groups_are_held_on_one_interface(lab: Lab, host: Namespace) -> None:
    groups = [f"239.1.{n // 200}.{n % 200}" for n in range(300)] + [f"ff3e::{n:x}" for n in range(1, 301)]

    async def body(worker: MembershipWorker) -> None:
        assert await worker.set(frozenset(membership("eth0", group) for group in groups)) == []
        assert worker.held == 600
        assert joined(lab, host) == {("eth0", group) for group in groups}

    with_worker(lab, host, body)


def test_thousands_of_sources_are_held_within_the_reply_timeout(lab: Lab, host: Namespace) -> None:
    desired = [(f"232.0.{n % 8}.1", f"10.9.{n // 256}.{n % 256}") for n in range(4096)]

    async def body(worker: MembershipWorker) -> None:
        assert await worker.set(frozenset(membership("eth0", *pair) for pair in desired)) == []
        assert worker.held == 4096
        assert filters(lab, host) == dict.fromkeys(desired, (1, 0))

    with_worker(lab, host, body)


def test_a_new_set_joins_what_is_new_and_leaves_what_is_gone(lab: Lab, host: Namespace) -> None:
    async def body(worker: MembershipWorker) -> None:
        await worker.set(
            frozenset(
                (
                    membership("eth0", "239.1.1.1"),
                    membership("eth0", "239.1.1.2"),
                    membership("eth1", "ff3e::1"),
                )
            )
        )
        assert joined(lab, host) == {("eth0", "239.1.1.1"), ("eth0", "239.1.1.2"), ("eth1", "ff3e::1")}
        await worker.set(frozenset((membership("eth0", "239.1.1.2"), membership("eth1", "239.1.1.1"))))
        assert joined(lab, host) == {("eth0", "239.1.1.2"), ("eth1", "239.1.1.1")}
        assert worker.held == 2

    with_worker(lab, host, body)


def test_sources_of_one_group_come_and_go_independently(lab: Lab, host: Namespace) -> None:
    def pairs(*pairs: tuple[str, str]) -> frozenset[Membership]:
        return frozenset(membership("eth0", group, source) for group, source in pairs)

    first = [("232.1.1.1", f"10.0.0.{n}") for n in range(1, 31)] + [
        ("ff3e::1", f"fd00::{n}") for n in range(1, 9)
    ]

    async def body(worker: MembershipWorker) -> None:
        assert await worker.set(pairs(*first)) == []
        assert filters(lab, host) == dict.fromkeys(first, (1, 0))
        assert await worker.set(pairs(first[3], first[-1])) == []
        assert filters(lab, host) == {first[3]: (1, 0), first[-1]: (1, 0)}

    with_worker(lab, host, body)


def test_any_source_and_one_source_of_a_group_stand_side_by_side(lab: Lab, host: Namespace) -> None:
    async def body(worker: MembershipWorker) -> None:
        one = {membership("eth0", "239.1.1.1", "10.0.0.7"), membership("eth0", "ff3e::1", "fd00::7")}
        every = {membership("eth0", "239.1.1.1"), membership("eth0", "ff3e::1")}
        assert await worker.set(frozenset(one | every)) == []
        assert worker.held == 4
        assert await worker.set(frozenset(one)) == []
        assert filters(lab, host) == {("239.1.1.1", "10.0.0.7"): (1, 0), ("ff3e::1", "fd00::7"): (1, 0)}
        assert await worker.set(frozenset(every)) == []
        assert filters(lab, host) == {}
        assert joined(lab, host) == {("eth0", "239.1.1.1"), ("eth0", "ff3e::1")}

    with_worker(lab, host, body)


def test_a_smaller_limit_per_socket_takes_more_sockets(lab: Lab, host: Namespace) -> None:
    lab.run(host, ["sysctl", "-qw", "net.ipv4.igmp_max_memberships=3"])

    async def body(worker: MembershipWorker) -> None:
        groups = [f"239.1.1.{n}" for n in range(50)]
        assert await worker.set(frozenset(membership("eth0", group) for group in groups)) == []
        assert joined(lab, host) == {("eth0", group) for group in groups}

    with_worker(lab, host, body)


def test_a_refused_join_names_the_sysctl_and_leaves_the_others_alone(lab: Lab, host: Namespace) -> None:
    lab.run(host, ["sysctl", "-qw", "net.ipv4.igmp_max_memberships=0"])

    async def body(worker: MembershipWorker) -> None:
        refused, accepted = membership("eth0", "239.1.1.1"), membership("eth0", "ff3e::1")
        (failure,) = await worker.set(frozenset((refused, accepted)))
        assert failure.membership == refused
        assert failure.cause == "cannot join 239.1.1.1 on interface eth0: the kernel has no room for it"
        assert "net.ipv4.igmp_max_memberships" in failure.remedy
        assert worker.failures == [failure]
        assert joined(lab, host) == {("eth0", "ff3e::1")}
        lab.run(host, ["sysctl", "-qw", "net.ipv4.igmp_max_memberships=20"])
        assert await worker.set(frozenset((refused, accepted))) == []
        assert joined(lab, host) == {("eth0", "239.1.1.1"), ("eth0", "ff3e::1")}

    with_worker(lab, host, body)


def test_a_join_on_an_absent_interface_fails_until_the_interface_appears(lab: Lab, host: Namespace) -> None:
    async def body(worker: MembershipWorker) -> None:
        desired = frozenset({Membership(77, ip_address("239.1.1.1"), None)})
        (failure,) = await worker.set(desired)
        assert "there is no such interface" in failure.cause
        add_interface(lab, host, "late0", 77)
        assert await worker.set(desired) == []
        assert joined(lab, host) == {("late0", "239.1.1.1")}

    with_worker(lab, host, body)


def test_an_interface_that_vanishes_takes_its_memberships_and_no_other(lab: Lab, host: Namespace) -> None:
    add_interface(lab, host, "gone0", 78)

    async def body(worker: MembershipWorker) -> None:
        kept = membership("eth0", "239.1.1.1")
        lost = [
            Membership(78, ip_address("239.2.2.2"), None),
            Membership(78, ip_address("232.2.2.2"), ip_address("10.0.0.7")),
            Membership(78, ip_address("ff3e::2"), ip_address("fd00::7")),
        ]
        assert await worker.set(frozenset((kept, *lost))) == []
        lab.ip(host, "link delete gone0")
        assert await worker.set(frozenset({kept})) == []
        assert worker.held == 1
        add_interface(lab, host, "gone0", 78)
        assert await worker.set(frozenset((kept, *lost))) == []
        assert joined(lab, host) == {
            ("eth0", "239.1.1.1"), ("gone0", "239.2.2.2"), ("gone0", "232.2.2.2"), ("gone0", "ff3e::2"),
        }  # fmt: skip

    with_worker(lab, host, body)


def test_a_killed_process_is_started_again_and_joins_everything_again(lab: Lab, host: Namespace) -> None:
    async def body(worker: MembershipWorker) -> None:
        await worker.set(frozenset({membership("eth0", "239.1.1.1")}))
        first = worker.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: worker.restarts == 1 and worker.held == 1)
        assert worker.pid not in (None, first)
        assert worker.failures == []
        assert joined(lab, host) == {("eth0", "239.1.1.1")}

    with_worker(lab, host, body)


def test_a_silent_process_is_killed_and_replaced(lab: Lab, host: Namespace) -> None:
    async def body(worker: MembershipWorker) -> None:
        silent = worker.pid
        assert silent is not None
        os.kill(silent, signal.SIGSTOP)
        (failure,) = await worker.set(frozenset({membership("eth0", "239.1.1.1")}))
        assert "is being restarted" in failure.cause
        await until(lambda: worker.restarts == 1 and worker.held == 1)
        assert worker.failures == []
        assert joined(lab, host) == {("eth0", "239.1.1.1")}

    with_worker(lab, host, body)


def test_a_stopped_process_cannot_hold_up_stop(lab: Lab, host: Namespace) -> None:
    async def body(worker: MembershipWorker) -> None:
        await worker.set(frozenset({membership("eth0", "239.1.1.1")}))
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)

    with_worker(lab, host, body)


def test_ctrl_c_at_the_terminal_does_not_end_the_process(lab: Lab, host: Namespace) -> None:
    async def body(worker: MembershipWorker) -> None:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        assert await worker.set(frozenset({membership("eth0", "239.1.1.1")})) == []
        assert worker.restarts == 0

    with_worker(lab, host, body)


def test_the_last_words_of_a_crashed_process_are_logged(
    lab: Lab, host: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(worker: MembershipWorker) -> None:
        await worker.set(
            frozenset({Membership(1 << 40, ip_address("239.1.1.1"), None)})
        )  # no ifindex is so big
        await until(lambda: worker.restarts == 1)

    with caplog.at_level(logging.INFO, "mcr.membership"):
        with_worker(lab, host, body)
    assert any(record.message.startswith("struct.error: ") for record in caplog.records)
    assert any("ended with status 1" in record.message for record in caplog.records)


def test_the_process_is_small_and_has_no_privilege(lab: Lab, host: Namespace) -> None:
    async def body(worker: MembershipWorker) -> None:
        await worker.set(frozenset(membership("eth0", f"239.1.1.{n}") for n in range(200)))
        lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        status = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
        assert status["Uid"] == status["Gid"] == [str(NOBODY)] * 4
        assert status["Groups"] == []
        assert int(status["CapEff"][0], 16) == int(status["CapPrm"][0], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
        assert int(status["VmRSS"][0]) < 16_000

    with_worker(lab, host, body)


def test_memberships_end_with_a_killed_supervisor(lab: Lab, host: Namespace) -> None:
    supervisor = lab.spawn(host, [sys.executable, "-c", ORPHANED_SUPERVISOR])
    supervisor.wait_for("joined")
    assert joined(lab, host) == {("eth0", "239.9.9.9")}
    supervisor.child.kill()
    assert supervisor.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while lab.leftovers(host):
        assert time.monotonic() < deadline, lab.leftovers(host)
        time.sleep(0.01)


def test_a_worker_that_cannot_be_started_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(McrError) as failed:
        asyncio.run(MembershipWorker().start())
    assert os.strerror(errno.ENOENT) in failed.value.cause
