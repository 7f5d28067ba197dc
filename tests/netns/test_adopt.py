"""`--on-exit keep`: the kernel path and its joins outlive the supervisor, and the next one adopts both."""

import json
import os
import shutil
import signal
import struct
import time
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from mcr._bpf import lib

from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    Report,
    assert_whole,
    config,
    listen,
    relay_one,
    report,
    send,
    spawn_send,
    stats,
    status,
    wait_until,
)
from tests.netns.lab import KERNEL_GROUPS, PINS, SOLICITED_NODES, Lab, Namespace, RelayTopology, processes_in
from tests.netns.test_joins import ALLOW_NEW, BLOCK_OLD, TO_EXCLUDE, Record, wire
from tests.netns.test_membership import filters

OTHER = ("other", "239.1.1.2%in0:5000", ["239.2.2.3%out0:6000"])
CAM = ("cam", GROUP_IN, [GROUP_OUT])
# The source-specific one of each family is joined last: /proc/net/mcfilter shows no other one.
ANY = ("any", "231.1.1.7%in0:5000", [GROUP_OUT])
ONE = ("one", "10.1.0.1@232.1.1.8%in0:5000", [GROUP_OUT])
ANY6 = ("any6", "[ff3e::9]%in0:5000", ["[ff3e::aa]%out0:6000"])
ANOTHER = ("another", "231.1.1.10%in0:5000", [GROUP_OUT])
RECEPTION = (
    {"231.1.1.7": 1, "232.1.1.8": 1, "ff3e::9": 1},
    {("232.1.1.8", "10.1.0.1"): (1, 0)},
    {"01:00:5e:01:01:07", "01:00:5e:01:01:08", "33:33:00:00:00:09"},
)
KERNEL_LINK_ADDRESSES = {"01:00:5e:00:00:01", "33:33:00:00:00:01", "33:33:00:00:00:02"}
NO_RECEPTION: tuple[dict[str, int], dict[tuple[str, str], tuple[int, int]], set[str]] = ({}, {}, set())
REPORTED: set[Record] = {
    (TO_EXCLUDE, "231.1.1.7", ()),
    (ALLOW_NEW, "232.1.1.8", ("10.1.0.1",)),
    (TO_EXCLUDE, "ff3e::9", ()),
}


def kernel_path(lab: Lab, relay: Namespace) -> bool:
    rows: list[Report] = json.loads(lab.mcr(relay, "rule", "show", "cam", "-j").stdout)
    return [row["path"] for row in rows] == ["kernel"]


def received(lab: Lab, relay: Namespace) -> int:
    counts: int = stats(lab, relay)[0]["received_packets"]
    return counts


def holds_joins(pid: int) -> bool:
    return b"mcr.membership_process" in Path(f"/proc/{pid}/cmdline").read_bytes()


def users(lab: Lab, relay: Namespace) -> dict[str, int]:
    """How many sockets hold each group on in0 that the kernel does not hold by itself (proc(5))."""
    found, interface = {}, ""
    for line in lab.run(relay, ["cat", "/proc/net/igmp"]).stdout.splitlines()[1:]:
        words = line.split()
        if not line.startswith("\t"):
            interface = words[1]
        elif interface == "in0":
            found[str(IPv4Address(struct.pack("=I", int(words[0], 16))))] = int(words[1])
    for line in lab.run(relay, ["cat", "/proc/net/igmp6"]).stdout.splitlines():
        _, interface, group, count, *_ = line.split()
        if interface == "in0":
            found[str(IPv6Address(bytes.fromhex(group)))] = int(count)
    kernels = {
        group for group in map(ip_address, found) if group in KERNEL_GROUPS or group in SOLICITED_NODES
    }
    return {group: count for group, count in found.items() if ip_address(group) not in kernels}


def link_layer(lab: Lab, relay: Namespace) -> set[str]:
    """What in0's filter of MAC addresses lets in, but for the kernel's own groups."""
    (link,) = json.loads(lab.ip(relay, "-j maddress show dev in0"))
    addresses = {entry["link"] for entry in link["maddr"] if "link" in entry}
    return {each for each in addresses if not each.startswith("33:33:ff:")} - KERNEL_LINK_ADDRESSES


def reception(
    lab: Lab, relay: Namespace
) -> tuple[dict[str, int], dict[tuple[str, str], tuple[int, int]], set[str]]:
    """What the relay receives: groups with their users, sources, and link-layer addresses."""
    return users(lab, relay), filters(lab, relay), link_layer(lab, relay)


def wait_for_nothing(lab: Lab, relay: Namespace) -> None:
    """Until no process and no reception is left; a process is seen no more just before its sockets close."""

    def nothing() -> bool:
        return not processes_in(relay) and reception(lab, relay) == NO_RECEPTION

    wait_until(nothing, "nothing is left", 30)


