"""What somebody else changes behind the supervisor's back is noticed, reported, and put right within seconds.

The other tool is bpftool or rm, as an operator would use it.
"""

import json
import shutil
from ipaddress import ip_address
from typing import Any

import pytest

from mcr import loader
from tests.netns.flows import config, listen, report, send, wait_until
from tests.netns.lab import Lab, Namespace
from tests.netns.test_kernel_path import Network, fan_out

MENDED_WITHIN_S = 60.0  # it looks every 3 s, and the machine may be busy
RULES = (
    ("one", "239.1.1.1%in0:5000", ["239.2.2.1%out0:6000"]),
    ("two", "239.1.1.2%in0:5000", ["239.2.2.2%out0:6000", "239.2.2.2%out1:6000"]),
)
SENT = {1: ("239.1.1.1%eth0:5000", "239.2.2.1%eth0:6000"), 2: ("239.1.1.2%eth0:5000", "239.2.2.2%eth0:6000")}


def started(lab: Lab, *options: str, path: str = "kernel") -> Network:
    network = fan_out(lab, 2)
    lab.supervisor(network.relay, *options, config=config(*RULES, path=path))
    assert drift(lab, network.relay) == (0, "")
    return network


def drift(lab: Lab, relay: Namespace) -> tuple[int, str]:
    """How many things were put right, and the last of them in words."""
    rows = [row for row in lab.ask(relay, "status") if row["object"] == "drift"]
    return (rows[0]["mended"], rows[0]["last"]) if rows else (0, "")


def assert_mended(lab: Lab, network: Network, words: str) -> None:
    """It is reported, once, and both streams arrive whole."""
    wait_until(lambda: drift(lab, network.relay)[0] > 0, "drift was seen", MENDED_WITHIN_S)
    assert words in drift(lab, network.relay)[1]
    assert_relays(lab, network)
    assert drift(lab, network.relay)[0] == 1
    assert "drift: 1 put right" in lab.mcr(network.relay, "status").stdout


def assert_relays(lab: Lab, network: Network) -> None:
    for to, heard_at in SENT.values():
        sink = listen(lab, network.sinks[0], heard_at, "--expect", "500", "--idle", "5")
        send(lab, network.src, to, "--count", "500", "--rate", "5000")
        heard = report(sink)
        assert (heard["packets"], heard["lost"], heard["duplicates"]) == (500, 0, 0)


def bpftool(lab: Lab, network: Network, *arguments: str) -> Any:
    return json.loads(lab.run(network.relay, ["bpftool", "-j", *arguments]).stdout)


def pinned(network: Network, name: str) -> tuple[str, str]:
    return "pinned", str(loader.pin_dir(network.relay.name) / name)


def delete_entry(lab: Lab, network: Network, name: str, key: bytes) -> None:
    words = [str(byte) for byte in key]
    lab.run(network.relay, ["bpftool", "map", "delete", *pinned(network, name), "key", *words])


def rule_key_of(lab: Lab, network: Network, group: str) -> bytes:
    wanted = [f"0x{byte:02x}" for byte in b"\0" * 10 + b"\xff\xff" + ip_address(group).packed]
    entries = bpftool(lab, network, "map", "dump", *pinned(network, "rules"))
    for entry in entries:
        key: list[str] = entry["key"]
        if key[12:28] == wanted:
            return bytes(int(byte, 16) for byte in key)
    raise AssertionError(f"no rule for {group}")


def link_of(lab: Lab, network: Network) -> int:
    """The id of the XDP link of in0."""
    program = bpftool(lab, network, "prog", "show", *pinned(network, "mcr_relay"))["id"]
    links = bpftool(lab, network, "link", "show")
    (number,) = (link["id"] for link in links if (link["type"], link["prog_id"]) == ("xdp", program))
    assert isinstance(number, int)
    return number


@pytest.mark.parametrize("path", ["kernel", "worker"])
def test_a_detached_program_is_attached_again(lab: Lab, path: str) -> None:
    network = started(lab, path=path)
    lab.run(network.relay, ["bpftool", "link", "detach", "id", str(link_of(lab, network))])
    assert_mended(lab, network, "in0: the XDP link had been detached")


@pytest.mark.parametrize("group", ["239.1.1.1", "239.1.1.2"])
def test_a_rule_that_was_deleted_from_the_map_is_put_back(lab: Lab, group: str) -> None:
    network = started(lab)
    delete_entry(lab, network, "rules", rule_key_of(lab, network, group))
    assert_mended(lab, network, "had gone from the map rules")


