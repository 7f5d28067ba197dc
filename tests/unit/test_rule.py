"""Rules: which sets are refused and where the error points, which path a rule takes, what a diff says."""

import random
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcr import rule as rule_module
from mcr.errors import McrError
from mcr.rule import (
    HELD,
    MCR_MAX_OUTPUTS,
    MCR_MAX_OUTPUTS_PER_RULE,
    MCR_MAX_RULES,
    XDP_FEATURE_BASIC,
    XDP_FEATURE_NDO_XMIT,
    XDP_FEATURE_NDO_XMIT_SG,
    Diff,
    InterfaceFacts,
    Origin,
    Plan,
    Rule,
    check_rule,
    check_rules,
    diff,
    needs_helper,
    plan,
    source_address,
)
from mcr.stream import parse_output, parse_stream

ABI = Path(__file__).parents[2] / "bpf" / "relay_abi.h"


def make(
    name: str, stream: str, *outputs: str, path: Literal["auto", "kernel", "worker"] = "auto", line: int = 0
) -> Rule:
    origin = Origin("m.toml", line) if line else None
    return Rule(name, parse_stream(stream), tuple(map(parse_output, outputs)), path, origin)


def test_the_limits_are_those_of_the_abi() -> None:
    limits = dict(
        re.findall(r"\b(MCR_MAX_(?:RULES|OUTPUTS|OUTPUTS_PER_RULE|WORKERS)) = (\d+),", ABI.read_text())
    )
    assert len(limits) == 4
    assert {name: str(getattr(rule_module, name)) for name in limits} == limits


def test_rules_that_make_sense_together_are_accepted() -> None:
    check_rules([])
    check_rules(
        [
            make("a", "239.1.1.1%eth0:5000", "239.2.2.2%eth1:6000", "10.20.0.9:6000"),
            make("b", "239.1.1.1%eth1:5000", "239.2.2.2%eth1:7000"),
            make("c", "239.1.1.1%eth0:*", "239.2.2.2%eth2:*"),
            make("d", "10.0.0.7@239.1.1.1%eth0:5000", "239.2.2.2%eth3:6000"),
            make("e", "239.1.1.1%eth0:5000,vlan=5", "239.2.2.2%eth4:6000"),
            make("f", "239.1.1.1%eth0:5000,vlan=6.5", "239.2.2.2%eth4:6000"),
            make("g", "[ff15::1]%eth0:5000", "239.2.2.2%eth5:6000"),
        ]
    )


@pytest.mark.parametrize("name", ["a", "0", "studio-cam.1:b_C", "x" * 64])
def test_a_name_of_letters_digits_and_marks_is_accepted(name: str) -> None:
    check_rule(make(name, "239.1.1.1%eth0:5", "239.2.2.2%eth1:6"))


@pytest.mark.parametrize("name", ["", "-a", ".", "x" * 65, "a b", "a\n", "é", "a/b", "a\ud800"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(McrError) as caught:
        check_rule(make(name, "239.1.1.1%eth0:5", "239.2.2.2%eth1:6", line=9))
    assert "cannot be the name of a rule" in caught.value.cause
    assert caught.value.cause.isprintable()
    assert caught.value.where == "m.toml:9"


def test_a_rule_has_1_to_64_outputs() -> None:
    outputs = [f"10.20.0.9:{port}" for port in range(1, MCR_MAX_OUTPUTS_PER_RULE + 2)]
    check_rule(make("a", "239.1.1.1%eth0:5", *outputs[:-1]))
    for count, some in ((0, []), (65, outputs)):
        with pytest.raises(McrError, match=rf"^m.toml:3: rule 'a' has {count} outputs$"):
            check_rule(make("a", "239.1.1.1%eth0:5", *some, line=3))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("10.20.0.9:6000", "10.20.0.9:6000"),
        ("10.20.0.9:6000,ttl=8", "10.20.0.9:6000,dscp=9"),
        ("10.20.0.9:5000", "10.20.0.9:*"),
    ],
)
def test_two_outputs_of_one_rule_to_the_same_destination_are_refused(first: str, second: str) -> None:
    with pytest.raises(McrError, match=r"has the output 10\.20\.0\.9:.* twice"):
        check_rule(make("a", "239.1.1.1%eth0:5000", first, second))


