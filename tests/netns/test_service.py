"""The supervisor as a service: what the shipped unit allows is enough, and systemd is told what happens."""

import configparser
import os
import signal
import socket
import sys
import time
from pathlib import Path

from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    assert_whole,
    config,
    relay_one,
    status,
)
from tests.netns.lab import Lab, RelayTopology

UNIT = Path(__file__).parents[2] / "deploy" / "mcr.service"


def unit_capabilities() -> list[str]:
    """As setpriv(1) writes them: `net_admin`."""
    unit = configparser.ConfigParser(strict=False)
    unit.read(UNIT)
    return [name.removeprefix("CAP_").lower() for name in unit["Service"]["CapabilityBoundingSet"].split()]


def argv(lab: Lab, topology: RelayTopology) -> list[str]:
    path = lab.directory / "service.toml"
    path.write_text(config(("cam", GROUP_IN, [GROUP_OUT])))
    return [sys.executable, "-m", "mcr.cli.main", "--instance", topology.relay.name, "run", "-c", str(path)]


def test_capabilities_of_the_unit_are_enough(lab: Lab) -> None:
    topology = lab.topology_relay()
    bounding = ",".join(["-all", *(f"+{name}" for name in unit_capabilities())])
    confined = ["setpriv", "--bounding-set", bounding, "--no-new-privs", *argv(lab, topology)]
    supervisor = lab.spawn(topology.relay, confined)
    supervisor.wait_for("mcr: ready")
    assert status(lab, topology.relay)["state"] == "attached"
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)
    assert supervisor.terminate() == 0
    assert lab.leftovers(topology.relay) == []


def test_systemd_is_told_of_start_reload_life_and_stop(lab: Lab) -> None:
    topology = lab.topology_relay()
    path = lab.directory / "notify"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(path))
    listener.settimeout(10)
    variables = [f"NOTIFY_SOCKET={path}", "WATCHDOG_USEC=200000"]
    supervisor = lab.spawn(topology.relay, ["env", *variables, *argv(lab, topology)])
    heard: list[str] = []

    def wait_for(assignment: str) -> None:
        deadline = time.monotonic() + 15
        while assignment not in heard:
            assert time.monotonic() < deadline, heard
            heard.extend(listener.recv(4096).decode().split("\n"))

    with listener:
        wait_for("READY=1")
        wait_for("STATUS=1 interfaces attached, 1 rules")
        wait_for("WATCHDOG=1")
        heard.clear()
        os.kill(supervisor.pid, signal.SIGHUP)
        wait_for("RELOADING=1")
        wait_for("READY=1")
        supervisor.child.send_signal(signal.SIGTERM)
        wait_for("STOPPING=1")
        assert supervisor.wait() == 0
