"""Links and addresses of this network namespace, and their events, read with pyroute2.

All goes over its IPRSocket, the one of its sockets that asyncio does not drive: it works inside a running
event loop and outside of one, in the network namespace of the calling thread, and outlives an overrun. This
module only reads; it must never change a link, and the monitor must never hold up the event loop while the
kernel is busy with one.
"""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, Self

from pyroute2 import IPRSocket
from pyroute2.arp import ARPHRD_ETHER
from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool
from pyroute2.netlink import NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, nlmsg, rtnl
from pyroute2.netlink.rtnl.ifinfmsg import IFF_RUNNING, IFF_UP, ifinfmsg

from mcr.errors import McrError
from mcr.rule import InterfaceFacts

EVENT_GROUPS = rtnl.RTMGRP_LINK | rtnl.RTMGRP_IPV4_IFADDR | rtnl.RTMGRP_IPV6_IFADDR
EVENT_TYPES = (rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK, rtnl.RTM_NEWADDR, rtnl.RTM_DELADDR)
EVENT_BUFFER_BYTES = 1 << 20
REQUEST_TIMEOUT_S = 5.0
DUMP_ATTEMPTS = 10
COALESCE_S = 0.05
EVENT_READS = 64  # from the event socket, before other work of the loop gets its turn

XdpMode = Literal["native", "generic", "offload"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class XdpProgram:
    """The XDP program on an interface, and how it is attached."""

    mode: XdpMode
    program_id: int


def _links(name: str | None = None) -> Generator[Any, None, None]:
    """One link by its name, or all, as RTM_NEWLINK messages of pyroute2 (rtnetlink(7)); of one, take one.

    One at a time, because each takes much memory. Raises OSError: ENODEV if there is no such link, EINTR if
    links changed while they were listed.
    """
    request = ifinfmsg()
    if name is not None:
        request["attrs"] = [("IFLA_IFNAME", os.fsencode(name))]
    with IPRSocket() as rtnetlink:
        rtnetlink.socket.settimeout(REQUEST_TIMEOUT_S)
        rtnetlink.put(request, rtnl.RTM_GETLINK, NLM_F_REQUEST | (NLM_F_DUMP if name is None else 0))
        while True:
            for message in rtnetlink.get():
                header = message["header"]
                if header["error"] is not None:
                    raise OSError(getattr(header["error"], "code", errno.EBADMSG), str(header["error"]))
                if header["flags"] & NLM_F_DUMP_INTR:
                    raise InterruptedError(errno.EINTR, "the links changed while they were listed")
                if header["type"] == NLMSG_DONE:
                    return
                yield message


def _link(name: str) -> Any:
    try:
        with contextlib.closing(_links(name)) as links:
            return next(links)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EINVAL, errno.ERANGE):
            raise McrError(f"there is no interface {name}", "see which there are: ip link") from None
        raise


def _facts(link: Any) -> InterfaceFacts:
    ethernet = link["ifi_type"] == ARPHRD_ETHER
    return InterfaceFacts(
        name=os.fsdecode(link.get("ifname")),  # pyroute2 leaves what is not UTF-8 as bytes
        ifindex=link["index"],
        mtu=link.get("mtu"),
        up=link["flags"] & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING,
        ethernet=ethernet,
        mac=link.get("address") if ethernet else "",
    )


def read_interfaces() -> dict[str, InterfaceFacts]:
    """Every interface of this network namespace, by its name.

    `up` means that it is set up and can carry packets (IFF_UP and IFF_RUNNING, netdevice(7)). Blocks while
    the kernel changes a link. Raises OSError if the kernel does not answer, or has no rest.
    """
    for _ in range(DUMP_ATTEMPTS):
        with contextlib.suppress(InterruptedError):
            return {facts.name: facts for facts in map(_facts, _links())}
    raise OSError(errno.EINTR, f"the links changed during each of {DUMP_ATTEMPTS} attempts to list them")


def receive_queues(name: str) -> int:
    """How many receive queues the interface uses now, at least 1.

    From ethtool's channels (ETHTOOL_GCHANNELS, linux/ethtool.h); where the driver does not tell them, as many
    as the interface was made with (IFLA_NUM_RX_QUEUES). Raises McrError if there is no such interface.
    """
    link = _link(name)
    with contextlib.suppress(EthtoolError, OSError), contextlib.closing(IoctlEthtool(name)) as ethtool:
        channels = ethtool.get_channels()
        if queues := int(channels.rx_count + channels.combined_count):
            return queues
    return max(1, int(link.get("num_rx_queues")))


def xdp_program(name: str) -> XdpProgram | None:
    """The XDP program on an interface, None if there is none; of several, the one that the driver runs.

    Raises McrError if there is no such interface.
    """
    link = _link(name)
    attributes: tuple[tuple[str, XdpMode], ...] = (("DRV", "native"), ("SKB", "generic"), ("HW", "offload"))
    for attribute, mode in attributes:
        if program_id := link.get(("IFLA_XDP", f"IFLA_XDP_{attribute}_PROG_ID")):
            return XdpProgram(mode, program_id)
    return None


class LinkMonitor:
    """Calls on_change(facts) after interfaces or addresses of this network namespace have changed.

    An async context manager. Between two calls there are at least COALESCE_S seconds, and every change is
    followed by a call, also one that the facts do not show: an address, or an interface that has gone and
    come back the same. Every call carries all the interfaces, freshly read, so an overrun of the event socket
    (ENOBUFS) loses nothing. `facts` are those of the last call, or of the start.
    """

    def __init__(self, on_change: Callable[[dict[str, InterfaceFacts]], None]) -> None:
        self.facts: dict[str, InterfaceFacts] = {}
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._forced = False  # the change may be one that the facts do not show
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            events = stack.enter_context(IPRSocket(rcvbuf=EVENT_BUFFER_BYTES))
            events.bind(EVENT_GROUPS)
            events.socket.setblocking(False)
            events.register_policy(dict.fromkeys(EVENT_TYPES, nlmsg))  # their types suffice: decode no more
            self.facts = await asyncio.to_thread(read_interfaces)
            loop.add_reader(events.fileno(), self._drain, events)
            stack.callback(loop.remove_reader, events.fileno())
            reporter = loop.create_task(self._report(), name="mcr-link-monitor")
            stack.push_async_callback(asyncio.wait, [reporter])
            stack.callback(reporter.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _drain(self, events: Any) -> None:
        """Empties the event socket. What the events say is read afresh; only that they came counts."""
        for _ in range(EVENT_READS):
            try:
                messages = events.get()
            except BlockingIOError:
                return
            except OSError as error:
                log.info("link events were lost (%s); reading all the links again", error.strerror)
                self._forced = True
            else:
                self._forced |= any(message["header"].get("type") != rtnl.RTM_NEWLINK for message in messages)
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
