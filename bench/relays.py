"""The relays that are measured, behind one interface: start one on a lane, say what it will send, stop it.

A lane is a namespace with one input and some outputs, the same for every relay. This module must never
generate traffic, count it, or prefer one relay to another in how its lane is set up.
"""

import contextlib
import ipaddress
import json
import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bench.traffic import FIRST_PRIORITY, Streams
from mcr.errors import McrError
from tests.netns.lab import Lab, LabError, Namespace, Process

START_LIMIT_S = 15.0
POLL_S = 0.05
WORKER_CPU = 1
SOURCE_ADDRESS = "10.1.0.1"
GROUPS_APART = 0x10000  # between the groups of one output and the next: more than any benchmark's streams

McrPath = Literal["kernel", "xsk", "packet"]


class RelayRefusedError(Exception):
    """The relay says that it cannot do what is to be measured; the text is its own, in one line."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Where one relay runs: its namespace, the interface that streams come in by, those they leave by."""

    namespace: Namespace
    input: str
    outputs: tuple[str, ...]


class Relay(ABC):
    """One relay, started once at most. label: as it is called in results."""

    label: str
    _process: Process | None = None

    @abstractmethod
    def start(self, lab: Lab, lane: Lane, streams: Streams) -> None:
        """Returns when the streams will be relayed to every output. Raises RelayRefusedError, LabError."""

    def check_alive(self) -> None:
        """Raises McrError if it has died since it was started."""
        if self._process is None or self._process.child.poll() is not None:
            raise self._died()

    def _died(self) -> McrError:
        words = _complaint(self._process.output()) if self._process else "never started"
        return McrError(f"{self.label} died while it was measured: {words}", "see its log; this is a bug")

    def stop(self) -> None:
        """Ends it; a relay that was never started is stopped already."""
        if self._process is not None and self._process.child.poll() is None:
            self._process.terminate()
        self._process = None

    def destination(self, streams: Streams, output: int) -> Streams:
        """What the streams are called at an output: here as at the input."""
        del output
        return streams


class Mcr(Relay):
    """MCR, with one rule for each stream, translating group and port, as it is made to."""

    def __init__(self, path: McrPath) -> None:
        self.path = path
        self.label = f"MCR {path}"
        self.worker_pid: int | None = None

    def destination(self, streams: Streams, output: int) -> Streams:
        group = ipaddress.IPv4Address(streams.group) + GROUPS_APART * (output + 1)
        return replace(streams, group=str(group), port=streams.port + 1000)

    def start(self, lab: Lab, lane: Lane, streams: Streams) -> None:
        try:
            self._process = lab.supervisor(
                lane.namespace, "--metrics", "off", config=self._config(lane, streams)
            )
        except LabError as error:
            raise RelayRefusedError(_complaint(str(error))) from error
        deadline = time.monotonic() + START_LIMIT_S
        while reason := self._not_ready(lab, lane):
            if self._process.child.poll() is not None or time.monotonic() > deadline:
                raise RelayRefusedError(f"{reason} ({_complaint(self._process.output())})")
            time.sleep(POLL_S)
        if self.worker_pid is not None:
            _pin(self.worker_pid)

    def check_alive(self) -> None:
        """As for every relay; a worker that was replaced would run on any CPU."""
        super().check_alive()
        if self.worker_pid is not None and not Path(f"/proc/{self.worker_pid}").exists():
            raise self._died()

    def _config(self, lane: Lane, streams: Streams) -> str:
        ingress = "packet" if self.path == "packet" else "xsk"
        mode = "auto" if self.path == "packet" else "native"
        text = f'[[attach]]\ninterface = "{lane.input}"\ningress = "{ingress}"\nmode = "{mode}"\n'
        outputs = [
            (interface, list(self.destination(streams, index).all()))
            for index, interface in enumerate(lane.outputs)
        ]
        for number, (group, port) in enumerate(streams.all()):
            to = [f"{out[number][0]}%{interface}:{out[number][1]},ttl=8" for interface, out in outputs]
            text += f'[[rule]]\nname = "stream-{number}"\nfrom = "{group}%{lane.input}:{port}"\n'
            text += f'to = {json.dumps(to)}\npath = "{"kernel" if self.path == "kernel" else "worker"}"\n'
        return text

    def _not_ready(self, lab: Lab, lane: Lane) -> str:
        """Why it does not relay yet; empty if it does."""
        rules = json.loads(lab.mcr(lane.namespace, "rule", "show", "-j").stdout)
        for row in rules:
            if row["state"] != "active" or row["output_state"] != "active":
                return f"rule {row['rule']} is pending: {row['reason'] or row['output_reason']}"
        status = json.loads(lab.mcr(lane.namespace, "status", "-j").stdout)
        interface = next(row for row in status if row["object"] == "interface")
        if interface["state"] != "attached":
            return f"{lane.input} is pending: {interface['reason']}"
        self.worker_pid = interface["worker_pid"]
        return "no worker yet" if self.worker_pid is None and self.path != "kernel" else ""