def test_outputs_that_differ_in_port_interface_or_source_go_together() -> None:
    check_rule(
        make(
            "a",
            "239.1.1.1%eth0:5000",
            "10.20.0.9:6000",
            "10.20.0.9:6001",
            "10.20.0.9%eth1:6000",
            "10.20.0.9:6000,source=10.0.0.1",
        )
    )


def test_a_source_cannot_be_preserved_across_families() -> None:
    check_rule(make("a", "239.1.1.1%eth0:5000", "[ff15::1]%eth1:6000"))
    with pytest.raises(McrError, match="cannot preserve an IPv4 source"):
        check_rule(make("a", "239.1.1.1%eth0:5000", "[ff15::1]%eth1:6000,source=preserve"))


def test_two_rules_of_one_name_are_refused_at_the_later() -> None:
    rules = [
        make("a", "239.1.1.1%eth0:5", "239.2.2.2%eth1:6", line=3),
        make("a", "239.1.1.2%eth0:5", "239.2.2.3%eth1:6", line=8),
    ]
    with pytest.raises(McrError) as caught:
        check_rules(rules)
    assert str(caught.value) == "m.toml:8: there are two rules named 'a' (the first is at m.toml:3)"


@pytest.mark.parametrize(
    "stream",
    ["239.1.1.1%eth0:5", "239.1.1.1%eth0:*", "10.0.0.7@239.1.1.1%eth0:5", "239.1.1.1%eth0:5,vlan=2.3"],
)
def test_two_rules_of_one_input_are_refused_at_the_later(stream: str) -> None:
    rules = [
        make("a", stream, "239.2.2.2%eth1:6", line=3),
        make("b", stream, "239.2.2.3%eth1:6", line=8),
    ]
    with pytest.raises(McrError) as caught:
        check_rules(rules)
    assert str(caught.value) == f"m.toml:8: rules 'a' and 'b' have the same input {stream}"


def test_as_many_rules_as_the_maps_hold_are_accepted_and_one_more_is_not() -> None:
    rules = [
        make(f"r{n}", f"239.1.{n >> 8}.{n & 255}%eth0:5", f"239.2.{n >> 8}.{n & 255}%eth1:6", line=n)
        for n in range(1, MCR_MAX_RULES + 1)
    ]
    check_rules(rules[: MCR_MAX_RULES - 1])
    with pytest.raises(McrError, match=r"^m.toml:4096: there are 4096 rules, more than 4095$"):
        check_rules(rules)


def test_as_many_outputs_as_the_maps_hold_are_accepted_and_one_more_is_not() -> None:
    def rules(total: int) -> list[Rule]:
        return [
            make(
                f"r{first}",
                f"239.1.1.{first // 64}%eth0:5",
                *(f"10.20.0.9:{port}" for port in range(1, min(64, total - first) + 1)),
                line=first + 1,
            )
            for first in range(0, total, 64)
        ]

    check_rules(rules(MCR_MAX_OUTPUTS - 1))
    with pytest.raises(McrError, match=r"^m.toml:8129: the rules have more than 8191 outputs$"):
        check_rules(rules(MCR_MAX_OUTPUTS))


