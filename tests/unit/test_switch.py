"""From some rules to others, one map entry at a time: who has each stream at every moment."""

from collections.abc import Iterator
from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st
from mcr._bpf import ffi

from mcr.maps import rule_key
from mcr.rule_maps import precedence as precedence_of_map_key
from mcr.stream import parse_stream
from mcr.switch import plan_switch

Key = tuple[str, int, str]
"""Group, port and source; 0 and "" are any."""
Entries = dict[Key, str]

GROUPS, PORTS, SOURCES = ("g", "h"), (5000, 5001), ("s", "t")
KEYS = st.tuples(st.sampled_from(GROUPS), st.sampled_from((0, *PORTS)), st.sampled_from(("", *SOURCES)))
ENTRIES = st.dictionaries(KEYS, st.sampled_from("abcdef"))
STREAMS = tuple(product(GROUPS, PORTS, SOURCES))


def precedence(key: Key) -> int:
    return 2 * (not key[1]) + (not key[2])


def taken_by(entries: Entries, stream: Key) -> str | None:
    """As the lookups of find_rule in relay_kern.c."""
    group, port, source = stream
    for key in ((group, port, source), (group, port, ""), (group, 0, source), (group, 0, "")):
        if key in entries:
            return entries[key]
    return None


def moments(in_place: Entries, wanted: Entries) -> Iterator[Entries]:
    """The map after each step, beginning with what is in place."""
    entries = dict(in_place)
    yield dict(entries)
    for key, value in plan_switch(in_place, wanted, precedence):
        if value is None:
            del entries[key]
        else:
            entries[key] = value
        yield dict(entries)


@given(ENTRIES, ENTRIES)
def test_the_steps_lead_to_what_is_wanted_and_touch_nothing_else(in_place: Entries, wanted: Entries) -> None:
    *_, last = moments(in_place, wanted)
    assert last == wanted
    changed = {key for key in in_place.keys() | wanted.keys() if in_place.get(key) != wanted.get(key)}
    steps = plan_switch(in_place, wanted, precedence)
    assert len(steps) == len(changed)
    assert {key for key, _ in steps} == changed


@given(ENTRIES, ENTRIES)
def test_a_key_of_before_and_after_is_never_missing(in_place: Entries, wanted: Entries) -> None:
    for entries in moments(in_place, wanted):
        assert in_place.keys() & wanted.keys() <= entries.keys()


@given(ENTRIES, ENTRIES)
def test_each_stream_is_taken_by_its_rule_of_before_or_of_after_and_by_no_other(
    in_place: Entries, wanted: Entries
) -> None:
    """And it changes hands at most once."""
    for stream in STREAMS:
        before, after = taken_by(in_place, stream), taken_by(wanted, stream)
        hands = [taken_by(entries, stream) for entries in moments(in_place, wanted)]
        changes = [hand for last, hand in pairwise(hands) if hand != last]
        assert changes == ([] if before == after else [after])


def test_two_rules_that_swap_their_inputs_are_both_there() -> None:
    first, second = ("g", 5000, ""), ("h", 5000, "")
    assert plan_switch({first: "x", second: "y"}, {first: "y", second: "x"}, precedence) == [
        (first, "y"),
        (second, "x"),
    ]


def test_a_wildcard_is_put_after_and_deleted_before_what_is_more_specific() -> None:
    every, specific = ("g", 0, ""), ("g", 5000, "s")
    rules = {every: "x", specific: "y"}
    assert plan_switch({}, rules, precedence) == [(specific, "y"), (every, "x")]
    assert plan_switch(rules, {}, precedence) == [(every, None), (specific, None)]


def test_the_precedence_of_map_keys_is_the_order_of_the_lookups() -> None:
    streams = (
        "10.0.0.7@239.1.1.1%in0:5000",
        "239.1.1.1%in0:256",
        "10.0.0.7@239.1.1.1%in0:*",
        "[ff15::1]%in0:*",
    )
    keys = [bytes(ffi.buffer(rule_key(parse_stream(text), 9))) for text in streams]
    assert [precedence_of_map_key(key) for key in keys] == [0, 1, 2, 3]
