"""Rules that change while streams run: whatever changes, and in whatever order, no packet is lost.

And a change that fails has changed nothing.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcr.control import ControlClient
from mcr.errors import McrError
from tests.netns.flows import (
    GROUP_IN,
    GROUP_SENT,
    Report,
    assert_whole,
    config,
    dropped,
    listen,
    report,
    send,
    spawn_send,
    stats,
    status,
    wait_until,
)
from tests.netns.lab import Lab, Namespace
from tests.netns.test_kernel_path import fan_out, listen_all, outputs

PATHS = pytest.mark.parametrize("path", ["kernel", "worker"])
INPUTS = ("239.1.1.1", "239.1.1.2")
ENDLESS = ("--count", "10000000", "--digest")


def client_of(lab: Lab, relay: Namespace) -> ControlClient:
    return ControlClient(lab.runtime_directory / f"{relay.name}.sock")


def config_file(lab: Lab, relay: Namespace) -> Path:
    return lab.directory / f"{relay.name}.toml"


def entries(lab: Lab, relay: Namespace) -> list[Any]:
    """The rules in the map, as bpftool reads them."""
    pinned = f"/sys/fs/bpf/mcr/{relay.name}/rules"
    dumped = json.loads(lab.run(relay, ["bpftool", "-j", "map", "dump", "pinned", pinned]).stdout)
    return sorted((each["formatted"] for each in dumped), key=lambda entry: bytes(entry["key"]["daddr"]))


def rules_and_outputs(lab: Lab, relay: Namespace) -> tuple[list[Report], list[Report]]:
    rows = stats(lab, relay)
    return [row for row in rows if row["object"] == "rule"], [
        row for row in rows if row["object"] == "output"
    ]


# Inputs that change hands


@PATHS
def test_two_rules_swap_their_inputs_again_and_again_and_every_packet_is_relayed(lab: Lab, path: str) -> None:
    topology = lab.topology_relay(gro=True)

    def rules(swapped: bool) -> str:
        inputs = INPUTS[::-1] if swapped else INPUTS
        return config(
            ("x", f"{inputs[0]}%in0:5000", ["239.2.0.1%out0:6001"]),
            ("y", f"{inputs[1]}%in0:5000", ["239.2.0.2%out0:6002"]),
            path=path,
        )

    def listen_both(*options: str) -> list[Any]:
        heard_at = ("239.2.0.1%eth0:6001", "239.2.0.2%eth0:6002")
        return [listen(lab, topology.dst, stream, "--idle", "4", *options) for stream in heard_at]

    lab.supervisor(topology.relay, config=rules(False))
    client, file = client_of(lab, topology.relay), config_file(lab, topology.relay)
    sinks = listen_both()
    sources = [
        spawn_send(lab, topology.src, f"{group}%eth0:5000", "--rate", "3000", *ENDLESS) for group in INPUTS
    ]
    wait_until(
        lambda: all(row["received_packets"] for row in client.call("stats") if row["object"] == "rule"),
        "traffic",
    )
    for number in range(11):
        file.write_text(rules(number % 2 == 0))
        client.call("reload")
        assert len(entries(lab, topology.relay)) == 2
    for source in sources:
        source.terminate()
    sent = sum(report(source)["packets"] for source in sources)
    assert sum(report(sink)["packets"] for sink in sinks) == sent
    found, sent_by = rules_and_outputs(lab, topology.relay)
    assert (
        sum(row["received_packets"] for row in found) == sum(row["relayed_packets"] for row in found) == sent
    )
    assert sum(row["sent_packets"] for row in sent_by) == sent
    again = listen_both("--expect", "1000")
    for group, sink, other in zip(INPUTS, again[::-1], again, strict=True):  # swapped, after 11 reloads
        assert (
            send(lab, topology.src, f"{group}%eth0:5000", "--count", "1000", "--rate", "5000")["packets"]
            == 1000
        )
        assert report(sink)["packets"] == 1000
        assert other is not sink


@PATHS
def test_an_input_that_moves_on_to_another_rule_is_never_without_one(lab: Lab, path: str) -> None:
    """a takes b's input and b a new one: the order of a file that is shifted by a line."""
    topology = lab.topology_relay(gro=True)

    def rules(shift: int) -> str:
        return config(
            *((name, f"239.1.1.{number + shift}%in0:5000", [f"239.2.0.{number}%out0:6000"])
              for number, name in enumerate("abc", 1)),
            path=path,
        )  # fmt: skip

    lab.supervisor(topology.relay, config=rules(0))
    client, file = client_of(lab, topology.relay), config_file(lab, topology.relay)
    source = spawn_send(
        lab, topology.src, "239.1.1.3%eth0:5000", "--rate", "5000", *ENDLESS
    )  # always somebody's
    wait_until(
        lambda: any(row["received_packets"] for row in client.call("stats") if row["object"] == "rule"),
        "traffic",
    )
    for shift in (1, 2, 0, 2, 1, 0):
        file.write_text(rules(shift))
        client.call("reload")
    source.terminate()
    found, _ = rules_and_outputs(lab, topology.relay)
    assert sum(row["received_packets"] for row in found) == report(source)["packets"]
    assert [entry["key"]["daddr"][-1] for entry in entries(lab, topology.relay)] == [1, 2, 3]


