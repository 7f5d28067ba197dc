"""What was damaged on its way is not healed: no path passes bytes off as good that a receiver would drop.

A relay that makes new checksums must verify the old ones first (RFC 1812 section 5.2.2: IPv4 header).
"""

from collections import Counter
from collections.abc import Callable

import pytest

from tests.kernel.packets import (
    GROUP,
    GROUP6,
    IPV4,
    IPV6,
    PORT,
    SOURCE6,
    UDP,
    checksum,
    datagram4,
    ethernet,
    ipv4,
    ipv6,
    options,
    udp,
)
from tests.netns.flows import Report, config, dropped, rule_row, stats, wait_until
from tests.netns.lab import Lab
from tests.netns.test_kernel_path import Network, fan_out
from tests.netns.wire import Capture, Source, send_all

PAYLOADS = (b"", b"x", b"seventeen bytes!!", bytes(range(256)) * 5)
ADDRESSES6 = SOURCE6.packed + GROUP6.packed
ETHERNET_BYTES = 14
WAYS = {
    "kernel": ("", "kernel"),
    "native": ('ingress = "xsk"\nmode = "native"', "worker"),
    "generic": ('ingress = "xsk"\nmode = "generic"', "worker"),
    "packet": ('ingress = "packet"', "worker"),
}
# The kernel path updates a UDP checksum: a wrong one stays wrong, and the receiver drops the datagram.
LEAVES_UDP_TO_THE_RECEIVER = ("kernel",)


def sound() -> list[bytes]:
    """Of every kind that must be relayed: with a checksum, an odd length, none, and behind other headers."""
    frames = [datagram4(payload) for payload in PAYLOADS]
    frames += [ethernet(ipv6(udp(payload, ADDRESSES6)), IPV6) for payload in PAYLOADS]
    frames.append(ethernet(ipv4(udp(PAYLOADS[2], with_checksum=False)), IPV4))
    frames.append(datagram4(PAYLOADS[2], ip_options=b"\x01" * 8))
    frames.append(ethernet(ipv6(udp(PAYLOADS[2], ADDRESSES6), extensions=[options(60)]), IPV6))
    return frames


def flip(frame: bytes, at: int) -> bytes:
    """One bit is another one."""
    return frame[:at] + bytes([frame[at] ^ 0x10]) + frame[at + 1 :]


def with_header_checksum(frame: bytes, value: int) -> bytes:
    at = ETHERNET_BYTES + 10
    return frame[:at] + value.to_bytes(2) + frame[at + 2 :]


def bad_headers() -> list[bytes]:
    """IPv4 headers of the stream whose checksum is wrong, in the header or in its options."""
    whole, long = datagram4(PAYLOADS[2]), datagram4(PAYLOADS[2], ip_options=b"\x01" * 8)
    frames = [with_header_checksum(whole, value) for value in (0, 1, 0xFFFF)]
    # Another TTL, identification, TOS or source than the checksum knows; an option that was changed.
    frames += [flip(whole, ETHERNET_BYTES + at) for at in (1, 5, 8, 15)]
    return [*frames, flip(long, ETHERNET_BYTES + 23)]


def bad_datagrams() -> list[bytes]:
    """The first and last byte of what UDP's checksum covers, and the checksum itself."""
    frames = []
    for payload in PAYLOADS[1:]:
        four, six = datagram4(payload), ethernet(ipv6(udp(payload, ADDRESSES6)), IPV6)
        frames += [flip(four, len(four) - 1), flip(six, len(six) - 1)]
        frames += [flip(four, ETHERNET_BYTES + 27), flip(six, ETHERNET_BYTES + 47)]
    return frames


def expired() -> list[bytes]:
    return [datagram4(PAYLOADS[2], ttl=0), ethernet(ipv6(udp(PAYLOADS[2], ADDRESSES6), hop_limit=0), IPV6)]


def network_of(lab: Lab, way: str, more: str = "") -> Network:
    attach, path = WAYS[way]
    network = fan_out(lab, 1)
    lab.run(network.relay, ["ethtool", "-K", "out0", "tx", "off"])  # whole checksums on the wire
    text = config(
        ("four", f"{GROUP}%in0:{PORT}", ["239.2.2.2%out0:6000"]),
        ("six", f"[{GROUP6}]%in0:{PORT}", ["[ff15::77]%out0:6000"]),
        attach=f"{attach}\n{more}",
        path=path,
    )
    lab.supervisor(network.relay, config=text)
    return network


