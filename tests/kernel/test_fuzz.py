"""The XDP program and the worker's own parser give the same answer to any frame, however broken.

The core's parser returns its answer. That of the XDP program is drawn out with rules:

- Where the core sees a datagram, a rule with exactly the key that the core read (addresses, tags, port) is
  put in place. Only if XDP reads the same key does that rule count; its counters then tell XDP's drop reason,
  or its metadata tells XDP's offsets.
- Where the core sees a later fragment, its datagram is made known to XDP with the port of such a rule.
- Where the core sees none, a rule for any port and source is put in place for every destination and tags that
  any reading of the frame could give (IPv4 or IPv6, behind up to three tags). If XDP saw a datagram, one of
  them would count it; that these rules do catch datagrams is a test of its own.
"""

import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from mcr._bpf import ffi, lib
from mcr.uring_egress._core import ffi as core_ffi
from mcr.uring_egress._core import lib as core_lib

from mcr.maps import DROP_REASONS
from tests.kernel import packets
from tests.kernel.packets import (
    AUTHENTICATION,
    CUSTOMER_TAG,
    DESTINATION,
    FRAGMENT,
    HOP_BY_HOP,
    IPV4,
    ROUTING,
    SERVICE_TAG,
    UDP,
    datagram4,
    datagram6,
    ethernet,
    ipv4,
    udp,
)
from tests.kernel.relay import Counted, Metadata, Relay, Verdict

SEED = 20250101
EXACT, ANY_READING = 1, 2
OTHER, DATAGRAM, LATER_FRAGMENT = range(3)  # enum mcr_parsed
NO_LIMIT = 1 << 16
SMALLEST_FRAME = 14  # ETH_HLEN, the least that BPF_PROG_TEST_RUN takes and that a driver hands over
MUTATIONS, RANDOM_FRAMES = 20_000, 6_000
ANSWERS = {"passed", "relayed", "fragment", "later_fragment", "truncated", "bad_length"}
HEADERS_BYTES = 140  # a change beyond them reaches no header of the corpus

CHAIN = [
    packets.options(HOP_BY_HOP),
    packets.options(DESTINATION, 1),
    packets.options(ROUTING),
    packets.fragment(),
    packets.authentication(),
    packets.options(DESTINATION),
]
CORPUS = [
    datagram4(b""),
    datagram4(b"payload").ljust(60, b"\0"),
    datagram4(b"payload", ip_options=b"\x01" * 4),
    datagram4(b"payload", ip_options=b"\x01" * 40),
    datagram4(bytes(200), [(CUSTOMER_TAG, 100)]),
    datagram4(b"payload", [(SERVICE_TAG, 200), (CUSTOMER_TAG, 0xE000 | 100)]),
    datagram4(b"payload", [(CUSTOMER_TAG, 0)]),
    datagram4(b"payload", [(CUSTOMER_TAG, 3), (CUSTOMER_TAG, 2), (CUSTOMER_TAG, 1)]),
    datagram4(b"payload", fragment_field=packets.MORE_FRAGMENTS),
    datagram4(b"payload", fragment_field=3),
    ethernet(ipv4(udp(b"payload", length=7)), IPV4),
    ethernet(ipv4(bytes(20), protocol=packets.TCP), IPV4),
    datagram6(b""),
    datagram6(b"payload", tags=[(CUSTOMER_TAG, 100)]),
    datagram6(b"payload", tags=[(SERVICE_TAG, 200), (CUSTOMER_TAG, 100)]),
    datagram6(b"payload", [packets.options(HOP_BY_HOP, 1)]),
    datagram6(b"payload", [packets.fragment(more=True)]),
    datagram6(b"payload", [packets.fragment(1)]),
    datagram6(b"payload", [packets.fragment(more=True), packets.fragment()]),
    datagram6(b"payload", [packets.authentication(0), packets.authentication(4)]),
    datagram6(b"payload", CHAIN),
    datagram6(b"payload", [*CHAIN, packets.options(DESTINATION)]),
]
PROTOCOLS = bytes([HOP_BY_HOP, UDP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION, packets.TCP, packets.ESP])


def core_parse(frame: bytes) -> tuple[int, Any]:
    """What the core's parser finds, and its details."""
    parsed = core_ffi.new("struct mcr_packet *")
    data = core_ffi.new("uint8_t[]", frame)  # its own memory, so that a read beyond it can be noticed
    found = core_lib.mcr_core_parse(data, len(frame), len(frame), 0, parsed)
    assert found in (OTHER, DATAGRAM, LATER_FRAGMENT)
    return found, parsed


def identification(frame: bytes, parsed: Any) -> int:
    """What tells the fragments of a datagram from others (RFC 791, RFC 8200 section 4.5)."""
    if frame[parsed.ip_offset] >> 4 == 4:
        return int.from_bytes(frame[parsed.ip_offset + 4 : parsed.ip_offset + 6])
    return int.from_bytes(frame[parsed.payload_offset - 4 : parsed.payload_offset])


