"""What was asked for is what runs: random sequences of changes, after each of which all that the kernel has
is compared with what a small reference says (model_reference.py), and one datagram of every stream is sent
through.

Hypothesis chooses the steps, and shortens a sequence that fails. A longer run, with other sequences each
time:

    MCR_MODEL_EXAMPLES=200 .venv/bin/python -m pytest -m soak tests/netns/test_model.py --hypothesis-seed=7
"""

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.netns.lab import Lab
from tests.netns.model_far import SOURCES
from tests.netns.model_machine import ALL_GROUPS, OUT1, OUT2, STREAMS, A, B, RelayMachine, TrafficMachine
from tests.netns.model_reference import Attachment, Input, Output, Rule
from tests.netns.model_traffic import Traffic
from tests.netns.model_world import World


def machine_of(lab: Lab) -> type[RelayMachine]:
    class Machine(RelayMachine):
        world = World(lab, ALL_GROUPS)

    return Machine


@contextlib.contextmanager
def traffic_machine_of(lab: Lab) -> Iterator[type[TrafficMachine]]:
    world_of_all = World(lab, ALL_GROUPS)
    with Traffic(world_of_all, STREAMS) as running:
        world_of_all.quiet = running.paused

        class Machine(TrafficMachine):
            world = world_of_all
            traffic = running

        yield Machine


def run(machine: type[RelayMachine], examples: int, steps: int, quick: bool) -> None:
    machine.outcomes = Counter()
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=quick,
        database=None,
        deadline=None,
        print_blob=False,
        phases=[Phase.generate]
        if os.environ.get("MCR_MODEL_SHRINK") == "0"
        else [Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)
    print(f"{machine.steps} steps, requests: {dict(machine.outcomes)}")


@pytest.mark.timeout(900)  # of which a run without a failure takes a small part
def test_any_order_of_changes_leads_to_what_was_asked_for(lab: Lab) -> None:
    run(machine_of(lab), examples=12, steps=20, quick=True)


CLONED = Rule("r1", Input(A, "in1", 0), (Output(OUT1, "out0", 6000), Output(OUT1, "out1", 6000)))
PLAIN = Rule("r2", Input(A, "in0", 5000), (Output(OUT1, "out0", 6000),))
OTHER = Rule("r3", Input(B, "in0", 5000), (Output(OUT2, "out1", 6001),))
UNICAST = Rule("r4", Input(B, "in1", 5000), (Output("10.2.0.2", "", 6000),), "worker")
ONLY_KERNEL = Rule("r5", Input(A, "in1", 5000, SOURCES[0]), (Output(OUT1, "out0", 6000),), "kernel")


def play_what_once_failed(machine: RelayMachine) -> None:
    """Inputs swapped, handed on to another interface, attachments against a rule, exchanged names, deaths."""
    machine.begin([PLAIN, OTHER, UNICAST])
    machine.rotate_inputs(1)
    machine.rotate_inputs(2)
    machine.drop_from_file(["r2", "r3"], "an attachment that fails")
    machine.exchange_names()
    machine.put_into_file(CLONED, "")
    machine.drop_from_file(["r2", "r3", "r4"], "")
    machine.shift_inputs(0, Input(A, "in0", 5000))
    machine.rename(0, "r2")
    machine.add(ONLY_KERNEL, False)
    machine.attach_by_file([Attachment("in0"), Attachment("in1", ingress="packet")])
    machine.restart(signal.SIGTERM, True)
    machine.delete_entry(0)
    machine.detach_program("in0")
    machine.remove_control_socket()
    machine.set_far_gro("out0", False)
    machine.put_into_file(OTHER, "")
    machine.set_far_gro("out0", True)
    machine.kill_worker("in0")
    machine.restart(signal.SIGKILL, False)
    machine.restart(signal.SIGKILL, False)
    machine.teardown()


def test_sequences_that_have_once_failed_lead_to_what_was_asked_for(lab: Lab) -> None:
    machine = machine_of(lab)()
    play_what_once_failed(machine)


def test_sequences_that_have_once_failed_disturb_no_stream_that_they_do_not_touch(lab: Lab) -> None:
    with traffic_machine_of(lab) as machine:
        play_what_once_failed(machine())


def test_the_model_notices_a_relay_that_is_not_what_was_asked_for(lab: Lab) -> None:
    with traffic_machine_of(lab) as machine_type:
        machine = machine_type()
        machine.begin([PLAIN, OTHER])
        other = replace(OTHER, outputs=(Output(OUT2, "out1", 6001, ttl=9),))
        machine.asked = machine.asked.with_file([PLAIN, other], machine.asked.file_attachments.values())
        with pytest.raises(AssertionError, match="wanted: port 6001, ttl 9"):
            machine._settle(0.2)
        machine.traffic.patience_s = 1
        fates = machine._fates(machine.world.links())
        with pytest.raises(AssertionError, match="lost"):
            machine._judge("then", {stream: fate.heard for stream, fate in fates.items()}, set())


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_hundreds_of_changes_disturb_no_stream_that_they_do_not_touch(lab: Lab) -> None:
    with traffic_machine_of(lab) as machine:
        run(machine, examples=int(os.environ.get("MCR_MODEL_EXAMPLES", "20")), steps=30, quick=False)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_thousands_of_changes_lead_to_what_was_asked_for(lab: Lab) -> None:
    run(machine_of(lab), examples=int(os.environ.get("MCR_MODEL_EXAMPLES", "100")), steps=50, quick=False)
