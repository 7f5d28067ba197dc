"""The kernel path's frames equal what the worker path's sockets send, field by field.

The same frames of the same rules go through either path, and what arrives is captured. All fields must be
equal but these, which are meant to differ and are asserted as such:

- source port: the packet's on the kernel path, that of the output's socket on the worker path;
- IPv4 identification and don't-fragment bit, IPv6 flow label: the packet's, or of the host's stack;
- ECN where the output sets the DSCP: the packet's, or zero;
- no UDP checksum (zero, IPv4): stays so, or the stack makes one.

IPv4 options, IPv6 extension headers, fragments and packets larger than the egress MTU are not here: the
worker path sends a payload, not a packet.
"""

import random
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from mcr.rule import RulePath
from mcr.stream import parse_output
from tests.kernel.packets import DONT_FRAGMENT, IPV4, IPV6, checksum, ethernet, ipv4, ipv6, udp
from tests.netns.flows import config, dropped, stats, wait_until
from tests.netns.lab import Lab, Namespace
from tests.netns.test_kernel_path import Network, fan_out, paths_now, rewrite_config
from tests.netns.wire import Capture, Source, send_all

SEED, RULES, FRAMES = 20250601, 24, 12
GROUP_MAC = {4: bytes.fromhex("01005e02"), 6: bytes.fromhex("33330077")}


@dataclass(frozen=True, slots=True)
class Frame:
    """A captured frame, taken apart; zero_checksum and the fields after it are meant to differ."""

    macs: bytes
    ethertype: int
    source: bytes
    group: bytes
    ttl: int
    dscp: int
    port: int
    payload: bytes
    zero_checksum: bool = False
    ecn: int = 0
    source_port: int = 0
    identification: int = 0
    fragment_field: int = 0
    flow_label: int = 0

    def alike(self) -> "Frame":
        """Only what both paths must agree on."""
        return replace(
            self, zero_checksum=False, ecn=0, source_port=0, identification=0, fragment_field=0, flow_label=0
        )

    def differing(self) -> tuple[int, ...]:
        """Only what the kernel path takes from the packet and the worker path does not."""
        fields = self.zero_checksum, self.ecn, self.source_port, self.identification
        return *fields, self.fragment_field, self.flow_label