# Names


@PATHS
def test_a_rule_that_is_renamed_loses_no_packet_and_keeps_its_counters(lab: Lab, path: str) -> None:
    network = fan_out(lab, 2)
    others = 200

    def rules(names: str) -> str:
        more = (
            (
                f"{names}{n}",
                f"239.3.0.{n + 1}%in0:5000",
                [f"239.4.0.{n + 1}%out{output}:6000" for output in (0, 1)],
            )
            for n in range(others)
        )
        return config((f"{names}-cam", GROUP_IN, outputs(2)), *more, path=path)

    lab.supervisor(network.relay, config=rules("old"))
    client, file = client_of(lab, network.relay), config_file(lab, network.relay)
    before = entries(lab, network.relay)
    sinks = listen_all(lab, network, "--idle", "4")
    source = spawn_send(lab, network.src, GROUP_SENT, "--rate", "2000", *ENDLESS)
    wait_until(lambda: client.call("stats", name="old-cam")[0]["received_packets"] > 1000, "traffic")
    file.write_text(rules("new"))
    client.call("reload")
    assert entries(lab, network.relay) == before
    names = {row["rule"] for row in client.call("rule.show")}
    assert names == {"new-cam", *(f"new{n}" for n in range(others))}
    seen = client.call("stats", name="new-cam")[0]["received_packets"]
    wait_until(
        lambda: client.call("stats", name="new-cam")[0]["received_packets"] > seen + 1000, "more traffic"
    )
    source.terminate()
    sent = report(source)
    for sink in sinks:
        assert_whole(report(sink), sent)
    rule, *sent_by = client.call("stats", name="new-cam")
    assert (rule["received_packets"], rule["relayed_packets"], dropped(rule)) == (
        sent["packets"],
        sent["packets"],
        {},
    )
    assert [(row["sent_packets"], dropped(row)) for row in sent_by] == [(sent["packets"], {})] * 2


# Beside others


def test_a_rule_of_two_outputs_changes_no_entry_of_the_hundreds_of_one_beside_it(lab: Lab) -> None:
    network = fan_out(lab, 2)
    rules = [("cam", GROUP_IN, outputs(1))]
    rules += [
        (f"r{n}", f"239.3.{n // 250}.{n % 250 + 1}%in0:5000", [f"239.4.{n // 250}.{n % 250 + 1}%out0:6000"])
        for n in range(700)
    ]
    lab.supervisor(network.relay, config=config(*rules, path="kernel"))
    client = client_of(lab, network.relay)
    before = entries(lab, network.relay)
    (sink, _) = listen_all(lab, network, "--idle", "4")
    source = spawn_send(lab, network.src, GROUP_SENT, "--rate", "5000", *ENDLESS)
    two = {"name": "two", "from": "239.9.9.9%in0:5000", "to": ["239.9.9.9%out0:7000", "239.9.9.9%out1:7000"]}
    for _ in range(5):
        client.call("rule.add", **two, temporary=True)
        new = [entry for entry in entries(lab, network.relay) if entry not in before]
        assert [entry["key"]["daddr"][-4:] for entry in new] == [[239, 9, 9, 9]]
        client.call("rule.del", names=["two"])
        assert entries(lab, network.relay) == before
    source.terminate()
    sent = report(source)
    assert_whole(report(sink), sent)
    rule, output = client.call("stats", name="cam")
    assert rule["received_packets"] == rule["relayed_packets"] == output["sent_packets"] == sent["packets"]


