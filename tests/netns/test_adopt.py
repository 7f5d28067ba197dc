"""`--on-exit keep`: the kernel path forwards without a process, and the next supervisor takes it over."""

import json
import os
import signal

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
    spawn_send,
    stats,
    status,
    wait_until,
)
from tests.netns.lab import Lab, Namespace, RelayTopology

OTHER = ("other", "239.1.1.2%in0:5000", ["239.2.2.3%out0:6000"])
CAM = ("cam", GROUP_IN, [GROUP_OUT])


def kernel_path(lab: Lab, relay: Namespace) -> bool:
    rows: list[Report] = json.loads(lab.mcr(relay, "rule", "show", "cam", "-j").stdout)
    return [row["path"] for row in rows] == ["kernel"]


def received(lab: Lab, relay: Namespace) -> int:
    counts: int = stats(lab, relay)[0]["received_packets"]
    return counts


def kept(lab: Lab, topology: RelayTopology) -> None:
    """Starts a supervisor that keeps, and kills it and its worker."""
    supervisor = lab.supervisor(topology.relay, "--on-exit", "keep", config=config(CAM))
    assert kernel_path(lab, topology.relay)
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


def test_kept_path_forwards_with_no_process_and_ends_with_a_detaching_supervisor(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    supervisor = lab.supervisor(topology.relay, "--on-exit", "keep", config=config(CAM))
    assert supervisor.terminate() == 0
    assert not any(line.startswith("process") for line in lab.leftovers(topology.relay))
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
    assert f"layout version 99, and this MCR has {lib.MCR_ABI_VERSION}" in refused.stderr
    assert "--replace" in refused.stderr
    assert "xdp" in lab.ip(topology.relay, "link show in0")
    last = lab.supervisor(topology.relay, "--replace", config=config(CAM))
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)
    assert last.terminate() == 0
    assert lab.leftovers(topology.relay) == []
