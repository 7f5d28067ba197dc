"""Links and addresses of this network namespace, and their events, straight from the kernel.

It speaks rtnetlink(7) over plain sockets: pyroute2's synchronous classes cannot run inside an event loop, and
importing it costs the supervisor 24 MB and a tenth of a second. This module only reads; it must never change
a link, and never hold up the event loop while the kernel is busy with one.
"""

import array
import asyncio
import contextlib
import errno
import fcntl
import logging
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from mcr.errors import McrError
from mcr.rule import InterfaceFacts

# linux/netlink.h, linux/rtnetlink.h
NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_GETLINK = 16, 18
NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x01, 0x300, 0x10
NLA_TYPE_MASK = 0x3FFF
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 0x1, 0x10, 0x100
# linux/if_link.h, linux/if_arp.h, linux/if.h
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_EXT_MASK, IFLA_NUM_RX_QUEUES, IFLA_XDP = 1, 3, 4, 29, 32, 43
IFLA_XDP_DRV_PROG_ID, IFLA_XDP_SKB_PROG_ID, IFLA_XDP_HW_PROG_ID = 5, 6, 7
RTEXT_FILTER_SKIP_STATS = 8
ARPHRD_ETHER = 1
IFF_UP, IFF_RUNNING = 0x1, 0x40
# linux/sockios.h, linux/ethtool.h
SIOCETHTOOL, ETHTOOL_GCHANNELS = 0x8946, 0x3C

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
RECEIVE_BYTES = 1 << 17
EVENT_BUFFER_BYTES = 1 << 20
REQUEST_TIMEOUT_S = 5.0
DUMP_ATTEMPTS = 10
COALESCE_S = 0.05
EVENT_READS = 64  # from the event socket, before other work of the loop gets its turn

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class XdpProgram:
    """The XDP program on an interface, and how it is attached."""

    mode: Literal["native", "generic", "offload"]
    program_id: int


@dataclass(frozen=True, slots=True)
class _Link:
    ifindex: int
    kind: int
    flags: int
    attributes: dict[int, bytes]

    @property
    def name(self) -> str:
        return self.attributes[IFLA_IFNAME].rstrip(b"\0").decode(errors="surrogateescape")


class _DumpInterruptedError(Exception):
    """Links changed while they were listed (NLM_F_DUMP_INTR): the list may be torn."""


