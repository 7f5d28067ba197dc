"""From rules and interfaces to what has to be where: specs of both paths, what is pending, and ids."""

import random
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from mcr._bpf import ffi, lib

from mcr.config import Attachment
from mcr.desired import (
    Desired,
    IdPool,
    Ids,
    KernelOutputSpec,
    OutputSpec,
    OutputState,
    Realiser,
    RuleSpec,
    frame_limit,
    frame_size,
    group_mac,
    longest_frame,
    output_flags,
    realise,
    share_cpus,
    share_queues,
)
from mcr.errors import McrError
from mcr.maps import MAX_OUTPUTS, MAX_RULES, rule_key
from mcr.membership import Membership
from mcr.rule import InterfaceFacts, PathChoice, Rule
from mcr.stream import parse_output, parse_stream

XMIT = 4 | 64  # NDO_XMIT and NDO_XMIT_SG of enum netdev_xdp_act
CAM = "239.1.1.1%in0:5000"


def facts(name: str, ifindex: int, number: int, **changes: Any) -> InterfaceFacts:
    plain = InterfaceFacts(
        name, ifindex, 1500, True, True, f"02:00:00:00:00:{number:02x}",
        ipv4=IPv4Address(f"10.{number}.0.1"), ipv6=IPv6Address(f"fd{number:02}::1"),
        ipv6_link=IPv6Address(f"fe80::{number}"), xdp_features=XMIT,
    )  # fmt: skip
    return replace(plain, **changes)


IN0 = facts("in0", 11, 1, mode="native", ingress="xsk")
INTERFACES = {"in0": IN0, "out0": facts("out0", 12, 2), "out1": facts("out1", 13, 3)}
ATTACHED = {"in0": Attachment("in0")}


def make(name: str, stream: str, *outputs: str, path: PathChoice = "auto") -> Rule:
    return Rule(name, parse_stream(stream), tuple(map(parse_output, outputs)), path)


def desire(
    *rules: Rule, interfaces: Mapping[str, InterfaceFacts] = INTERFACES, ids: Ids | None = None
) -> Desired:
    ids = (ids or Ids()).assign(rules).ids
    return realise(rules, ATTACHED, interfaces, ids)


def key(stream: str, ifindex: int = 11) -> bytes:
    return bytes(ffi.buffer(rule_key(parse_stream(stream), ifindex)))


def mapped(address: str) -> bytes:
    """16 bytes, as in relay_abi.h."""
    parsed = ip_address(address)
    return bytes(10) + b"\xff\xff" + parsed.packed if parsed.version == 4 else parsed.packed


@pytest.mark.parametrize(
    ("group", "mac"),
    [
        ("224.0.0.1", "01005e000001"),
        ("239.2.2.2", "01005e020202"),
        ("239.129.2.3", "01005e010203"),
        ("239.255.255.255", "01005e7fffff"),
        ("ff02::1", "333300000001"),
        ("ff15::2:2", "333300020002"),
        ("ff15::89ab:cdef:89ab:cdef", "333389abcdef"),
    ],
)
def test_the_ethernet_address_of_a_group_comes_from_its_low_bits(group: str, mac: str) -> None:
    assert group_mac(ip_address(group)).hex() == mac


def test_each_output_option_that_takes_something_from_the_packet_is_a_flag() -> None:
    flags = {
        "239.2.2.2%out0:6000,dscp=0": 0,
        "239.2.2.2%out0:*,dscp=0": lib.MCR_OUTPUT_KEEP_PORT,
        "239.2.2.2%out0:6000": lib.MCR_OUTPUT_PRESERVE_DSCP,
        "239.2.2.2%out0:6000,dscp=preserve": lib.MCR_OUTPUT_PRESERVE_DSCP,
        "239.2.2.2%out0:6000,dscp=0,ttl=decrement": lib.MCR_OUTPUT_DECREMENT_TTL,
        "239.2.2.2%out0:6000,dscp=0,source=preserve": lib.MCR_OUTPUT_PRESERVE_SOURCE,
        "239.2.2.2%out0:6000,dscp=0,source=10.0.0.9": 0,
        "239.2.2.2%out0:*,ttl=decrement,source=preserve": 15,
    }
    assert {text: output_flags(parse_output(text)) for text in flags} == flags


