"""VLAN devices of MCR's own, which register with a NIC the VLANs that rules take streams from.

A NIC that filters VLANs drops the frames of those that no device is for. Such a device of ours stays down: it
carries nothing, so that the host gets no new way into that network. This module must never touch a device
that somebody else made, and creates none where one is there; `vlans.py` decides.
"""

import asyncio
import logging
import os
from collections.abc import Mapping

from pyroute2 import netlink
from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from mcr import ethtool
from mcr.netlink import ask
from mcr.rule import InterfaceFacts
from mcr.vlans import FILTERS, Seen, Vlan, missing

log = logging.getLogger(__name__)


class VlanDevices:
    """The devices of one instance, which are known by their alias."""

    def __init__(self, instance: str) -> None:
        self._alias = f"mcr {instance}"
        self._offloads: dict[str, dict[str, bool]] = {}  # of interfaces that rules with vlan= name
        self._refused: dict[Vlan, str] = {}

    def seen(self, facts: InterfaceFacts) -> Seen:
        """What is known of the tags of an interface."""
        refused = {vlan.tag: why for vlan, why in self._refused.items() if vlan.ifindex == facts.ifindex}
        return Seen(self._offloads.get(facts.name, {}), refused)

    async def provide(self, needed: Mapping[Vlan, str], facts: Mapping[str, InterfaceFacts]) -> None:
        """Registers what is needed and is not."""
        names = set(needed.values())
        if not names and not self._offloads:
            return
        self._offloads = await asyncio.to_thread(lambda: {name: ethtool.features(name) for name in names})
        self._refused = {vlan: why for vlan, why in self._refused.items() if vlan in needed}
        filtering = [name for name, offloads in self._offloads.items() if offloads.get(FILTERS)]
        for vlan in missing(needed, facts, filtering):
            if vlan not in self._refused:
                await asyncio.to_thread(self._create, vlan, needed[vlan])

    async def withdraw(self, needed: Mapping[Vlan, str], facts: Mapping[str, InterfaceFacts]) -> None:
        """Deletes those of ours that are not needed."""
        for device in facts.values():
            if device.alias == self._alias and Vlan(device.parent, device.vlan) not in needed:
                await asyncio.to_thread(self._delete, device)

    def _create(self, vlan: Vlan, parent: str) -> None:
        name = f"mcr{vlan.ifindex}.{vlan.tag}"
        try:
            _create_link(name, vlan)
            _set_alias(name, self._alias)
        except FileExistsError:
            return  # made a moment ago, and not yet among the facts
        except OSError as error:
            self._refused[vlan] = os.strerror(error.errno) if error.errno else str(error)
            words = (parent, vlan.tag, self._refused[vlan])
            log.warning("%s: VLAN %d cannot be registered: %s", *words, extra={"interface": parent})
        else:
            words = (parent, vlan.tag, name)
            log.info("%s: VLAN %d is registered by the device %s", *words, extra={"interface": parent})

    def _delete(self, device: InterfaceFacts) -> None:
        request = ifinfmsg()
        request["index"] = device.ifindex
        try:
            _do(request, rtnl.RTM_DELLINK)
        except OSError as error:
            log.warning("the device %s cannot be deleted: %s", device.name, error)
        else:
            log.info("%s: no rule needs it any more", device.name)


def _create_link(name: str, vlan: Vlan) -> None:
    request = ifinfmsg()
    data = {"attrs": [("IFLA_VLAN_ID", vlan.tag)]}
    info = {"attrs": [("IFLA_INFO_KIND", "vlan"), ("IFLA_INFO_DATA", data)]}
    request["attrs"] = [("IFLA_IFNAME", name), ("IFLA_LINK", vlan.ifindex), ("IFLA_LINKINFO", info)]
    _do(request, rtnl.RTM_NEWLINK, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL)


def _set_alias(name: str, alias: str) -> None:
    request = ifinfmsg()
    request["attrs"] = [("IFLA_IFNAME", name), ("IFLA_IFALIAS", alias)]
    _do(request, rtnl.RTM_NEWLINK)


def _do(request: ifinfmsg, message_type: int, flags: int = 0) -> None:
    """Raises OSError: what the kernel answers, or TimeoutError."""
    next(ask(netlink.NETLINK_ROUTE, request, message_type, flags | netlink.NLM_F_ACK))  # the acknowledgement