def test_rules_of_one_and_of_two_outputs_share_bulks_and_each_packet_is_as_its_own_rule_says(
    lab: Lab,
) -> None:
    network = fan_out(lab, 2)
    one, two = ("one", "239.1.1.2%in0:5000", ["239.2.9.9%out0:7000,ttl=3"]), ("two", GROUP_IN, outputs(2))
    lab.supervisor(network.relay, config=config(one, two, path="kernel"))
    both = listen_all(lab, network, "--idle", "4")
    alone = listen(lab, network.sinks[0], "239.2.9.9%eth0:7000", "--idle", "4", "--digest")
    sources = [
        spawn_send(lab, network.src, stream, "--rate", "0", "--count", "100000", "--digest")
        for stream in (GROUP_SENT, "239.1.1.2%eth0:5000")
    ]
    sent_two, sent_one = map(report, sources)
    heard_one, heard_two = report(alone), [report(sink) for sink in both]
    rows = {(row["object"], row["rule"], row.get("to", "")): row for row in stats(lab, network.relay)}
    for (kind, _, _), row in rows.items():
        if kind == "output":
            assert row["relayed_packets"] == row["sent_packets"] + sum(dropped(row).values()) == 100_000
    by_output = [row for (kind, rule, _), row in rows.items() if (kind, rule) == ("output", "one")]
    assert [row["sent_packets"] for row in by_output] == [heard_one["packets"] + heard_one["socket_dropped"]]
    assert (heard_one["ttls"], [heard["ttls"] for heard in heard_two]) == ([3], [[8], [9]])
    assert (sent_one["packets"], sent_two["packets"]) == (100_000, 100_000)
    for heard in (heard_one, *heard_two):
        assert (heard["corrupt"], heard["duplicates"], heard["checksum_errors"]) == (0, 0, 0)


# What fails changes nothing


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "mcr-test", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@PATHS
def test_a_rule_that_cannot_be_deleted_for_a_full_disk_loses_nothing(lab: Lab, path: str) -> None:
    topology = lab.topology_relay(gro=True)
    directory = lab.state_directory / topology.relay.name
    with small_disk(directory):
        supervisor = lab.supervisor(topology.relay, config=config())
        client = client_of(lab, topology.relay)
        client.call("rule.add", name="x", **{"from": GROUP_IN}, to=["239.2.2.2%out0:6000"], path=path)
        saved = (directory / "rules.toml").read_bytes()
        sink = listen(lab, topology.dst, "239.2.2.2%eth0:6000", "--idle", "4", "--digest")
        source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "5000", *ENDLESS)
        wait_until(lambda: client.call("stats", name="x")[0]["received_packets"] > 1000, "traffic")
        before = entries(lab, topology.relay)
        with contextlib.suppress(OSError), (directory / "fill").open("wb", buffering=0) as fill:
            while True:
                fill.write(bytes(4096))
        for _ in range(5):
            with pytest.raises(McrError, match="cannot be saved"):
                client.call("rule.del", names=["x"])
        assert entries(lab, topology.relay) == before
        assert sorted(each.name for each in directory.iterdir()) == ["fill", "rules.toml"]
        assert (directory / "rules.toml").read_bytes() == saved
        source.terminate()
        sent = report(source)
        assert_whole(report(sink), sent)
        rule, output = client.call("stats", name="x")
        assert (
            rule["received_packets"] == rule["relayed_packets"] == output["sent_packets"] == sent["packets"]
        )
        (directory / "fill").unlink()
        client.call("rule.del", names=["x"])
        assert b"[[rule]]" not in (directory / "rules.toml").read_bytes()
        assert supervisor.terminate() == 0


@PATHS
def test_a_reload_that_fails_touches_neither_counters_nor_streams(lab: Lab, path: str) -> None:
    topology = lab.topology_relay(gro=True)
    good = config(("x", GROUP_IN, ["239.2.2.2%out0:6000"]), path=path)
    lab.supervisor(topology.relay, config=good)
    client, file = client_of(lab, topology.relay), config_file(lab, topology.relay)
    sink = listen(lab, topology.dst, "239.2.2.2%eth0:6000", "--idle", "4", "--digest")
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "5000", *ENDLESS)
    wait_until(lambda: client.call("stats", name="x")[0]["received_packets"] > 1000, "traffic")
    before = entries(lab, topology.relay)
    file.write_text(config() + '[[attach]]\ninterface = "out0"\nzero_copy = "on"\n')  # a veth cannot
    for _ in range(3):
        with pytest.raises(McrError, match="without copying"):
            client.call("reload")
    assert entries(lab, topology.relay) == before
    source.terminate()
    sent = report(source)
    assert_whole(report(sink), sent)
    rule, output = client.call("stats", name="x")
    assert rule["received_packets"] == rule["relayed_packets"] == output["sent_packets"] == sent["packets"]


