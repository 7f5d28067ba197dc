"""What one interface, its driver and the kernel's settings for it mean for MCR: the checks of features.py
that are about an interface.

It asks the kernel and reads sysctls. This module must never change an interface, nor attach anything to it.
"""

import contextlib
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcr import ethtool, loader, netlink, procfs, vlans
from mcr.desired import FRAME_HEADROOM, LARGE_FRAME, longest_frame
from mcr.errors import McrError
from mcr.features import Check, Relay
from mcr.maps import MAX_QUEUES
from mcr.rule import AGGREGATES, FRAIL_NATIVE, XDP_FEATURE_BASIC, XDP_FEATURE_NDO_XMIT, InterfaceFacts

XDP_FEATURE_ZERO_COPY = 8  # enum netdev_xdp_act of linux/netdev.h
BRIDGE_QUERIER_STATE = 47  # IFLA_BR_MCAST_QUERIER_STATE of linux/if_link.h, there if a querier was heard


@dataclass(frozen=True, slots=True)
class Use:
    """An interface to look at. used: MCR uses it or shall, so that what is missing matters; takes_in: streams
    come in by it, or shall."""

    interface: str
    used: bool
    takes_in: bool


def interface_checks(use: Use, facts: InterfaceFacts | None, relay: Relay | None) -> list[Check]:
    """Every check of one interface; facts are None where there is none of that name."""
    name = use.interface
    if facts is None:
        evidence, remedy = "there is no such interface", "see which there are: ip link"
        return [Check("link is up", "no", evidence, remedy, use.used, name)]
    rows = [row for row in relay.status if row.get("interface") == name] if relay else []
    attached = [row for row in rows if row["object"] == "interface"]
    workers = [row for row in rows if row["object"] == "worker"]
    checks: list[Check] = []
    try:
        checks.extend(_attached(attached, workers))
        checks.extend(_all(use, facts, attached))
    except McrError as error:  # it has gone meanwhile, or the kernel is silent
        checks.append(Check("the rest", "can't tell", str(error), f"mcr doctor {name}"))
    return [replace(check, interface=name) for check in checks]


def _all(use: Use, facts: InterfaceFacts, attached: list[dict[str, Any]]) -> Iterator[Check]:
    name = use.interface
    yield _up(name, facts, use.used)
    yield _ethernet(facts, use.takes_in)
    yield _address(name, facts)
    yield _hook(name, attached, use.takes_in)
    yield _native(name, facts)
    yield _transmits(name, facts)
    yield _zero_copy(facts, attached)
    yield _queues(name, attached, use.takes_in)
    yield _mtu(name, facts, attached)
    offloads = ethtool.features(name)
    yield _merging(name, facts, offloads, attached)
    yield _tags(name, offloads)
    yield _vlan_filter(name, offloads)
    yield _reverse_path(name)
    yield _forced_version(name, "ipv4", "force_igmp_version", "IGMPv3")
    yield _forced_version(name, "ipv6", "force_mld_version", "MLDv2")
    yield _querier(name)


# --- what MCR did with it


def _attached(attached: list[dict[str, Any]], workers: list[dict[str, Any]]) -> Iterator[Check]:
    """What a worker lacks is said of the worker."""
    of_workers = {row["reason"] for row in workers if row["state"] == "pending"}
    for row in attached:
        if row["reason"] and row["reason"] not in of_workers:
            remedy = "it is tried again by itself; see the other checks of this interface, and the log"
            yield Check("attached", "no", row["reason"], remedy, True)
            continue
        mode = f"{row['mode']} XDP" if row["mode"] != "none" else "no XDP"
        yield Check("attached", "yes", f"{mode}, ingress {row['ingress']}")
        yield from map(_worker, workers)


def _worker(row: dict[str, Any]) -> Check:
    check, pid = f"worker {row['worker']}", row["pid"]
    restarts = f", restarted {row['restarts']} times" if row["restarts"] else ""
    if row["state"] == "idle":
        return Check(check, "no", row["reason"], "none is needed, or attach with fewer workers")
    if row["reason"]:
        remedy = "it is started again by itself within 10 s; if it dies again, the log says of what"
        return Check(check, "no", f"{row['reason']}{restarts}", remedy, True)
    if (state := procfs.state(pid)) in ("T", "Z", "X"):
        remedy = "none is needed: it is replaced after some seconds; the log says why it ended"
        return Check(check, "no", f"{pid} is {'stopped' if state == 'T' else 'dead'}{restarts}", remedy, True)
    queues = f", queues {row['queues']}" if row["queues"] else ""
    return Check(check, "yes", f"{pid}{queues}{restarts}")