@pytest.mark.parametrize(
    ("stream", "output"),
    [
        ("239.1.1.1%eth0:5000", "239.1.1.1%eth0:5000"),
        ("239.1.1.1%eth0:5000", "239.1.1.1%eth0:*,ttl=8"),
        ("239.1.1.1%eth0:*", "239.1.1.1%eth0:6000"),
        ("239.1.1.1%eth0:*", "239.1.1.1%eth0:*"),
        ("10.20.0.9%eth0:5000", "10.20.0.9:5000"),
        ("10.20.0.9%eth0:5000", "10.20.0.9%eth1:5000"),
        ("10.0.0.7@239.1.1.1%eth0:5000", "239.1.1.1%eth0:5000"),
        ("10.0.0.7@239.1.1.1%eth0:5000", "239.1.1.1%eth0:5000,source=preserve"),
        ("10.0.0.7@239.1.1.1%eth0:5000", "239.1.1.1%eth0:5000,source=10.0.0.7"),
        ("239.1.1.1%eth0:5000", "239.1.1.1%eth0:5000,source=10.0.0.7"),
        ("239.1.1.1%eth0:5000,vlan=5", "239.1.1.1%eth0:5000,vlan=5"),
    ],
)
def test_an_output_that_is_its_own_input_is_refused(stream: str, output: str) -> None:
    with pytest.raises(McrError, match=r"^m.toml:4: rule 'a' sends to its own input: output "):
        check_rules([make("a", stream, "10.99.0.1:9", output, line=4)])


@pytest.mark.parametrize(
    ("stream", "output"),
    [
        ("239.1.1.1%eth0:5000", "239.1.1.1%eth1:5000"),
        ("239.1.1.1%eth0:5000", "239.1.1.1%eth0:5001"),
        ("239.1.1.1%eth0:5000", "239.1.1.2%eth0:5000"),
        ("10.0.0.7@239.1.1.1%eth0:5000", "239.1.1.1%eth0:5000,source=10.0.0.8"),
        ("239.1.1.1%eth0:5000,vlan=5", "239.1.1.1%eth0:5000"),
        ("239.1.1.1%eth0:5000", "239.1.1.1%eth0:5000,vlan=5"),
        ("239.1.1.1%eth0:5000,vlan=6.5", "239.1.1.1%eth0:5000,vlan=5"),
    ],
)
def test_an_output_that_differs_from_its_input_is_accepted(stream: str, output: str) -> None:
    check_rules([make("a", stream, output)])


def test_a_loop_is_named_whole_and_points_to_its_last_rule() -> None:
    rules = [
        make("before", "239.9.9.9%eth0:5", "239.1.1.1%eth0:5", line=1),
        make("a", "239.1.1.1%eth0:5", "10.99.0.1:9", "239.1.1.2%eth0:5", line=2),
        make("c", "239.1.1.3%eth0:5", "239.1.1.1%eth0:5", line=3),
        make("b", "239.1.1.2%eth0:*", "239.1.1.3%eth0:*", "239.8.8.8%eth0:*", line=4),
        make("after", "239.8.8.8%eth0:5", "239.7.7.7%eth0:5", line=5),
    ]
    with pytest.raises(McrError) as caught:
        check_rules(rules)
    assert str(caught.value) == "m.toml:4: rules form a loop: 'a' -> 'b' -> 'c' -> 'a'"
    check_rules([*rules[:3], *rules[4:]])


def test_a_loop_by_unicast_is_found_whatever_the_interface() -> None:
    rules = [
        make("a", "239.1.1.1%eth0:5", "10.20.0.9:5"),
        make("b", "10.20.0.9%eth1:5", "239.1.1.1%eth0:5"),
    ]
    with pytest.raises(McrError, match=r"^rules form a loop: 'a' -> 'b' -> 'a'$"):
        check_rules(rules)


def test_a_known_source_breaks_a_loop_and_a_preserved_one_does_not() -> None:
    back = make("b", "10.0.0.7@232.1.1.1%eth0:5", "239.1.1.1%eth0:5")
    check_rules([make("a", "239.1.1.1%eth0:5", "232.1.1.1%eth0:5,source=10.0.0.8"), back])
    for option in ("", ",source=preserve", ",source=10.0.0.7"):
        with pytest.raises(McrError, match="rules form a loop"):
            check_rules([make("a", "239.1.1.1%eth0:5", f"232.1.1.1%eth0:5{option}"), back])


