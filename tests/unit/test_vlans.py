"""Tagged streams: which VLANs have to be registered, and what stands against a tagged packet."""

from dataclasses import replace

import pytest

from mcr.rule import InterfaceFacts, Rule
from mcr.stream import parse_output, parse_stream
from mcr.vlans import FILTERS, TAKES_TAGS_OUT, Seen, Vlan, devices, missing, tag_problem, vlans_needed

ETH0 = InterfaceFacts("eth0", 7, 1500, True, True, "02:00:00:00:00:01", mode="native", ingress="xsk")
ETH1 = replace(ETH0, name="eth1", ifindex=8)
DEVICE = replace(ETH0, name="eth0.5", ifindex=20, kind="vlan", parent=7, vlan=5)
FACTS = {"eth0": ETH0, "eth1": ETH1}
TAGGED = parse_stream("239.1.1.1%eth0:5000,vlan=5")


def rule(stream: str) -> Rule:
    return Rule(stream, parse_stream(stream), (parse_output("239.2.2.2%eth2:6000"),))


def test_the_outer_tags_of_attached_interfaces_are_needed() -> None:
    streams = ["239.1.1.1%eth0:5", "239.1.1.2%eth0:5,vlan=5", "239.1.1.3%eth0:5,vlan=9.5"]
    elsewhere = ["239.1.1.4%eth1:5,vlan=6", "239.1.1.5%eth9:5,vlan=6"]
    rules = [rule(stream) for stream in streams + elsewhere]
    assert vlans_needed(rules, {"eth0", "eth9"}, FACTS) == {Vlan(7, 5): "eth0", Vlan(7, 9): "eth0"}


@pytest.mark.parametrize(
    ("filtering", "facts", "expected"),
    [
        (["eth0"], FACTS, [Vlan(7, 5)]),
        ([], FACTS, []),
        (["eth1"], FACTS, []),
        (["eth0"], FACTS | {"eth0.5": DEVICE}, []),
        (["eth0"], FACTS | {"eth0.5": replace(DEVICE, up=False)}, []),
        (["eth0"], FACTS | {"eth0.5": replace(DEVICE, vlan=6)}, [Vlan(7, 5)]),
        (["eth0"], FACTS | {"eth0.5": replace(DEVICE, parent=8)}, [Vlan(7, 5)]),
    ],
)
def test_a_vlan_is_registered_only_where_the_nic_filters_and_nobody_has_done_it(
    filtering: list[str], facts: dict[str, InterfaceFacts], expected: list[Vlan]
) -> None:
    assert missing({Vlan(7, 5): "eth0"}, facts, filtering) == expected


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_devices_for_a_vlan_the_one_that_is_up_counts(order: int) -> None:
    down = replace(DEVICE, name="mcr7.5", ifindex=21, up=False)
    assert devices([DEVICE, down][::order]) == {Vlan(7, 5): DEVICE}


@pytest.mark.parametrize(
    ("facts", "seen", "cause", "remedy"),
    [
        (ETH0, Seen(), "", ""),
        (ETH0, Seen({TAKES_TAGS_OUT: True}), "takes VLAN tags out", "ethtool -K eth0 rxvlan off"),
        (replace(ETH0, kind="veth"), Seen({TAKES_TAGS_OUT: True}), "", ""),
        (replace(ETH0, mode="", ingress="packet"), Seen({TAKES_TAGS_OUT: True}), "", ""),
        (ETH0, Seen({FILTERS: True}), "", ""),
        (
            ETH0,
            Seen({FILTERS: True}, {5: "Operation not supported"}),
            "VLAN 5, which could not be registered: Operation not supported",
            "ip link add link eth0 name eth0.5 type vlan id 5",
        ),
        (ETH0, Seen({FILTERS: True}, {6: "Operation not supported"}), "", ""),
    ],
)
def test_what_keeps_tagged_packets_out_is_named_with_a_remedy(
    facts: InterfaceFacts, seen: Seen, cause: str, remedy: str
) -> None:
    problem = tag_problem(TAGGED, facts, seen)
    assert (problem is None) == (not cause)
    if problem is not None:
        assert cause in problem.cause
        assert problem.remedy.startswith(remedy)
    assert tag_problem(parse_stream("239.1.1.1%eth0:5000"), facts, seen) is None
