"""Interfaces that change under a running relay: renamed, moved, resized, flapping, readdressed.

Each change is followed within a second, and the rules wait with the reason meanwhile.
"""

import time
from collections.abc import Callable

import pytest

from mcr.control import ControlClient
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
    spawn_send,
    wait_until,
)
from tests.netns.lab import Lab, Namespace, RelayTopology
from tests.netns.wire import Capture

FOLLOWED_S, ASKING_S = 1.0, 1.0  # and what a busy machine may add until a change is seen
IGMP_REPORTS = bytes.fromhex("01005e000016")  # 224.0.0.22, RFC 3376 section 4.2.14


def start(lab: Lab, path: str = "auto") -> tuple[RelayTopology, ControlClient]:
    topology = lab.topology_relay(gro=True)
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT]), path=path))
    return topology, ControlClient(lab.runtime_directory / f"{topology.relay.name}.sock")


def shown(client: ControlClient) -> Report:
    """The one rule with its one output."""
    (row,) = client.call("rule.show")
    return dict(row)


def followed(condition: Callable[[], bool], what: str) -> None:
    began_s = time.monotonic()
    wait_until(condition, what)
    assert time.monotonic() - began_s < FOLLOWED_S + ASKING_S, what


def assert_relays(lab: Lab, topology: RelayTopology) -> None:
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)


def rename(lab: Lab, relay: Namespace, old: str, new: str) -> None:
    lab.ip(relay, f"link set {old} down")
    lab.ip(relay, f"link set {old} name {new}")
    lab.ip(relay, f"link set {new} up")


def test_a_renamed_interface_is_waited_for_until_it_has_its_name_again(lab: Lab) -> None:
    topology, client = start(lab)
    rename(lab, topology.relay, "in0", "other0")
    followed(lambda: shown(client)["reason"] == "there is no interface in0", "the name has gone")
    assert "xdp" not in lab.ip(topology.relay, "link show other0")
    rename(lab, topology.relay, "other0", "in0")
    followed(lambda: shown(client)["state"] == "active", "the name is back")
    rename(lab, topology.relay, "out0", "other0")
    followed(lambda: shown(client)["output_reason"] == "there is no interface out0", "the name has gone")
    rename(lab, topology.relay, "other0", "out0")
    followed(lambda: shown(client)["output_state"] == "active", "the name is back")
    assert_relays(lab, topology)


@pytest.mark.soak
def test_an_interface_that_moves_to_another_namespace_and_back_is_followed(lab: Lab) -> None:
    topology, client = start(lab)
    elsewhere = lab.namespace("elsewhere")
    lab.ip(topology.relay, f"link set in0 netns {elsewhere.name}")
    followed(lambda: shown(client)["reason"] == "there is no interface in0", "it has gone")
    assert "xdp" not in lab.ip(elsewhere, "link show in0")
    lab.ip(elsewhere, f"link set in0 netns {topology.relay.name}")
    lab.ip(topology.relay, "address add 10.1.0.2/24 dev in0")
    lab.ip(topology.relay, "link set in0 up")
    followed(lambda: shown(client)["state"] == "active", "it is back")
    assert_relays(lab, topology)


@pytest.mark.soak
def test_an_mtu_that_needs_larger_frames_is_followed(lab: Lab) -> None:
    topology, client = start(lab, path="worker")
    for namespace, name in (
        (topology.src, "eth0"), (topology.relay, "in0"), (topology.relay, "out0"), (topology.dst, "eth0"),
    ):  # fmt: skip
        lab.ip(namespace, f"link set {name} mtu 3000")
    followed(lambda: shown(client)["state"] == "active", "larger frames")
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000", "--size", "2900")
    assert_whole(heard, sent)


@pytest.mark.soak
@pytest.mark.parametrize("path", ["kernel", "worker"])
def test_a_flap_under_traffic_renews_the_joins_and_doubles_nothing(lab: Lab, path: str) -> None:
    topology, client = start(lab, path=path)
    sink = listen(lab, topology.dst, GROUP_HEARD, "--idle", "5")
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "5000", "--count", "1000000")
    wait_until(lambda: client.call("stats")[0]["relayed_packets"] > 0, "traffic")
    with Capture(lab, topology.src) as capture:
        for name in ("in0", "out0"):
            lab.ip(topology.relay, f"link set {name} down")
            wait_until(lambda: not shown_up(lab, topology.relay, name), "down")  # noqa: B023
            lab.ip(topology.relay, f"link set {name} up")
        reports = capture.frames(1, IGMP_REPORTS)
    assert any(bytes([239, 1, 1, 1]) in frame for frame in reports)
    followed(lambda: shown(client)["output_state"] == "active", "up again")
    before = client.call("stats")[1]["sent_packets"]
    wait_until(lambda: client.call("stats")[1]["sent_packets"] > before + 1000, "relaying again")
    source.terminate()
    heard = report(sink)
    assert (heard["duplicates"], heard["corrupt"]) == (0, 0)
    assert shown(client)["path"] == path
    assert_relays(lab, topology)


def shown_up(lab: Lab, relay: Namespace, name: str) -> bool:
    return "LOWER_UP" in lab.ip(relay, f"link show {name}")


@pytest.mark.soak
def test_a_changed_address_is_followed_on_the_worker_path(lab: Lab) -> None:
    topology, client = start(lab, path="worker")

    def heard_sources() -> list[str]:
        _, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 10)
        return list(heard["sources"])

    assert heard_sources() == ["10.2.0.1"]
    lab.ip(topology.relay, "address add 10.2.0.77/24 dev out0")
    lab.ip(topology.relay, "address delete 10.2.0.1/24 dev out0")
    lab.ip(topology.relay, "address replace 10.2.0.77/24 dev out0")
    assert heard_sources() == ["10.2.0.77"]
    assert shown(client)["output_state"] == "active"