def _can_become(output_of: Rule, input_of: Rule) -> bool:
    """The definition of an edge, pair by pair, as a model of the index."""
    stream = input_of.stream
    for output in output_of.outputs:
        port = output.port if output.port is not None else output_of.stream.port
        source = output_of.stream.source if output.source == "preserve" else output.source
        if (
            output.address == stream.address
            and (output.interface == stream.interface or not output.group)
            and (port is None or stream.port is None or port == stream.port)
            and (source in (None, "interface") or stream.source is None or source == stream.source)
            and (output.vlan, 0) == (stream.vlan, stream.vlan_outer)
        ):
            return True
    return False


def _has_cycle(rules: list[Rule]) -> bool:
    reach = [[_can_become(a, b) for b in rules] for a in rules]
    count = range(len(rules))
    for via in count:
        for a in count:
            for b in count:
                reach[a][b] = reach[a][b] or (reach[a][via] and reach[via][b])
    return any(reach[index][index] for index in count)


@st.composite
def rule_lists(draw: st.DrawFn) -> list[Rule]:
    addresses = st.sampled_from(["239.1.1.1", "239.1.1.2", "10.20.0.9", "10.20.0.8"])
    port = st.sampled_from(["5", "6", "*"])
    interface = st.sampled_from(["eth0", "eth1"])
    inputs = st.builds(
        "{}{}%{}:{}{}".format,
        st.sampled_from(["", "", "10.0.0.7@", "10.0.0.8@"]),
        addresses,
        interface,
        port,
        st.sampled_from(["", "", ",vlan=5", ",vlan=6.5"]),
    )
    outputs = st.builds(
        "{}%{}:{}{}{}".format,
        addresses,
        interface,
        port,
        st.sampled_from(["", ",source=preserve", ",source=10.0.0.7", ",source=10.0.0.8"]),
        st.sampled_from(["", "", ",vlan=5"]),
    )
    streams = draw(st.lists(inputs, max_size=6, unique=True))
    return [
        make(f"r{n}", stream, *draw(st.lists(outputs, min_size=1, max_size=2, unique=True)))
        for n, stream in enumerate(streams)
    ]


@settings(deadline=None, max_examples=300)
@given(rule_lists())
def test_loops_are_refused_exactly_where_the_definition_says(rules: list[Rule]) -> None:
    try:
        check_rules(rules)
    except McrError as error:
        if " twice" in error.cause:
            return
        assert _has_cycle(rules)
        loop = re.findall(r"'(r\d)'", error.cause.partition("loop: ")[2])
        by_name = {rule.name: rule for rule in rules}
        for one, following in pairwise(loop):
            assert _can_become(by_name[one], by_name[following])
    else:
        assert not _has_cycle(rules)


def _chain(count: int) -> list[Rule]:
    """Rule n sends to the input of rule n + 1."""
    groups = [f"239.1.{n >> 8}.{n & 255}%eth0:5" for n in range(count + 1)]
    return [make(f"r{n}", groups[n], groups[n + 1], line=n + 1) for n in range(count)]


def _many_to_many(count: int) -> list[Rule]:
    """Every output of the first half can be every input of the second: count squared over 4 pairs."""
    half = count // 2
    first = [
        make(f"a{n}", f"10.1.{n >> 8}.{n & 255}@239.1.1.1%eth0:*", "239.1.1.2%eth1:*") for n in range(half)
    ]
    second = [
        make(f"b{n}", f"10.2.{n >> 8}.{n & 255}@239.1.1.2%eth1:*", "239.1.1.3%eth2:*") for n in range(half)
    ]
    return [*first, *second]


@pytest.mark.parametrize("make_rules", [_chain, _many_to_many])
def test_many_rules_are_checked_in_linear_time(make_rules: object) -> None:
    assert callable(make_rules)
    rules = make_rules(4094)
    random.Random(3).shuffle(rules)

    def seconds() -> float:
        start = time.process_time()
        check_rules(rules)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 1.0


