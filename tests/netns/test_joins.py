"""Joins from end to end: what rules want is on the wire, in the kernel's tables and in what MCR shows."""

import contextlib
import ipaddress
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from tests.netns.flows import GROUP_OUT
from tests.netns.lab import Lab, Namespace

ETH_P_ALL = 3
IGMP, HOP_BY_HOP, ICMPV6 = 2, 0, 58
IGMPV3_REPORT, MLDV2_REPORT = 0x22, 143
TO_INCLUDE, TO_EXCLUDE, ALLOW_NEW, BLOCK_OLD = 3, 4, 5, 6  # RFC 3376 4.2.12, RFC 3810 5.2.12
REPEATED_WITHIN_S = (
    3  # a change is reported several times, each within a second (RFC 3376 8.11, RFC 3810 9.11)
)
Record = tuple[int, str, tuple[str, ...]]

ANY, ONE = "239.1.1.1%in0:5000", "10.1.0.1@232.1.1.1%in0:5000"
ANY6, ONE6 = "[ff3e::1]%in0:5000", "[fd01::1]@[ff3e::2]%in0:5000"
RULES = {"any": ANY, "one": ONE, "any6": ANY6, "one6": ONE6}


def records(frame: bytes) -> list[Record]:
    """The group records of an IGMPv3 or MLDv2 report; none of any other frame."""
    kind, packet = struct.unpack_from("!H", frame, 12)[0], frame[14:]
    if kind == 0x0800 and packet[9] == IGMP:
        report, size = packet[(packet[0] & 15) * 4 :], 4
        if report[0] != IGMPV3_REPORT:
            return []
    elif kind == 0x86DD and packet[6] == HOP_BY_HOP and packet[40] == ICMPV6:
        report, size = packet[40 + 8 * (packet[41] + 1) :], 16
        if report[0] != MLDV2_REPORT:
            return []
    else:
        return []
    found, at = [], 8
    for _ in range(struct.unpack_from("!H", report, 6)[0]):
        change, _, count = struct.unpack_from("!BBH", report, at)
        ends = range(at + 4, at + 4 + size * (count + 1), size)
        group, *sources = (str(ipaddress.ip_address(report[end : end + size])) for end in ends)
        found.append((change, group, tuple(sources)))
        at += 4 + size * (count + 1)
    return found


class Wire:
    """What is reported to an interface: `heard`, in order."""

    def __init__(self, packets: socket.socket) -> None:
        self.packets = packets
        self.heard: list[Record] = []

    def wait_for(self, wanted: set[Record]) -> None:
        """Returns when all of these records have been reported."""
        deadline_s = time.monotonic() + 20
        while missing := wanted - set(self.heard):
            assert time.monotonic() < deadline_s, missing
            self._listen(0.1)

    def settle(self, wanted: set[Record]) -> None:
        """Waits for these records and until the kernel repeats none any more, then forgets them."""
        self.wait_for(wanted)
        count, since_s = len(self.heard), time.monotonic()
        while time.monotonic() < since_s + REPEATED_WITHIN_S:
            self._listen(0.1)
            if len(self.heard) > count:
                count, since_s = len(self.heard), time.monotonic()
        self.forget()

    def _listen(self, timeout_s: float) -> None:
        self.packets.settimeout(timeout_s)
        with contextlib.suppress(TimeoutError):
            self.heard += records(self.packets.recv(65535))

    def forget(self) -> None:
        """Forgets what has been reported so far."""
        self.heard.clear()
        self.packets.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.packets.recv(65535)


@contextlib.contextmanager
def wire(lab: Lab, namespace: Namespace, interface: str = "eth0") -> Iterator[Wire]:
    with lab.inside(namespace), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as packets:
        packets.bind((interface, ETH_P_ALL))
        yield Wire(packets)


