"""An XDP program that passes everything, on egress interfaces whose driver transmits redirected frames only
while it has one.

Which interfaces need it is decided by `rule.needs_helper`; whether it helps is found out by trying, so that
no list of drivers has to be kept. A failure means that rules take the worker path, and is never an error.
This module must never touch an interface that is attached, nor replace a program of somebody else.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from mcr import loader, netlink
from mcr.errors import McrError
from mcr.rule import HELD, XDP_FEATURE_NDO_XMIT, InterfaceFacts

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    name: str
    link: loader.Link
    xdp_features: int


class EgressHelpers:
    """The links of `mcr_pass`. keep: they are pinned, so that they outlive the supervisor."""

    def __init__(self, instance: str, program_fd: int, keep: bool) -> None:
        self._instance = instance
        self._program_fd = program_fd
        self._keep = keep
        self._held: dict[int, _Held] = {}  # by ifindex
        self._refused: dict[
            int, tuple[object, str]
        ] = {}  # by ifindex: what it was like, and why it does not help

    def seen(self, facts: InterfaceFacts) -> InterfaceFacts:
        """An interface, with what its program or the attempt to attach one has brought."""
        if held := self._held.get(facts.ifindex):
            return replace(facts, helper=HELD, xdp_features=(facts.xdp_features or 0) | held.xdp_features)
        like, why = self._refused.get(facts.ifindex, (None, ""))
        return replace(facts, helper=why) if why and like == _like(facts) else facts

    def adopt(self, facts: Mapping[str, InterfaceFacts]) -> None:
        """Takes over the links that an earlier supervisor left."""
        present = {str(each.ifindex): each for each in facts.values()}
        for path in loader.helper_dir(self._instance).glob("*"):
            if interface := present.get(path.name):
                fd = loader.open_pin(self._instance, f"{path.parent.name}/{path.name}")
                link = loader.Link(fd, "native", path)
                if not self._keep:
                    link.unpin()
                features = interface.xdp_features or 0
                self._held[interface.ifindex] = _Held(interface.name, link, features)
            else:
                path.unlink()

    async def provide(self, needed: Collection[str], facts: Mapping[str, InterfaceFacts]) -> None:
        """Attaches to those that are needed, have none and have not been tried as they are."""
        for name in sorted(needed):
            interface = facts.get(name)
            if interface is not None and not self.seen(interface).helper:
                await asyncio.to_thread(self._try, interface)

    def release(self, attached: Collection[str]) -> None:
        """Makes room on interfaces that shall be attached."""
        for ifindex, held in list(self._held.items()):
            if held.name in attached:
                held.link.close()
                del self._held[ifindex]

    def withdraw(self, needed: Collection[str], facts: Mapping[str, InterfaceFacts]) -> None:
        """Detaches from those that are not needed, or that have gone."""
        present = {each.ifindex: name for name, each in facts.items()}
        for ifindex, held in list(self._held.items()):
            if present.get(ifindex) not in needed:
                held.link.close()
                del self._held[ifindex]
                log.info("%s: %s is no longer needed", held.name, loader.HELPER_NAME)
        for ifindex in self._refused.keys() - present.keys():
            del self._refused[ifindex]

    def close(self) -> None:
        """Detaches all, or leaves them if they are kept."""
        for held in self._held.values():
            if self._keep:
                held.link.let_go()
            else:
                held.link.close()
        self._held.clear()

    def _try(self, facts: InterfaceFacts) -> None:
        name, ifindex = facts.name, facts.ifindex
        try:
            link = loader.attach(self._program_fd, name, ifindex, "native")
        except McrError as error:
            self._refuse(facts, f"it needs an XDP program of its own for that, but {error.cause}")
            return
        features = netlink.xdp_features(ifindex) or 0
        if not features & XDP_FEATURE_NDO_XMIT:
            link.close()
            self._refuse(facts, "its driver has no XDP transmit, not even with an XDP program of its own")
            return
        if self._keep:
            link.keep(loader.helper_dir(self._instance) / str(ifindex))
        self._held[ifindex] = _Held(name, link, features)
        words = "attached, so that its driver transmits redirected frames"
        log.info("%s: %s %s", name, loader.HELPER_NAME, words, extra={"interface": name})

    def _refuse(self, facts: InterfaceFacts, why: str) -> None:
        self._refused[facts.ifindex] = _like(facts), why
        log.info("%s cannot transmit redirected frames: %s", facts.name, why, extra={"interface": facts.name})


def _like(facts: InterfaceFacts) -> object:
    """What has to change before another attempt; not whether it is up, which an attempt may change."""
    return facts.name, facts.mtu, facts.xdp_features