def send(
    lab: Lab,
    network: Network,
    frames: list[bytes],
    put: Callable[[Source, list[bytes]], None] = send_all,
) -> list[bytes]:
    """Sends the frames, returns what has left by the time that each packet and each copy is accounted for."""

    def received() -> int:
        return sum(row["received_packets"] for row in stats(lab, network.relay) if row["object"] == "rule")

    def is_accounted(row: Report) -> bool:
        first, second = ("received", "relayed") if row["object"] == "rule" else ("relayed", "sent")
        return bool(row[f"{first}_packets"] == row[f"{second}_packets"] + sum(dropped(row).values()))

    before = received()
    with Capture(lab, network.sinks[0]) as capture, Source(lab, network.src) as source:
        put(source, frames)
        wait_until(lambda: received() == before + len(frames), f"{len(frames)} packets received", 30)
        wait_until(lambda: all(map(is_accounted, stats(lab, network.relay))), "all accounted for", 30)
        taken = capture.all_frames(b"")
    groups = (b"\x01\x00\x5e\x02", b"\x33\x33\x00\x00\x00\x77")
    return [frame for frame in taken if frame.startswith(groups)]


def dropped_by_rules(lab: Lab, network: Network) -> Counter[str]:
    return sum((Counter(dropped(rule_row(lab, network.relay, rule))) for rule in ("four", "six")), Counter())


def is_valid(frame: bytes) -> bool:
    """Whether a receiver's stack takes it: every checksum that is there is right."""
    ip = frame[ETHERNET_BYTES:]
    if ip[0] >> 4 == 4:
        header = (ip[0] & 15) * 4
        addresses, datagram = ip[12:20], ip[header : int.from_bytes(ip[2:4])]
        if checksum(ip[:header]):
            return False
    else:
        skipped = 0 if ip[6] == UDP else 8 * (ip[41] + 1)
        addresses, datagram = ip[8:40], ip[40 + skipped : 40 + int.from_bytes(ip[4:6])]
    pseudo = addresses + len(datagram).to_bytes(2) + UDP.to_bytes(2)
    return datagram[6:8] == b"\0\0" or checksum(pseudo + datagram) == 0


@pytest.mark.parametrize("way", WAYS)
def test_what_is_whole_is_relayed_whole(lab: Lab, way: str) -> None:
    network = network_of(lab, way)
    left = send(lab, network, sound())
    assert len(left) == len(sound()) and all(map(is_valid, left))
    assert dropped_by_rules(lab, network) == {}


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_header_is_dropped(lab: Lab, way: str) -> None:
    network = network_of(lab, way)
    assert send(lab, network, bad_headers()) == []
    assert dropped_by_rules(lab, network) == {"bad_checksum": len(bad_headers())}


@pytest.mark.parametrize("way", WAYS)
def test_a_packet_whose_time_is_over_is_dropped(lab: Lab, way: str) -> None:
    network = network_of(lab, way)
    assert send(lab, network, expired()) == []
    assert dropped_by_rules(lab, network) == {"ttl_expired": 2}


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_datagram_never_leaves_as_a_good_one(lab: Lab, way: str) -> None:
    network = network_of(lab, way)
    left = send(lab, network, bad_datagrams())
    assert [frame for frame in left if is_valid(frame)] == []
    if way in LEAVES_UDP_TO_THE_RECEIVER:
        assert len(left) == len(bad_datagrams())
    else:
        assert left == []
        assert dropped_by_rules(lab, network) == {"bad_checksum": len(bad_datagrams())}


def test_whoever_trusts_checksums_gets_everything(lab: Lab) -> None:
    network = network_of(lab, "native", 'udp_checksums = "trust"')
    assert len(send(lab, network, bad_datagrams())) == len(bad_datagrams())
    assert dropped_by_rules(lab, network) == {}


@pytest.mark.parametrize("way", WAYS)
def test_a_checksum_that_the_sender_left_to_its_device_is_no_damage(lab: Lab, way: str) -> None:
    network = network_of(lab, way)
    partial = [ethernet(ipv4(udp(payload, partial=True)), IPV4) for payload in PAYLOADS]

    def send_partial(source: Source, frames: list[bytes]) -> None:
        for frame in frames:
            source.send(frame, udp_offset=ETHERNET_BYTES + 20)

    assert len(send(lab, network, partial, send_partial)) == len(partial)
    assert dropped_by_rules(lab, network) == {}
