"""Every packet accounted for, exactly: at overload, when workers and links die, when a rule changes its way.

The generator is the benchmark's: whole frames at the XDP hook, faster than any relay, so that packets of all
rules alternate in every batch.
"""

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

import pytest

from bench.streams import Streams
from bench.traffic import Programs, Traffic
from mcr.accounting import ASKED_ROUNDS, Resting, unaccounted
from mcr.maps import Maps
from tests.netns.driven import loaded
from tests.netns.flows import Report, config, dropped, stats, status, wait_until
from tests.netns.lab import Lab, Namespace
from tests.netns.test_kernel_path import Network, fan_out

RULES = ("a", "b", "c")
Rule = tuple[str, str, list[str]]
SOAK = pytest.mark.soak
INGRESSES = {
    "native": 'mode = "native"',
    "generic": 'mode = "generic"',
    "packet": 'ingress = "packet"',
}


@dataclass(slots=True)
class Flood:
    """A generator that sends from a thread of its own."""

    lab: Lab
    source: Namespace
    traffic: Traffic
    streams: Streams
    pool: ThreadPoolExecutor

    def count_at_sink(self, streams: Streams) -> None:
        """From now on, by XDP, which sees frames and the stack's packets alike."""
        self.traffic.expect("eth0", streams, frames=True)
        self.traffic.begin_trial(("eth0",))

    def send(self, count: int, rate_pps: float = 0) -> None:
        """Sends count packets, alternating among the streams."""
        self.traffic.send(("eth0",), self.streams, count, rate_pps)

    def taken(self) -> int:
        """How many packets the relay's end of the veth took: its queue may be full on a busy machine."""
        told = self.lab.run(self.source, ["ethtool", "-S", "eth0"]).stdout
        return sum(int(each) for each in re.findall(r"tx_queue_\d+_xdp_xmit: (\d+)", told))

    @contextmanager
    def meanwhile(self, rate_pps: float) -> Iterator[None]:
        """Traffic for as long as the body runs."""
        ended = Event()

        def keep_sending() -> None:
            while not ended.is_set():
                self.send(int(rate_pps / 10), rate_pps)

        sending = self.pool.submit(keep_sending)
        try:
            yield
        finally:
            ended.set()
            sending.result()


def supervise(lab: Lab, network: Network, wanted: list[Rule], path: str, ingress: str = "native") -> None:
    if ingress != "native":  # without XDP a veth takes the generator's frames only if it has GRO on
        lab.run(network.relay, ["ethtool", "-K", "in0", "gro", "on"])
    lab.supervisor(network.relay, config=config(*wanted, attach=INGRESSES[ingress], path=path))


@contextmanager
def flood(lab: Lab, network: Network, streams: int = 3) -> Iterator[Flood]:
    """Streams to 239.1.0.1, ports 5000 and up, from the source; the sinks are for the caller to attach."""
    wanted = Streams("239.1.0.1", 5000, streams, 200)
    with (
        Programs() as programs,
        Traffic(programs, lab, network.src, network.sinks[0]) as traffic,
        ThreadPoolExecutor(1) as pool,
    ):
        yield Flood(lab, network.src, traffic, wanted, pool)


def rules(*outputs: list[str]) -> list[Rule]:
    """One rule for each port, with these outputs."""
    return [
        (name, f"239.1.0.1%in0:{5000 + number}", list(each))
        for number, (name, each) in enumerate(zip(RULES, outputs, strict=False))
    ]


def one_each() -> list[Rule]:
    return rules(*([f"239.2.0.{number}%out0:600{number}"] for number in range(1, 4)))


def check(lab: Lab, relay: Namespace) -> dict[str, Report]:
    """The rows when every packet is accounted for, by rule; outputs by `rule>output`."""
    done = lab.mcr(relay, "stats", "--check", "-j", check=False)
    assert done.stdout, done.stderr
    rows: list[Report] = json.loads(done.stdout)
    wrong = [row for row in rows if row["unaccounted_packets"]]
    assert (wrong, done.returncode) == ([], 0)
    return {row["rule"] + (f">{row['output']}" if "output" in row else ""): row for row in rows}