def test_a_loop_through_every_rule_is_found_without_recursion() -> None:
    rules = _chain(4000)
    rules.append(make("last", "239.1.15.160%eth0:5", "239.1.0.0%eth0:5", line=5000))
    with pytest.raises(McrError) as caught:
        check_rules(rules)
    assert caught.value.where == "m.toml:5000"
    assert caught.value.cause.count(" -> ") == 4001


NATIVE, GENERIC = {"mode": "native", "ingress": "xsk"}, {"mode": "generic", "ingress": "xsk"}
FEATURES = XDP_FEATURE_NDO_XMIT | XDP_FEATURE_NDO_XMIT_SG
GROUP = "239.2.2.2%eth1:6"
CANNOT_TRANSMIT = "eth1 cannot transmit redirected frames"


def facts(name: str, **changes: Any) -> InterfaceFacts:
    """An interface that nothing stands against; it is not attached."""
    plain = InterfaceFacts(
        name, 7, 1500, True, True, "02:00:00:00:00:01",
        ipv4=IPv4Address("10.2.0.1"), ipv6=IPv6Address("fd02::1"), ipv6_link=IPv6Address("fe80::1"),
        xdp_features=FEATURES,
    )  # fmt: skip
    return replace(plain, **changes)


def network(
    eth0: Mapping[str, Any] = MappingProxyType({}),
    eth1: Mapping[str, Any] = MappingProxyType({}),
    eth2: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, InterfaceFacts]:
    """Three interfaces that differ from `facts` as said; eth0 is attached in native mode if not said."""
    return {
        "eth0": facts("eth0", **{**NATIVE, **eth0}),
        "eth1": facts("eth1", **eth1),
        "eth2": facts("eth2", **eth2),
    }


KERNEL = [
    ("one output", [GROUP], network()),
    ("several interfaces", [GROUP, "239.2.2.2%eth2:6"], network()),
    ("vlan=", ["239.2.2.2%eth1:6,vlan=100"], network()),
    ("generic mode, one output", [GROUP], network(eth0=GENERIC)),
    ("generic mode needs no XDP transmit", [GROUP], network(eth0=GENERIC, eth1={"xdp_features": 0})),
    ("no SG for small frames", [GROUP], network(eth1={"xdp_features": XDP_FEATURE_NDO_XMIT})),
    (
        "the largest MTU of one buffer",
        [GROUP, "239.2.2.2%eth2:6"],
        network({"mtu": 3496}, {"mtu": 3496, "xdp_features": XDP_FEATURE_NDO_XMIT}, {"mtu": 3496}),
    ),
    ("jumbo frames, one output", [GROUP], network({"mtu": 9000}, {"mtu": 9000})),
    ("larger egress MTU", [GROUP], network(eth1={"mtu": 9000})),
    ("no address but another source", [GROUP + ",source=10.0.0.9"], network(eth1={"ipv4": None})),
    ("no address but a preserved source", [GROUP + ",source=preserve"], network(eth1={"ipv4": None})),
    ("one output, no metadata", [GROUP], network(eth0={"metadata": False})),
    ("absent egress", ["239.2.2.2%eth9:6"], network()),
    ("absent ingress", [GROUP], {"eth1": facts("eth1", xdp_features=0)}),
    ("nothing known", [GROUP], {}),
]


@pytest.mark.parametrize(
    ("outputs", "interfaces"), [each[1:] for each in KERNEL], ids=[each[0] for each in KERNEL]
)
def test_a_rule_takes_the_kernel_path_where_nothing_stands_against_it(
    outputs: list[str], interfaces: dict[str, InterfaceFacts]
) -> None:
    auto, asked = (make("a", "239.1.1.1%eth0:5", *outputs, path=path) for path in ("auto", "kernel"))
    assert plan(auto, interfaces) == Plan("kernel", "nothing stands against it")
    assert plan(asked, interfaces) == Plan("kernel", "asked for")


