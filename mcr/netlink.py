"""Links, their addresses and XDP features in this network namespace, and their events.

The messages are pyroute2's, the sockets are not, because asyncio drives those: these work inside a running
event loop and outside of one, in the network namespace of the calling thread, and outlive an overrun. This
module only reads; it must never change a link, and the monitor must never hold up the event loop while the
kernel is busy with one.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal, Self

from pyroute2 import netlink
from pyroute2.arp import ARPHRD_ETHER
from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool
from pyroute2.netlink import rtnl
from pyroute2.netlink.marshal import Marshal
from pyroute2.netlink.rtnl import ifaddrmsg as ifa
from pyroute2.netlink.rtnl.ifinfmsg import IFF_RUNNING, IFF_UP, ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from mcr.background import cause_of
from mcr.errors import McrError
from mcr.limits import scaled
from mcr.rule import InterfaceFacts
from mcr.stream import Address

EVENT_GROUPS = rtnl.RTMGRP_LINK | rtnl.RTMGRP_IPV4_IFADDR | rtnl.RTMGRP_IPV6_IFADDR
EVENT_BUFFER_BYTES = 1 << 20
RECEIVE_BYTES = 1 << 15  # the largest part that the kernel makes of an answer
REQUEST_TIMEOUT_S = 5.0
DUMP_ATTEMPTS = 10
COALESCE_S = 0.05
RETRY_S = 1.0
EVENT_READS = 64  # from an event socket, before other work of the loop gets its turn
NETDEV_FAMILY, NETDEV_EVENT_GROUP = "netdev", "mgmt"
NETDEV_CMD_DEV_GET = 1  # linux/netdev.h
ETH_P_8021Q = 0x8100  # linux/if_ether.h
UNSEEN = -1  # no message type: of events that all tell of what the facts do not show
ETHTOOL_FAMILY, ETHTOOL_EVENT_GROUP = "ethtool", "monitor"  # linux/ethtool_netlink.h

# By address family: the flags of an address that the kernel does not send from, and of one that it sends from
# only if there is no other, the worse the flag the greater (RFC 6724 section 5).
UNUSABLE = {socket.AF_INET: ifa.IFA_F_SECONDARY, socket.AF_INET6: ifa.IFA_F_TENTATIVE | ifa.IFA_F_DADFAILED}
LAST_RESORT = {socket.AF_INET: 0, socket.AF_INET6: ifa.IFA_F_DEPRECATED | ifa.IFA_F_TEMPORARY}
SCOPE_LINK, SCOPE_HOST = rtnl.rt_scope["link"], rtnl.rt_scope["host"]
NEIGHBOUR_STATES = {  # linux/neighbour.h
    "incomplete": 0x01,
    "reachable": 0x02,
    "stale": 0x04,
    "delay": 0x08,
    "probe": 0x10,
    "failed": 0x20,
    "noarp": 0x40,
    "permanent": 0x80,
}

XdpMode = Literal["native", "generic", "offload"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class XdpProgram:
    """The XDP program on an interface, and how it is attached."""

    mode: XdpMode
    program_id: int


@dataclass(frozen=True, slots=True)
class Route:
    """Where the kernel would send a packet now (RTM_GETROUTE, rtnetlink(7)).

    error: the errno of a send that finds no way, else 0. gateway and source are empty where there is none;
    mtu is the route's own in bytes, 0 where the interface's counts. local: the packet stays on this host.
    """

    ifindex: int = 0
    gateway: str = ""
    source: str = ""
    mtu: int = 0
    local: bool = False
    error: int = 0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """What the kernel knows of a next hop: its state as `ip neigh` writes it, its MAC if it has one."""

    state: str
    mac: str


class _DeviceMessage(netlink.genlmsg):  # type: ignore[misc]
    """NETDEV_CMD_DEV_GET and its answers (linux/netdev.h)."""

    __slots__ = ()
    prefix = "NETDEV_A_DEV_"
    nla_map = (
        ("NETDEV_A_DEV_UNSPEC", "none"),
        ("NETDEV_A_DEV_IFINDEX", "uint32"),
        ("NETDEV_A_DEV_PAD", "none"),
        ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
    )


def ask(protocol: int, request: Any, message_type: int, flags: int = 0) -> Generator[Any, None, None]:
    """The answers to a request (netlink(7)), of the request's class: all of a dump, one of any other.

    One at a time, because each takes much memory. Raises OSError: what the kernel answers, EINTR if something
    changed during the dump; McrError where it cannot be asked, or is silent.
    """
    request["header"].update(type=message_type, flags=netlink.NLM_F_REQUEST | flags)
    request.encode()
    marshal = Marshal()
    marshal.default_message_class, marshal.msg_map = type(request), {netlink.NLMSG_DONE: netlink.nlmsg}
    for part in _parts(protocol, request.data):
        for message in marshal.parse(part):
            header = message["header"]
            if header["error"] is not None:
                raise OSError(getattr(header["error"], "code", errno.EBADMSG), str(header["error"]))
            if header["flags"] & netlink.NLM_F_DUMP_INTR:
                raise InterruptedError(errno.EINTR, "something changed while it was listed")
            if header["type"] == netlink.NLMSG_DONE:
                return
            yield message
            if not flags & netlink.NLM_F_DUMP:
                return


def _parts(protocol: int, request: bytes) -> Iterator[bytes]:
    """What the kernel answers, without end. Raises McrError where it cannot be asked, or is silent."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as kernel:
            kernel.settimeout(scaled(REQUEST_TIMEOUT_S))
            kernel.send(request)
            while True:
                yield kernel.recv(RECEIVE_BYTES)
    except OSError as error:
        raise _not_answered(error) from error