def received(rows: dict[str, Report]) -> int:
    return sum(int(rows[name]["received_packets"]) for name in RULES if name in rows)


def outputs_of(rows: dict[str, Report]) -> list[Report]:
    return [row for row in rows.values() if row["object"] == "output"]


def lost_to_rings(row: Report) -> int:
    return int(row["dropped_receive_ring_full"] + row["dropped_fill_ring_empty"])


def lost_to_sockets(lab: Lab, relay: Namespace) -> int:
    row = status(lab, relay)
    return int(row["receive_ring_full"] + row["fill_ring_empty"])


@pytest.mark.parametrize("ingress", ["native", pytest.param("generic", marks=SOAK), "packet"])
def test_overload_of_a_worker_is_accounted_for_by_rule(lab: Lab, ingress: str) -> None:
    network = fan_out(lab, 1)
    many = [[f"239.2.{rule}.{number}%out0:6000" for number in range(1, 7)] for rule in range(3)]
    supervise(lab, network, rules(*many), "worker", ingress)  # six times the work, several times too much
    with flood(lab, network) as source:
        source.send(400_000)
    rows = check(lab, network.relay)
    assert status(lab, network.relay)["worker_restarts"] == 0
    if ingress == "packet":
        return
    assert received(rows) == source.taken()
    lost = sum(lost_to_rings(rows[name]) for name in RULES)
    assert lost > 0 or ingress == "generic", "the worker was not overloaded"
    wait_until(lambda: lost_to_sockets(lab, network.relay) == lost, "a worker that agrees, at its next PING")


@pytest.mark.parametrize("ingress", ["native", pytest.param("packet", marks=SOAK)])
def test_what_a_killed_worker_had_in_hand_is_accounted_for(lab: Lab, ingress: str) -> None:
    network = fan_out(lab, 1)
    supervise(lab, network, one_each(), "worker", ingress)
    with flood(lab, network) as source, source.meanwhile(300_000):
        for restarts in range(2):
            wait_until(lambda: _relays(lab, network.relay), "a worker that relays", 40)
            worker = status(lab, network.relay)["worker_pid"]
            os.kill(worker, signal.SIGSTOP)
            wait_until(lambda: _has_in_hand(lab, network.relay), "packets in the worker's hands", 40)
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda n=restarts: _restarted(lab, network.relay, n + 1), "another worker", 40)  # type: ignore[misc]
    rows = check(lab, network.relay)
    if ingress == "native":
        assert received(rows) == source.taken()
        assert sum(rows[name]["dropped_no_worker"] for name in RULES) > 0
    died = [name for name in rows if rows[name]["dropped_worker_died"]]
    assert died, "no worker died with a packet in hand"


def _restarted(lab: Lab, relay: Namespace, restarts: int) -> bool:
    row = status(lab, relay)
    return bool(row["worker_restarts"] >= restarts and row["worker_pid"])


def _has_in_hand(lab: Lab, relay: Namespace) -> bool:
    """AF_PACKET's are not seen before the worker has read them; what it has in flight then must do."""
    rows = [row for row in stats(lab, relay) if row["object"] == "rule"]
    return any(unaccounted(row) for row in rows) or status(lab, relay)["ingress"] == "packet"


def _relays(lab: Lab, relay: Namespace) -> bool:
    first, second = (sum(int(row["relayed_packets"]) for row in stats(lab, relay)) for _ in range(2))
    return first != second


