"""The control-plane worker holds exactly the memberships it is told to, in the kernel's own tables."""

import asyncio
import errno
import json
import logging
import os
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

import mcr
from mcr.errors import McrError
from mcr.membership import NOBODY, Membership, MembershipWorker
from mcr.membership_life import Refuge
from tests.netns.lab import KERNEL_GROUPS, SOLICITED_NODES, Lab, Namespace, processes_in
from tests.netns.test_joins import ALLOW_NEW, TO_EXCLUDE, TO_INCLUDE, Record, wire

Groups = set[tuple[str, str]]
LONE_SUPERVISOR = """
import asyncio, ipaddress, pathlib, socket, sys
sys.path[:0] = sys.argv[4:]
from mcr.membership import Membership, MembershipWorker
from mcr.membership_life import Refuge
def membership(group, source=None):
    addresses = (text and ipaddress.ip_address(text) for text in (group, source))
    return Membership(socket.if_nametoindex("eth0"), *addresses)
async def main():
    worker = MembershipWorker(Refuge(*map(pathlib.Path, sys.argv[1:3])), keep=sys.argv[3] == "keep")
    await worker.start()
    groups = membership("231.9.9.9"), membership("232.9.9.9", "10.9.9.9"), membership("ff3e::9")
    print(await worker.set(frozenset(groups)))
    print("joined", flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
# The one with a source is the last that is joined: /proc/net/mcfilter shows no other one.
LONE_GROUPS = {("eth0", "231.9.9.9"), ("eth0", "232.9.9.9"), ("eth0", "ff3e::9")}
REPORTED = {
    (TO_EXCLUDE, "231.9.9.9", ()),
    (ALLOW_NEW, "232.9.9.9", ("10.9.9.9",)),
    (TO_EXCLUDE, "ff3e::9", ()),
}
LONE = (("231.9.9.9",), ("232.9.9.9", "10.9.9.9"), ("ff3e::9",))


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


def refuge(lab: Lab, namespace: Namespace) -> Refuge:
    return Refuge(lab.runtime_directory / f"{namespace.name}.join", lab.directory / "links")


def with_worker(
    lab: Lab, namespace: Namespace, body: Callable[[MembershipWorker], Coroutine[Any, Any, None]]
) -> None:
    """Runs the body with a worker that lives in the namespace, which has no membership of it afterwards."""

    async def session() -> None:
        worker = MembershipWorker(refuge(lab, namespace))
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
        assert rss_kilobytes(int(worker.pid or 0)) < 16_000

    with_worker(lab, host, body)


def lone_supervisor(lab: Lab, host: Namespace, *arguments: str) -> None:
    """Leaves what a supervisor that joined LONE_GROUPS on eth0 and was killed leaves."""
    places = refuge(lab, host)
    argv = [sys.executable, "-c", LONE_SUPERVISOR, str(places.address), str(places.links), *arguments]
    supervisor = lab.spawn(host, argv)
    supervisor.wait_for("joined", 60)
    assert joined(lab, host) == LONE_GROUPS
    supervisor.child.kill()
    assert supervisor.wait() == -signal.SIGKILL


def kept(lab: Lab, host: Namespace, *arguments: str) -> int:
    """The same of one that keeps, with something that the joins are kept for. Returns the process's id."""
    links = refuge(lab, host).links
    links.mkdir()
    (links / "1").touch()
    lone_supervisor(lab, host, "keep", *arguments)
    (pid,) = processes_in(host)
    return pid


def rss_kilobytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmRSS:")]
    return int(line.split()[1])


def wait_for_nothing(lab: Lab, host: Namespace) -> None:
    deadline = time.monotonic() + 30
    while joined(lab, host) or processes_in(host):
        assert time.monotonic() < deadline, lab.leftovers(host)
        time.sleep(0.05)


def adopting(
    lab: Lab, host: Namespace, keep: bool, body: Callable[[MembershipWorker], Coroutine[Any, Any, None]]
) -> None:
    """Runs the body with a worker that has looked for the process of an earlier supervisor."""

    async def session() -> None:
        worker = MembershipWorker(refuge(lab, host), keep)
        await worker.find()
        try:
            await body(worker)
        finally:
            await worker.stop()

    with lab.inside(host):
        asyncio.run(session())