def keys_of_any_reading(frame: bytes) -> Iterator[dict[str, Any]]:
    """Destination and tags, as some reader could find them, right or wrong."""
    padded = frame.ljust(100, b"\0")
    tags = [struct.unpack_from("!H", padded, offset)[0] & 0x0FFF for offset in (14, 18, 22)]
    stacks = {(0, 0), *((tag, 0) for tag in tags), *zip(tags[1:], tags, strict=False), (tags[2], tags[0])}
    destinations = set()
    for ip in (14, 18, 22, 26):
        destinations.add(bytes(10) + b"\xff\xff" + padded[ip + 16 : ip + 20])
        destinations.add(padded[ip + 24 : ip + 40])
    for vlan, vlan_outer in stacks:
        for daddr in destinations:
            yield {"vlan": vlan, "vlan_outer": vlan_outer, "daddr": daddr}


@dataclass
class Comparison:
    """Asks both parsers about frames, and keeps how often they gave which answer."""

    relay: Relay
    answers: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.relay.add_socket(0)
        self.relay.maps.set_lookups(lib.MCR_HAS_SOURCE_PORT | lib.MCR_HAS_ANY_STAR)

    def put_rule(self, rule_id: int, key: dict[str, Any]) -> Any:
        made = ffi.new("struct mcr_rule_key *", {"ifindex": self.relay.ifindex, **key})
        self.relay.maps.set_rule(made, {"rule_id": rule_id, "xsk_base": 0, "frame_limit": NO_LIMIT})
        return made

    def compare(self, frame: bytes) -> None:
        found, parsed = core_parse(frame)
        answer = self._datagram(frame, parsed, found) if found else self._other(frame)
        self.answers[answer] += 1

    def _datagram(self, frame: bytes, parsed: Any, found: int) -> str:
        """XDP reads the same key, and sees the same drop reason or the same offsets."""
        key = parsed.key
        dport = key.dport or packets.PORT
        named = {"vlan": key.vlan, "vlan_outer": key.vlan_outer}
        named |= {"daddr": bytes(key.daddr), "saddr": bytes(key.saddr)}
        made = self.put_rule(EXACT, {"dport": dport, **named})
        if found == LATER_FRAGMENT:
            assert key.dport == 0
            assert self.relay.run(frame).verdict is Verdict.PASS, frame.hex()
            named["identification"] = identification(frame, parsed)
            self.relay.remember_fragment(named, dport)
        result = self.relay.run(frame)
        counted = self.relay.counted(EXACT)
        self.relay.maps.delete_rule(made)
        self.relay.maps.clear_rule(EXACT)
        self.relay.forget_fragments()
        if parsed.drop_reason >= 0:
            reason: str = DROP_REASONS[parsed.drop_reason]
            assert result.verdict is Verdict.DROP, frame.hex()
            assert counted == Counted(1, parsed.payload_length, {reason: 1}), frame.hex()
            return "later_fragment" if (found, reason) == (LATER_FRAGMENT, "fragment") else reason
        expected = Metadata(
            EXACT,
            parsed.payload_offset,
            parsed.payload_length,
            parsed.ip_offset,
            key.dport,
            parsed.ttl,
            parsed.tos,
        )
        assert (result.verdict, result.metadata) == (Verdict.REDIRECT, expected), frame.hex()
        assert counted == Counted(1, parsed.payload_length), frame.hex()
        assert result.frame == frame
        assert parsed.payload_offset + parsed.payload_length <= len(frame)
        return "relayed"

    def _other(self, frame: bytes) -> str:
        """XDP lets the frame pass, although rules wait for whatever it could take it for."""
        result = self.run_with_any_reading(frame)
        assert (result.verdict, result.frame) == (Verdict.PASS, frame), frame.hex()
        return "passed"

    def run_with_any_reading(self, frame: bytes) -> Any:
        keys = [self.put_rule(ANY_READING, key) for key in keys_of_any_reading(frame)]
        try:
            return self.relay.run(frame)
        finally:
            for key in keys:
                self.relay.maps.delete_rule(key)


@pytest.fixture
def comparison(relay: Relay) -> Iterator[Comparison]:
    """At its end the rules for any reading must have counted nothing."""
    made = Comparison(relay)
    yield made
    counted = relay.counted(ANY_READING)
    relay.maps.clear_rule(ANY_READING)
    assert counted == Counted()