@pytest.mark.parametrize(
    ("path", "count"),
    [pytest.param("kernel", 1, marks=SOAK), ("kernel", 2), pytest.param("worker", 2, marks=SOAK)],
)
def test_an_egress_link_that_goes_down_under_traffic_is_accounted_for(
    lab: Lab, path: str, count: int
) -> None:
    network = fan_out(lab, count)
    outputs = [f"239.2.0.{number + 1}%out{number}:6000" for number in range(count)]
    supervise(lab, network, rules(outputs, outputs, outputs), path)
    with flood(lab, network) as source, source.meanwhile(90_000):
        wait_until(lambda: stats(lab, network.relay)[0]["relayed_packets"] > 0, "traffic")
        lab.ip(network.relay, "link set out0 down")
        before = stats(lab, network.relay)[0]["received_packets"]
        wait_until(lambda: stats(lab, network.relay)[0]["received_packets"] > before + 1000, "traffic")
        lab.ip(network.relay, "link set out0 up")
        lab.ip(network.sinks[0], "link set eth0 down")
    rows = check(lab, network.relay)
    assert received(rows) == source.taken()
    if path == "worker":
        return  # its sockets know at once
    down = [row for row in rows.values() if row["object"] == "rule" or "%out0" in row["output"]]
    assert sum(sum(dropped(row).values()) for row in down) > 0, "the link was never missed"


def test_rules_with_one_output_and_with_several_share_interfaces(lab: Lab) -> None:
    """Their packets alternate in every bulk: none may take the other kind's way."""
    network = fan_out(lab, 2)
    one, many = ["239.2.0.1%out0:7000"], ["239.2.0.1%out0:7001", "239.2.0.2%out1:7001"]
    supervise(lab, network, rules(one, many), "kernel")
    with flood(lab, network, 2) as source:
        source.count_at_sink(Streams("239.2.0.1", 7000, 2, 200))
        source.send(200_000)
        (arrived,) = source.traffic.settle(("eth0",), source.taken())
    rows = check(lab, network.relay)
    outputs = outputs_of(rows)
    assert received(rows) == source.taken()
    one_sent, many_sent = rows["a"]["received_packets"], rows["b"]["received_packets"]
    assert [row["relayed_packets"] for row in outputs] == [one_sent, many_sent, many_sent]
    assert arrived.packets == sum(row["sent_packets"] for row in outputs if "%out0" in row["output"])


def test_a_rule_that_changes_its_way_under_traffic_stays_accounted_for(lab: Lab) -> None:
    network = fan_out(lab, 2)
    one, other = ["239.2.0.1%out0:7000"], ["239.2.0.2%out1:7000"]
    supervise(lab, network, rules(one), "kernel")
    path = lab.directory / f"{network.relay.name}.toml"
    ways = [
        ("kernel", one + other),
        ("kernel", one),
        ("worker", one),
        ("kernel", other + one),
        ("worker", one),
    ]
    with flood(lab, network, 1) as source:
        source.count_at_sink(Streams("239.2.0.1", 7000, 1, 200))
        with source.meanwhile(50_000):
            for way, outputs in [*ways, ("kernel", one)]:
                path.write_text(config(*rules(outputs), attach=INGRESSES["native"], path=way))
                lab.mcr(network.relay, "reload")
        sent = source.taken()
        (arrived,) = source.traffic.settle(("eth0",), sent)
    rows = check(lab, network.relay)
    rule, output = rows["a"], rows["a>239.2.0.1%out0:7000"]
    assert rule["received_packets"] == sent
    assert rule["relayed_packets"] == output["relayed_packets"]
    assert (arrived.packets, dropped(output)) == (output["sent_packets"], {})
    assert dropped(rule).keys() <= {"receive_ring_full", "fill_ring_empty"}, "more than a busy machine loses"


@SOAK
def test_what_an_egress_device_does_not_take_is_its_outputs_drop(lab: Lab) -> None:
    """A veth holds 256 packets, and here its peer takes them in a thread that waits for a CPU."""
    network = fan_out(lab, 1)
    threaded = "echo 1 > /sys/class/net/eth0/threaded"
    lab.run(network.relay, ["ip", "netns", "exec", network.sinks[0].name, "sh", "-c", threaded])
    supervise(lab, network, one_each(), "kernel")
    with flood(lab, network) as source:
        source.send(600_000)
    rows = check(lab, network.relay)
    assert received(rows) == source.taken()
    lost = sum(row["dropped_device_full"] for row in outputs_of(rows))
    (egress,) = [
        row for row in json.loads(lab.mcr(network.relay, "status", "-j").stdout) if row["object"] == "egress"
    ]
    assert egress["redirect_lost"] == lost > 0


