"""Fragments of a datagram are counted alike by every ingress of the worker path, which relays none."""

import pytest

from tests.kernel.packets import (
    GROUP,
    IPV4,
    IPV6,
    MORE_FRAGMENTS,
    PORT,
    datagram4,
    ethernet,
    fragment,
    ipv4,
    ipv6,
    udp,
)
from tests.netns.flows import config, dropped, rule_row, wait_until
from tests.netns.lab import Lab
from tests.netns.test_damaged import ADDRESSES6, WAYS, network_of
from tests.netns.test_kernel_path import fan_out
from tests.netns.wire import Source, send_all

PAYLOAD = bytes(range(256)) * 16
PART = 1400
PARTS = -(-(len(PAYLOAD) + 8) // PART)


def fragmented(number: int, port: int = PORT) -> list[bytes]:
    """An IPv4 and an IPv6 datagram, in pieces."""
    four, six = udp(PAYLOAD, port=port), udp(PAYLOAD, ADDRESSES6, port=port)
    frames = []
    for at in range(0, len(four), PART):
        more = at + PART < len(four)
        field = at // 8 | (MORE_FRAGMENTS if more else 0)
        frames.append(ethernet(ipv4(four[at : at + PART], identification=number, fragment_field=field), IPV4))
        header = fragment(at // 8, more, identification=number)
        frames.append(ethernet(ipv6(six[at : at + PART], extensions=[header]), IPV6))
    return frames


@pytest.mark.parametrize("way", [way for way in WAYS if way != "kernel"])
def test_every_fragment_of_a_stream_is_counted(lab: Lab, way: str) -> None:
    network = network_of(lab, way)
    with Source(lab, network.src) as source:
        for number in range(1, 11):
            send_all(source, fragmented(number))
        send_all(source, fragmented(20, PORT + 1))  # of nobody
        send_all(source, fragmented(21)[2:])  # its first fragment is missing
        send_all(source, [datagram4(b"whole")])
    wait_until(lambda: rule_row(lab, network.relay, "four")["relayed_packets"] == 1, "the last packet", 30)
    for rule, whole in (("four", 1), ("six", 0)):
        row = rule_row(lab, network.relay, rule)
        assert row["received_packets"] == 10 * PARTS + whole
        assert dropped(row) == {"fragment": 10 * PARTS}


def test_an_identification_that_comes_again_for_another_port_is_not_claimed(lab: Lab) -> None:
    network = fan_out(lab, 1)
    rule = "r", f"{GROUP}%in0:{PORT}", ["239.2.2.2%out0:6000"]
    lab.supervisor(network.relay, config=config(rule, attach='ingress = "packet"'))
    with Source(lab, network.src) as source:
        send_all(source, fragmented(7)[::2])
        send_all(source, fragmented(7, PORT + 1)[::2])
        send_all(source, [datagram4(b"whole")])
    wait_until(lambda: rule_row(lab, network.relay, "r")["relayed_packets"] == 1, "the last packet", 30)
    assert dropped(rule_row(lab, network.relay, "r")) == {"fragment": PARTS}