def memberships(lab: Lab, namespace: Namespace) -> dict[str, object]:
    (row,) = [row for row in lab.ask(namespace, "status") if row["object"] == "membership"]
    return {key: row[key] for key in ("wanted", "held", "failed")}


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_joins_are_reported_again_after_a_flap_and_taken_back_with_the_last_rule(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config='[[attach]]\ninterface = "in0"\n')
    with wire(lab, topology.src) as reports:
        for name, stream in RULES.items():
            lab.ask(topology.relay, "rule.add", name=name, **{"from": stream, "to": [GROUP_OUT]})
        every = {(TO_EXCLUDE, "239.1.1.1", ()), (TO_EXCLUDE, "ff3e::1", ())}
        source = {(ALLOW_NEW, "232.1.1.1", ("10.1.0.1",)), (ALLOW_NEW, "ff3e::2", ("fd01::1",))}
        reports.wait_for(every | source)
        shown = {(row["group"], row["source"], row["state"]) for row in lab.ask(topology.relay, "joins")}
        assert shown == {
            ("239.1.1.1", None, "joined"), ("232.1.1.1", "10.1.0.1", "joined"),
            ("ff3e::1", None, "joined"), ("ff3e::2", "fd01::1", "joined"),
        }  # fmt: skip
        lab.ip(topology.relay, "link set in0 down")
        reports.forget()
        lab.ip(topology.relay, "link set in0 up")
        reports.wait_for(every | source)
        assert memberships(lab, topology.relay) == {"wanted": 4, "held": 4, "failed": 0}
        lab.ask(topology.relay, "rule.add", name="other", **{"from": "239.1.1.1%in0:5001", "to": [GROUP_OUT]})
        lab.ask(topology.relay, "rule.del", names=["one", "one6", "any6", "any"])
        reports.wait_for(
            {
                (BLOCK_OLD, "232.1.1.1", ("10.1.0.1",)),
                (BLOCK_OLD, "ff3e::2", ("fd01::1",)),
                (TO_INCLUDE, "ff3e::1", ()),
            }
        )
        assert memberships(lab, topology.relay) == {"wanted": 1, "held": 1, "failed": 0}
        lab.ask(topology.relay, "rule.del", names=["other"])
        reports.wait_for({(TO_INCLUDE, "239.1.1.1", ())})
    assert lab.ask(topology.relay, "joins") == []


def test_a_refused_join_is_shown_with_its_sysctl_and_tried_again_by_itself(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.run(topology.relay, ["sysctl", "-qw", "net.ipv4.igmp_max_memberships=0"])
    rules = "".join(
        f'[[rule]]\nname = "{name}"\nfrom = "{stream}"\nto = ["{GROUP_OUT}"]\n'
        for name, stream in (("any", ANY), ("any6", ANY6))
    )
    supervisor = lab.supervisor(topology.relay, config='[[attach]]\ninterface = "in0"\n' + rules)
    assert memberships(lab, topology.relay) == {"wanted": 2, "held": 1, "failed": 1}
    (row,) = [row for row in lab.ask(topology.relay, "status") if row["object"] == "join"]
    assert (row["interface"], row["group"], row["state"]) == ("in0", "239.1.1.1", "refused")
    text = lab.mcr(topology.relay, "status").stdout
    assert "joined 1 of 2 groups, 1 refused (mcr joins):\ncannot join 239.1.1.1 on interface in0: " in text
    assert "  remedy: raise the sysctl net.ipv4.igmp_max_memberships" in text
    assert row["remedy"] in lab.mcr(topology.relay, "joins").stdout
    lab.run(topology.relay, ["sysctl", "-qw", "net.ipv4.igmp_max_memberships=20"])
    until(lambda: memberships(lab, topology.relay) == {"wanted": 2, "held": 2, "failed": 0})
    supervisor.wait_for("joined 1 groups that had been refused")
    assert supervisor.output().count("cannot join") == 1


@pytest.mark.soak
def test_thousands_of_groups_are_joined_and_left_by_a_supervisor(lab: Lab) -> None:
    ipv4, ipv6 = 3000, 1000
    topology = lab.topology_relay()
    groups = [f"239.{n >> 8}.{n & 255}.1" for n in range(ipv4)] + [f"[ff3e::{n + 1:x}]" for n in range(ipv6)]
    text = '[[attach]]\ninterface = "in0"\n' + "".join(
        f'[[rule]]\nname = "r{n}"\nfrom = "{group}%in0:5000"\nto = ["{GROUP_OUT}"]\n'
        for n, group in enumerate(groups)
    )
    supervisor = lab.supervisor(topology.relay, config=text, timeout_s=100)
    count = ipv4 + ipv6
    assert memberships(lab, topology.relay) == {"wanted": count, "held": count, "failed": 0}
    assert {row["state"] for row in lab.ask(topology.relay, "joins")} == {"joined"}
    (link,) = json.loads(lab.ip(topology.relay, "-j maddress show dev in0"))
    held = {entry["address"] for entry in link["maddr"] if "address" in entry}
    assert held >= {group.strip("[]") for group in groups}
    assert len(json.dumps(lab.ask(topology.relay, "status"))) < 10_000
    assert supervisor.terminate() == 0
    assert lab.leftovers(topology.relay) == []
