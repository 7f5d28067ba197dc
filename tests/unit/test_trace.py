"""Why no rule took a packet, by the rules that come near."""

from dataclasses import replace

from mcr.cli.trace import why_no_rule
from mcr.stream import parse_stream

PACKET = parse_stream("10.1.0.1@239.1.1.1%in0:5000")


def test_rules_of_the_group_are_named_with_every_difference() -> None:
    rows = [
        {"rule": "port", "from": "239.1.1.1%in0:5001"},
        {"rule": "both", "from": "239.1.1.1%in1:5000,vlan=7"},
    ]
    assert why_no_rule(PACKET, rows) == (
        "rule port is at port 5001, not at 5000; "
        "rule both is on in1, not on in0, with VLAN tag 7, not with no VLAN tag"
    )


def test_a_rule_that_would_match_was_not_in_place() -> None:
    rows = [{"rule": "late", "from": "239.1.1.1%in0:5000"}]
    assert why_no_rule(PACKET, rows) == "rule late is pending, or was added later"
    tagged = replace(PACKET, vlan=7)
    assert why_no_rule(tagged, rows) == "rule late is with no VLAN tag, not with VLAN tag 7"


def test_without_a_rule_of_that_group_that_is_the_reason() -> None:
    assert why_no_rule(PACKET, [{"rule": "a", "from": "239.9.9.9%in0:5000"}]) == "no rule names 239.1.1.1"


def test_at_most_three_rules_are_named_each_once() -> None:
    rows = [{"rule": f"r{n // 2}", "from": f"239.1.1.1%in0:{n // 2 + 1}"} for n in range(10)]
    assert why_no_rule(PACKET, rows).count("rule ") == 3