def _hook(name: str, attached: list[dict[str, Any]], takes_in: bool) -> Check:
    check = "XDP hook is free"
    program = netlink.xdp_program(name)
    if program is None:
        return Check(check, "yes", "no program is attached")
    title = loader.program_name(program.program_id)
    number = f"id {program.program_id}, {program.mode}"
    evidence = f"{title} ({number})"
    if any(row["mode"] in ("native", "generic") for row in attached):
        return Check(check, "yes", f"MCR's own: {evidence}")
    if title == loader.HELPER_NAME:
        return Check(check, "yes", f"MCR's own, so that the kernel path can send by it: {evidence}")
    if title == loader.GONE:
        return Check(check, "can't tell", f"not permitted to look at it ({number})", "run mcr doctor as root")
    if title == loader.PROGRAM_NAME:
        remedy = "choose the --instance that has it, or: mcr detach there"
        return Check(check, "no", f"another instance of MCR has it: {evidence}", remedy, takes_in)
    remedy = (
        f"ip link set dev {name} xdp off, or stop the program that holds it, or attach with --ingress packet"
    )
    return Check(check, "no", f"another XDP program is attached: {evidence}", remedy, takes_in)


# --- the link


def _up(name: str, facts: InterfaceFacts, used: bool) -> Check:
    if facts.up:
        return Check("link is up", "yes", f"index {facts.ifindex}, {facts.mac or 'no MAC'}")
    remedy = f"ip link set dev {name} up; if it is up, its other end has no carrier"
    return Check("link is up", "no", "down, or without a carrier", remedy, used)


def _ethernet(facts: InterfaceFacts, takes_in: bool) -> Check:
    if facts.ethernet:
        return Check("Ethernet", "yes", facts.mac)
    remedy = "take the streams in by an Ethernet interface; as an output it needs the worker path"
    return Check("Ethernet", "no", "its frames have no Ethernet header", remedy, takes_in)


def _address(name: str, facts: InterfaceFacts) -> Check:
    found = [str(each) for each in (facts.ipv4, facts.ipv6, facts.ipv6_link) if each is not None]
    if facts.ipv4 is not None or facts.ipv6 is not None:
        return Check("IP address", "yes", ", ".join(found))
    evidence = f"only {found[0]}" if found else "none: outputs have no address to send from"
    remedy = f"ip address add ADDRESS/LENGTH dev {name}, or name one in each output: source=ADDRESS"
    return Check("IP address", "no", evidence, remedy)


def _queues(name: str, attached: list[dict[str, Any]], takes_in: bool) -> Check:
    count = netlink.receive_queues(name)
    if count > MAX_QUEUES:
        remedy = f"ethtool -L {name} combined {MAX_QUEUES}"
        found = f"{count}, of which {MAX_QUEUES} are drained; packets on the others drop as no_worker"
        return Check("queues", "no", found, remedy, takes_in)
    drained = sum(row["queues"] for row in attached if row["ingress"] == "xsk")
    if drained and drained != count:
        evidence = f"{count}, but its workers drain the {drained} that were there at the attach"
        return Check("queues", "no", evidence, f"mcr detach {name}, then mcr attach {name}", True)
    return Check("queues", "yes", f"{count} receive queue{'s' if count > 1 else ''}")


def _mtu(name: str, facts: InterfaceFacts, attached: list[dict[str, Any]]) -> Check:
    limit = LARGE_FRAME - FRAME_HEADROOM
    if longest_frame(facts) <= limit or any(row["ingress"] == "packet" for row in attached):
        return Check("MTU", "yes", f"{facts.mtu}: every frame fits a frame of the pool")
    evidence = f"{facts.mtu}: the worker path drops frames above {limit} bytes as oversize"
    remedy = (
        f"send datagrams below {limit - 70} bytes, or use the kernel path, or: ip link set dev {name} mtu"
    )
    return Check("MTU", "no", evidence, f"{remedy} {limit - 22}")


# --- the driver


