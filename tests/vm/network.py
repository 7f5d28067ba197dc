"""The network inside the virtual machine: namespaces gen, rel and snk, and a lane for each driver.

      gen                     rel                     snk
     +---------+             +---------------+       +---------+
     |   veth0 |-------------| veth0   veth1 |-------| veth1   |   a lane: one way in, two ways out
     |         |             |         veth2 |-------| veth2   |
     +---------+             +---------------+       +---------+

The ends of a cable have one name. A cable's network is 10.LANE.CABLE.0/24, and fd00:LANE:CABLE::/64.
Devices that are made of others (bond, bridge, VLAN, macvlan) are on the relay's side, over a veth of their
own, and have one way in and one way out. It must run in a machine of its own: it takes every NIC that it
knows.
"""

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.netns.lab import Lab, LabError, Namespace

CARRIER_S = 120.0
VLAN_ID = 100


@dataclass(frozen=True, slots=True)
class Lane:
    """number: of its networks. model: QEMU's name of the NIC, empty for what the kernel makes."""

    name: str
    number: int
    model: str = ""
    stacked: bool = False

    @property
    def short(self) -> str:
        """Begins the names of its interfaces."""
        return self.name.removesuffix("_net")

    @property
    def inward(self) -> str:
        return f"{self.short}0"

    @property
    def outward(self) -> tuple[str, ...]:
        return (f"{self.short}1",) if self.stacked else (f"{self.short}1", f"{self.short}2")

    def mac(self, cable: int, end: int) -> str:
        """Of one of its NICs: end 0 is the relay's."""
        return f"52:54:00:{self.number:02x}:{cable:02x}:{end:02x}"


VETH = Lane("veth", 1)
LANES = (
    VETH,
    Lane("virtio_net", 2, "virtio-net-pci"),
    Lane("e1000e", 3, "e1000e"),
    Lane("vmxnet3", 4, "vmxnet3"),
    Lane("igb", 5, "igb"),
    Lane("bond", 6, stacked=True),
    Lane("bridge", 7, stacked=True),
    Lane("vlan", 8, stacked=True),
    Lane("macvlan", 9, stacked=True),
)

SMALL_FRAMES = ("igb",)
"""Drivers that refuse a larger MTU while an XDP program is attached."""