def test_a_kernel_path_rule_has_its_outputs_in_the_map_and_none_at_the_worker() -> None:
    outputs = ["239.2.2.2%out0:6000,ttl=8,dscp=46", "239.2.2.3%out1:*,ttl=decrement,source=10.0.0.9,vlan=100"]
    desired = desire(make("cam", CAM, *outputs))
    spec = desired.interfaces["in0"]
    assert spec.outputs == {}
    first = KernelOutputSpec(
        output_id=1, ifindex=12, mtu=1500, flags=0, dport=6000, vlan=0, ttl=8, dscp=46,
        mac_destination=bytes.fromhex("01005e020202"), mac_source=bytes.fromhex("020000000002"),
        saddr=mapped("10.2.0.1"), daddr=mapped("239.2.2.2"),
    )  # fmt: skip
    second = KernelOutputSpec(
        output_id=2, ifindex=13, mtu=1500,
        flags=lib.MCR_OUTPUT_KEEP_PORT | lib.MCR_OUTPUT_DECREMENT_TTL | lib.MCR_OUTPUT_PRESERVE_DSCP,
        dport=0, vlan=100, ttl=0, dscp=0,
        mac_destination=bytes.fromhex("01005e020203"), mac_source=bytes.fromhex("020000000003"),
        saddr=mapped("10.0.0.9"), daddr=mapped("239.2.2.3"),
    )  # fmt: skip
    assert spec.rules == {
        1: RuleSpec(1, key(CAM), 1522, kernel=True, generic=False, kernel_outputs=(first, second))
    }
    state = desired.rules["cam"]
    assert (state.path, state.reason, state.pending) == ("kernel", "nothing stands against it", "")
    assert state.outputs == tuple(OutputState(parse_output(text), n) for n, text in enumerate(outputs, 1))
    assert {*first.fields(), "bulk"} == {name for name, _ in ffi.typeof("struct mcr_kernel_output").fields}
    ffi.new("struct mcr_kernel_output *", second.fields())


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("[ff15::2]%out0:6000", "fd02::1"),
        ("[ff02::2]%out0:6000", "fe80::2"),
        ("[ff15::2]%out0:6000,source=[fd99::9]", "fd99::9"),
    ],
)
def test_an_ipv6_output_is_sent_from_an_address_of_its_scope(text: str, source: str) -> None:
    (spec,) = desire(make("cam", "[ff15::1]%in0:5000", text)).interfaces["in0"].rules.values()
    (output,) = spec.kernel_outputs
    assert output.saddr == mapped(source)


def test_a_preserved_source_needs_no_address() -> None:
    interfaces = {**INTERFACES, "out0": replace(INTERFACES["out0"], ipv4=None)}
    rule = make("cam", CAM, "239.2.2.2%out0:6000,source=preserve")
    (spec,) = desire(rule, interfaces=interfaces).interfaces["in0"].rules.values()
    assert (spec.kernel, spec.kernel_outputs[0].saddr) == (True, bytes(16))


def test_a_worker_path_rule_has_its_outputs_at_the_worker_and_none_in_the_map() -> None:
    outputs = ["239.2.2.2%out0:6000", "10.20.0.9:6001", "[ff15::2]%out1:6002"]
    desired = desire(make("cam", CAM, *outputs))
    parsed = [parse_output(text) for text in outputs]
    spec = desired.interfaces["in0"]
    assert spec.outputs == {
        1: OutputSpec(1, parsed[0], 12, 1472),
        2: OutputSpec(2, parsed[1], 0, 65487),
        3: OutputSpec(3, parsed[2], 13, 1452),
    }
    assert spec.rules == {1: RuleSpec(1, key(CAM), 1522, (1, 2, 3))}
    state = desired.rules["cam"]
    assert (state.path, state.pending) == ("worker", "")
    assert state.reason == "output 10.20.0.9:6001 is unicast where a group is needed"


def test_the_kernel_path_takes_longer_frames_than_the_pool_holds() -> None:
    jumbo = {name: replace(interface, mtu=9000) for name, interface in INTERFACES.items()}
    kernel = make("a", CAM, "239.2.2.2%out0:6000")
    worker = make("b", "239.1.1.2%in0:5000", "239.2.2.2%out0:6000", path="worker")
    rules = desire(kernel, worker, interfaces=jumbo).interfaces["in0"].rules
    assert (rules[1].frame_limit, rules[2].frame_limit) == (9022, 4096 - 256 - 24)
    assert rules[1].kernel_outputs[0].mtu == 9000