def take_apart(frame: bytes) -> Frame:
    """Every checksum is verified on the way."""
    ethertype = int.from_bytes(frame[12:14])
    ip = frame[14:]
    if ethertype == IPV4:
        version, tos, length, identification, fragment_field, ttl, protocol = struct.unpack_from(
            "!BBHHHBB", ip
        )
        assert (version, protocol, checksum(ip[:20])) == (0x45, 17, 0)
        addresses, datagram, flow_label = ip[12:20], ip[20:length], 0
    else:
        assert ethertype == IPV6
        first, length, protocol, ttl = struct.unpack_from("!IHBB", ip)
        assert (first >> 28, protocol) == (6, 17)
        tos, flow_label, identification, fragment_field = first >> 20 & 0xFF, first & 0xFFFFF, 0, 0
        addresses, datagram = ip[8:40], ip[40 : 40 + length]
    source_port, port, udp_length, field_value = struct.unpack_from("!HHHH", datagram)
    assert udp_length == len(datagram)
    if field_value:
        assert checksum(addresses + struct.pack("!HH", udp_length, 17) + datagram) == 0, frame.hex()
    half = len(addresses) // 2
    return Frame(
        frame[:12], ethertype, addresses[:half], addresses[half:], ttl, tos >> 2, port, datagram[8:],
        not field_value, tos & 3, source_port, identification, fragment_field, flow_label,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Given:
    """One rule and the frames that are sent to it."""

    stream: str
    outputs: tuple[str, ...]
    frames: tuple[bytes, ...] = field(repr=False)

    def passing(self, output: str) -> list[Frame]:
        """What an output must send something for."""
        frames = map(take_apart, self.frames)
        return [frame for frame in frames if frame.ttl > 1 or ",ttl=decrement" not in output]


def random_rule(rng: random.Random, number: int, version: int) -> Given:
    group = f"239.1.1.{number}" if version == 4 else f"ff15::1:{number:x}"
    port: int | None = rng.choice((5000, None))
    outputs = tuple(random_output(rng, number, interface, version) for interface in range(rng.choice((1, 2))))
    frames = tuple(random_frame(rng, group, port or rng.randrange(1, 65536)) for _ in range(FRAMES))
    return Given(f"{bracketed(group)}%in0:{port or '*'}", outputs, frames)


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def random_output(rng: random.Random, number: int, interface: int, version: int) -> str:
    group = f"239.2.{number}.{interface}" if version == 4 else f"ff15::77:{number << 8 | interface:x}"
    port = rng.choice(("*", "6000"))
    ttl = rng.choice((f",ttl={rng.randrange(1, 256)}", ",ttl=decrement"))
    dscp = rng.choice(("", f",dscp={rng.randrange(64)}"))
    address = "192.0.2.9" if version == 4 else "[2001:db8::9]"
    source = rng.choice(("", ",source=preserve", f",source={address}"))
    return f"{bracketed(group)}%out{interface}:{port}{ttl}{dscp}{source}"


def random_frame(rng: random.Random, group: str, port: int) -> bytes:
    to = ip_address(group)
    size = rng.choice((0, 1, 17, 188, 1316, rng.randrange(1453)))
    data, tos, ttl = rng.randbytes(size), rng.randrange(256), rng.choice((1, 2, 64, rng.randrange(2, 256)))
    if isinstance(to, IPv4Address):
        source = IPv4Address(f"10.1.0.{rng.randrange(3, 255)}")
        datagram = udp(data, source.packed + to.packed, port=port, with_checksum=rng.random() < 0.7)
        packet = ipv4(
            datagram, source=source, destination=to, tos=tos, ttl=ttl,
            identification=rng.getrandbits(16), fragment_field=rng.choice((0, DONT_FRAGMENT)),
        )  # fmt: skip
        return ethernet(packet, IPV4)
    source6 = IPv6Address(f"fd01::{rng.randrange(3, 65536):x}")
    datagram = udp(data, source6.packed + to.packed, port=port)
    return ethernet(ipv6(datagram, source=source6, destination=to, traffic_class=tos, hop_limit=ttl), IPV6)


def run_path(
    lab: Lab, network: Network, given: Sequence[Given], version: int, path: RulePath
) -> dict[bytes, list[Frame]]:
    """What arrives when all rules take this path: the frames of each group, in order of arrival."""
    rules = tuple((f"r{n}", each.stream, each.outputs) for n, each in enumerate(given))
    rewrite_config(lab, network.relay, config(*rules, path=path))
    assert paths_now(lab, network.relay) == {path}
    captures = [Capture(lab, sink) for sink in network.sinks]
    before = sent_by(lab, network.relay)
    with Source(lab, network.src) as source:
        for each in given:
            send_all(source, each.frames)
    total = sum(len(each.passing(output)) for each in given for output in each.outputs)
    wait_until(lambda: sent_by(lab, network.relay) - before >= total, f"{total} frames sent")
    frames: dict[bytes, list[Frame]] = defaultdict(list)
    for capture in captures:
        with capture:
            for frame in map(take_apart, capture.all_frames(GROUP_MAC[version])):
                frames[frame.group].append(frame)
    assert sum(map(len, frames.values())) == total
    return frames


def sent_by(lab: Lab, relay: Namespace) -> int:
    return sum(row["sent_packets"] for row in stats(lab, relay) if row["object"] == "output")


def without_offloads(lab: Lab, network: Network) -> None:
    """The stack makes whole frames with whole checksums, as a network card would."""
    for number in range(len(network.sinks)):
        lab.run(network.relay, ["ethtool", "-K", f"out{number}", "tx", "off", "gso", "off", "tso", "off"])


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_both_paths_send_the_same_but_for_what_is_meant_to_differ(lab: Lab, version: int, seed: int) -> None:
    rng = random.Random(f"{SEED} {seed} {version}")
    network = fan_out(lab, 2)
    without_offloads(lab, network)
    lab.supervisor(network.relay, config=config())
    given = [random_rule(rng, number, version) for number in range(1, RULES + 1)]
    worker = run_path(lab, network, given, version, "worker")
    kernel = run_path(lab, network, given, version, "kernel")
    for each in given:
        for output in each.outputs:
            group = parse_output(output).address.packed
            assert_agree(each.passing(output), worker[group], kernel[group], parse_output(output).dscp)
    expired = sum(dropped(row).get("ttl_expired", 0) for row in stats(lab, network.relay))
    assert expired == 2 * sum(FRAMES - len(each.passing(text)) for each in given for text in each.outputs) > 0


def assert_agree(given: list[Frame], worker: list[Frame], kernel: list[Frame], dscp: int | None) -> None:
    """dscp: what the output sets, None where it keeps the packet's."""
    for packet, sent, redirected in zip(given, worker, kernel, strict=True):
        assert redirected.alike() == sent.alike()
        assert redirected.payload == packet.payload
        assert redirected.differing() == packet.differing()
        assert (sent.zero_checksum, sent.ecn) == (False, packet.ecn if dscp is None else 0)
    assert len({sent.source_port for sent in worker}) <= 1
