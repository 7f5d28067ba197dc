"""Which rule takes a stream, which ones nearly do, and what is said of a situation: values in, rows out."""

import errno
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, ip_address
from typing import Any

import pytest

from mcr.config import Attachment
from mcr.desired import Ids, RuleState, realise
from mcr.explain import (
    MAX_NEAR_MISSES,
    Ingress,
    Query,
    RefusedJoin,
    Situation,
    Worker,
    differences,
    explain,
    matching,
    near_misses,
)
from mcr.explain_output import OutputSeen
from mcr.maps import DROP_REASONS, OUTPUT_DROP_REASONS, OutputCounts, RuleCounts
from mcr.netlink import Neighbour, Route
from mcr.reasons import OUTPUT_DROPS, RULE_DROPS
from mcr.rule import InterfaceFacts, Rule
from mcr.stream import parse_output, parse_stream
from mcr.vlans import TAKES_TAGS_OUT, Seen, tag_problem

CAM = "239.1.1.1%in0:5000"
OUT = "239.2.2.2%out0:6000"


def facts(name: str, ifindex: int, **changes: Any) -> InterfaceFacts:
    plain = InterfaceFacts(
        name, ifindex, 1500, True, True, f"02:00:00:00:00:{ifindex:02x}",
        ipv4=IPv4Address(f"10.{ifindex}.0.1"), xdp_features=4,
    )  # fmt: skip
    return replace(plain, **changes)


FACTS = {
    "in0": facts("in0", 1, mode="native", ingress="xsk"),
    "in1": facts("in1", 2),
    "out0": facts("out0", 3),
}
ATTACHED = Ingress("native", "xsk", "", (Worker(77, "S"),))


def states(
    *rules: tuple[str, str], outputs: Sequence[str] = (OUT,), interfaces: dict[str, InterfaceFacts] = FACTS
) -> dict[str, RuleState]:
    made = [Rule(name, parse_stream(stream), tuple(map(parse_output, outputs))) for name, stream in rules]
    ids = Ids().assign(made).ids
    return realise(made, {"in0": Attachment("in0")}, interfaces, ids).rules


def rule_counts(received: int = 10, **dropped: int) -> RuleCounts:
    return RuleCounts(received, 0, received, received, 0, dict.fromkeys(DROP_REASONS, 0) | dropped)


def seen(sent: int = 10, last_error: int = 0, route: Route | None = None, **dropped: int) -> OutputSeen:
    counts = OutputCounts(0, sent, 0, dict.fromkeys(OUTPUT_DROP_REASONS, 0) | dropped, last_error)
    return OutputSeen(counts, route)


def situation(rules: dict[str, RuleState], **changes: Any) -> Situation:
    healthy = Situation(
        rules, FACTS, ATTACHED, counts=rule_counts(), silent_s=0.1,
        outputs={output.output_id: seen() for state in rules.values() for output in state.outputs},
    )  # fmt: skip
    return replace(healthy, **changes)


def asked(
    text: str, given: Situation, ttl: int | None = None, size: int | None = None
) -> tuple[str, dict[str, str]]:
    """The verdict, and the remedies by cause."""
    rows = explain(Query(parse_stream(text), ttl, size), given)
    assert rows[0]["object"] == "verdict"
    for row in rows:
        assert all(value is None or isinstance(value, str | int | float) for value in row.values())
        assert "\n" not in row["text"]
    problems = [row for row in rows if row["object"] == "problem"]
    return rows[0]["verdict"], {row["cause"]: row["remedy"] for row in problems}


# --- which rule


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("10.0.0.7@239.1.1.1%in0:5000", "source and port"),
        ("10.0.0.8@239.1.1.1%in0:5000", "port"),
        ("10.0.0.7@239.1.1.1%in0:5001", "source"),
        ("10.0.0.8@239.1.1.1%in0:5001", "any"),
        ("239.1.1.1%in0:5000", "port"),
        ("239.1.1.1%in0:*", "any"),
    ],
)
def test_the_most_specific_rule_takes_a_stream(text: str, name: str) -> None:
    streams = {
        "any": "239.1.1.1%in0:*",
        "source": "10.0.0.7@239.1.1.1%in0:*",
        "port": "239.1.1.1%in0:5000",
        "source and port": "10.0.0.7@239.1.1.1%in0:5000",
    }
    named = states(*((key.replace(" ", "-"), stream) for key, stream in streams.items()))
    assert matching(parse_stream(text), named.values())[0].rule.name == name.replace(" ", "-")