def _not_answered(error: OSError) -> McrError:
    cause = f"cannot ask the kernel for its links: {error.strerror or error}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return McrError(cause, "raise the limit of open files (ulimit -n, LimitNOFILE=, fs.file-max)")
    return McrError(cause, "see whether the kernel's log says more: dmesg")


def read_link(name: str) -> Any:
    """The kernel's own description of an interface (RTM_NEWLINK). Raises McrError, also if there is none."""
    request = ifinfmsg()
    request["attrs"] = [("IFLA_IFNAME", os.fsencode(name))]
    try:
        (answer,) = ask(netlink.NETLINK_ROUTE, request, rtnl.RTM_GETLINK)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EINVAL, errno.ERANGE):
            raise McrError(f"there is no interface {name}", "see which there are: ip link") from None
        raise _not_answered(error) from error
    return answer


def _family(name: str, event_group: str) -> tuple[int, int] | None:
    """The message type and the event group of a generic netlink family; None if the kernel has no such."""
    request = netlink.ctrlmsg()
    request.update(cmd=netlink.CTRL_CMD_GETFAMILY, attrs=[("CTRL_ATTR_FAMILY_NAME", name)])
    try:
        (family,) = ask(netlink.NETLINK_GENERIC, request, netlink.GENL_ID_CTRL)
    except FileNotFoundError:
        return None
    groups = {
        group.get_attr("CTRL_ATTR_MCAST_GRP_NAME"): group.get_attr("CTRL_ATTR_MCAST_GRP_ID")
        for group in family.get_attr("CTRL_ATTR_MCAST_GROUPS")
    }
    return family.get_attr("CTRL_ATTR_FAMILY_ID"), groups[event_group]


def _xdp_features() -> dict[int, int]:
    """The XDP features by interface index; empty if the kernel does not tell them, before Linux 6.3."""
    if (family := _family(NETDEV_FAMILY, NETDEV_EVENT_GROUP)) is None:
        return {}
    request = _DeviceMessage()
    request["cmd"] = NETDEV_CMD_DEV_GET
    devices = ask(netlink.NETLINK_GENERIC, request, family[0], netlink.NLM_F_DUMP)
    return {device.get("ifindex"): device.get("xdp_features") for device in devices}


def xdp_features(ifindex: int) -> int | None:
    """The XDP features of one interface as they are now; None where the kernel does not tell."""
    with contextlib.suppress(OSError):
        return _xdp_features().get(ifindex)
    return None


def _addresses() -> dict[int, dict[str, Any]]:
    """The primary addresses by interface index, then by their names in InterfaceFacts.

    Those that the kernel chooses for a socket that sends to a group: the first in its order of those with the
    widest scope.
    """
    found: list[tuple[int, int, str, int, str]] = []
    for address in ask(netlink.NETLINK_ROUTE, ifa.ifaddrmsg(), rtnl.RTM_GETADDR, netlink.NLM_F_DUMP):
        family, scope, flags = address["family"], address["scope"], address.get_attr("IFA_FLAGS")
        if family not in UNUSABLE or scope >= SCOPE_HOST or flags & UNUSABLE[family]:
            continue
        kind = "ipv4" if family == socket.AF_INET else "ipv6_link" if scope == SCOPE_LINK else "ipv6"
        own = address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")  # or, if it has one, its peer
        found.append((scope, flags & LAST_RESORT[family], kind, address["index"], own))
    primary: dict[int, dict[str, Any]] = {}
    for _, _, kind, ifindex, own in sorted(found, key=lambda each: each[:2]):
        primary.setdefault(ifindex, {}).setdefault(kind, ip_address(own))
    return primary


