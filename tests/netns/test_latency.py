"""The relay's own latency against an outside one: the generator's stamps in the same packets' payload.

From outside the way is longer by two veth hops, a microsecond or two. The worker sleeps between batches, so
that waking it is most of either figure.
"""

import pytest

from bench.histogram import Histogram
from bench.streams import Streams
from bench.traffic import Programs, Traffic
from mcr.latency import Latency
from mcr.maps import Maps
from tests.netns.flows import GROUP_IN, config, wait_until
from tests.netns.lab import Lab

AGREEMENT = 0.2
TRIALS = 5


def difference(inside: Latency, outside: Histogram, quantile: float) -> float:
    """As a share of what was seen from outside."""
    return abs((inside.quantile_ns(quantile) or 0) / outside.quantile_ns(quantile) - 1)


@pytest.mark.parametrize("rate_pps", [1_000, 10_000, 50_000])
def test_the_relays_latency_agrees_with_stamps_in_the_payload(lab: Lab, rate_pps: int) -> None:
    topology = lab.topology_relay(gro=True)
    # The sink tells packets apart where they come as packets.
    lab.run(topology.relay, ["ethtool", "-K", "out0", "tx-udp-segmentation", "off"])
    lab.supervisor(
        topology.relay, config=config(("cam", GROUP_IN, ["239.2.2.2%out0:6000,ttl=8"]), path="worker")
    )
    streams, heard = Streams("239.1.1.1", 5000), Streams("239.2.2.2", 6000)
    count = max(500, rate_pps // 10)
    apart: list[float] = []
    with (
        Programs() as programs,
        Traffic(programs, lab, topology.src, topology.dst) as traffic,
        Maps(topology.relay.name) as maps,
    ):
        traffic.expect("eth0", heard, frames=False)
        for _ in range(TRIALS):
            before = maps.rule_latency(1)
            traffic.begin_trial(("eth0",), timed=True)
            traffic.send(("eth0",), streams, count, rate_pps)
            wait_until(lambda: maps.rule_latency(1).count >= before.count + count, "counted", 60)  # noqa: B023
            (arrived,) = traffic.settle(("eth0",), count)
            inside, outside = maps.rule_latency(1).since(before), traffic.latency()
            assert inside.count == outside.packets == arrived.packets == count
            apart.append(max(difference(inside, outside, quantile) for quantile in (0.5, 0.99)))
    assert min(apart) < AGREEMENT, apart