AGAINST_KERNEL = [
    (["10.20.0.9:6"], network(), "output 10.20.0.9:6 is unicast where a group is needed"),
    ([GROUP, "10.20.0.9:6"], network(), "output 10.20.0.9:6 is unicast where a group is needed"),
    ([GROUP, "239.2.2.3%eth1:6"], network(), "2 outputs leave by eth1"),
    (["[ff15::2]%eth1:6"], network(), "output [ff15::2]%eth1:6 is IPv6 but the input is IPv4"),
    ([GROUP], network(eth1={"ipv4": None}), "eth1 has no IPv4 address to send from"),
    ([GROUP], network(eth1={"ethernet": False, "mac": ""}), "eth1 is not Ethernet"),
    ([GROUP], network(eth0={"ethernet": False, "mac": ""}), "eth0 is not Ethernet"),
    (
        [GROUP],
        network(eth0={"mode": "", "ingress": "packet"}),
        "eth0 uses AF_PACKET, where no XDP program runs",
    ),
    (
        [GROUP, "239.2.2.2%eth2:6"],
        network(eth0=GENERIC),
        "eth0 is attached in generic mode, where clones cannot be told apart",
    ),
    (
        [GROUP, "239.2.2.2%eth2:6"],
        network({"mtu": 3497}, {"mtu": 3497}, {"mtu": 3497}),
        "frames of eth0's MTU 3497 take several buffers, which cannot be cloned",
    ),
    (
        [GROUP],
        network(eth1={"xdp_features": None}),
        "the kernel, before 6.3, does not tell whether eth1 can transmit redirected frames",
    ),
    (
        [GROUP, "239.2.2.2%eth2:6"],
        network(eth0={"metadata": False}),
        "the driver of eth0 has no XDP metadata, by which clones are told apart",
    ),
    ([GROUP], network(eth1={"xdp_features": 0}), f"{CANNOT_TRANSMIT} (its driver has no XDP transmit)"),
    (
        [GROUP],
        network(eth1={"xdp_features": ~XDP_FEATURE_NDO_XMIT & 0xFF}),
        f"{CANNOT_TRANSMIT} (its driver needs an XDP program of its own for that)",
    ),
    (
        [GROUP],
        network(eth1={"xdp_features": XDP_FEATURE_BASIC, "kind": "veth"}),
        f"{CANNOT_TRANSMIT} (it is a veth whose peer has neither GRO nor XDP)",
    ),
    (
        [GROUP],
        network(eth1={"xdp_features": XDP_FEATURE_BASIC, "helper": "it was in vain"}),
        f"{CANNOT_TRANSMIT} (it was in vain)",
    ),
    (
        [GROUP],
        network({"mtu": 9000}, {"mtu": 9000, "xdp_features": XDP_FEATURE_NDO_XMIT}),
        f"{CANNOT_TRANSMIT} (its driver takes none of several buffers, which the MTU of the input allows)",
    ),
]


@pytest.mark.parametrize(("outputs", "interfaces", "reason"), AGAINST_KERNEL)
def test_what_stands_against_the_kernel_path_is_the_reason_for_the_worker(
    outputs: list[str], interfaces: dict[str, InterfaceFacts], reason: str
) -> None:
    auto, asked, worker = (
        make("a", "239.1.1.1%eth0:5", *outputs, path=path, line=7) for path in ("auto", "kernel", "worker")
    )
    assert plan(auto, interfaces) == Plan("worker", reason)
    assert plan(worker, interfaces) == Plan("worker", "asked for")
    with pytest.raises(McrError) as caught:
        plan(asked, interfaces)
    assert str(caught.value) == f"m.toml:7: rule 'a' cannot take the kernel path: {reason}"
    assert caught.value.remedy == 'choose the path "auto" or "worker"'


