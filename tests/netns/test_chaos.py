"""Random deaths at random moments, under traffic: never a hang, never a leftover, always ready again in time.

Each round starts a supervisor, waits a random while (it may still be starting), and sends SIGTERM or SIGKILL
to one of its processes. The seed is in every failure, so that a round can be repeated.
"""

import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.netns.flows import GROUP_IN, GROUP_OUT, GROUP_SENT, config, rule_row, spawn_send, wait_until
from tests.netns.lab import Lab, LabError, Process, RelayTopology, processes_in

PATIENCE_S = 20.0  # where the machine may be busy; the long test holds it to LIMIT_S
LIMIT_S = 2.0
SHARED_MEMORY = Path("/dev/shm")

RULES = (
    ("v4", GROUP_IN, [GROUP_OUT, "10.2.0.2:6000"]),
    ("v6", "[ff15::1]%in0:5000", ["[ff15::2]%out0:6000"]),
)


@dataclass(frozen=True, slots=True)
class Death:
    """What happens in a round: after delay_s from the start, a signal to one kind of process."""

    delay_s: float
    number: signal.Signals
    victim: str
    attach: str


def choose(chance: random.Random) -> Death:
    return Death(
        delay_s=chance.choice([chance.uniform(0, 1.2), chance.uniform(1.2, 2)]),
        number=chance.choice([signal.SIGTERM, signal.SIGKILL]),
        victim=chance.choice(["supervisor", "worker", "membership"]),
        attach=chance.choice(['ingress = "xsk"', 'ingress = "packet"', ""]),
    )


def start(lab: Lab, topology: RelayTopology, attach: str) -> Process:
    path = lab.directory / "chaos.toml"
    path.write_text(config(*RULES, attach=attach))
    name = topology.relay.name
    return lab.spawn(
        topology.relay, [sys.executable, "-m", "mcr.cli.main", "--instance", name, "run", "-c", str(path)]
    )


def pids_of(topology: RelayTopology, victim: str) -> list[int]:
    """The processes of that kind which run now, perhaps none."""
    marks = {"worker": b"mcr.uring_egress", "membership": b"mcr.membership"}
    found = []
    for pid in processes_in(topology.relay):
        try:
            if marks[victim] in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def strike(topology: RelayTopology, supervisor: Process, death: Death) -> None:
    time.sleep(death.delay_s)
    pids = [supervisor.pid] if death.victim == "supervisor" else pids_of(topology, death.victim)
    for pid in pids:
        try:
            os.kill(pid, death.number)
        except ProcessLookupError:
            continue


def assert_down(
    lab: Lab, topology: RelayTopology, supervisor: Process, number: signal.Signals, limit_s: float
) -> None:
    """After SIGTERM nothing is left; after SIGKILL only pins and files, until the next start.

    A SIGTERM before Python could ask for it ends the process as signals do, and then what an earlier round's
    SIGKILL has left is still there.
    """
    status = supervisor.wait(limit_s)
    assert status in (0, -number), supervisor.described()
    if status == 0:
        assert lab.leftovers(topology.relay) == []
        return
    kept = ("pin ", "file ")
    wait_until(
        lambda: all(line.startswith(kept) for line in lab.leftovers(topology.relay)),
        "processes gone",
        limit_s,
    )


def assert_relaying(lab: Lab, topology: RelayTopology) -> None:
    before = rule_row(lab, topology.relay, "v4")["relayed_packets"]
    wait_until(lambda: rule_row(lab, topology.relay, "v4")["relayed_packets"] > before, "relaying again")


def survive(lab: Lab, topology: RelayTopology, death: Death, limit_s: float) -> None:
    """One round."""
    supervisor = start(lab, topology, death.attach)
    strike(topology, supervisor, death)
    if death.victim == "supervisor":
        assert_down(lab, topology, supervisor, death.number, limit_s)
        return
    supervisor.wait_for("mcr: ready", limit_s)  # after delay_s, in which it may have become so already
    assert_relaying(lab, topology)
    supervisor.child.send_signal(signal.SIGTERM)
    assert_down(lab, topology, supervisor, signal.SIGTERM, limit_s)


def survive_all(lab: Lab, rounds: int, seed: int, limit_s: float) -> None:
    topology = lab.topology_relay()
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "20000")
    chance = random.Random(seed)
    shared = sorted(SHARED_MEMORY.iterdir())
    for number in range(rounds):
        death = choose(chance)
        try:
            survive(lab, topology, death, limit_s)
        except (AssertionError, LabError) as error:
            raise AssertionError(f"seed {seed}, round {number}, {death}: {error}") from error
    assert source.child.poll() is None
    assert source.terminate() == 0, source.described()
    last = start(lab, topology, "")
    last.wait_for("mcr: ready", limit_s)
    assert last.terminate(limit_s) == 0
    assert lab.leftovers(topology.relay) == []
    assert sorted(SHARED_MEMORY.iterdir()) == shared


def test_random_deaths_leave_nothing_and_the_next_start_is_ready(lab: Lab) -> None:
    survive_all(lab, rounds=5, seed=random.randrange(1 << 32), limit_s=PATIENCE_S)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_three_hundred_random_deaths_leave_nothing_and_the_next_start_is_ready(lab: Lab) -> None:
    survive_all(lab, rounds=300, seed=random.randrange(1 << 32), limit_s=LIMIT_S)