@pytest.mark.parametrize(
    ("mtu", "longest", "size", "limit"),
    [(1500, 1522, 2048, 1522), (1746, 1768, 2048, 1768), (1747, 1769, 4096, 1769), (9000, 9022, 4096, 3816)],
)
def test_a_frame_of_the_pool_holds_what_the_mtu_allows_up_to_a_page(
    mtu: int, longest: int, size: int, limit: int
) -> None:
    interface = replace(IN0, mtu=mtu)
    assert (longest_frame(interface), frame_size(interface), frame_limit(interface)) == (longest, size, limit)


def test_a_rule_in_generic_mode_says_so() -> None:
    interfaces = {**INTERFACES, "in0": replace(IN0, mode="generic")}
    (spec,) = (
        desire(make("cam", CAM, "239.2.2.2%out0:6000"), interfaces=interfaces)
        .interfaces["in0"]
        .rules.values()
    )
    assert (spec.kernel, spec.generic) == (True, True)


@pytest.mark.parametrize(
    ("stream", "pending"),
    [
        ("239.1.1.1%nosuch0:5000", "there is no interface nosuch0"),
        ("239.1.1.1%out1:5000", "out1 is not attached (mcr attach out1)"),
    ],
)
@pytest.mark.parametrize("path", ["auto", "kernel", "worker"])
def test_a_rule_whose_input_is_absent_or_not_attached_is_pending(
    stream: str, pending: str, path: PathChoice
) -> None:
    desired = desire(make("cam", stream, "239.2.2.2%out0:6000", path=path))
    state = desired.rules["cam"]
    assert (state.pending, [each.pending for each in state.outputs]) == (pending, [pending])
    assert (desired.interfaces["in0"].rules, desired.interfaces["in0"].outputs) == ({}, {})
    assert desired.memberships == frozenset()


@pytest.mark.parametrize("path", ["auto", "kernel", "worker"])
def test_an_output_whose_interface_is_absent_is_left_out_alone(path: PathChoice) -> None:
    rule = make("cam", CAM, "239.2.2.2%out0:6000", "239.2.2.3%nosuch0:6000", path=path)
    desired = desire(rule)
    state = desired.rules["cam"]
    assert (state.pending, [each.pending for each in state.outputs]) == (
        "", ["", "there is no interface nosuch0"],
    )  # fmt: skip
    spec = desired.interfaces["in0"]
    if path == "worker":
        assert (set(spec.outputs), spec.rules[1].output_ids) == ({1}, (1,))
    else:
        assert [output.output_id for output in spec.rules[1].kernel_outputs] == [1]


def test_a_rule_that_insists_on_the_kernel_path_waits_while_it_cannot_take_it() -> None:
    rule = make("cam", CAM, "239.2.2.2%out0:6000", path="kernel")
    interfaces = {**INTERFACES, "out0": replace(INTERFACES["out0"], xdp_features=0)}
    desired = desire(rule, interfaces=interfaces)
    state = desired.rules["cam"]
    assert state.path == "kernel"
    assert state.pending.startswith("rule 'cam' cannot take the kernel path: out0 cannot transmit")
    assert [each.pending for each in state.outputs] == [state.pending]
    assert desired.interfaces["in0"].rules == {}


def test_groups_are_joined_once_with_their_source_and_unicast_is_not() -> None:
    desired = desire(
        make("a", CAM, "239.2.2.2%out0:6000"),
        make("b", "239.1.1.1%in0:5001", "239.2.2.2%out0:6001"),
        make("c", "10.0.0.7@232.1.1.1%in0:5000", "239.2.2.2%out0:6002"),
        make("d", "10.1.0.1%in0:5000", "239.2.2.2%out0:6003"),
    )
    assert desired.memberships == {
        Membership(11, IPv4Address("239.1.1.1"), None),
        Membership(11, IPv4Address("232.1.1.1"), IPv4Address("10.0.0.7")),
    }