def _facts(link: Any, addresses: dict[int, dict[str, Any]], xdp_features: dict[int, int]) -> InterfaceFacts:
    ethernet = link["ifi_type"] == ARPHRD_ETHER
    parent, vlan = _vlan(link)
    return InterfaceFacts(
        name=os.fsdecode(link.get("ifname")),  # pyroute2 leaves what is not UTF-8 as bytes
        ifindex=link["index"],
        mtu=link.get("mtu"),
        up=link["flags"] & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING,
        ethernet=ethernet,
        mac=link.get("address") if ethernet else "",
        xdp_features=xdp_features.get(link["index"]),
        kind=link.get(("linkinfo", "kind")) or "",
        parent=parent,
        vlan=vlan,
        alias=link.get("ifalias") or "",
        **addresses.get(link["index"], {}),
    )


def _vlan(link: Any) -> tuple[int, int]:
    """Of a VLAN device whose tags are 802.1Q's: its parent's index and its tag; else 0 and 0."""
    if link.get(("linkinfo", "kind")) != "vlan" or link.get("link_netnsid") is not None:
        return 0, 0
    data = link.get(("linkinfo", "data"))
    if data.get_attr("IFLA_VLAN_PROTOCOL") != ETH_P_8021Q:
        return 0, 0
    return link.get("link"), data.get_attr("IFLA_VLAN_ID")


def read_interfaces() -> dict[str, InterfaceFacts]:
    """Every interface of this network namespace, by its name.

    `up` means that it is set up and can carry packets (IFF_UP and IFF_RUNNING, netdevice(7)); what MCR did
    with an interface, `mode` and `ingress`, is not told. Blocks while the kernel changes a link. Raises
    McrError if the kernel does not answer, or has no rest.
    """
    try:
        return _read_interfaces()
    except OSError as error:
        raise _not_answered(error) from error


def _read_interfaces() -> dict[str, InterfaceFacts]:
    for _ in range(DUMP_ATTEMPTS):
        with contextlib.suppress(InterruptedError):
            addresses, xdp_features = _addresses(), _xdp_features()
            links = ask(netlink.NETLINK_ROUTE, ifinfmsg(), rtnl.RTM_GETLINK, netlink.NLM_F_DUMP)
            found = (_facts(link, addresses, xdp_features) for link in links)
            return {facts.name: facts for facts in found}
    raise OSError(errno.EINTR, f"the links changed during each of {DUMP_ATTEMPTS} attempts to list them")


def receive_queues(name: str) -> int:
    """How many receive queues the interface uses now, at least 1.

    From ethtool's channels (ETHTOOL_GCHANNELS, linux/ethtool.h); where the driver does not tell them, as many
    as the interface was made with (IFLA_NUM_RX_QUEUES). Raises McrError if there is no such interface, or if
    the driver cannot be asked now.
    """
    link = read_link(name)
    try:
        with contextlib.closing(IoctlEthtool(name)) as ethtool:
            channels = ethtool.get_channels()
    except (EthtoolError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise _not_answered(error) from error
    else:
        if queues := int(channels.rx_count + channels.combined_count):
            return queues
    return max(1, int(link.get("num_rx_queues")))


def is_veth(name: str) -> bool:
    """Whether the interface is one end of a veth pair. Raises McrError if there is no such interface."""
    return bool(read_link(name).get(("IFLA_LINKINFO", "IFLA_INFO_KIND")) == "veth")


def xdp_program(name: str) -> XdpProgram | None:
    """The XDP program on an interface, None if there is none; of several, the one that the driver runs.

    Raises McrError if there is no such interface.
    """
    link = read_link(name)
    attributes: tuple[tuple[str, XdpMode], ...] = (("DRV", "native"), ("SKB", "generic"), ("HW", "offload"))
    for attribute, mode in attributes:
        if program_id := link.get(("IFLA_XDP", f"IFLA_XDP_{attribute}_PROG_ID")):
            return XdpProgram(mode, program_id)
    return None


def route_to(address: Address, ifindex: int) -> Route:
    """The way to an address, by one interface if ifindex is not 0. Raises McrError if the kernel says
    nothing."""
    request = rtmsg()
    request["family"] = socket.AF_INET if address.version == 4 else socket.AF_INET6
    request["dst_len"] = address.max_prefixlen
    request["attrs"] = [("RTA_DST", str(address))] + ([("RTA_OIF", ifindex)] if ifindex else [])
    try:
        (found,) = ask(netlink.NETLINK_ROUTE, request, rtnl.RTM_GETROUTE)
    except OSError as error:
        return Route(error=error.errno or errno.ENETUNREACH)
    return Route(
        ifindex=found.get("oif") or 0,
        gateway=found.get("gateway") or (found.get("via") or {}).get("addr") or "",
        source=found.get("prefsrc") or "",
        mtu=found.get(("metrics", "mtu")) or 0,
        local=found["type"] == rtnl.rt_type["local"],
    )


def neighbour(ifindex: int, address: Address) -> Neighbour | None:
    """A next hop as the kernel knows it now; None if it has not tried to reach it, or does not tell (5.0)."""
    request = ndmsg()
    request.update(
        family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
        ifindex=ifindex,
        attrs=[("NDA_DST", str(address))],
    )
    try:
        (found,) = ask(netlink.NETLINK_ROUTE, request, rtnl.RTM_GETNEIGH)
    except OSError:
        return None
    states = [name for name, bit in NEIGHBOUR_STATES.items() if found["state"] & bit]
    return Neighbour(states[0] if states else "none", found.get("lladdr") or "")


def _event_socket(protocol: int, groups: int) -> socket.socket:
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, EVENT_BUFFER_BYTES)
    events.bind((0, groups))  # what is not bound gets no event
    return events


