"""VLAN devices that register a VLAN with a NIC. No NIC here filters VLANs: the test says that one does.

On a kernel without 8021q it sees that this is said, and nothing else.
"""

import asyncio
from collections.abc import Iterator

import pytest

from mcr import ethtool
from mcr.netlink import read_interfaces
from mcr.vlan_devices import VlanDevices
from mcr.vlans import FILTERS, Vlan
from tests.netns.lab import Lab, LabError, Namespace


@pytest.fixture
def relay(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """The thread is in a namespace with in0, which seems to filter VLANs."""
    topology = lab.topology_relay()
    monkeypatch.setattr(ethtool, "features", lambda name: {FILTERS: name == "in0"})
    with lab.inside(topology.relay):
        yield topology.relay


def has_8021q(lab: Lab, relay: Namespace) -> bool:
    try:
        lab.ip(relay, "link add link in0 name probe type vlan id 4000")
    except LabError as error:
        assert "Unknown device type" in str(error) or "not supported" in str(error)
        return False
    lab.ip(relay, "link del probe")
    return True


def test_a_vlan_is_registered_by_a_device_that_stays_down_and_goes_with_the_need(
    lab: Lab, relay: Namespace
) -> None:
    facts = read_interfaces()
    vlan = Vlan(facts["in0"].ifindex, 100)
    name = f"mcr{vlan.ifindex}.100"
    devices = VlanDevices(relay.name)
    asyncio.run(devices.provide({vlan: "in0"}, facts))
    if not has_8021q(lab, relay):
        assert devices.seen(facts["in0"]).refused == {100: "Operation not supported"}
        assert devices.seen(read_interfaces()["out0"]).refused == {}
        assert read_interfaces().keys() == facts.keys()
        return
    made = read_interfaces()[name]
    assert (made.up, made.parent, made.vlan, made.alias) == (False, vlan.ifindex, 100, f"mcr {relay.name}")
    assert "state DOWN" in lab.ip(relay, f"link show {name}")
    for known in (facts, read_interfaces()):
        asyncio.run(devices.provide({vlan: "in0"}, known))
        assert devices.seen(facts["in0"]).refused == {}
    asyncio.run(VlanDevices("another").withdraw({}, read_interfaces()))
    assert name in read_interfaces()
    asyncio.run(VlanDevices(relay.name).withdraw({}, read_interfaces()))  # after a crash, by the alias
    assert read_interfaces().keys() == facts.keys()
    lab.ip(relay, "link add link in0 name mine type vlan id 100")  # the user's: it is enough, and stays
    asyncio.run(devices.provide({vlan: "in0"}, read_interfaces()))
    asyncio.run(devices.withdraw({}, read_interfaces()))
    assert read_interfaces().keys() == facts.keys() | {"mine"}