def test_what_is_unchanged_keeps_its_ids() -> None:
    ids = Ids()
    kept = make("kept", CAM, "239.2.2.2%out0:6000", "239.2.2.3%out1:6000")
    gone = make("gone", "239.1.1.2%in0:5000", "239.2.2.2%out0:6001")
    first = ids.assign([kept, gone])
    assert (first.new_rules, first.new_outputs) == ([1, 2], [1, 2, 3])
    again = first.ids.assign([kept, gone])
    assert (again.new_rules, again.new_outputs) == ([], [])
    changed = make("kept", CAM, "239.2.2.4%out0:6000", "239.2.2.3%out1:6000")
    new = make("new", "239.1.1.3%in0:5000", "239.2.2.2%out0:6002")
    second = again.ids.assign([changed, new])
    assert (second.new_rules, second.new_outputs) == ([3], [4, 5])
    desired = realise([changed, new], ATTACHED, INTERFACES, second.ids)
    specs = desired.interfaces["in0"].rules
    assert {rule_id: [each.output_id for each in specs[rule_id].kernel_outputs] for rule_id in specs} == {
        1: [4, 2],
        3: [5],
    }


def test_a_rule_that_is_only_renamed_takes_its_ids_along() -> None:
    outputs = ("239.2.2.2%out0:6000", "239.2.2.3%out1:6000")
    before = Ids().assign([make("a", CAM, *outputs), make("b", "239.1.1.2%in0:5000", *outputs)]).ids
    renamed = before.assign([make("c", CAM, *outputs), make("b", "239.1.1.2%in0:5000", *outputs)])
    assert (renamed.new_rules, renamed.new_outputs) == ([], [])
    assert renamed.ids.rules == {"c": 1, "b": 2}
    assert {key[0]: number for key, number in renamed.ids.outputs.items()} == {"c": 2, "b": 4}
    swapped = renamed.ids.assign([make("b", CAM, *outputs), make("c", "239.1.1.2%in0:5000", *outputs)])
    assert swapped.ids.rules == {"c": 1, "b": 2}  # both names are still there: ids follow these


@pytest.mark.parametrize("changed", ["input", "output", "still there"])
def test_a_new_name_with_anything_else_new_has_new_ids(changed: str) -> None:
    old = make("a", CAM, "239.2.2.2%out0:6000")
    stream = "239.1.1.9%in0:5000" if changed != "output" else CAM
    new = make("b", stream, "239.2.2.9%out0:6000" if changed == "output" else "239.2.2.2%out0:6000")
    wanted = [old, new] if changed == "still there" else [new]
    assigned = Ids().assign([old]).ids.assign(wanted)
    assert (assigned.new_rules, assigned.new_outputs) == ([2], [2])


def test_assigning_changes_nothing_of_the_ids_of_before() -> None:
    old, new = make("old", CAM, "239.2.2.2%out0:6000"), make("new", CAM, "239.2.2.3%out0:6000")
    before = Ids().assign([old]).ids
    for _ in range(3):
        after = before.assign([new])
        assert (after.ids.rules, after.new_rules, after.new_outputs) == ({"new": 2}, [2], [2])
        assert (before.rules, list(before.outputs.values())) == ({"old": 1}, [1])
        assert before.assign([old]).new_rules == []
    assert after.ids.assign([new, old]).new_rules == [3]  # the id of a rule that is gone comes last


def many(first: int, count: int, outputs: int = 1, ttl: int = 8) -> list[Rule]:
    return [
        make(f"r{n}", f"239.9.{n >> 8}.{n & 255}%in0:5000", *(
            f"239.2.2.2%out0:{6000 + output},ttl={ttl}" for output in range(outputs)
        ))
        for n in range(first, first + count)
    ]  # fmt: skip


def test_an_id_is_never_given_out_in_the_change_that_frees_it() -> None:
    ids = Ids().assign(many(0, MAX_RULES - 2)).ids
    one_more = ids.assign(many(1, MAX_RULES - 2))
    assert one_more.new_rules == [MAX_RULES - 1]
    with pytest.raises(McrError, match="no number for another rule is left: all 4095 are in use"):
        ids.assign(many(2, MAX_RULES - 2))
    assert one_more.ids.assign(many(2, MAX_RULES - 2)).new_rules == [1]