def test_memberships_end_with_a_killed_supervisor(lab: Lab, host: Namespace) -> None:
    lone_supervisor(lab, host, "end")
    wait_for_nothing(lab, host)
    assert lab.leftovers(host) == []


def test_kept_joins_are_adopted_and_only_the_difference_is_reported(lab: Lab, host: Namespace) -> None:
    source = {("232.9.9.9", "10.9.9.9"): (1, 0)}
    difference: set[Record] = {(TO_EXCLUDE, "231.9.9.8", ()), (TO_INCLUDE, "ff3e::9", ())}

    async def adopt(worker: MembershipWorker) -> None:
        await worker.start(adopt=True)
        assert (worker.pid, worker.held, worker.restarts) == (first, 3, 0)
        assert await worker.set(frozenset(membership("eth0", *each) for each in LONE)) == []
        assert (joined(lab, host), filters(lab, host)) == (LONE_GROUPS, source)

    async def change(worker: MembershipWorker) -> None:
        await worker.start(adopt=True)
        changed = frozenset(membership("eth0", *each) for each in (*LONE[:2], ("231.9.9.8",)))
        assert await worker.set(changed) == []
        assert (worker.pid, worker.held) == (first, 3)

    with wire(lab, host, "eth1") as reports:
        first = kept(lab, host)
        reports.settle(REPORTED)
        assert (joined(lab, host), filters(lab, host)) == (LONE_GROUPS, source)
        adopting(lab, host, True, adopt)
        assert (joined(lab, host), filters(lab, host)) == (LONE_GROUPS, source)
        adopting(lab, host, True, change)
        reports.wait_for(difference)
        assert set(reports.heard) == difference
    assert processes_in(host) == [first]
    assert joined(lab, host) == {("eth0", "231.9.9.9"), ("eth0", "232.9.9.9"), ("eth0", "231.9.9.8")}


def test_a_killed_process_is_started_again_and_the_new_one_is_adopted(lab: Lab, host: Namespace) -> None:
    first = kept(lab, host)

    async def survive(worker: MembershipWorker) -> None:
        await worker.start(adopt=True)
        await worker.set(frozenset(membership("eth0", *each) for each in LONE))
        os.kill(first, signal.SIGKILL)
        await until(lambda: worker.restarts == 1 and worker.held == 3)

    async def adopt(worker: MembershipWorker) -> None:
        await worker.start(adopt=True)
        assert (worker.pid, worker.held) == (second, 3)

    adopting(lab, host, True, survive)
    (second,) = processes_in(host)
    assert second != first
    adopting(lab, host, True, adopt)
    assert processes_in(host) == [second]
    assert joined(lab, host) == LONE_GROUPS
    assert rss_kilobytes(second) < 16_000


def test_adopted_joins_end_with_a_supervisor_that_does_not_keep(lab: Lab, host: Namespace) -> None:
    kept(lab, host)

    async def adopt(worker: MembershipWorker) -> None:
        await worker.start(adopt=True)
        await worker.set(frozenset({membership("eth0", *LONE[0])}))
        assert joined(lab, host) == {("eth0", "231.9.9.9")}

    adopting(lab, host, False, adopt)
    assert lab.leftovers(host) == []


def test_a_supervisor_that_fails_before_it_adopts_leaves_the_joins(lab: Lab, host: Namespace) -> None:
    first = kept(lab, host)

    async def nothing(_: MembershipWorker) -> None: ...

    adopting(lab, host, False, nothing)
    assert processes_in(host) == [first]
    assert joined(lab, host) == LONE_GROUPS


def another_version(directory: Path) -> str:
    """Where another version of MCR is."""
    shutil.copytree(
        Path(mcr.__file__).parent, directory / "mcr", ignore=shutil.ignore_patterns("__pycache__")
    )
    (directory / "mcr" / "__init__.py").write_text('__version__ = "0.0.9"\n')
    return str(directory)