def test_a_smaller_egress_mtu_is_a_reason_only_where_the_path_is_free() -> None:
    interfaces = network(eth1={"mtu": 1499})
    reason = "eth1's MTU 1499 is smaller than eth0's 1500, and only the worker path fragments"
    auto, asked, worker = (
        make("a", "239.1.1.1%eth0:5", GROUP, path=path) for path in ("auto", "kernel", "worker")
    )
    assert plan(auto, interfaces) == Plan("worker", reason)
    assert plan(asked, interfaces) == Plan("kernel", "asked for")
    assert plan(worker, interfaces) == Plan("worker", "asked for")


@pytest.mark.parametrize(
    ("addresses", "kernel"),
    [
        ({"ipv6": None}, True),
        ({"ipv6_link": None}, True),
        ({"ipv4": None}, True),
        ({"ipv6": None, "ipv6_link": None}, False),
    ],
)
def test_an_ipv6_output_sends_from_any_ipv6_address(addresses: dict[str, None], kernel: bool) -> None:
    rule = make("a", "[ff15::1]%eth0:5", "[ff15::2]%eth1:6")
    expected = (
        Plan("kernel", "nothing stands against it")
        if kernel
        else Plan("worker", "eth1 has no IPv6 address to send from")
    )
    assert plan(rule, network(eth1=addresses)) == expected


def test_a_group_of_link_scope_is_sent_from_the_link_local_address() -> None:
    eth1, wide, link = facts("eth1"), IPv6Address("fd02::1"), IPv6Address("fe80::1")
    for group, first, second in (("ff15::2", wide, link), ("ff02::2", link, wide), ("ff12::2", link, wide)):
        output = parse_output(f"[{group}]%eth1:6")
        assert source_address(output, eth1) == first
        without = {wide: replace(eth1, ipv6=None), link: replace(eth1, ipv6_link=None)}[first]
        assert source_address(output, without) == second
    assert source_address(parse_output(GROUP), eth1) == IPv4Address("10.2.0.1")
    assert source_address(parse_output(GROUP), replace(eth1, ipv4=None)) is None


def test_a_rule_that_insists_on_the_kernel_path_is_told_everything_against_it() -> None:
    outputs = [
        "10.20.0.9:6",
        "239.2.2.2%eth1:6",
        "239.2.2.3%eth1:6,vlan=5,source=10.0.0.9",
        "[ff15::2]%eth2:6",
    ]
    rule = make("a", "239.1.1.1%eth0:5", *outputs, path="kernel", line=7)
    interfaces = network(
        {"mtu": 9000, "ethernet": False, **GENERIC},
        {"ethernet": False, "ipv4": None},
        {"xdp_features": 0, "mtu": 9000},
    )
    reasons = [
        "output 10.20.0.9:6 is unicast where a group is needed",
        "2 outputs leave by eth1",
        "eth1 has no IPv4 address to send from",
        "output [ff15::2]%eth2:6 is IPv6 but the input is IPv4",
        "eth0 is not Ethernet",
        "eth1 is not Ethernet",
        "eth0 is attached in generic mode, where clones cannot be told apart",
        "frames of eth0's MTU 9000 take several buffers, which cannot be cloned",
    ]
    with pytest.raises(McrError) as caught:
        plan(rule, interfaces)
    assert caught.value.cause == f"rule 'a' cannot take the kernel path: {'; '.join(reasons)}"
    interfaces["eth0"] = replace(interfaces["eth0"], mode="native")
    with pytest.raises(McrError) as caught:
        plan(rule, interfaces)
    cannot = [f"{CANNOT_TRANSMIT.replace('eth1', 'eth2')} (its driver has no XDP transmit)"]
    assert caught.value.cause == (
        f"rule 'a' cannot take the kernel path: {'; '.join([*reasons[:6], reasons[7], *cannot])}"
    )


@pytest.mark.parametrize(("path", "outputs"), [("auto", ["10.20.0.9:6"]), ("worker", [])])
def test_the_worker_path_cannot_tag_and_points_to_the_vlan_interface(
    path: Literal["auto", "worker"], outputs: list[str]
) -> None:
    with pytest.raises(McrError) as caught:
        plan(make("a", "239.1.1.1%eth0:5", "239.2.2.2%eth7:6,vlan=100", *outputs, path=path, line=2), {})
    assert "cannot tag output 239.2.2.2%eth7:6,vlan=100" in caught.value.cause
    assert caught.value.remedy == "remove vlan= and send through the VLAN interface, such as eth7.100"
    assert caught.value.where == "m.toml:2"


