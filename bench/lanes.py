"""The namespaces and veth pairs that a relay is measured in: one lane for each relay, all alike.

             src                 relay (one for each hop)                      dst
            +------------------+         +--------------------+         +----------------------+
            | generator   toNi0|  veth   | in0           out0 |  veth   | fromNo0         sink |
            |             toNi1|---------| in1           out1 |---------| fromNo1         sink |
            +------------------+         +--------------------+         +----------------------+

With several hops the out0 of each leads to the in0 of the next. Source and sink namespace are shared by all
lanes. This module must never prefer one relay to another in how its lane is set up.
"""

from dataclasses import dataclass
from itertools import pairwise

from bench.streams import SOURCE_ADDRESS
from mcr.errors import McrError
from tests.netns.lab import Lab, Namespace

DIRECT = "direct"


@dataclass(frozen=True, slots=True)
class Setting:
    """What a figure depends on besides the relay.

    inputs: interfaces that converge. hops: relays in a chain. streams: that packets are sent of, in turn.
    rules: installed, at least as many as streams.
    """

    inputs: int = 1
    outputs: int = 1
    hops: int = 1
    streams: int = 1
    rules: int = 1
    payload_bytes: int = 1316

    def __post_init__(self) -> None:
        if min(self.inputs, self.outputs, self.hops, self.streams) < 1 or self.rules < self.streams:
            raise McrError(f"the setting {self} makes no sense", "a rule for each stream, one of all else")
        if self.streams % self.inputs:
            raise McrError(
                f"{self.streams} streams over {self.inputs} inputs", "give each input as many streams"
            )

    @property
    def title(self) -> str:
        """In words, the usual left out."""
        usual = Setting()
        words = [
            f"{self.inputs} inputs" if self.inputs > 1 else "",
            f"{self.outputs} outputs" if self.outputs > 1 else "1 output",
            f"chain of {self.hops}" if self.hops > 1 else "",
            f"{self.streams} streams" if self.streams > 1 else "",
            f"{self.rules} rules" if self.rules > self.streams else "",
            f"{self.payload_bytes} bytes" if self.payload_bytes != usual.payload_bytes else "",
        ]
        return ", ".join(word for word in words if word)


@dataclass(frozen=True, slots=True)
class Node:
    """Where one relay runs: its namespace, the interfaces that streams come in by, those they leave by."""

    namespace: Namespace
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lane:
    """sources: interfaces of the source namespace, one for each input. sinks: of the sink namespace."""

    nodes: tuple[Node, ...]
    sources: tuple[str, ...]
    sinks: tuple[str, ...]


class Ground:
    """The source and the sink namespace of one setting, and the lanes between them."""

    def __init__(self, lab: Lab, setting: Setting) -> None:
        self.lab, self.setting = lab, setting
        self.source, self.sink = self._namespace("src"), self._namespace("dst")
        self._lanes = 0

    def _namespace(self, label: str) -> Namespace:
        """No reverse-path check, and no IPv6: a neighbour's solicitation that another CPU sends in the midst
        of a trial takes the receiving interface's NAPI over to that CPU, for as long as packets come.
        """
        namespace = self.lab.namespace(label)
        settings = ["net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0"]
        settings += ["net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1"]
        self.lab.run(namespace, ["sysctl", "-qw", *settings])
        return namespace

    def direct(self) -> Lane:
        """Generator and sink with nothing between them."""
        self.lab.veth(self.source, DIRECT, self.sink, DIRECT)
        return Lane((), (DIRECT,), (DIRECT,))

    def lane(self) -> Lane:
        """One more lane."""
        number, self._lanes = self._lanes, self._lanes + 1
        namespaces = [self._namespace(f"relay{number}{hop}") for hop in range(self.setting.hops)]
        sources = self._join_sources(number, namespaces[0])
        for hop, (here, following) in enumerate(pairwise(namespaces)):
            self.lab.veth(
                here, "out0", following, "in0",
                addresses_a=(f"10.3.{hop}.1/24",), addresses_b=(f"10.3.{hop}.2/24",),
            )  # fmt: skip
            self._give_napi(following, "in0")
        sinks = self._join_sinks(number, namespaces[-1])
        return Lane(tuple(self._nodes(namespaces)), sources, sinks)

    def _nodes(self, namespaces: list[Namespace]) -> list[Node]:
        first = tuple(f"in{index}" for index in range(self.setting.inputs))
        last = tuple(f"out{index}" for index in range(self.setting.outputs))
        return [
            Node(
                namespace,
                first if hop == 0 else ("in0",),
                last if hop == len(namespaces) - 1 else ("out0",),
            )
            for hop, namespace in enumerate(namespaces)
        ]

    def _join_sources(self, number: int, relay: Namespace) -> tuple[str, ...]:
        sources = tuple(f"to{number}i{index}" for index in range(self.setting.inputs))
        for index, source in enumerate(sources):
            self.lab.veth(
                self.source, source, relay, f"in{index}",
                addresses_a=(f"{SOURCE_ADDRESS}/32",), addresses_b=(f"10.1.{index}.2/24",),
            )  # fmt: skip
            self._give_napi(relay, f"in{index}")
        return sources

    def _join_sinks(self, number: int, relay: Namespace) -> tuple[str, ...]:
        sinks = tuple(f"from{number}o{index}" for index in range(self.setting.outputs))
        for index, sink in enumerate(sinks):
            self.lab.veth(relay, f"out{index}", self.sink, sink, addresses_a=(f"10.2.{index}.1/24",))
            self._give_napi(self.sink, sink)
            # Packets cross the wire one by one: a super-packet must not reach the sink in one piece.
            self.lab.run(relay, ["ethtool", "-K", f"out{index}", "tx-udp-segmentation", "off"])
        return sinks

    def _give_napi(self, namespace: Namespace, interface: str) -> None:
        """GRO gives an interface the NAPI that XDP redirects into it need.

        It is switched on when both ends are up: only then does veth make the other end one that transmits
        redirected frames.
        """
        self.lab.run(namespace, ["ethtool", "-K", interface, "gro", "on"])
