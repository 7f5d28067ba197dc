"""Which rule the XDP program finds for a packet, under every settings word; and counting on every CPU."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest
from mcr._bpf import ffi, lib

from mcr.stream import Address, Stream
from tests.kernel.packets import GROUP, GROUP6, PORT, SOURCE, SOURCE6, datagram4, datagram6
from tests.kernel.relay import Counted, Relay, Verdict

NOTHING = Counted()
ONE = Counted(1, 3)
FRAME = {4: datagram4(b"abc"), 6: datagram6(b"abc")}
# Each lookup's bit of the settings word, in their order: (S,G,port), (*,G,port), (S,G,*), (*,G,*).
BITS = (lib.MCR_HAS_SOURCE_PORT, lib.MCR_HAS_ANY_PORT, lib.MCR_HAS_SOURCE_STAR, lib.MCR_HAS_ANY_STAR)
SUBSETS = [subset for size in range(5) for subset in itertools.combinations(range(4), size)]


def streams(family: int) -> tuple[Stream, ...]:
    """The four inputs that can name the packet, most specific first."""
    group: Address = GROUP if family == 4 else GROUP6
    source: Address = SOURCE if family == 4 else SOURCE6
    exact = Stream(group, PORT, "in0", source)
    any_source, any_port = replace(exact, source=None), replace(exact, port=None)
    return exact, any_source, any_port, replace(any_port, source=None)


def assert_found(relay: Relay, frame: bytes, rule_id: int, rule_ids: tuple[int, ...]) -> None:
    """The packet goes to this rule, which counts it, and to no other; 0 is none."""
    result = relay.run(frame)
    if rule_id:
        assert result.verdict is Verdict.REDIRECT
        assert result.metadata is not None
        assert result.metadata.rule_id == rule_id
    else:
        assert (result.verdict, result.metadata) == (Verdict.PASS, None)
    assert result.frame == frame
    assert {each: relay.counted(each) for each in rule_ids} == {
        each: ONE if each == rule_id else NOTHING for each in rule_ids
    }


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("present", SUBSETS, ids=str)
def test_the_most_specific_rule_whose_lookup_is_on_is_found(
    relay: Relay, present: tuple[int, ...], family: int
) -> None:
    relay.add_socket(0)
    inputs = streams(family)
    rule_ids = tuple(10 + step for step in present)
    for step in present:
        relay.add_rule(10 + step, inputs[step])
    for on in SUBSETS:
        relay.maps.set_lookups(sum(BITS[step] for step in on))
        found = [10 + step for step in present if step in on]
        assert_found(relay, FRAME[family], found[0] if found else 0, rule_ids)
        for rule_id in rule_ids:
            relay.maps.clear_rule(rule_id)


def test_a_rule_that_is_deleted_gives_way_to_the_next(relay: Relay) -> None:
    relay.add_socket(0)
    for rule_id, stream in enumerate(streams(4), start=1):
        relay.add_rule(rule_id, stream)
    remaining: tuple[int, ...] = (1, 2, 3, 4)
    while remaining:
        assert_found(relay, FRAME[4], remaining[0], remaining)
        relay.delete_rule(remaining[0])
        remaining = remaining[1:]
    assert_found(relay, FRAME[4], 0, (1, 2, 3, 4))


def test_a_rule_that_is_replaced_takes_effect_at_once(relay: Relay) -> None:
    relay.add_socket(0)
    stream = streams(4)[1]
    relay.add_rule(1, stream)
    assert_found(relay, FRAME[4], 1, (1, 2))
    relay.add_rule(2, stream)
    relay.maps.clear_rule(1)
    assert_found(relay, FRAME[4], 2, (1, 2))


def test_a_thousand_rules_each_find_their_own_packets(relay: Relay) -> None:
    relay.add_socket(0)
    groups = [IPv4Address(int(GROUP) + number) for number in range(1000)]
    for rule_id, group in enumerate(groups, start=1):
        relay.add_rule(rule_id, Stream(group, PORT, "in0"))
    for rule_id, group in enumerate(groups, start=1):
        metadata = relay.run(datagram4(b"abc", destination=group)).metadata
        assert metadata is not None
        assert metadata.rule_id == rule_id
    assert all(relay.counted(rule_id) == ONE for rule_id in range(1, 1001))


def test_every_byte_of_the_key_tells_streams_apart(relay: Relay) -> None:
    relay.add_socket(0)
    exact = streams(6)[0]
    relay.add_rule(1, exact)
    assert_found(relay, FRAME[6], 1, (1,))
    start = 14 + 8  # of the source in an IPv6 frame; the destination follows
    for position in [*range(start, start + 32), start + 34, start + 35]:
        changed = bytearray(FRAME[6])
        changed[position] ^= 0x01
        assert relay.run(bytes(changed)).verdict is Verdict.PASS
    assert relay.counted(1) == ONE


def test_the_families_do_not_mix(relay: Relay) -> None:
    relay.add_socket(0)
    relay.add_rule(1, streams(4)[1])
    relay.add_rule(2, Stream(IPv6Address("::239.1.1.1"), PORT, "in0"))
    assert_found(relay, FRAME[4], 1, (1, 2))


@contextmanager
def running_on(cpu: int) -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def test_counts_of_every_cpu_are_summed(relay: Relay) -> None:
    relay.add_rule(1, streams(4)[1])
    cpus = sorted(os.sched_getaffinity(0))
    for number, cpu in enumerate(cpus, start=1):
        with running_on(cpu):
            for _ in range(number):
                assert relay.run(FRAME[4]).verdict is Verdict.DROP
            latest = relay.counts(1).last_seen_ns
    total = sum(range(1, len(cpus) + 1))
    assert relay.counted(1) == Counted(total, 3 * total, {"no_worker": total})
    assert relay.counts(1).last_seen_ns == latest
    assert [relay.packets_of_cpu(1)[cpu] for cpu in cpus] == list(range(1, len(cpus) + 1))
    relay.maps.clear_rule(1)
    assert set(relay.packets_of_cpu(1)) == {0}


def test_the_settings_word_carries_the_version_of_the_layout(relay: Relay) -> None:
    relay.add_rule(1, streams(4)[1])
    settings = ffi.new("struct mcr_settings *")
    relay.read("settings", 0, settings)
    assert (settings.abi_version, settings.lookups) == (lib.MCR_ABI_VERSION, lib.MCR_HAS_ANY_PORT)