def kept(lab: Lab, topology: RelayTopology, *rules: tuple[str, str, list[str]]) -> None:
    """Starts a supervisor that keeps, and kills it and its worker."""
    supervisor = lab.supervisor(topology.relay, "--on-exit", "keep", config=config(*(rules or (CAM,))))
    assert rules or kernel_path(lab, topology.relay)
    worker = status(lab, topology.relay)["worker_pid"]
    supervisor.child.kill()
    os.kill(worker, signal.SIGKILL)
    supervisor.wait()


def test_kill_of_everything_loses_no_packet_and_the_next_supervisor_adopts(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    supervisor = lab.supervisor(topology.relay, "--on-exit", "keep", config=config(CAM))
    assert kernel_path(lab, topology.relay)
    sink = listen(lab, topology.dst, GROUP_HEARD, "--expect", "200000", "--idle", "8", "--digest")
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "40000", "--count", "200000", "--digest")
    wait_until(lambda: received(lab, topology.relay) > 10_000, "traffic")
    worker = status(lab, topology.relay)["worker_pid"]
    supervisor.child.kill()
    os.kill(worker, signal.SIGKILL)
    supervisor.wait()
    second = lab.supervisor(topology.relay, "--on-exit", "keep", config=config(CAM))
    assert source.child.poll() is None, "the source must still send while the second supervisor adopts"
    assert "adopting the kernel path" in second.output()
    assert_whole(report(sink), report(source))
    rule, output = stats(lab, topology.relay)
    assert (rule["received_packets"], rule["relayed_packets"]) == (200_000, 200_000)
    assert output["sent_packets"] == 200_000


def test_kept_path_forwards_with_no_supervisor_and_ends_with_a_detaching_one(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    supervisor = lab.supervisor(topology.relay, "--on-exit", "keep", config=config(CAM))
    assert supervisor.terminate() == 0
    assert [holds_joins(pid) for pid in processes_in(topology.relay)] == [True]
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 10_000, "--rate", "20000")
    assert_whole(heard, sent)
    last = lab.supervisor(topology.relay, config=config(CAM))
    assert received(lab, topology.relay) == 10_000
    assert last.terminate() == 0
    assert lab.leftovers(topology.relay) == []