@pytest.mark.parametrize("why", ["another version", "another kernel path", "it is stopped"])
def test_a_process_that_cannot_be_adopted_ends_once_another_holds_its_joins(
    lab: Lab, host: Namespace, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcr.membership_life.REPLY_TIMEOUT_S", 4.0)
    old = [another_version(tmp_path / "old")] if why == "another version" else []

    async def replace(worker: MembershipWorker) -> None:
        await worker.start(adopt=why != "another kernel path")
        assert worker.pid != first
        assert first in processes_in(host)
        assert await worker.set(frozenset(membership("eth0", *each) for each in LONE)) == []
        assert processes_in(host) == [worker.pid]

    with wire(lab, host, "eth1") as reports:
        first = kept(lab, host, *old)
        if why == "it is stopped":
            os.kill(first, signal.SIGSTOP)
        reports.settle(REPORTED)
        adopting(lab, host, True, replace)
        assert joined(lab, host) == LONE_GROUPS
        (second,) = processes_in(host)
        assert second != first
        adopting(lab, host, True, just_one_more)  # what was reported before it has been heard by then
        reports.wait_for({(TO_EXCLUDE, "231.9.9.7", ())})
        assert set(reports.heard) == {(TO_EXCLUDE, "231.9.9.7", ())}
    assert processes_in(host) == [second]


async def just_one_more(worker: MembershipWorker) -> None:
    await worker.start(adopt=True)
    await worker.set(frozenset(membership("eth0", *each) for each in (*LONE, ("231.9.9.7",))))


@pytest.mark.parametrize("gone", ["the last link", "the links", "its address"])
def test_kept_joins_end_when_what_they_are_kept_for_has_gone(lab: Lab, host: Namespace, gone: str) -> None:
    kept(lab, host)
    places = refuge(lab, host)
    if gone == "its address":
        places.address.unlink()
    else:
        (places.links / "1").unlink()
    if gone == "the links":
        places.links.rmdir()
    wait_for_nothing(lab, host)


def test_kept_joins_without_a_link_end_with_their_supervisor(lab: Lab, host: Namespace) -> None:
    lone_supervisor(lab, host, "keep")
    wait_for_nothing(lab, host)


def test_a_set_that_a_dying_supervisor_did_not_finish_changes_nothing(lab: Lab, host: Namespace) -> None:
    first = kept(lab, host)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dying:
        dying.connect(str(refuge(lab, host).address))
        assert dying.recv(100) == f"{mcr.__version__} 3\n".encode()
        dying.sendall(b"1 end 3,231.9.9.9,")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as following:
        following.connect(str(refuge(lab, host).address))
        assert following.recv(100) == f"{mcr.__version__} 3\n".encode()
    assert joined(lab, host) == LONE_GROUPS
    assert processes_in(host) == [first]


def test_nobody_else_gets_at_kept_joins(lab: Lab, host: Namespace) -> None:
    kept(lab, host)
    address = refuge(lab, host).address
    assert stat.S_IMODE(address.stat().st_mode) == 0o600
    attempt = (
        "import os, socket, sys\n"
        "directory = os.open(sys.argv[1], os.O_PATH)\n"
        "os.setuid(65534)\n"
        "end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\n"
        "end.connect(f'/proc/self/fd/{directory}/{sys.argv[2]}')\n"
        "print(end.recv(100))\n"
    )
    argv = [sys.executable, "-c", attempt, str(address.parent), address.name]
    assert "PermissionError" in lab.run(host, argv, check=False).stderr
    address.chmod(0o666)
    assert lab.run(host, argv).stdout == "b''\n"
    assert joined(lab, host) == LONE_GROUPS


def test_an_answer_that_arrived_while_the_supervisor_was_held_up_counts(
    lab: Lab, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcr.membership_life.REPLY_TIMEOUT_S", 1.0)

    async def body(worker: MembershipWorker) -> None:
        answer = asyncio.create_task(worker.set(frozenset({membership("eth0", "239.1.1.1")})))
        await asyncio.sleep(0)
        while not joined(lab, host):
            pass  # the loop stands still
        time.sleep(1.5)  # noqa: ASYNC251 - here too
        assert await answer == []
        assert (worker.held, worker.restarts) == (1, 0)

    with_worker(lab, host, body)


def test_a_worker_that_cannot_be_started_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(McrError) as failed:
        asyncio.run(MembershipWorker(Refuge(tmp_path / "join", tmp_path)).start())
    assert os.strerror(errno.ENOENT) in failed.value.cause
