"""The program that passes everything, on egress interfaces whose driver transmits only with one.

No driver of that kind can be made in a namespace. These tests put the program on a veth, whose peer decides
whether it seems to have helped.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace

from mcr import loader
from mcr.egress_helpers import EgressHelpers
from mcr.maps import Maps
from mcr.netlink import read_interfaces, xdp_program
from mcr.rule import HELD, XDP_FEATURE_BASIC, XDP_FEATURE_NDO_XMIT, InterfaceFacts
from tests.netns.driven import loaded
from tests.netns.lab import Lab, Namespace

NEEDED = frozenset({"out0"})


@contextlib.contextmanager
def instance(lab: Lab, gro: bool) -> Iterator[tuple[Namespace, Maps]]:
    """A namespace with a loaded program, and out0 whose peer has GRO or not."""
    topology = lab.topology_relay(gro=gro)
    with loaded(lab, topology.relay) as maps:
        yield topology.relay, maps


def program_on(interface: str) -> str:
    found = xdp_program(interface)
    return loader.program_name(found.program_id) if found else ""


def provide(helpers: EgressHelpers, facts: dict[str, InterfaceFacts]) -> InterfaceFacts:
    asyncio.run(helpers.provide(NEEDED, facts))
    return helpers.seen(facts["out0"])


def test_a_program_that_helps_is_held_for_as_long_as_a_rule_needs_it(lab: Lab) -> None:
    with instance(lab, gro=True) as (relay, maps):
        helpers = EgressHelpers(relay.name, maps.helper_fd, keep=False)
        facts = read_interfaces()
        facts["out0"] = replace(facts["out0"], xdp_features=XDP_FEATURE_BASIC)
        seen = provide(helpers, facts)
        assert (seen.helper, program_on("out0")) == (HELD, "mcr_pass")
        assert seen.xdp_features is not None
        assert seen.xdp_features & XDP_FEATURE_NDO_XMIT
        helpers.withdraw(NEEDED, facts)
        assert program_on("out0") == "mcr_pass"
        helpers.withdraw(frozenset(), facts)
        assert (program_on("out0"), helpers.seen(facts["out0"])) == ("", facts["out0"])


def test_it_makes_room_for_an_attachment_and_ends_with_its_holder(lab: Lab) -> None:
    with instance(lab, gro=True) as (relay, maps):
        helpers = EgressHelpers(relay.name, maps.helper_fd, keep=False)
        provide(helpers, read_interfaces())
        helpers.release({"out0"})
        assert program_on("out0") == ""
        provide(helpers, read_interfaces())
        assert program_on("out0") == "mcr_pass"
        helpers.close()
        assert program_on("out0") == ""


def test_a_program_that_does_not_help_is_taken_away_and_not_tried_again(lab: Lab) -> None:
    with instance(lab, gro=False) as (relay, maps):
        helpers = EgressHelpers(relay.name, maps.helper_fd, keep=False)
        facts = read_interfaces()
        why = "its driver has no XDP transmit, not even with an XDP program of its own"
        assert provide(helpers, facts).helper == why
        assert program_on("out0") == ""
        assert helpers.seen(replace(facts["out0"], up=False)).helper == why
        assert helpers.seen(replace(facts["out0"], mtu=1400)).helper == ""
        helpers.withdraw(frozenset(), {})
        assert helpers.seen(facts["out0"]).helper == ""


def test_another_program_stays_and_is_the_reason(lab: Lab) -> None:
    with instance(lab, gro=True) as (relay, maps):
        ifindex = socket.if_nametoindex("out0")
        with contextlib.closing(loader.attach(maps.program_fd, "out0", ifindex, "native")):
            helpers = EgressHelpers(relay.name, maps.helper_fd, keep=False)
            reason = provide(helpers, read_interfaces()).helper
            assert reason.startswith(
                "it needs an XDP program of its own for that, but another XDP program is"
            )
            assert "mcr_relay" in reason
            assert program_on("out0") == "mcr_relay"


def test_what_is_kept_outlives_its_holder_and_is_adopted(lab: Lab) -> None:
    with instance(lab, gro=True) as (relay, maps):
        first = EgressHelpers(relay.name, maps.helper_fd, keep=True)
        provide(first, read_interfaces())
        first.close()
        assert program_on("out0") == "mcr_pass"
        gone = loader.helper_dir(relay.name) / "999999"
        gone.hardlink_to(loader.helper_dir(relay.name) / str(socket.if_nametoindex("out0")))
        second = EgressHelpers(relay.name, maps.helper_fd, keep=False)
        second.adopt(read_interfaces())
        assert not gone.exists()
        assert (second.seen(read_interfaces()["out0"]).helper, program_on("out0")) == (HELD, "mcr_pass")
        assert not any(loader.helper_dir(relay.name).iterdir())  # it ends with this one, however that ends
        second.close()
        assert program_on("out0") == ""