def flip_bits(frame: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        frame[rng.randrange(min(len(frame), HEADERS_BYTES))] ^= 1 << rng.randrange(8)


def set_a_byte(frame: bytearray, rng: random.Random) -> None:
    """A value at the edge of something, or a protocol number."""
    value = rng.choice((0, 1, 6, 7, 8, 20, 0x45, 0x60, 0x7F, 0x80, 0xFF, *PROTOCOLS))
    frame[rng.randrange(12, min(len(frame), HEADERS_BYTES))] = value


def set_a_length(frame: bytearray, rng: random.Random) -> None:
    """A 16-bit field near a length of this frame."""
    near = rng.choice((0, 8, 20, 28, 40, len(frame) - 14, len(frame) - 34, len(frame) - 54, len(frame)))
    value = (near + rng.randrange(-2, 3)) & 0xFFFF
    struct.pack_into("!H", frame, rng.randrange(12, min(len(frame), HEADERS_BYTES) - 1), value)


def cut(frame: bytearray, rng: random.Random) -> None:
    del frame[rng.randrange(SMALLEST_FRAME, len(frame) + 1) :]


def insert_bytes(frame: bytearray, rng: random.Random) -> None:
    start = rng.randrange(12, len(frame))
    frame[start:start] = rng.randbytes(rng.choice((1, 2, 4, 8)))


def remove_bytes(frame: bytearray, rng: random.Random) -> None:
    start = rng.randrange(12, len(frame))
    if len(frame) >= SMALLEST_FRAME + 8:
        del frame[start : start + rng.choice((1, 2, 4, 8))]


MUTATORS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip_bits, set_a_byte, set_a_length, cut, insert_bytes, remove_bytes,
)  # fmt: skip


def random_frame(rng: random.Random) -> bytes:
    """Noise behind an Ethernet header that leads the parsers as deep as noise can get."""
    data = bytearray(rng.randbytes(rng.randrange(SMALLEST_FRAME, 200)))
    offset = 12
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        data[offset : offset + 2] = rng.choice((b"\x81\x00", b"\x88\xa8"))
        offset += 4
    if rng.random() < 0.5:
        data[offset : offset + 3] = b"\x08\x00" + bytes([0x40 | rng.randrange(16)])
        data[offset + 8 : offset + 10] = rng.choice((b"\0\0", b"\x20\x00", rng.randbytes(2)))
        data[offset + 11 : offset + 12] = bytes([rng.choice((UDP, UDP, UDP, packets.TCP))])
    else:
        data[offset : offset + 3] = b"\x86\xdd" + bytes([0x60 | rng.randrange(16)])
        for position in (offset + 8, *range(offset + 42, len(data), 8)):
            data[position : position + 1] = bytes([rng.choice(PROTOCOLS)])
            data[position + 1 : position + 2] = b"\0"
    return bytes(data)


def test_every_reading_catches_every_datagram_of_the_corpus(relay: Relay) -> None:
    comparison = Comparison(relay)
    datagrams = [frame for frame in CORPUS if core_parse(frame)[0] == DATAGRAM]
    assert len(datagrams) == len(CORPUS) - 5
    for frame in datagrams:
        assert comparison.run_with_any_reading(frame).verdict is not Verdict.PASS
    assert relay.counted(ANY_READING).packets == len(datagrams)
    relay.maps.clear_rule(ANY_READING)


def test_both_parsers_agree_on_the_corpus_and_every_prefix_of_it(comparison: Comparison) -> None:
    for frame in CORPUS:
        for length in range(len(frame) + 1):
            if length < SMALLEST_FRAME:
                assert core_parse(frame[:length])[0] == OTHER
            else:
                comparison.compare(frame[:length])
    assert set(comparison.answers) == ANSWERS


def test_both_parsers_agree_on_mutated_frames(comparison: Comparison) -> None:
    rng = random.Random(SEED)
    for _ in range(MUTATIONS):
        frame = bytearray(rng.choice(CORPUS))
        for mutate in rng.choices(MUTATORS, k=rng.choice((1, 1, 2, 3))):
            mutate(frame, rng)
        comparison.compare(bytes(frame))
    assert sum(comparison.answers.values()) == MUTATIONS
    for answer in ANSWERS:
        assert comparison.answers[answer] > MUTATIONS // 200, comparison.answers


def test_both_parsers_agree_on_random_frames(comparison: Comparison) -> None:
    rng = random.Random(SEED)
    for _ in range(RANDOM_FRAMES):
        comparison.compare(random_frame(rng))
    assert sum(comparison.answers.values()) == RANDOM_FRAMES
    assert comparison.answers["truncated"] + comparison.answers["bad_length"] > 50, comparison.answers


@pytest.mark.parametrize("size", range(9))
def test_the_core_reads_nothing_beyond_the_captured_bytes(size: int) -> None:
    """The rest of the frame lies there all the same, and must not be looked at."""
    for frame in CORPUS:
        captured = min(len(frame), 34 + size)
        answers = []
        for rest in (frame[captured:], b"\xff" * (len(frame) - captured)):
            parsed = core_ffi.new("struct mcr_packet *")
            data = core_ffi.new("uint8_t[]", frame[:captured] + rest)
            found = core_lib.mcr_core_parse(data, captured, len(frame), 0, parsed)
            answers.append((found, bytes(core_ffi.buffer(parsed)) if found else b""))
        assert answers[0] == answers[1]