def test_a_diff_tells_added_changed_removed_and_unchanged_rules() -> None:
    kept = make("kept", "239.1.1.1%eth0:5", "239.2.2.2%eth1:6", line=1)
    gone = make("gone", "239.1.1.2%eth0:5", "239.2.2.2%eth1:7", line=2)
    before = make("new-ttl", "239.1.1.3%eth0:5", "239.2.2.2%eth1:8", line=3)
    after = make("new-ttl", "239.1.1.3%eth0:5", "239.2.2.2%eth1:8,ttl=9", line=3)
    new = make("new", "239.1.1.4%eth0:5", "239.2.2.2%eth1:9")
    old_rules = {rule.name: rule for rule in (kept, gone, before)}
    new_rules = {rule.name: rule for rule in (new, after, kept)}
    assert diff(old_rules, new_rules) == Diff((new,), (after,), (gone,), (kept,))
    assert diff({}, {}) == Diff((), (), (), ())


def test_a_rule_that_moved_in_its_file_or_became_permanent_is_unchanged() -> None:
    old = Rule("a", parse_stream("239.1.1.1%eth0:5"), (parse_output("10.20.0.9:6"),), "auto", None, True)
    new = make("a", "239.1.1.1%eth0:5", "10.20.0.9:6", line=44)
    found = diff({"a": old}, {"a": new})
    assert found == Diff((), (), (), (new,))
    assert found.unchanged[0].origin == Origin("m.toml", 44)


NEEDY = {"xdp_features": XDP_FEATURE_BASIC}


@pytest.mark.parametrize(
    ("outputs", "interfaces", "needed"),
    [
        ([GROUP], network(), set()),
        ([GROUP], network(eth1=NEEDY), {"eth1"}),
        ([GROUP], network(eth1=NEEDY, eth2=NEEDY), {"eth1"}),
        ([GROUP, "239.2.2.2%eth2:6"], network(eth1=NEEDY, eth2=NEEDY), {"eth1", "eth2"}),
        ([GROUP], network(eth1={**NEEDY, "up": False}), {"eth1"}),
        ([GROUP], network(eth1={**NEEDY, "mtu": 1000}), set()),
        ([GROUP], network(eth1={**NEEDY, "kind": "veth"}), set()),
        ([GROUP], network(eth1={"xdp_features": 0}), set()),
        ([GROUP], network(eth1={"xdp_features": None}), set()),
        ([GROUP], network(eth1={"helper": HELD}), {"eth1"}),
        ([GROUP], network(eth1={**NEEDY, "helper": "it was in vain"}), set()),
        ([GROUP, "10.20.0.9:6"], network(eth1=NEEDY), set()),
        ([GROUP], network(eth0=GENERIC, eth1=NEEDY), set()),
        ([GROUP], network(eth0={"mode": "", "ingress": "packet"}, eth1=NEEDY), set()),
    ],
)
def test_an_egress_interface_gets_a_program_only_where_that_alone_opens_the_kernel_path(
    outputs: list[str], interfaces: dict[str, InterfaceFacts], needed: set[str]
) -> None:
    for path in ("auto", "kernel"):
        if path == "kernel" and interfaces["eth1"].mtu == 1000:
            continue
        rule = make("a", "239.1.1.1%eth0:5", *outputs, path=path)
        assert needs_helper([rule], {"eth0"}, interfaces) == needed
        assert needs_helper([rule], set(), interfaces) == set()
        assert needs_helper([rule], {"eth0", "eth1", "eth2"}, interfaces) == set()
    worker = make("b", "239.1.1.1%eth0:5", *outputs, path="worker")
    assert needs_helper([worker], {"eth0"}, interfaces) == set()
