"""The laboratory keeps its own promises: what it makes works at once, and vanishes whatever happens."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import skip_objection
from tests.netns.lab import PINS, Lab, LabError, Namespace, leftovers

GROUP, PORT = "239.1.1.1", 5000


def pin_a_map(namespace: Namespace) -> Path:
    if not PINS.parent.is_mount():
        subprocess.run(["mount", "-t", "bpf", "bpf", PINS.parent], check=True)
    path = PINS / namespace.name / "rules"
    path.parent.mkdir(parents=True)
    create = f"bpftool map create {path} type array key 4 value 4 entries 1 name lab"
    subprocess.run(create.split(), check=True)
    return path


def test_everything_is_removed_after_an_exception(lab_prefixes: Iterator[str], tmp_path: Path) -> None:
    prefix = next(lab_prefixes)
    with pytest.raises(ZeroDivisionError), Lab(prefix, tmp_path) as lab:
        relay = lab.topology_relay().relay
        process = lab.spawn(relay, ["sh", "-c", "trap '' TERM; setsid sleep 1000 & echo $!; sleep 1000"])
        process.wait_for("\n")
        orphan = int(process.output())
        pin = pin_a_map(relay)
        assert any(f"process {orphan}:" in line for line in leftovers(prefix))
        raise ZeroDivisionError
    assert leftovers(prefix) == []
    assert not pin.exists()
    assert process.child.poll() == -9


def test_a_lab_that_cannot_finish_its_topology_removes_what_it_began(
    lab_prefixes: Iterator[str], tmp_path: Path
) -> None:
    prefix = next(lab_prefixes)
    with pytest.raises(LabError, match="netns add"), Lab(prefix, tmp_path) as lab:
        lab.namespace("src")
        lab.namespace("src")
    assert leftovers(prefix) == []


def test_leftovers_of_a_namespace_name_process_pin_file_and_membership(lab: Lab) -> None:
    relay = lab.topology_relay().relay
    assert lab.leftovers(relay) == []
    process = lab.spawn(relay, ["sleep", "1000"])
    pin = pin_a_map(relay)
    file = lab.runtime_directory / f"{relay.name}.sock"
    file.touch()
    with lab.inside(relay), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as joined:
        index = socket.if_nametoindex("in0")
        request = socket.inet_aton(GROUP) + bytes(4) + index.to_bytes(4, sys.byteorder)
        joined.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        assert lab.leftovers(relay) == [
            f"process {process.pid}: sleep 1000",
            f"pin {pin.parent}",
            f"pin {pin}",
            f"file {file}",
            f"membership {GROUP} on in0",
        ]


@pytest.mark.parametrize("address", ["10.1.0.2", "fd01::2"])
def test_the_first_datagram_over_a_new_link_arrives(lab: Lab, address: str) -> None:
    topology = lab.topology_relay()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        with lab.inside(topology.relay):
            receiver = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        with lab.inside(topology.src):
            sender = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        receiver.settimeout(5)
        receiver.bind((address, PORT))
        sender.sendto(b"first", (address, PORT))
        assert receiver.recv(100) == b"first"


def test_a_link_has_the_queues_mtu_and_gro_that_were_asked_for(lab: Lab) -> None:
    a, b = lab.namespace("a"), lab.namespace("b")
    lab.veth(a, "eth0", b, "eth1", mtu=9000, queues=2, gro=True)
    channels = lab.run(b, ["ethtool", "-l", "eth1"]).stdout.splitlines()
    assert [line.split() for line in channels if line.startswith("RX:")] == [["RX:", "2"]] * 2
    assert " mtu 9000 " in lab.ip(a, "link show eth0")
    assert "generic-receive-offload: on" in lab.run(a, ["ethtool", "-k", "eth0"]).stdout


def test_bpffs_is_visible_inside_a_namespace(lab: Lab) -> None:
    namespace = lab.namespace("a")
    pin = pin_a_map(namespace)
    assert lab.run(namespace, ["ls", str(pin.parent)]).stdout == "rules\n"


def test_waiting_for_a_process_that_ends_shows_what_it_wrote(lab: Lab) -> None:
    process = lab.spawn(lab.namespace("a"), ["sh", "-c", "echo all is lost >&2; exit 3"])
    with pytest.raises(LabError, match=r"(?s)status 3\).*all is lost.*ended without 'ready'"):
        process.wait_for("ready")
    assert process.wait() == 3


def test_a_failing_command_shows_its_output_unless_failure_is_expected(lab: Lab) -> None:
    namespace = lab.namespace("a")
    with pytest.raises(LabError, match=r"status 2\nwhy\n"):
        lab.run(namespace, ["sh", "-c", "echo why >&2; exit 2"])
    assert lab.run(namespace, ["sh", "-c", "exit 2"], check=False).returncode == 2


@pytest.mark.parametrize(
    ("reason", "environ", "objection"),
    [
        ("Skipped: probe xdp: no driver", {}, ""),
        ("Skipped: probe xdp: no driver", {"CI": "true"}, "skips are forbidden here"),
        ("Skipped: probe xdp: no driver", {"MCR_FORBID_SKIPS": "1"}, "skips are forbidden here"),
        ("Skipped: not today", {}, "skipped without a probe"),
    ],
)
def test_only_a_failed_probe_may_skip_and_never_where_skips_are_forbidden(
    reason: str, environ: dict[str, str], objection: str
) -> None:
    assert skip_objection(reason, environ)[: len(objection)] == objection
    assert bool(skip_objection(reason, environ)) == bool(objection)