def test_shadowed_rule_is_mentioned() -> None:
    given = situation(states(("wide", "239.1.1.1%in0:*"), ("cam", CAM)))
    rows = explain(Query(parse_stream(CAM)), given)
    (row,) = [row for row in rows if row["object"] == "rule"]
    assert row["rule"] == "cam"
    assert "rule wide matches too, but is less specific" in row["text"]


@pytest.mark.parametrize(
    ("text", "what", "partial"),
    [
        ("239.1.1.1%in0:5001", ["port"], [False]),
        ("239.1.1.1%in0:*", ["port"], [True]),
        ("239.1.1.1%in0:5000,vlan=7", ["VLAN tag"], [False]),
        ("239.1.1.1%in1:5000", ["interface"], [False]),
        ("239.1.1.2%in0:5000", ["group"], [False]),
        ("239.1.1.1%in1:5001,vlan=3.7", ["interface", "VLAN tag", "port"], [False] * 3),
        ("10.0.0.9@239.1.1.1%in0:5000", [], []),
    ],
)
def test_differences_name_everything_that_does_not_match(
    text: str, what: list[str], partial: list[bool]
) -> None:
    found = differences(parse_stream(text), parse_stream(CAM))
    assert [each.what for each in found] == what
    assert [each.partial for each in found] == partial


@pytest.mark.parametrize(
    ("text", "partial"), [("10.0.0.8@239.1.1.1%in0:5000", False), ("239.1.1.1%in0:5000", True)]
)
def test_other_source_is_a_difference(text: str, partial: bool) -> None:
    (found,) = differences(parse_stream(text), parse_stream("10.0.0.7@239.1.1.1%in0:5000"))
    assert (found.what, found.partial) == ("source", partial)


def test_nearest_misses_come_first_and_are_limited() -> None:
    far = [(f"far{number}", f"239.1.1.1%in1:{6000 + number}") for number in range(9)]
    named = states(*far, ("near", "239.1.1.1%in0:5001"), ("other", "239.9.9.9%in0:5000"))
    misses = near_misses(parse_stream(CAM), named.values())
    assert [miss.rule.name for miss in misses][:2] == ["near", "far0"]
    assert len(misses) == MAX_NEAR_MISSES


def test_other_group_is_a_near_miss_only_where_no_rule_has_the_group() -> None:
    named = states(("cam", CAM), ("other", "239.9.9.9%in0:7000"))
    misses = near_misses(parse_stream("239.1.1.9%in0:5000"), named.values())
    assert [miss.rule.name for miss in misses] == ["cam"]


def test_stream_that_no_rule_resembles_gets_the_command_to_add_one() -> None:
    verdict, problems = asked("239.7.7.7%in0:7", situation(states(("cam", CAM)), counts=None))
    assert verdict == "not taken"
    assert problems == {"no rule names 239.7.7.7": "mcr rule add NAME --from 239.7.7.7%in0:7 --to OUTPUT"}


# --- its way in


def test_healthy_stream_has_no_problem() -> None:
    assert asked(CAM, situation(states(("cam", CAM)))) == ("relayed", {})


def test_interface_that_is_not_attached_makes_the_rule_wait() -> None:
    verdict, problems = asked(
        "239.1.1.1%in1:5000", situation(states(("cam", "239.1.1.1%in1:5000")), ingress=None)
    )
    assert verdict == "pending"
    assert problems == {"in1 is not attached": "mcr attach in1"}


def test_absent_interface_is_named() -> None:
    verdict, problems = asked("239.1.1.1%in9:5000", situation(states(("cam", CAM)), ingress=None))
    assert verdict == "not taken"
    assert problems["there is no interface in9"] == "see which there are: ip link"
    assert any("on in0, not on in9" in cause for cause in problems)


def test_other_xdp_program_blocks_the_input() -> None:
    ingress = Ingress("none", "xsk", "another XDP program", (), "intruder (id 5, native)")
    verdict, problems = asked(CAM, situation(states(("cam", CAM)), ingress=ingress))
    assert verdict == "blocked"
    ((cause, remedy),) = problems.items()
    assert cause == "another XDP program is attached to in0: intruder (id 5, native)"
    assert remedy.startswith("ip link set dev in0 xdp off")


@pytest.mark.parametrize(
    ("mode", "ingress", "verdict"), [("native", "xsk", "dropped"), ("none", "packet", "blocked")]
)
def test_absent_worker_drops_with_xdp_and_blocks_without(mode: str, ingress: str, verdict: str) -> None:
    away = Ingress(mode, ingress, "its worker is being restarted: it ended", ())
    rules = states(("cam", CAM), outputs=["10.3.0.2:6000"])
    found, problems = asked(CAM, situation(rules, ingress=away))
    assert found == verdict
    assert list(problems) == ["in0: its worker is being restarted: it ended"]