class Network:
    """Everything that the machine's NICs allow. lanes: those that are there."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.gen, self.rel, self.snk = (lab.namespace(label) for label in ("gen", "rel", "snk"))
        nics = _nics()
        self.lanes = [lane for lane in LANES if not lane.model or lane.mac(0, 0) in nics]
        cables = [(lane, *cable) for lane in self.lanes for cable in enumerate((lane.inward, *lane.outward))]
        _ip("", [line for cable in cables for line in self._cable(*cable, nics)])
        for namespace in (self.gen, self.rel, self.snk):
            lines = [line for cable in cables for line in self._end(namespace, *cable)]
            _ip(namespace.name, lines)
        self._set_offloads()
        self.wait_for_carriers()

    def _other(self, cable: int) -> Namespace:
        return self.snk if cable else self.gen

    def _cable(self, lane: Lane, cable: int, name: str, nics: dict[str, str]) -> Iterator[str]:
        """What `ip` must do for a cable outside of the namespaces."""
        ends = (self.rel.name, self._other(cable).name)
        if lane.model:
            for end, namespace in enumerate(ends):
                yield f"link set {nics[lane.mac(cable, end)]} netns {namespace} name {name}"
        else:
            lower = f"{name}p" if lane.stacked else name
            yield f"link add name {lower} netns {ends[0]} type veth peer name {lower} netns {ends[1]}"

    def _end(self, namespace: Namespace, lane: Lane, cable: int, name: str) -> Iterator[str]:
        """What `ip` must do for a cable in a namespace: the devices, their addresses, up."""
        if namespace not in (self.rel, self._other(cable)):
            return
        if lane.stacked:
            plain = namespace is not self.rel and lane.name != "vlan"
            yield from _stack("" if plain else lane.name, f"{name}p", name)
        host = 2 if (namespace is self.rel) is (cable == 0) else 1
        yield from _up(name, lane.number, cable, host)
        if namespace is self.gen and not lane.stacked:
            yield f"link add link {name} name {tagged_name(lane)} type vlan id {VLAN_ID}"
            yield from _up(tagged_name(lane), lane.number, VLAN_ID, host)

    def _set_offloads(self) -> None:
        """As OPERATIONS.md asks for: GRO for the kernel path, and tags that stay in the frames up to XDP."""
        for name in (VETH.inward, *VETH.outward):
            for namespace in (self.rel, self.gen if name == VETH.inward else self.snk):
                self.lab.run(namespace, ["ethtool", "-K", name, "gro", "on"])
        for lane in self.lanes:
            if not lane.stacked:
                end, feature = (self.gen, "txvlan") if lane is VETH else (self.rel, "rxvlan")
                self.lab.run(end, ["ethtool", "-K", lane.inward, feature, "off"], check=False)
            if lane.name == "igb":  # QEMU's damages what it segments; the true device does not
                for name in lane.outward:
                    self.lab.run(self.rel, ["ethtool", "-K", name, "tx-udp-segmentation", "off"])

    def wait_for_carriers(self) -> None:
        """Returns once every interface can send and receive."""
        deadline = time.monotonic() + CARRIER_S
        while waiting := [name for each in (self.gen, self.rel, self.snk) for name in self._without(each)]:
            if time.monotonic() > deadline:
                raise LabError(f"no carrier after {CARRIER_S} s: {waiting}")
            time.sleep(0.2)

    def _without(self, namespace: Namespace) -> list[str]:
        """The interfaces that have no carrier."""
        links = json.loads(self.lab.ip(namespace, "-j link show up"))
        return [link["ifname"] for link in links if "LOWER_UP" not in link["flags"]]

    def set_mtu(self, mtu: int) -> None:
        """Of both ends of every cable of a NIC or veth, if its driver can while XDP is attached."""
        for namespace in (self.gen, self.rel, self.snk):
            _ip(namespace.name, [f"link set {name} mtu {mtu}" for name in self._plain_ends(namespace)])
        self.wait_for_carriers()

    def _plain_ends(self, namespace: Namespace) -> Iterator[str]:
        for lane in self.lanes:
            if lane.stacked or lane.name in SMALL_FRAMES:
                continue
            if namespace is not self.snk:
                yield lane.inward
            if namespace is not self.gen:
                yield from lane.outward

    def interrupt(self) -> None:
        """Sets every interface of the relay down and up again."""
        cables = [(lane, *cable) for lane in self.lanes for cable in enumerate((lane.inward, *lane.outward))]
        _ip(self.rel.name, [f"link set {name} down" for _, _, name in cables])
        for lane, cable, name in cables:  # the kernel takes IPv6 addresses away from what is down
            host = 1 if cable else 2
            address = f"fd00:{lane.number}:{cable}::{host}/64"
            _ip(self.rel.name, [f"link set {name} up", f"address replace {address} dev {name}"])
        self.wait_for_carriers()


def _ip(namespace: str, lines: Sequence[str]) -> None:
    """Runs them all in one process, which matters without KVM. LabError if one fails."""
    where = ["-n", namespace] if namespace else []
    text = "\n".join(lines) + "\n"
    done = subprocess.run(["ip", *where, "-batch", "-"], input=text, text=True, capture_output=True)
    if done.returncode:
        raise LabError(f"{done.stderr}{text}")


def _stack(kind: str, lower: str, name: str) -> Iterator[str]:
    """Puts a device of that kind over a veth; of no kind, the veth takes the name itself."""
    if kind == "bond":
        yield f"link add {name} type bond mode active-backup miimon 100"
        yield f"link set {lower} master {name}"
    elif kind == "bridge":
        yield f"link add {name} type bridge"
        yield f"link set {lower} master {name}"
    elif kind == "vlan":
        yield f"link add link {lower} name {name} type vlan id {VLAN_ID}"
    elif kind == "macvlan":
        yield f"link add link {lower} name {name} type macvlan mode bridge"
    else:
        yield f"link set {lower} name {name}"
        return
    yield f"link set {lower} up"


def _up(name: str, number: int, cable: int, host: int) -> Iterator[str]:
    yield f"address add 10.{number}.{cable}.{host}/24 dev {name}"
    yield f"address add fd00:{number}:{cable}::{host}/64 dev {name}"
    yield f"link set {name} up"


def tagged_name(lane: Lane) -> str:
    """The interface of gen that sends tagged frames into the lane."""
    return f"{lane.inward}.{VLAN_ID}"


def _nics() -> dict[str, str]:
    """The machine's NICs: name by MAC."""
    found = {}
    for path in Path("/sys/class/net").iterdir():
        if (path / "device").exists():
            found[(path / "address").read_text().strip()] = path.name
    return found