def _native(name: str, facts: InterfaceFacts) -> Check:
    driver = ethtool.driver(name) or "unknown"
    if facts.kind in AGGREGATES:
        remedy = f"generic mode is used instead and is slower; attach the members of the {facts.kind}"
        return Check("native XDP", "no", f"it runs in the {facts.kind}'s members, and sees them", remedy)
    if driver in FRAIL_NATIVE:
        evidence = (
            f"{driver} receives nothing after a link down and up in native mode, which auto leaves alone"
        )
        return Check("native XDP", "no", evidence, "generic mode is used instead and is slower")
    if facts.xdp_features is None:
        return Check("native XDP", "can't tell", f"driver {driver}; the kernel tells since 6.3")
    if facts.xdp_features & XDP_FEATURE_BASIC:
        return Check("native XDP", "yes", f"driver {driver}")
    remedy = "generic mode is used instead and is slower; use a device whose driver has XDP"
    return Check("native XDP", "no", f"driver {driver} has none", remedy)


def _transmits(name: str, facts: InterfaceFacts) -> Check:
    """Whether the kernel path can send by it (ndo_xdp_xmit)."""
    check = "transmits redirected frames"
    if facts.xdp_features is None:
        evidence = "the kernel tells since 6.3; rules that send here take the worker path"
        return Check(check, "can't tell", evidence)
    if facts.xdp_features & XDP_FEATURE_NDO_XMIT:
        return Check(check, "yes", "the kernel path can send by it")
    if facts.kind == "veth":
        peer = _veth_peer(name)
        remedy = f"ethtool -K {peer} gro on, where the peer is; until then rules take the worker path"
        return Check(check, "no", f"its veth peer {peer} has no NAPI: neither GRO nor XDP", remedy)
    if facts.xdp_features & XDP_FEATURE_BASIC:
        evidence = (
            f"perhaps with an XDP program of its own: a rule that can use it attaches {loader.HELPER_NAME}"
        )
        return Check(check, "can't tell", evidence, "see which path rules take, and why: mcr rule show NAME")
    remedy = "none is needed: rules that send here take the worker path"
    return Check(check, "no", "its driver has no XDP transmit", remedy)


def _veth_peer(name: str) -> str:
    """The name of the other end; that of its index where it is in another namespace."""
    link = netlink.read_link(name)
    index = link.get("link")
    if index and link.get("link_netnsid") is None:
        with contextlib.suppress(OSError):
            return socket.if_indextoname(index)
    return f"PEER (index {index} in another namespace)"


def _zero_copy(facts: InterfaceFacts, attached: list[dict[str, Any]]) -> Check:
    if any(row["zero_copy"] for row in attached):
        return Check("zero-copy", "yes", "bound without copying")
    if facts.xdp_features is None:
        return Check("zero-copy", "can't tell", "the kernel tells since 6.3; --zero-copy auto tries")
    if facts.xdp_features & XDP_FEATURE_ZERO_COPY:
        return Check("zero-copy", "yes", "the driver says that it can")
    return Check("zero-copy", "no", "the driver cannot", "none is needed: frames are copied")


def _merging(
    name: str, facts: InterfaceFacts, offloads: Mapping[str, bool], attached: list[dict[str, Any]]
) -> Check:
    """In generic mode XDP cannot tell a super-packet from one datagram: GRO of UDP that is forwarded makes
    such, and on a device that is no hardware a sender on this host does. AF_PACKET cuts them again."""
    if any(row["ingress"] == "packet" for row in attached):
        return Check("datagrams stay whole", "yes", "AF_PACKET cuts what was merged")
    generic = any(row["mode"] == "generic" for row in attached)
    if generic and facts.kind and facts.kind not in AGGREGATES:
        evidence = f"in generic mode, and a sender on this host that uses UDP_SEGMENT reaches a {facts.kind}"
        return Check("datagrams stay whole", "no", evidence, "attach with --ingress packet")
    if not offloads:
        return Check("datagrams stay whole", "can't tell", "the driver does not tell its offloads")
    on = [feature for feature in ethtool.MERGES if offloads.get(feature)]
    if not on:
        gro = "on, but not for UDP that is forwarded" if offloads.get("rx-gro") else "off"
        return Check("datagrams stay whole", "yes", f"GRO is {gro}")
    remedy = f"ethtool -K {name} {' '.join(f'{feature} off' for feature in on)}"
    return Check("datagrams stay whole", "no", f"GRO merges them: {', '.join(on)}", remedy)


def _tags(name: str, offloads: Mapping[str, bool]) -> Check:
    check = "VLAN tags are seen"
    if not offloads:
        return Check(check, "can't tell", "the driver does not tell its offloads")
    if not offloads.get(vlans.TAKES_TAGS_OUT):
        return Check(check, "yes", "rxvlan is off")
    if ethtool.driver(name) == "veth":
        evidence = "a veth may hide the tags that its peer leaves to the device (txvlan), and no others"
        remedy = f"only for rules with vlan=: ethtool -K {_veth_peer(name)} txvlan off, where the peer is"
        return Check(check, "can't tell", evidence, remedy)
    evidence = "rxvlan is on: the device takes tags out before XDP"
    remedy = f"only for rules with vlan=: ethtool -K {name} rxvlan off, or attach with --ingress packet"
    return Check(check, "no", evidence, remedy)