RESTARTED = "its worker is being restarted: it ended"


@pytest.mark.parametrize(
    ("workers", "verdict", "causes"),
    [
        ([Worker(7, "S", queues="0-1"), Worker(8, "R", queues="2")], "relayed", []),
        (
            [Worker(7, "S", queues="0-1"), Worker(8, "T", queues="2")],
            "partly relayed",
            ["worker 8 of in0, queues 2 is stopped and relays nothing"],
        ),
        (
            [Worker(7, "T", queues="0-1"), Worker(None, reason=RESTARTED, queues="2")],
            "dropped",
            ["worker 7 of in0, queues 0-1 is stopped and relays nothing", f"in0, queues 2: {RESTARTED}"],
        ),
        ([Worker(7, "Z"), Worker(8, "S")], "partly relayed", ["worker 7 of in0 is dead"]),
        ([Worker(7, "T")], "dropped", ["worker 7 of in0 is stopped and relays nothing"]),
    ],
)
def test_each_worker_that_is_away_is_named(workers: list[Worker], verdict: str, causes: list[str]) -> None:
    pending = next((worker.reason for worker in workers if worker.reason), "")
    ingress = Ingress("native", "xsk", pending, tuple(workers))
    rules = states(("cam", CAM), outputs=["10.3.0.2:6000"])
    found, problems = asked(CAM, situation(rules, ingress=ingress))
    assert (found, list(problems)) == (verdict, causes)
    (row,) = [
        row
        for row in explain(Query(parse_stream(CAM)), situation(rules, ingress=ingress))
        if row["object"] == "input"
    ]
    assert row["workers"] == ", ".join(str(worker.pid) for worker in workers if worker.pid)


def test_kernel_path_needs_no_worker() -> None:
    away = Ingress("native", "xsk", "its worker is being restarted: it ended", ())
    assert asked(CAM, situation(states(("cam", CAM)), ingress=away)) == ("relayed", {})


def test_refused_join_of_that_group_alone_is_named() -> None:
    other = RefusedJoin(ip_address("239.1.1.2"), None, "cannot join 239.1.1.2", "raise it")
    mine = RefusedJoin(ip_address("239.1.1.1"), None, "cannot join 239.1.1.1", "raise it")
    verdict, problems = asked(CAM, situation(states(("cam", CAM)), refused=[other, mine]))
    assert (verdict, problems) == ("not joined", {"cannot join 239.1.1.1": "raise it"})


def test_stream_that_never_came_is_told_how_to_look() -> None:
    given = situation(states(("cam", CAM)), counts=rule_counts(0), silent_s=None)
    verdict, problems = asked(CAM, given)
    assert verdict == "relayed"
    assert problems == {
        "no packet of it has come yet": "see what comes and no rule takes: tcpdump -ni in0 udp"
    }


def test_hidden_tags_are_named_where_a_tagged_rule_gets_nothing() -> None:
    tagged = f"{CAM},vlan=7"
    problem = tag_problem(parse_stream(tagged), FACTS["in0"], Seen({TAKES_TAGS_OUT: True}))
    given = situation(states(("cam", tagged)), counts=rule_counts(0), silent_s=None, tags=problem)
    _, problems = asked(tagged, given)
    assert [remedy.partition(",")[0] for remedy in problems.values()] == ["ethtool -K in0 rxvlan off"]


@pytest.mark.parametrize(
    ("size", "mtu", "words"),
    [(1473, 1500, "come in fragments"), (4000, 9000, "more than 3816 bytes"), (1472, 1500, "")],
)
def test_size_that_the_worker_path_cannot_take_is_named(size: int, mtu: int, words: str) -> None:
    interfaces = FACTS | {"in0": replace(FACTS["in0"], mtu=mtu), "out0": replace(FACTS["out0"], mtu=mtu)}
    rules = states(("cam", CAM), outputs=["10.3.0.2:6000"], interfaces=interfaces)
    verdict, problems = asked(CAM, situation(rules, facts=interfaces), size=size)
    assert verdict == ("dropped" if words else "relayed")
    assert [cause for cause in problems if words in cause] == list(problems)


