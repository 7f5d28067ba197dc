"""Which chains can drop what a host sends, from chains and rules as the kernel lists them."""

import pytest

from mcr.firewall import Chain, ChainRule, droppers

OUTPUT = Chain(1, "t", "out", "output", False)
HELPER = Chain(1, "t", "helper", "", False)
INPUT = Chain(1, "t", "in", "", False)


def rule(
    chain: Chain, *, drops: bool = False, accepts: bool = False, certain: bool = False, jumps: str = ""
) -> ChainRule:
    targets = frozenset({jumps} if jumps else ())
    return ChainRule((chain.family, chain.table, chain.name), drops, accepts, certain, targets)


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ([], []),
        ([rule(OUTPUT, accepts=True)], []),
        ([rule(OUTPUT, drops=True)], ["out has a rule that drops"]),
        ([rule(OUTPUT, drops=True, certain=True)], ["out drops all UDP"]),
        (
            [rule(OUTPUT, accepts=True), rule(OUTPUT, drops=True, certain=True)],
            ["out has a rule that drops"],
        ),
        ([rule(HELPER, drops=True)], []),
        ([rule(OUTPUT, jumps="helper"), rule(HELPER, drops=True)], ["helper has a rule that drops"]),
        (
            [rule(OUTPUT, jumps="helper"), rule(HELPER, drops=True, certain=True, jumps="helper")],
            ["helper has a rule that drops"],
        ),
        ([rule(OUTPUT, jumps="gone")], []),
        ([rule(INPUT, drops=True, certain=True)], []),
    ],
)
def test_chains_that_a_sent_packet_reaches_and_that_drop(rules: list[ChainRule], found: list[str]) -> None:
    listed = [str(each) for each in droppers([OUTPUT, HELPER, INPUT], rules)]
    assert listed == [f"table inet t, chain {words}" for words in found]


def test_policy_that_drops_is_certain_only_where_nothing_is_accepted() -> None:
    strict = Chain(2, "t", "out", "output", True)
    assert [each.certain for each in droppers([strict], [])] == [True]
    assert [each.certain for each in droppers([strict], [rule(strict, accepts=True)])] == [False]