def test_a_reload_puts_right_what_it_finds(lab: Lab) -> None:
    network = started(lab)
    delete_entry(lab, network, "rules", rule_key_of(lab, network, "239.1.1.1"))
    lab.mcr(network.relay, "reload")
    assert drift(lab, network.relay)[0] == 1
    assert_relays(lab, network)


def test_a_rule_that_nobody_wants_is_deleted(lab: Lab) -> None:
    network = started(lab)
    key = bytearray(rule_key_of(lab, network, "239.1.1.1"))
    value = ["0"] * int(str(bpftool(lab, network, "map", "show", *pinned(network, "rules"))["bytes_value"]))
    key[27] = 77
    words = [str(byte) for byte in key]
    lab.run(
        network.relay,
        ["bpftool", "map", "update", *pinned(network, "rules"), "key", *words, "value", *value],
    )
    assert_mended(lab, network, "the map rules had an entry more")


@pytest.mark.parametrize("name", ["kernel_outputs", "fan_out_outputs", "settings"])
def test_a_value_that_was_changed_is_put_back(lab: Lab, name: str) -> None:
    network = started(lab)
    with lab.inside(network.relay):
        size = bpftool(lab, network, "map", "show", *pinned(network, name))["bytes_value"]
    number = 0 if name == "settings" else 1
    words = ["bpftool", "map", "update", *pinned(network, name), "key", str(number), "0", "0", "0"]
    lab.run(network.relay, [*words, "value", *["0"] * size])
    assert_mended(lab, network, name)


@pytest.mark.parametrize("name", ["devices", "device_sets"])
def test_a_device_that_was_deleted_is_put_back(lab: Lab, name: str) -> None:
    network = started(lab)
    delete_entry(lab, network, name, bytes([1, 0, 0, 0]))
    assert_mended(lab, network, name)


def test_a_socket_that_was_deleted_from_the_map_is_opened_again(lab: Lab) -> None:
    """The map cannot be read back: it shows in packets that find no socket."""
    network = started(lab, path="worker")
    delete_entry(lab, network, "xsks", bytes(4))
    to = SENT[1][0]

    def seen() -> bool:
        send(lab, network.src, to, "--count", "50", "--rate", "1000")
        return drift(lab, network.relay)[0] > 0

    wait_until(seen, "drift was seen", MENDED_WITHIN_S)
    assert "packets found no AF_XDP socket" in drift(lab, network.relay)[1]
    wait_until(lambda: _served(lab, network), "a worker takes traffic", MENDED_WITHIN_S)
    assert_relays(lab, network)


def _served(lab: Lab, network: Network) -> bool:
    workers = [row for row in lab.ask(network.relay, "status") if row["object"] == "worker"]
    return all(row["state"] == "running" and row["restarts"] == 1 for row in workers)


@pytest.mark.parametrize("options", [(), ("--on-exit", "keep")], ids=["detach", "keep"])
def test_pins_that_were_removed_are_made_again(lab: Lab, options: tuple[str, ...]) -> None:
    network = started(lab, *options)
    directory = loader.pin_dir(network.relay.name)
    before = sorted(path.name for path in directory.iterdir())
    shutil.rmtree(directory)
    wait_until(lambda: drift(lab, network.relay)[0] > 0, "drift was seen", MENDED_WITHIN_S)
    wait_until(
        lambda: sorted(path.name for path in directory.iterdir()) == before, "all pins", MENDED_WITHIN_S
    )
    assert_relays(lab, network)
    lab.mcr(network.relay, "trace", SENT[1][0].replace("eth0", "in0"), "--seconds", "1", check=False)


def test_nothing_is_put_right_where_nothing_was_changed(lab: Lab) -> None:
    """Not by commands, reloads, links that go and come, or workers that die."""
    network = started(lab)
    lab.mcr(network.relay, "rule", "add", "x", "--from", "239.1.1.9%in0:*", "--to", "239.2.2.9%out1:6000")
    lab.mcr(network.relay, "reload")
    lab.ip(network.relay, "link set out0 down")
    lab.mcr(network.relay, "rule", "del", "x")
    lab.ip(network.relay, "link set out0 up")
    lab.ip(network.relay, "link set in0 mtu 3000")
    wait_until(lambda: _interface(lab, network)["state"] == "attached", "attached again", MENDED_WITHIN_S)
    lab.ip(network.relay, "link set in0 mtu 1500")
    lab.mcr(network.relay, "reload")
    wait_until(lambda: _interface(lab, network)["state"] == "attached", "attached again", MENDED_WITHIN_S)
    assert_relays(lab, network)
    assert drift(lab, network.relay) == (0, "")


def _interface(lab: Lab, network: Network) -> dict[str, object]:
    return next(row for row in lab.ask(network.relay, "status") if row["object"] == "interface")
