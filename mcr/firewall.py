"""Which nftables rules could drop what this host sends: read from the kernel, in this network namespace.

It only reads, and it does not evaluate: this module must never claim that a rule with conditions meets a
certain packet.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pyroute2 import netlink
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFNL_SUBSYS_NFTABLES,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETRULE,
    nft_chain_msg,
    nft_rule_msg,
)

from mcr.netlink import ask

NETLINK_NETFILTER = 12  # linux/netlink.h
# linux/netfilter.h: the hooks that a packet of this host's own passes, by family
INET_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
NETDEV_FAMILY = 5
INET_HOOKS = {3: "output", 4: "postrouting"}
NETDEV_EGRESS = 1
NF_DROP, NF_ACCEPT = 0, 1
UDP = b"\x11"
# Expressions that only count, log or mark: they narrow nothing.
UNCONDITIONAL = {"immediate", "counter", "log", "reject", "meta", "cmp"}


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain; hook is empty where it is only jumped to. drops: its policy is to drop."""

    family: int
    table: str
    name: str
    hook: str
    drops: bool

    def __str__(self) -> str:
        return f"table {INET_FAMILIES.get(self.family, 'netdev')} {self.table}, chain {self.name}"


@dataclass(frozen=True, slots=True)
class ChainRule:
    """What one rule of a chain can do to a packet. certain: it does so to all UDP."""

    chain: tuple[int, str, str]
    drops: bool
    accepts: bool
    certain: bool
    jumps: frozenset[str]


@dataclass(frozen=True, slots=True)
class Dropper:
    """A chain in the way of what is sent that can drop it. certain: it drops all UDP."""

    chain: Chain
    certain: bool

    def __str__(self) -> str:
        return f"{self.chain} {'drops all UDP' if self.certain else 'has a rule that drops'}"


def droppers(chains: Iterable[Chain], rules: Iterable[ChainRule]) -> list[Dropper]:
    """The chains that can drop what is sent, those that surely do first."""
    by_chain: dict[tuple[int, str, str], list[ChainRule]] = {}
    for rule in rules:
        by_chain.setdefault(rule.chain, []).append(rule)
    known = {(chain.family, chain.table, chain.name): chain for chain in chains}
    found: dict[tuple[int, str, str], bool] = {}
    waiting = [key for key, chain in known.items() if chain.hook]
    seen = set(waiting)
    while waiting:
        key = waiting.pop()
        own = by_chain.get(key, [])
        if (certain := _drops(own, known[key])) is not None:
            # A chain that is only jumped to, or is of one device, does not see everything.
            found[key] = certain and known[key].hook in INET_HOOKS.values()
        jumps = {(key[0], key[1], name) for rule in own for name in rule.jumps}
        fresh = (jumps & known.keys()) - seen
        seen |= fresh
        waiting.extend(fresh)
    listed = [Dropper(known[key], certain) for key, certain in found.items()]
    return sorted(listed, key=lambda dropper: (not dropper.certain, str(dropper)))


def _drops(rules: list[ChainRule], chain: Chain) -> bool | None:
    """Whether a chain drops all UDP (True) or some packets (False); None if it drops nothing."""
    can = False
    for rule in rules:
        if rule.drops and rule.certain:
            return not any(earlier.accepts or earlier.jumps for earlier in rules[: rules.index(rule)])
        can |= rule.drops
    if chain.drops:
        return not any(rule.accepts or rule.jumps for rule in rules)
    return False if can else None


def read_droppers() -> list[Dropper]:
    """The chains of this network namespace that can drop what is sent. Raises OSError: not permitted, or
    no nftables."""
    chains = [chain for message in _dump(nft_chain_msg, NFT_MSG_GETCHAIN) if (chain := _chain(message))]
    rules = [_rule(message) for message in _dump(nft_rule_msg, NFT_MSG_GETRULE)]
    return droppers(chains, rules)


def _dump(kind: type[Any], message_type: int) -> Iterator[Any]:
    request = kind()
    request["nfgen_family"] = 0
    return ask(NETLINK_NETFILTER, request, NFNL_SUBSYS_NFTABLES << 8 | message_type, netlink.NLM_F_DUMP)


def _chain(message: Any) -> Chain | None:
    family = message["nfgen_family"]
    if family not in INET_FAMILIES and family != NETDEV_FAMILY:
        return None
    number = message.get(("NFTA_CHAIN_HOOK", "NFTA_HOOK_HOOKNUM"))
    if family == NETDEV_FAMILY:
        hook = "egress" if number == NETDEV_EGRESS else ""
    else:
        hook = INET_HOOKS.get(number, "")
    drops = bool(hook) and message.get("NFTA_CHAIN_POLICY") == NF_DROP
    return Chain(family, message.get("NFTA_CHAIN_TABLE"), message.get("NFTA_CHAIN_NAME"), hook, drops)


def _rule(message: Any) -> ChainRule:
    expressions = message.get("NFTA_RULE_EXPRESSIONS") or []
    names = [expression.get_attr("NFTA_EXPR_NAME") for expression in expressions]
    verdicts = [verdict for each in expressions if (verdict := _verdict(each)) is not None]
    codes = {verdict.get_attr("NFTA_VERDICT_CODE") for verdict in verdicts}
    targets = {verdict.get_attr("NFTA_VERDICT_CHAIN") for verdict in verdicts} - {None}
    maps = any(map(_is_verdict_map, expressions))
    return ChainRule(
        chain=(message["nfgen_family"], message.get("NFTA_RULE_TABLE"), message.get("NFTA_RULE_CHAIN")),
        # A verdict map, an iptables target: what they do is not looked into.
        drops=maps or "NF_DROP" in codes or "reject" in names or "target" in names,
        accepts=maps or "NF_ACCEPT" in codes,
        certain=set(names) <= UNCONDITIONAL and _only_asks_for_udp(expressions),
        jumps=frozenset(targets),
    )


def _verdict(expression: Any) -> Any:
    if expression.get_attr("NFTA_EXPR_NAME") != "immediate":
        return None
    data = expression.get_attr("NFTA_EXPR_DATA").get_attr("NFTA_IMMEDIATE_DATA")
    return data.get_attr("NFTA_DATA_VERDICT")


def _is_verdict_map(expression: Any) -> bool:
    data = expression.get_attr("NFTA_EXPR_DATA")
    is_lookup = expression.get_attr("NFTA_EXPR_NAME") == "lookup"
    return bool(is_lookup and data.get_attr("NFTA_LOOKUP_DREG") == "NFT_REG_VERDICT")


def _only_asks_for_udp(expressions: Iterable[Any]) -> bool:
    """Whether the only comparison, if there is one, is that of the protocol with UDP."""
    key = ""
    for expression in expressions:
        name, data = expression.get_attr("NFTA_EXPR_NAME"), expression.get_attr("NFTA_EXPR_DATA")
        if name == "meta":
            key = data.get_attr("NFTA_META_KEY")
        elif name == "cmp":
            value = data.get_attr("NFTA_CMP_DATA").get_attr("NFTA_DATA_VALUE")
            equal = data.get_attr("NFTA_CMP_OP") == "NFT_CMP_EQ"
            if key != "NFT_META_L4PROTO" or not equal or value != UDP:
                return False
    return True