def test_a_reload_that_has_to_wait_reads_the_files_when_its_turn_comes(lab: Lab) -> None:
    """Else the older of two that come at once could be the one that counts."""
    topology = lab.topology_relay(gro=True)
    older, newer = (config(("x", f"{group}%in0:5000", ["239.2.2.2%out0:6000"])) for group in INPUTS)
    lab.supervisor(topology.relay, config=config())
    relay, file = topology.relay, config_file(lab, topology.relay)
    rule = {"name": "w", "from": "239.9.9.9%in0:5000", "to": ["10.2.0.2:6000"], "path": "worker"}
    adding = threading.Thread(target=client_of(lab, relay).call, args=("rule.add",), kwargs=rule)
    reloading = threading.Thread(target=client_of(lab, relay).call, args=("reload",))
    worker = status(lab, relay)["worker_pid"]
    os.kill(worker, signal.SIGSTOP)
    adding.start()  # waits for the worker
    wait_until((lab.state_directory / relay.name / "rules.new").exists, "the turn of the rule that is added")
    file.write_text(older)
    reloading.start()
    reloading.join(0.5)  # were it not to wait, the older file would have been read by now
    file.write_text(newer)
    os.kill(worker, signal.SIGCONT)
    for each in (adding, reloading):
        each.join(30)
    shown = {row["rule"]: row["from"] for row in lab.ask(relay, "rule.show")}
    assert shown == {"w": "239.9.9.9%in0:5000", "x": f"{INPUTS[1]}%in0:5000"}


# Adopted


def test_two_thousand_one_hundred_fan_outs_are_adopted_as_they_are(lab: Lab) -> None:
    network = fan_out(lab, 2)
    rules = [("cam", GROUP_IN, outputs(2))]
    for n in range(2099):
        host = f"{n // 250}.{n % 250 + 1}"
        rules.append(
            (f"r{n}", f"239.3.{host}%in0:5000", [f"239.4.{host}%out{output}:6000" for output in (0, 1)])
        )
    text = config(*rules, path="kernel")
    first = lab.supervisor(network.relay, "--on-exit", "keep", config=text)
    sinks = listen_all(lab, network, "--idle", "4")
    source = spawn_send(lab, network.src, GROUP_SENT, "--rate", "2000", *ENDLESS)
    client = client_of(lab, network.relay)
    wait_until(lambda: client.call("stats", name="cam")[0]["received_packets"] > 1000, "traffic")
    before = entries(lab, network.relay)
    first.child.kill()
    first.wait()  # the worker ends with it
    lab.supervisor(network.relay, "--on-exit", "keep", config=text)
    assert entries(lab, network.relay) == before
    source.terminate()
    sent = report(source)
    for sink in sinks:
        assert_whole(report(sink), sent)
    rule, *sent_by = client_of(lab, network.relay).call("stats", name="cam")
    assert rule["received_packets"] == rule["relayed_packets"] == sent["packets"]
    assert [(row["sent_packets"], dropped(row)) for row in sent_by] == [(sent["packets"], {})] * 2


def test_what_is_adopted_with_other_outputs_than_it_had_is_exchanged_without_loss(lab: Lab) -> None:
    """From two outputs to one, which is another way through the maps, while nobody runs."""
    network = fan_out(lab, 2)
    first = lab.supervisor(
        network.relay, "--on-exit", "keep", config=config(("cam", GROUP_IN, outputs(2)), path="kernel")
    )
    sink, _ = listen_all(lab, network, "--idle", "4")
    source = spawn_send(lab, network.src, GROUP_SENT, "--rate", "20000", *ENDLESS)
    client = client_of(lab, network.relay)
    wait_until(lambda: client.call("stats", name="cam")[0]["received_packets"] > 1000, "traffic")
    assert first.terminate() == 0
    lab.supervisor(network.relay, config=config(("cam", GROUP_IN, outputs(1)), path="kernel"))
    source.terminate()
    sent = report(source)
    assert_whole(report(sink), sent)
    rule, output = client_of(lab, network.relay).call("stats", name="cam")
    assert rule["received_packets"] == rule["relayed_packets"] == output["sent_packets"] == sent["packets"]


def test_a_rule_that_has_to_wait_stands_in_the_way_of_no_other_change(lab: Lab) -> None:
    """It insists on the kernel path, which its output lost when the peer's GRO went off."""
    topology = lab.topology_relay(gro=True)
    kernel = "x", GROUP_IN, ["239.2.2.2%out0:6000"]
    lab.supervisor(topology.relay, config=config(kernel, path="kernel"))
    client, file = client_of(lab, topology.relay), config_file(lab, topology.relay)
    lab.run(topology.dst, ["ethtool", "-K", "eth0", "gro", "off"])
    wait_until(lambda: client.call("rule.show", name="x")[0]["state"] == "pending", "x has to wait", 30)
    rule = {"name": "y", "from": "239.1.1.9%in0:5000", "to": ["10.2.0.2:6000"], "path": "worker"}
    client.call("rule.add", **rule)
    client.call("reload")
    client.call("rule.del", names=["y"])
    with pytest.raises(McrError, match="cannot take the kernel path"):
        client.call("rule.add", **{**rule, "path": "kernel", "to": ["239.2.2.9%out0:6000"]})
    file.write_text(config())
    client.call("reload")
    assert client.call("rule.show") == []