def test_what_the_adopting_supervisor_does_not_want_is_taken_away(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    first = lab.supervisor(topology.relay, "--on-exit", "keep", config=config(CAM, OTHER))
    assert first.terminate() == 0
    lab.supervisor(topology.relay, config=config(OTHER))
    pinned = f"/sys/fs/bpf/mcr/{topology.relay.name}/rules"
    dumped = lab.run(topology.relay, ["bpftool", "-j", "map", "dump", "pinned", pinned])
    assert len(json.loads(dumped.stdout)) == 1


def test_another_layout_is_refused_with_both_versions_unless_it_is_replaced(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    kept(lab, topology)
    pinned = f"/sys/fs/bpf/mcr/{topology.relay.name}/settings"
    lab.run(
        topology.relay,
        [
            "bpftool",
            "map",
            "update",
            "pinned",
            pinned,
            "key",
            *["0", "0", "0", "0"],
            "value",
            *["99", "0", "0", "0", "15", "0", "0", "0", *["0"] * 8],
        ],
    )
    refused = lab.mcr(topology.relay, "run", check=False)
    assert refused.returncode == 1
    assert f"layout 00000063, and this MCR has {lib.MCR_ABI_VERSION:08x}" in refused.stderr
    assert "--replace" in refused.stderr
    assert "xdp" in lab.ip(topology.relay, "link show in0")
    last = lab.supervisor(topology.relay, "--replace", config=config(CAM))
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)
    assert last.terminate() == 0
    assert lab.leftovers(topology.relay) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_groups_stay_joined_without_a_supervisor_and_the_next_one_changes_only_the_difference(
    lab: Lab, number: signal.Signals
) -> None:
    topology = lab.topology_relay(gro=True)
    relay = topology.relay
    with wire(lab, topology.src) as reports:
        first = lab.supervisor(relay, "--on-exit", "keep", config=config(ANY, ONE, ANY6))
        reports.settle(REPORTED)
        assert reception(lab, relay) == RECEPTION
        first.child.send_signal(number)
        first.wait()
        wait_until(lambda: len(processes_in(relay)) == 1, "the workers end with their supervisor")
        (holder,) = processes_in(relay)
        assert holds_joins(holder)
        assert reception(lab, relay) == RECEPTION

        second = lab.supervisor(relay, "--on-exit", "keep", config=config(ANY, ONE, ANY6))
        assert f"adopting pid {holder} and its 3 joins" in second.output()
        assert holder in processes_in(relay)
        assert reception(lab, relay) == RECEPTION
        assert second.terminate() == 0
        lab.supervisor(relay, config=config(ANY, ANY6, ANOTHER))
        assert holder in processes_in(relay)
        changes: set[Record] = {(TO_EXCLUDE, "231.1.1.10", ()), (BLOCK_OLD, "232.1.1.8", ("10.1.0.1",))}
        reports.wait_for(changes)
        assert set(reports.heard) == changes
    assert users(lab, relay) == {"231.1.1.7": 1, "231.1.1.10": 1, "ff3e::9": 1}
    assert filters(lab, relay) == {}
    assert link_layer(lab, relay) == {"01:00:5e:01:01:07", "01:00:5e:01:01:0a", "33:33:00:00:00:09"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_without_keep_no_group_stays_joined(lab: Lab, number: signal.Signals) -> None:
    topology = lab.topology_relay(gro=True)
    supervisor = lab.supervisor(topology.relay, config=config(ANY, ONE, ANY6))
    assert reception(lab, topology.relay) == RECEPTION
    supervisor.child.send_signal(number)
    supervisor.wait()
    wait_for_nothing(lab, topology.relay)


def test_an_adopting_supervisor_without_keep_leaves_nothing(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    kept(lab, topology, ANY, ONE, ANY6)
    last = lab.supervisor(topology.relay, config=config(ANY, ONE, ANY6))
    assert reception(lab, topology.relay) == RECEPTION
    assert last.terminate() == 0
    assert lab.leftovers(topology.relay) == []


def test_an_adopting_supervisor_without_keep_that_is_killed_leaves_no_path_and_no_group(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    kept(lab, topology, ANY, ONE, ANY6)
    last = lab.supervisor(topology.relay, config=config(ANY, ONE, ANY6))
    last.child.kill()
    last.wait()
    wait_for_nothing(lab, topology.relay)
    wait_until(lambda: "xdp" not in lab.ip(topology.relay, "link show in0"), "XDP is detached")


def test_groups_are_left_when_the_kept_path_is_removed_by_hand(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    kept(lab, topology, ANY, ONE, ANY6)
    wait_until(lambda: len(processes_in(topology.relay)) == 1, "the workers end with their supervisor")
    assert reception(lab, topology.relay) == RECEPTION
    shutil.rmtree(PINS / topology.relay.name)
    wait_for_nothing(lab, topology.relay)
    last = lab.supervisor(topology.relay, config=config(CAM))
    assert last.terminate() == 0
    assert lab.leftovers(topology.relay) == []


def test_a_supervisor_that_replaces_the_kept_path_never_leaves_a_group(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    relay = topology.relay
    with wire(lab, topology.src) as reports:
        first = lab.supervisor(relay, "--on-exit", "keep", config=config(ANY, ONE, ANY6))
        reports.settle(REPORTED)
        assert first.terminate() == 0
        (holder,) = processes_in(relay)
        last = lab.supervisor(relay, "--replace", config=config(ANY, ONE, ANY6, ANOTHER))
        reports.wait_for({(TO_EXCLUDE, "231.1.1.10", ())})
        assert set(reports.heard) == {(TO_EXCLUDE, "231.1.1.10", ())}
    assert holder not in processes_in(relay)
    assert users(lab, relay) == {"231.1.1.7": 1, "231.1.1.10": 1, "232.1.1.8": 1, "ff3e::9": 1}
    assert last.terminate() == 0
    assert lab.leftovers(relay) == []


def test_a_start_that_is_refused_leaves_the_kept_path_its_groups(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    kept(lab, topology, ANY, ONE, ANY6)
    wait_until(lambda: len(processes_in(topology.relay)) == 1, "the workers end with their supervisor")
    (PINS / topology.relay.name / "settings").unlink()
    refused = lab.mcr(topology.relay, "run", check=False)
    assert refused.returncode == 1
    assert "layout unknown" in refused.stderr
    assert reception(lab, topology.relay) == RECEPTION


@pytest.mark.parametrize("pause_s", [0.0, 0.06, 0.12, 0.2, 0.4])
def test_a_stop_in_the_middle_of_a_change_leaves_the_kept_path_whole(lab: Lab, pause_s: float) -> None:
    """Another frame size attaches every interface anew; links change 50 ms before that is acted on."""
    topology = lab.topology_relay(gro=True)
    text = config(("cam", GROUP_IN, [GROUP_OUT]), path="kernel") + '[[attach]]\ninterface = "out0"\n'
    supervisor = lab.supervisor(topology.relay, "--on-exit", "keep", config=text)
    for namespace, interface in ((topology.src, "eth0"), (topology.relay, "in0"), (topology.relay, "out0")):
        lab.ip(namespace, f"link set {interface} mtu 3000")
    time.sleep(pause_s)
    assert supervisor.terminate(30) == 0
    sink = listen(lab, topology.dst, GROUP_HEARD, "--expect", "500", "--idle", "5")
    send(lab, topology.src, GROUP_SENT, "--count", "500", "--rate", "5000")
    heard = report(sink)
    assert (heard["packets"], heard["lost"]) == (500, 0)
    for interface in ("in0", "out0"):
        assert "xdp" in lab.ip(topology.relay, f"link show {interface}")