def _vlan_filter(name: str, offloads: Mapping[str, bool]) -> Check:
    """MCR registers the VLANs of its rules by devices of its own, which needs the kernel's 8021q."""
    check = "VLANs come in"
    if not offloads:
        return Check(check, "can't tell", "the driver does not tell its offloads")
    if not offloads.get(vlans.FILTERS):
        return Check(check, "yes", "rx-vlan-filter is off")
    evidence = "rx-vlan-filter is on: VLANs have to be registered, as MCR does for rules with vlan="
    if Path("/proc/net/vlan").exists():
        return Check(check, "yes", evidence)
    remedy = "only for rules with vlan=: modprobe 8021q"
    return Check(check, "can't tell", f"{evidence}, but the kernel's 8021q is not in use yet", remedy)


# --- sysctls and bridges


def _sysctl(name: str, family: str, key: str) -> int | None:
    """The greater of a setting for all interfaces and that of this one, which is what counts for these."""
    read = (procfs.number(Path("/proc/sys/net", family, "conf", where, key)) for where in ("all", name))
    return max((value for value in read if value is not None), default=None)


def _reverse_path(name: str) -> Check:
    value = _sysctl(name, "ipv4", "rp_filter")
    if value is None:
        return Check("rp_filter", "can't tell", "the sysctl cannot be read")
    what = {0: "off", 1: "strict", 2: "loose"}.get(value, str(value))
    evidence = f"{what}: without meaning for MCR, which takes packets before it"
    if value != 1:
        return Check("rp_filter", "yes", evidence)
    remedy = f"only if receivers on this host miss streams: sysctl -w net.ipv4.conf.{name}.rp_filter=2"
    return Check("rp_filter", "no", f"{evidence}; receivers on this host do meet it", remedy)


def _forced_version(name: str, family: str, key: str, wanted: str) -> Check:
    """A forced older version cannot join a group of one source only (RFC 3376 section 7, RFC 3810)."""
    check, newest = wanted, {"force_igmp_version": 3, "force_mld_version": 2}[key]
    value = _sysctl(name, family, key)
    if value is None:
        return Check(check, "can't tell", f"{key} cannot be read, or the interface has no {family}")
    if value in (0, newest):
        return Check(check, "yes", f"{key} is {value}")
    remedy = f"sysctl -w net.{family}.conf.{name}.{key}=0, and that of `all`"
    return Check(check, "no", f"{key} is {value}: joins of one source ask for every source", remedy)


def _querier(name: str) -> Check:
    """A bridge that snoops without a querier forgets its members after some minutes (RFC 4541 2.1.1)."""
    check = "snooping has a querier"
    link = netlink.read_link(name)
    bridge = name if link.get(("linkinfo", "kind")) == "bridge" else _name_of(link.get("master"))
    if not bridge:
        evidence = "no bridge here; a switch that snoops needs a querier in its network"
        return Check(check, "can't tell", evidence, "look at the switch's IGMP querier")
    described = netlink.read_link(bridge)
    if described.get(("linkinfo", "kind")) != "bridge":
        return Check(check, "can't tell", f"{bridge} is no bridge", "look at the switch's IGMP querier")
    data = described.get(("linkinfo", "data"))
    if not data.get_attr("IFLA_BR_MCAST_SNOOPING"):
        return Check(check, "yes", f"bridge {bridge} does not snoop")
    if data.get_attr("IFLA_BR_MCAST_QUERIER"):
        return Check(check, "yes", f"bridge {bridge} queries itself")
    unknown = (value for key, value in data["attrs"] if key == "UNKNOWN")
    if any(value["header"]["type"] & 0x3FFF == BRIDGE_QUERIER_STATE for value in unknown):
        return Check(check, "yes", f"bridge {bridge} has heard one")
    remedy = f"ip link set {bridge} type bridge mcast_querier 1, or mcast_snooping 0"
    return Check(check, "no", f"bridge {bridge} snoops and has heard none: members are forgotten", remedy)


def _name_of(ifindex: int | None) -> str:
    with contextlib.suppress(OSError):
        return socket.if_indextoname(ifindex) if ifindex else ""
    return ""