def _generic_event_socket(group: int) -> socket.socket:
    events = _event_socket(netlink.NETLINK_GENERIC, 0)
    events.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_ADD_MEMBERSHIP, group)
    return events


class LinkMonitor:
    """Calls on_change(facts) after interfaces of this network namespace, or what they have, have changed.

    An async context manager. Between two calls there are at least COALESCE_S seconds, and every change is
    followed by a call, also one that the facts do not show: a further address, another number of queues, or
    an interface that has gone and come back the same. Every call carries all the interfaces, freshly read, so
    an overrun of an event socket (ENOBUFS) loses nothing. `facts` are those of the last call, or of the
    start.
    """

    def __init__(self, on_change: Callable[[dict[str, InterfaceFacts]], None]) -> None:
        self.facts: dict[str, InterfaceFacts] = {}
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._trouble = ""
        self._forced = False  # the change may be one that the facts do not show
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            events = stack.enter_context(_event_socket(netlink.NETLINK_ROUTE, EVENT_GROUPS))
            sources = [(events, rtnl.RTM_NEWLINK)]
            if family := await asyncio.to_thread(_family, NETDEV_FAMILY, NETDEV_EVENT_GROUP):
                sources.append((stack.enter_context(_generic_event_socket(family[1])), family[0]))
            if family := await asyncio.to_thread(_family, ETHTOOL_FAMILY, ETHTOOL_EVENT_GROUP):
                sources.append((stack.enter_context(_generic_event_socket(family[1])), UNSEEN))
            self.facts = await asyncio.to_thread(read_interfaces)
            for source in sources:
                loop.add_reader(source[0], self._drain, *source)
                stack.callback(loop.remove_reader, source[0])
            reporter = loop.create_task(self._report(), name="mcr-link-monitor")
            stack.push_async_callback(asyncio.wait, [reporter])
            stack.callback(reporter.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _drain(self, events: socket.socket, shown_type: int) -> None:
        """Empties an event socket. What the events say is read afresh; only that they came counts.

        shown_type: the type of the messages that tell of nothing but what the facts show.
        """
        for _ in range(EVENT_READS):
            try:
                data = events.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                log.info("link events were lost (%s); reading all the links again", error.strerror)
                self._forced = True
            else:
                messages = Marshal().parse(data)
                self._forced |= any(message["header"].get("type") != shown_type for message in messages)
            self._changed.set()

    async def _report(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(COALESCE_S)
            self._changed.clear()
            forced, self._forced = self._forced, False
            try:
                facts = await asyncio.to_thread(read_interfaces)
                self._trouble = ""
            except Exception as error:
                self._forced |= forced
                self._changed.set()
                self._say_once(cause_of(error))
                log.debug("listing the links failed here:", exc_info=True)
                await asyncio.sleep(RETRY_S)
                continue
            if forced or facts != self.facts:
                self.facts = facts
                self._call(facts)

    def _say_once(self, trouble: str) -> None:
        """However long it lasts."""
        if trouble != self._trouble:
            log.warning("trying again until it succeeds: %s", trouble)
        self._trouble = trouble

    def _call(self, facts: dict[str, InterfaceFacts]) -> None:
        try:
            self._on_change(facts)
        except Exception:
            log.exception("a change of the links could not be handled")
