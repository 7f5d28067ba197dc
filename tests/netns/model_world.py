"""The real relay of the model test: its network, its supervisor, and what the kernel says of it from outside.

            far in0                   relay                    far out0
          +----------+         +------------------+         +----------+
          | eth0     |---------| in0         out0 |---------|     eth0 |
          +----------+         |                  |         +----------+
          | eth0     |---------| in1         out1 |---------|     eth0 |
            far in1            +------------------+           far out1

Everything is read from the kernel: maps, links, joins, processes and what sockets at the far ends hear. Only
two things are the supervisor's own word, which is compared as well: the names of ids, and what it shows.
This module must never decide what is right; `model_reference.py` does.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from mcr.control import ControlClient
from mcr.errors import McrError
from tests.netns.lab import PINS, Lab, Namespace, Process, processes_in
from tests.netns.lab import _remove_pins as remove_pins
from tests.netns.model_far import NUMBER, SOURCE6, SOURCES, FarEnd
from tests.netns.model_maps import PinnedMaps
from tests.netns.model_reference import (
    Attachment,
    Heard,
    Link,
    Links,
    Rule,
    Sent,
    State,
)

# name: number of its networks, and the last octet of the relay and of the far end
INTERFACES = {"in0": (1, 2, 1), "in1": (3, 2, 1), "out0": (2, 1, 2), "out1": (4, 1, 2)}
# Before Linux 6.3 the kernel does not report which interfaces can transmit redirected frames.
TRANSMIT_IS_KNOWN = [int(number) for number in re.findall(r"\d+", os.uname().release)[:2]] >= [6, 3]
JOINS = "mcr.membership_process"  # which outlives a supervisor that keeps
PADDING = bytes(92)


class World:
    """Four interfaces, and at most one supervisor between them."""

    def __init__(self, lab: Lab, groups: Iterable[str]) -> None:
        self.lab = lab
        self.relay = lab.namespace("relay")
        self.far: dict[str, Namespace] = {name: lab.namespace(f"far-{name}") for name in INTERFACES}
        self.park = lab.namespace("park")
        self.file = lab.directory / "model.toml"
        self.gro = dict.fromkeys(INTERFACES, True)
        self.ipv4 = {name: f"10.{net}.0.{own}" for name, (net, own, _) in INTERFACES.items()}
        self.supervisor: Process | None = None
        self.keep = False
        self.ends = {name: FarEnd(lab, self.far[name], list(groups)) for name in INTERFACES}
        self._client = ControlClient(lab.runtime_directory / f"{self.relay.name}.sock", timeout_s=60)
        self._maps: PinnedMaps | None = None
        self.quiet: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._number = 0
        self._mark = 0
        self.ip("link add mark0 type veth peer name other-mark")
        for name in INTERFACES:
            self.create(name)

    # --- links

    def create(self, name: str) -> None:
        """A new pair of links, of that name in the relay."""
        net, own, far = INTERFACES[name]
        sources = (*(f"{source}/32" for source in SOURCES), f"{SOURCE6}/128") if name.startswith("in") else ()
        self.lab.veth(
            self.relay, name, self.far[name], "eth0",
            addresses_a=(f"{self.ipv4[name]}/24", f"fd0{net}::{own}/64"),
            addresses_b=(f"10.{net}.0.{far}/24", f"fd0{net}::{far}/64", *sources),
        )  # fmt: skip
        self.set_gro(name, self.gro[name])
        with self.quiet():
            self.ends[name].open()

    def ip(self, *commands: str) -> None:
        self._batch(self.relay, commands)

    def _batch(self, namespace: Namespace, commands: Iterable[str]) -> None:
        done = subprocess.run(
            ["ip", "-n", namespace.name, "-batch", "-"],
            input="\n".join(commands) + "\n", capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (commands, done.stderr)

    def set_gro(self, name: str, on: bool) -> None:
        """Of the far end: without it the interface cannot transmit redirected frames."""
        self.gro[name] = on
        self.lab.run(self.far[name], ["ethtool", "-K", "eth0", "gro", "on" if on else "off"])

    def set_ipv4(self, name: str, address: str) -> None:
        self.ip(f"address del {self.ipv4[name]}/24 dev {name}", f"address add {address}/24 dev {name}")
        self.ipv4[name] = address

    def exchange(self, one: str, other: str) -> None:
        """Each gets the other's name."""
        self.ip(
            f"link set {one} down", f"link set {other} down",
            f"link set {one} name aside", f"link set {other} name {one}", f"link set aside name {other}",
            f"link set {one} up", f"link set {other} up",
            self._ipv6(one), self._ipv6(other),
        )  # fmt: skip
        with self.quiet():
            self._exchange_tables(one, other)
        self._wait_until_up(one)
        self._wait_until_up(other)

    def _exchange_tables(self, one: str, other: str) -> None:
        self.far[one], self.far[other] = self.far[other], self.far[one]
        self.gro[one], self.gro[other] = self.gro[other], self.gro[one]
        self.ipv4[one], self.ipv4[other] = self.ipv4[other], self.ipv4[one]
        self.ends[one], self.ends[other] = self.ends[other], self.ends[one]

    def set_up(self, name: str, up: bool) -> None:
        if not up:
            self.ip(f"link set {name} down")
            return
        self.ip(f"link set {name} up", self._ipv6(name))
        self._wait_until_up(name)

    def leave(self, name: str, how: str) -> None:
        """how: `deleted`, `parked` in another namespace, or `renamed`."""
        if how == "deleted":
            self.ip(f"link delete {name}")
        elif how == "parked":
            self.ip(f"link set {name} netns {self.park.name}")
        else:
            self.ip(f"link set {name} down", f"link set {name} name away-{name}")

    def come_back(self, name: str, how: str) -> None:
        """After it has left in this way."""
        if how == "deleted":
            self.create(name)
            return
        if how == "parked":
            self._batch(self.park, [f"link set {name} netns {self.relay.name}"])
            self.ip(f"address replace {self.ipv4[name]}/24 dev {name}")
        else:
            self.ip(f"link set away-{name} name {name}")
        self.set_up(name, True)

    def _ipv6(self, name: str) -> str:
        """Which a link loses when it is set down."""
        net, own, _ = INTERFACES[name]
        return f"address replace fd0{net}::{own}/64 dev {name}"

    def _wait_until_up(self, name: str) -> None:
        self.lab._wait_until_up(self.relay, name)
        self.lab._wait_until_up(self.far[name], "eth0")

    def noticed(self) -> None:
        """Returns when the supervisor has read the links anew and done what follows."""
        old, self._mark = self._mark, self._mark + 1
        self.ip(f"link set mark{old} name mark{self._mark}")
        deadline = time.monotonic() + 30
        while "there is no interface" in self.call("explain", stream=f"239.9.9.9%mark{self._mark}:1"):
            assert time.monotonic() < deadline, "the supervisor does not follow the links"
            time.sleep(0.01)
        self.call("rule.del", names=[])  # which waits until what follows from that has been done

    def links(self) -> Links:
        return {name: link for name, (link, _) in self._links_and_xdp().items()}

    def _links_and_xdp(self) -> dict[str, tuple[Link, dict[str, Any]]]:
        rows = json.loads(self.lab.ip(self.relay, "-j -d address show"))
        return {
            row["ifname"]: (self._link(row), row.get("xdp", {}))
            for row in rows
            if row["ifname"] in INTERFACES or "xdp" in row
        }

    def _link(self, row: Mapping[str, Any]) -> Link:
        addresses = [each for each in row["addr_info"] if each.get("scope") == "global"]
        of = {each["family"]: each["local"] for each in reversed(addresses) if not each.get("secondary")}
        local = [
            each["local"]
            for each in row["addr_info"]
            if each["family"] == "inet6" and each["scope"] == "link"
        ]
        return Link(
            name=row["ifname"],
            ifindex=row["ifindex"],
            mtu=row["mtu"],
            mac=row["address"],
            up={"UP", "LOWER_UP"} <= set(row["flags"]),
            transmits=TRANSMIT_IS_KNOWN and self.gro.get(row["ifname"], False),
            ipv4=of.get("inet", ""),
            ipv6=of.get("inet6", (local or [""])[0]),
        )

    # --- the supervisor

    def write(self, text: str) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.rename(self.file)

    def start(self, keep: bool) -> None:
        options = ("run", "-c", str(self.file), *(("--on-exit", "keep") if keep else ()))
        argv = [sys.executable, "-m", "mcr.cli.main", "--instance", self.relay.name, *options]
        self.supervisor, self.keep = self.lab.spawn(self.relay, argv), keep
        self.supervisor.wait_for("mcr: ready", 90)
        self._maps = PinnedMaps(PINS / self.relay.name)

    def stop(self, number: signal.Signals) -> None:
        """Ends the supervisor, and waits until its processes have gone as well."""
        assert self.supervisor is not None
        self._client.close()
        if self._maps is not None:
            self._maps.close()
            self._maps = None
        self.supervisor.child.send_signal(number)
        self.supervisor.wait(60)
        self.supervisor = None
        deadline = time.monotonic() + 30
        while [pid for pid in processes_in(self.relay) if not (self.keep and JOINS in _command(pid))]:
            assert time.monotonic() < deadline, "processes outlive their supervisor"
            time.sleep(0.01)

    def clean(self) -> None:
        """Nothing is left of a supervisor, however it is."""
        if self.supervisor is not None:
            self.stop(signal.SIGKILL)
        for pid in processes_in(self.relay):
            os.kill(pid, signal.SIGKILL)
        remove_pins(self.relay)
        for directory in (self.lab.runtime_directory, self.lab.state_directory):
            shutil.rmtree(directory)
            directory.mkdir()

    def make_usual(self) -> None:
        """The links that are there have what they had at first."""
        for name in INTERFACES:
            net, own, _ = INTERFACES[name]
            commands = [f"link set {name} mtu 1500"] if self._mtu_of(name) != 1500 else []
            self.ip(*commands, f"link set {name} up", self._ipv6(name))
            if name.startswith("out") and self.ipv4[name] != f"10.{net}.0.{own}":
                self.set_ipv4(name, f"10.{net}.0.{own}")
            if not self.gro[name]:
                self.set_gro(name, True)
            self._wait_until_up(name)

    def _mtu_of(self, name: str) -> int:
        return self.links()[name].mtu

    def call(self, method: str, **params: object) -> str:
        """Asks for a change. Returns why it was refused, empty if it was not."""
        try:
            self._client.call(method, **params)
        except McrError as error:
            return error.cause
        return ""

    def ask(self, method: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._client.call(method)
        return rows

    def kill(self, mark: str, interface: str = "") -> None:
        """SIGKILL for the worker of an interface, or for the process of the joins."""
        for row in self.ask("status"):
            if row["object"] == mark and row.get("interface", "") == interface and row["pid"]:
                os.kill(row["pid"], signal.SIGKILL)

    # --- by hand

    def delete_entry(self, position: int) -> None:
        """One of the map of rules, if it has any."""
        assert self._maps is not None
        self._maps.delete_entry(position)

    def detach_program(self, name: str) -> None:
        """The program of an interface, if it has one, by its link."""
        links = json.loads(self.lab.run(self.relay, ["bpftool", "-j", "link", "show"]).stdout)
        ifindex = self.links()[name].ifindex if name in self.links() else -1
        for link in links:
            if link["type"] == "xdp" and link.get("ifindex") == ifindex:
                self.lab.run(self.relay, ["bpftool", "link", "detach", "id", str(link["id"])])

    def remove_control_socket(self) -> None:
        """Its file; who is connected stays so, and the next one connects by a new one."""
        (self.lab.runtime_directory / f"{self.relay.name}.sock").unlink()
        self._client.close()
        deadline = time.monotonic() + 30
        while "no supervisor" in self.call("status"):
            assert time.monotonic() < deadline, "nobody makes a new control socket"
            time.sleep(0.05)

    # --- what is there

    def found(self) -> State:
        """The state of the kernel, and what the supervisor shows."""
        assert self._maps is not None
        links = self._links_and_xdp()
        shown, status = self.ask("rule.show"), self.ask("status")
        names = {link.ifindex: name for name, (link, _) in links.items()}
        state = self._maps.rules({row["rule_id"]: row["rule"] for row in shown}, names)
        state |= _shown(shown)
        state |= self._joined(status)
        state["lookups"] = self._maps.lookups()
        state |= self._attached(status, links)
        return state

    def ids(self) -> dict[str, int]:
        """The ids of rules by name, and of outputs by name and text."""
        rows = self.ask("rule.show")
        rules = {row["rule"]: row["rule_id"] for row in rows}
        return rules | {f"{row['rule']} -> {row['to']}": row["output_id"] for row in rows}

    def received(self) -> dict[str, int]:
        return {row["rule"]: row["received_packets"] for row in self.ask("stats") if row["object"] == "rule"}

    def _joined(self, status: list[dict[str, Any]]) -> State:
        (row,) = [row for row in status if row["object"] == "membership"]
        runs = row["pid"] is not None and Path(f"/proc/{row['pid']}").exists()
        state = {
            "joins": f"process {'runs' if runs else 'is dead'}, refused {row['failed']}, held {row['held']}"
        }
        return state | self.joins()

    def joins(self) -> State:
        """By the kernel alone."""
        with self.lab.inside(self.relay):
            ipv4 = Path("/proc/thread-self/net/igmp").read_text()
            ipv6 = Path("/proc/thread-self/net/igmp6").read_text()
        found = (*_igmp(ipv4), *_igmp6(ipv6))
        return {f"joined {group} on {interface}": f"by {holders}" for interface, group, holders in found}

    def _attached(
        self, status: list[dict[str, Any]], links: Mapping[str, tuple[Link, dict[str, Any]]]
    ) -> State:
        assert self._maps is not None
        state: State = {}
        ours = self._maps.program_id()
        for name, (_, xdp) in links.items():
            if xdp:
                mode = {1: "native", 2: "generic"}.get(xdp["mode"], str(xdp["mode"]))
                state[f"xdp {name}"] = f"{mode}, {'ours' if xdp['prog']['id'] == ours else 'of another'}"
        workers = {pid for pid in processes_in(self.relay) if "mcr.uring_egress" in _command(pid)}
        for row in status:
            name = row.get("interface", "")
            if row["object"] == "interface":
                attached = f"attached, {row['mode']}, {row['ingress']}"
                state[f"interface {name}"] = attached if row["state"] == "attached" else "pending"
            elif row["object"] == "worker" and row["pid"] in workers:
                workers.remove(row["pid"])
                runs = "runs" if row["state"] == "running" else "starts"
                state[f"worker {name}"] = f"{runs}, {_registered_sockets(row['pid'])} sockets"
        for pid in workers:
            state[f"worker process {pid}"] = "of no interface"
        return state

    # --- packets

    def send(self, streams: Iterable[Sent]) -> dict[int, Sent]:
        """One datagram of each. Returns them by their number."""
        sent = {}
        for stream in streams:
            self._number += 1
            sent[self._number] = stream
            self.ends[stream.interface].send(stream, NUMBER.pack(self._number) + PADDING)
        return sent

    @property
    def next_number(self) -> int:
        return self._number + 1

    def hear(self, expected: int, timeout_s: float) -> list[tuple[int, Heard]]:
        """What the far ends hear, until it is as much as expected or time is up; and what else is there
        then.
        """
        heard: list[tuple[int, Heard]] = []
        deadline = time.monotonic() + timeout_s
        while True:
            for name, end in self.ends.items():
                heard += end.hear(name)
            if len(heard) >= expected or time.monotonic() > deadline:
                return heard
            time.sleep(0.001)


def _shown(rows: list[dict[str, Any]]) -> State:
    state: State = {}
    for row in rows:
        rule = f"active, {row['path']}" if row["state"] == "active" else "pending"
        state[f"shown {row['rule']}"] = f"{rule}, {row['from']}"
        state[f"shown {row['rule']} -> {row['to']}"] = row["output_state"]
    return state


def _igmp(text: str) -> Iterator[tuple[str, str, int]]:
    """Interface, group and number of holders, of /proc/net/igmp: a line for each interface, and its
    groups'.
    """
    interface = ""
    for line in text.splitlines()[1:]:
        words = line.split()
        if line[0] != "\t":
            interface = words[1]
        elif (group := socket.inet_ntoa(bytes.fromhex(words[0])[::-1])) != "224.0.0.1":
            yield interface, group, int(words[1])


def _igmp6(text: str) -> Iterator[tuple[str, str, int]]:
    """The same of /proc/net/igmp6, where all is on one line; the kernel's own groups have scopes below 5."""
    for line in text.splitlines():
        _, interface, group, holders, *_ = line.split()
        address = IPv6Address(bytes.fromhex(group))
        if address.packed[1] & 0x0F >= 5 and interface != "lo":
            yield interface, str(address), int(holders)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def _registered_sockets(pid: int) -> int:
    """How many sockets a worker has given to its io_uring to send by (io_uring's fdinfo, from number 1
    on).
    """
    with contextlib.suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            if "io_uring" in str(fd.readlink()):
                lines = Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text().splitlines()
                return sum("socket:" in line and not line.strip().startswith("0:") for line in lines)
    return -1


def configuration(rules: Iterable[Rule], attachments: Iterable[Attachment]) -> str:
    """The TOML file of these."""
    text = ""
    for attachment in attachments:
        text += f'[[attach]]\ninterface = "{attachment.interface}"\nmode = "{attachment.mode}"\n'
        text += f'ingress = "{attachment.ingress}"\n' + (
            f'cpus = "{attachment.cpus}"\n' if attachment.cpus else ""
        )
    for rule in rules:
        outputs = json.dumps([str(output) for output in rule.outputs])
        text += (
            f'[[rule]]\nname = "{rule.name}"\nfrom = "{rule.input}"\nto = {outputs}\npath = "{rule.path}"\n'
        )
    return text