class Smcroute(Relay):
    """Kernel multicast routing set up by smcroute: static (S,G) routes, so that no packet asks the daemon."""

    label = "smcroute"

    def start(self, lab: Lab, lane: Lane, streams: Streams) -> None:
        program = _program("smcrouted", "smcroute")
        name = lane.namespace.name
        base = lab.runtime_directory / f"{name}-smcroute"
        config = base.with_suffix(".conf")
        config.write_text(self._config(lane, streams))
        lab.run(lane.namespace, ["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0"])
        for interface in (lane.input, *lane.outputs):
            lab.run(lane.namespace, ["sysctl", "-qw", f"net.ipv4.conf.{interface}.rp_filter=0"])
        self._process = lab.spawn(
            lane.namespace,
            [program, "-n", "-N", "-i", name, "-f", str(config), "-P", f"{base}.pid", "-u", f"{base}.sock"],
        )
        wanted = len({group for group, _ in streams.all()})
        deadline = time.monotonic() + START_LIMIT_S
        while lab.ip(lane.namespace, "mroute show").count("resolved") < wanted:
            if self._process.child.poll() is not None or time.monotonic() > deadline:
                raise RelayRefusedError(_complaint(self._process.described()))
            time.sleep(POLL_S)

    def _config(self, lane: Lane, streams: Streams) -> str:
        lines = [f"phyint {interface} enable" for interface in (lane.input, *lane.outputs)]
        outputs = " ".join(lane.outputs)
        for group in sorted({group for group, _ in streams.all()}):
            lines.append(f"mroute from {lane.input} source {SOURCE_ADDRESS} group {group} to {outputs}")
        return "\n".join(lines) + "\n"


class Socat(Relay):
    """socat, one stream to one output: it knows nothing else."""

    label = "socat"

    def destination(self, streams: Streams, output: int) -> Streams:
        group = ipaddress.IPv4Address(streams.group) + GROUPS_APART * (output + 1)
        return replace(streams, group=str(group), port=streams.port + 1000)

    def start(self, lab: Lab, lane: Lane, streams: Streams) -> None:
        if streams.count > 1 or len(lane.outputs) > 1:
            raise RelayRefusedError("socat relays one stream to one output")
        to = self.destination(streams, 0)
        address = json.loads(lab.ip(lane.namespace, f"-j -4 address show dev {lane.outputs[0]}"))
        local = address[0]["addr_info"][0]["local"]
        self._process = lab.spawn(
            lane.namespace,
            [
                _program("socat", "socat"),
                "-u",
                f"UDP4-RECV:{streams.port},ip-add-membership={streams.group}:{lane.input}",
                f"UDP4-DATAGRAM:{to.group}:{to.port},ip-multicast-if={local},ip-multicast-ttl=8",
            ],
        )
        deadline = time.monotonic() + START_LIMIT_S
        while streams.group not in lab.ip(lane.namespace, f"maddress show dev {lane.input}"):
            if self._process.child.poll() is not None or time.monotonic() > deadline:
                raise RelayRefusedError(_complaint(self._process.described()))
            time.sleep(POLL_S)
        _pin(self._process.pid)


def _program(name: str, package: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise McrError(f"{name} is not installed", f"apt install {package}")
    return path


def _pin(pid: int) -> None:
    """Keeps every thread of a process on the CPU that the generator does not use, before everybody else."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {WORKER_CPU})
            os.setpriority(os.PRIO_PROCESS, int(task.name), FIRST_PRIORITY)


def _complaint(text: str) -> str:
    """The line of a program's last words that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line.lower() or "cannot" in line]
    words = (wrong or lines or ["it said nothing"])[-1 if wrong else 0]
    return re.sub(r"^mcr: \S+\.toml:\d+: ", "", words)