def test_what_an_egress_qdisc_drops_is_its_outputs_drop(lab: Lab) -> None:
    network = fan_out(lab, 1)
    supervise(lab, network, one_each(), "worker")
    shaper = "tc qdisc add dev out0 root tbf rate 40mbit burst 128k limit 256k"
    lab.run(network.relay, shaper.split())
    with flood(lab, network) as source:
        source.send(60_000, 60_000)
    rows = check(lab, network.relay)
    assert received(rows) == source.taken()
    outputs = outputs_of(rows)
    full = sum(row["dropped_socket_full"] for row in outputs)
    assert full > 0
    told = json.loads(lab.run(network.relay, ["tc", "-j", "-s", "qdisc", "show", "dev", "out0"]).stdout)[0]
    assert told["drops"] > 0
    assert (
        sum(row["sent_packets"] for row in outputs) == sum(row["relayed_packets"] for row in outputs) - full
    )


def test_check_names_the_rule_and_the_output_of_a_loss_that_nobody_counted(lab: Lab) -> None:
    network = fan_out(lab, 1)
    supervise(lab, network, one_each(), "worker")
    with flood(lab, network) as source:
        source.send(3_000, 30_000)
    check(lab, network.relay)
    ids = {row["rule"]: row for row in json.loads(lab.mcr(network.relay, "rule", "show", "-j").stdout)}
    with Maps(network.relay.name) as maps:  # the workers, which are idle, have these mapped too
        maps._rule_counters[ids["b"]["rule_id"]].relayed_packets -= 1
        maps._output_counters[ids["c"]["output_id"]].sent_packets -= 1
    done = lab.mcr(network.relay, "stats", "--check", check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "rule b: received 1000, relayed 999, dropped 0: +1 unaccounted for",
        "rule c, output 239.2.0.3%out0:6003: relayed 1000, sent 999, dropped 0: +1 unaccounted for",
    ]


@SOAK
def test_check_says_when_traffic_goes_on(lab: Lab) -> None:
    network = fan_out(lab, 1)
    supervise(lab, network, one_each(), "auto")
    with flood(lab, network) as source, source.meanwhile(6_000):
        wait_until(lambda: stats(lab, network.relay)[0]["relayed_packets"] > 0, "traffic")
        done = lab.mcr(network.relay, "stats", "--check", check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "traffic goes on" in done.stderr


def test_what_a_check_asks_for_is_watched_for_some_rounds_and_what_was_retired_until_it_rests(
    lab: Lab,
) -> None:
    topology = lab.topology_relay()
    with loaded(lab, topology.relay) as maps:
        resting = Resting(maps)
        resting.watch([1])
        resting.watch([2], ASKED_ROUNDS)

        async def rounds(count: int, moving: bool) -> None:
            for _ in range(count):
                for output_id in (1, 2) if moving else ():
                    maps.settle_output(
                        output_id, 1, "link_down"
                    )  # more dropped than relayed: nothing to settle
                await resting.settle()

        def dropped_of_both() -> list[int]:
            return [maps.output_counts(output_id).dropped["link_down"] for output_id in (1, 2)]

        asyncio.run(rounds(ASKED_ROUNDS, moving=True))
        assert list(resting._fan_outs) == [1]
        asyncio.run(rounds(20, moving=True))
        assert list(resting._fan_outs) == [1]
        asyncio.run(rounds(2, moving=False))
        assert list(resting._fan_outs) == []
        assert dropped_of_both() == [ASKED_ROUNDS + 20] * 2