def _attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of a message or of a nested attribute: type -> payload."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < ATTRIBUTE.size:
            break
        found[kind & NLA_TYPE_MASK] = data[offset + ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The messages of one datagram: type, flags, payload."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, _, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size:
            break
        yield kind, flags, data[offset + HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _link_request(name: str | None) -> bytes:
    """RTM_GETLINK for one link by its name, or for all of them."""
    attributes = ATTRIBUTE.pack(8, IFLA_EXT_MASK) + struct.pack("=I", RTEXT_FILTER_SKIP_STATS)
    if name is not None:
        value = name.encode(errors="surrogateescape") + b"\0"
        attributes += ATTRIBUTE.pack(ATTRIBUTE.size + len(value), IFLA_IFNAME) + value
        attributes += b"\0" * (-len(value) % 4)
    payload = LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attributes
    flags = NLM_F_REQUEST if name is not None else NLM_F_REQUEST | NLM_F_DUMP
    return HEADER.pack(HEADER.size + len(payload), RTM_GETLINK, flags, 1, 0) + payload


def _links(name: str | None = None) -> list[_Link]:
    """One link, or all. Raises OSError (ENODEV if there is no such link) and _DumpInterruptedError."""
    links: list[_Link] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as request:
        request.settimeout(REQUEST_TIMEOUT_S)
        request.bind((0, 0))
        request.send(_link_request(name))
        while True:
            for kind, flags, payload in _messages(request.recv(RECEIVE_BYTES)):
                if flags & NLM_F_DUMP_INTR:
                    raise _DumpInterruptedError
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    (status,) = struct.unpack_from("=i", payload)
                    if status:
                        raise OSError(-status, "the kernel refused to list the links")
                    return links
                _, arphrd, ifindex, interface_flags, _ = LINK.unpack_from(payload)
                attributes = _attributes(payload[LINK.size :])
                links.append(_Link(ifindex, arphrd, interface_flags, attributes))
                if name is not None:
                    return links


def _link(name: str) -> _Link:
    try:
        return _links(name)[0]
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EINVAL, errno.ERANGE):
            raise McrError(f"there is no interface {name}", "see which there are: ip link") from None
        raise


def _u32(link: _Link, attribute: int) -> int:
    value: int = struct.unpack("=I", link.attributes[attribute])[0]
    return value


def _facts(link: _Link) -> InterfaceFacts:
    ethernet = link.kind == ARPHRD_ETHER
    return InterfaceFacts(
        name=link.name,
        ifindex=link.ifindex,
        mtu=_u32(link, IFLA_MTU),
        up=link.flags & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING,
        ethernet=ethernet,
        mac=link.attributes[IFLA_ADDRESS].hex(":") if ethernet else "",
    )


def read_interfaces() -> dict[str, InterfaceFacts]:
    """Every interface of this network namespace, by its name.

    `up` means that it is set up and can carry packets (IFF_UP and IFF_RUNNING, netdevice(7)). Blocks while
    the kernel changes a link. Raises OSError if the kernel does not answer.
    """
    for _ in range(DUMP_ATTEMPTS):
        with contextlib.suppress(_DumpInterruptedError):
            return {facts.name: facts for facts in map(_facts, _links())}
    raise OSError(errno.EINTR, f"the links changed during each of {DUMP_ATTEMPTS} attempts to list them")


def _channels(name: str) -> int:
    """Receive queues in use by ethtool's count. Raises OSError where the driver has no such thing."""
    channels = array.array("I", [ETHTOOL_GCHANNELS] + [0] * 8)  # struct ethtool_channels
    address, _ = channels.buffer_info()
    request = struct.pack("16sP16x", name.encode(errors="surrogateescape"), address)  # struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCETHTOOL, request)
    _, _, _, _, _, receive, _, _, combined = channels
    return receive + combined


def receive_queues(name: str) -> int:
    """How many receive queues the interface uses now, at least 1.

    From ethtool's channels (ETHTOOL_GCHANNELS, linux/ethtool.h); where the driver does not tell them, as many
    as the interface was made with (IFLA_NUM_RX_QUEUES). Raises McrError if there is no such interface.
    """
    link = _link(name)
    with contextlib.suppress(OSError):
        if queues := _channels(name):
            return queues
    return max(1, _u32(link, IFLA_NUM_RX_QUEUES))


def xdp_program(name: str) -> XdpProgram | None:
    """The XDP program on an interface, None if there is none; of several, the one that the driver runs.

    Raises McrError if there is no such interface.
    """
    nested = _attributes(_link(name).attributes.get(IFLA_XDP, b""))
    modes: tuple[tuple[int, Literal["native", "generic", "offload"]], ...] = (
        (IFLA_XDP_DRV_PROG_ID, "native"),
        (IFLA_XDP_SKB_PROG_ID, "generic"),
        (IFLA_XDP_HW_PROG_ID, "offload"),
    )
    for attribute, mode in modes:
        if attribute in nested:
            return XdpProgram(mode, struct.unpack("=I", nested[attribute])[0])
    return None


class LinkMonitor:
    """Calls on_change(facts) after interfaces or addresses of this network namespace have changed.

    An async context manager. Between two calls there are at least COALESCE_S seconds, and every change is
    followed by a call. Every call carries all the interfaces, freshly read, so an overrun of the event socket
    (ENOBUFS) loses nothing. `facts` are those of the last call, or of the start.
    """

    def __init__(self, on_change: Callable[[dict[str, InterfaceFacts]], None]) -> None:
        self.facts: dict[str, InterfaceFacts] = {}
        self._on_change = on_change
        self._events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._changed = asyncio.Event()
        self._forced = False
        self._reporter: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "LinkMonitor":
        self._events.setblocking(False)
        self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, EVENT_BUFFER_BYTES)
        self._events.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
        try:
            self.facts = await asyncio.to_thread(read_interfaces)
        except BaseException:
            self._events.close()
            raise
        asyncio.get_running_loop().add_reader(self._events, self._drain)
        self._reporter = asyncio.create_task(self._report(), name="mcr-link-monitor")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._events)
        self._events.close()
        if self._reporter is not None:
            self._reporter.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reporter

    def _drain(self) -> None:
        """Empties the event socket. What the events say is read afresh; only that they came counts."""
        for _ in range(EVENT_READS):
            try:
                data = self._events.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                log.info("link events were lost (%s); reading all the links again", error.strerror)
                self._forced = True
            else:
                self._forced |= any(kind != RTM_NEWLINK for kind, _, _ in _messages(data))
            self._changed.set()

    async def _report(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(COALESCE_S)
            self._changed.clear()
            forced, self._forced = self._forced, False
            try:
                facts = await asyncio.to_thread(read_interfaces)
            except OSError as error:
                log.warning("cannot list the links, trying again: %s", error)
                self._forced |= forced
                self._changed.set()
                continue
            if forced or facts != self.facts:
                self.facts = facts
                self._call(facts)

    def _call(self, facts: dict[str, InterfaceFacts]) -> None:
        try:
            self._on_change(facts)
        except Exception:
            log.exception("a change of the links could not be handled")