def test_all_outputs_of_a_full_relay_can_change_at_once() -> None:
    ids = Ids().assign(many(0, 2000, outputs=4)).ids
    changed = ids.assign(many(0, 2000, outputs=4, ttl=9))
    used = list(changed.ids.outputs.values())
    assert len(set(used)) == len(used) == 8000
    fresh = MAX_OUTPUTS - 1 - 8000
    assert sorted(changed.new_outputs) == list(range(8001, 8001 + fresh // 4 * 4))
    for rule in many(0, 2000, outputs=4, ttl=9)[fresh // 4 :]:
        of_rule = {number for key, number in changed.ids.outputs.items() if key[0] == rule.name}
        assert of_rule == {number for key, number in ids.outputs.items() if key[0] == rule.name}
        break  # one tells: looking through all takes long


def test_a_rule_that_changes_its_path_keeps_its_ids() -> None:
    ids = Ids()
    for path in ("kernel", "worker", "kernel"):
        rule = make("cam", CAM, "239.2.2.2%out0:6000", "239.2.2.3%out1:6000", path=path)
        ids = ids.assign([rule]).ids
        state = desire(rule, ids=ids).rules["cam"]
        assert (state.path, state.rule_id, [each.output_id for each in state.outputs]) == (path, 1, [1, 2])


def test_the_id_that_was_freed_the_longest_ago_is_given_out_first() -> None:
    pool = IdPool(4, "rule")
    assert [pool.take(), pool.take()] == [1, 2]
    pool.give(2)
    pool.give(1)
    assert [pool.take(), pool.take(), pool.take()] == [3, 2, 1]


@pytest.mark.parametrize(
    ("queues", "workers", "shares"),
    [
        (1, 1, [[0]]),
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1], [2, 3, 4]]),
        (7, 3, [[0, 1], [2, 3], [4, 5, 6]]),
        (2, 3, [[0], [1]]),
    ],
)
def test_queues_are_shared_out_in_ranges_as_even_as_possible(
    queues: int, workers: int, shares: list[list[int]]
) -> None:
    assert [list(share) for share in share_queues(queues, workers)] == shares


def test_every_queue_has_one_worker_whatever_their_numbers() -> None:
    for queues in range(1, 65):
        for workers in range(1, 65):
            shares = share_queues(queues, workers)
            assert [queue for share in shares for queue in share] == list(range(queues))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_cpus_are_taken_in_turn_across_all_threads() -> None:
    assert share_cpus((), 2, 2) == [(), ()]
    assert share_cpus((3,), 2, 2) == [(3, 3), (3, 3)]
    assert share_cpus((4, 0, 1), 2, 2) == [(4, 0), (1, 4)]


def test_a_realiser_remembers_but_never_what_is_no_longer_so() -> None:
    chance = random.Random(7)
    realiser, ids = Realiser(), Ids()
    texts = ["239.2.0.1%out0:6000", "239.2.0.2%out1:6000", "10.2.0.2:7000", "239.2.0.3%out9:1"]
    for _ in range(300):
        chosen = chance.sample(range(12), 8)
        rules = [
            make(f"r{n}", f"239.1.1.{n}%in{chance.choice('00001')}:5000", *chance.sample(texts, 2))
            for n in chosen
        ]
        interfaces = dict(INTERFACES)
        if chance.random() < 0.3:
            interfaces["out0"] = replace(interfaces["out0"], up=False)
        if chance.random() < 0.2:
            del interfaces["in0"]
        attached = ATTACHED if chance.random() < 0.8 else {}
        ids = ids.assign(rules).ids
        if chance.random() < 0.2:
            continue  # as when something fails between the two
        remembered = realiser.realise(rules, attached, interfaces, ids)
        assert remembered == realise(rules, attached, interfaces, ids)
        again = realiser.realise(rules, attached, interfaces, ids)
        for name, interface in again.interfaces.items():
            for rule_id, spec in interface.rules.items():
                assert spec is remembered.interfaces[name].rules[rule_id]


def test_a_tagged_group_is_joined_on_the_vlans_device_where_one_is_up() -> None:
    rule = make("cam", "10.0.0.7@239.1.1.1%in0:5000,vlan=5", "239.2.2.2%out0:6000")
    device = replace(IN0, name="in0.5", ifindex=20, kind="vlan", parent=11, vlan=5)
    for found, ifindex in (
        ({}, 11),
        ({"in0.5": device}, 20),
        ({"in0.5": replace(device, up=False)}, 11),
        ({"in0.5": replace(device, vlan=6)}, 11),
        ({"in0.5": replace(device, parent=12)}, 11),
    ):
        desired = desire(rule, interfaces=INTERFACES | found)
        group, source = rule.stream.address, rule.stream.source
        assert desired.memberships == {Membership(ifindex, group, source)}
    twice = replace(rule, stream=parse_stream("239.1.1.1%in0:5000,vlan=9.5"))
    (membership,) = desire(twice, interfaces=INTERFACES | {"in0.5": device}).memberships
    assert membership.ifindex == 11