@pytest.mark.parametrize("reason", DROP_REASONS)
def test_every_drop_reason_of_a_rule_has_a_meaning_and_a_remedy(reason: str) -> None:
    given = situation(states(("cam", CAM)), counts=rule_counts(10, **{reason: 3}))
    _, problems = asked(CAM, given)
    meaning, remedy = RULE_DROPS[reason]
    assert problems == {f"dropped 3 so far as {reason}: {meaning}": remedy.replace("IFACE", "in0")}


# --- outputs


@pytest.mark.parametrize("reason", OUTPUT_DROP_REASONS)
def test_every_drop_reason_of_an_output_has_a_meaning_and_a_remedy(reason: str) -> None:
    rules = states(("cam", CAM))
    (output,) = rules["cam"].outputs
    given = situation(rules, outputs={output.output_id: seen(5, errno.EPERM, None, **{reason: 3})})
    verdict, problems = asked(CAM, given)
    assert verdict == "relayed"  # it sends what it can
    ((cause, remedy),) = problems.items()
    assert cause.startswith(f"{OUT}: dropped 3 so far as {reason}: {OUTPUT_DROPS[reason][0]}")
    assert cause.endswith("the last error was EPERM, the firewall dropped it")
    assert remedy


def test_output_that_dropped_everything_does_not_send() -> None:
    rules = states(("cam", CAM), outputs=[OUT, "10.3.0.2:6000"])
    first, second = rules["cam"].outputs
    given = situation(rules, outputs={first.output_id: seen(), second.output_id: seen(0, denied=4)})
    assert asked(CAM, given)[0] == "partly relayed"


@pytest.mark.parametrize(
    ("route", "neighbour", "cause"),
    [
        (Route(error=errno.ENETUNREACH), None, "no route to 10.9.9.9 (ENETUNREACH, no route leads there)"),
        (Route(error=errno.EHOSTUNREACH), None, "no route to 10.9.9.9 (EHOSTUNREACH, "),
        (Route(3, "10.3.0.9"), Neighbour("failed", ""), "next hop 10.3.0.9 does not answer ARP on out0"),
        (Route(3), Neighbour("failed", ""), "next hop 10.9.9.9 does not answer ARP on out0"),
        (Route(3), Neighbour("incomplete", ""), "next hop 10.9.9.9 has not answered ARP on out0"),
        (Route(3), Neighbour("reachable", "02:00:00:00:00:01"), ""),
        (Route(3), None, ""),
    ],
)
def test_way_to_a_unicast_output_is_judged(route: Route, neighbour: Neighbour | None, cause: str) -> None:
    rules = states(("cam", CAM), outputs=["10.9.9.9:6000"])
    (output,) = rules["cam"].outputs
    there = {output.output_id: replace(seen(route=route), neighbour=neighbour)}
    verdict, problems = asked(CAM, situation(rules, outputs=there))
    assert verdict == ("dropped" if cause else "relayed")
    assert [each.startswith(f"10.9.9.9:6000: {cause}") for each in problems] == ([True] if cause else [])


def test_output_interface_that_is_absent_down_or_without_address_is_named() -> None:
    cases = {
        "there is no interface out0": {"in0": FACTS["in0"]},
        "out0 is down": FACTS | {"out0": replace(FACTS["out0"], up=False)},
        "out0 has no IPv4 address to send from": FACTS | {"out0": replace(FACTS["out0"], ipv4=None)},
    }
    for cause, interfaces in cases.items():
        rules = states(("cam", CAM), interfaces=interfaces)
        verdict, problems = asked(CAM, situation(rules, facts=interfaces))
        assert verdict == "dropped"
        assert list(problems) == [f"{OUT}: {cause}"]


@pytest.mark.parametrize(("ttl", "verdict"), [(1, "dropped"), (2, "relayed"), (None, "relayed")])
def test_ttl_is_judged_where_the_output_decrements_it(ttl: int | None, verdict: str) -> None:
    rules = states(("cam", CAM), outputs=[f"{OUT},ttl=decrement"])
    assert asked(CAM, situation(rules), ttl=ttl)[0] == verdict
    assert asked(CAM, situation(states(("cam", CAM))), ttl=ttl)[0] == "relayed"


def test_size_above_the_egress_mtu_leaves_in_fragments_on_the_worker_path() -> None:
    interfaces = FACTS | {"out0": replace(FACTS["out0"], mtu=1000)}
    rules = states(("cam", CAM), interfaces=interfaces)
    rows = explain(Query(parse_stream(CAM), None, 1400), situation(rules, facts=interfaces))
    (output,) = [row for row in rows if row["object"] == "output"]
    assert (rows[0]["verdict"], output["fits"]) == ("relayed", "in 2 fragments")
