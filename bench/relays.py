"""The relays that are measured, behind one interface: start one on a lane, say what it will send, stop it.

This module must never generate traffic or count it.
"""

import json
import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from bench.lanes import Lane, Node
from bench.machine import pin, resident_bytes, worker_cpu
from bench.results import PEER_LABEL
from bench.streams import SOURCE_ADDRESS, Streams
from mcr.control import ControlClient
from mcr.errors import McrError
from tests.netns.lab import Lab, LabError, Process

START_LIMIT_S = 30.0
POLL_S = 0.02
MAX_VIFS = 32  # linux/mroute.h
FRAME_BYTES = 2048  # of a worker's pool, at the MTU of the lanes

McrPath = Literal["kernel", "xsk", "packet"]


class RelayRefusedError(Exception):
    """The relay says that it cannot do what is to be measured; the text is its own, in one line."""


class Relay(ABC):
    """One relay, started once at most: a process for each node of its lane. label: its name in results.

    has_throughput: a rate without loss is worth searching for.
    """

    label: str
    has_throughput = True
    translates = False
    sends_frames = False  # as XDP frames, not packets of the stack

    def __init__(self) -> None:
        self._processes: list[Process] = []
        self._pinned = 0

    @abstractmethod
    def start(self, lab: Lab, lane: Lane, streams: Streams) -> None:
        """Returns when the streams will be relayed to every output. Raises RelayRefusedError, LabError."""

    def check_alive(self) -> None:
        """Raises McrError if it has died since it was started."""
        for process in self._processes:
            if process.child.poll() is not None:
                raise self._died(process)

    def _died(self, process: Process) -> McrError:
        words = _complaint(process.output())
        return McrError(f"{self.label} died while it was measured: {words}", "see its log; this is a bug")

    def stop(self) -> None:
        """Ends it; a relay that was never started is stopped already."""
        for process in self._processes:
            if process.child.poll() is None:
                process.terminate()
        self._processes.clear()

    def destination(self, lane: Lane, streams: Streams, output: int) -> Streams:
        """What the streams are called at an output of the lane."""
        for node in lane.nodes if self.translates else ():
            streams = streams.translated(output if node is lane.nodes[-1] else 0)
        return streams

    def memory(self) -> dict[str, float]:
        """Resident MB, by kind of process; frame pools left out."""
        return {}

    def exhausted_frames(self) -> int | None:
        """How often a worker had no frame free for a packet, so far; None if it has no frames."""
        return None

    def _pin(self, pid: int) -> None:
        """Pins one more of its processes."""
        pin(pid, worker_cpu(self._pinned))
        self._pinned += 1

    def _wait(self, process: Process, missing: Callable[[], str]) -> None:
        """Returns once nothing is missing. Raises RelayRefusedError if the process ends or takes too long."""
        deadline = time.monotonic() + START_LIMIT_S
        while reason := missing():
            if process.child.poll() is not None or time.monotonic() > deadline:
                raise RelayRefusedError(f"{reason} ({_complaint(process.output())})")
            time.sleep(POLL_S)


class Mcr(Relay):
    """MCR, with one rule for each stream, translating group and port, as it is made to.

    without_rules: is started with none. without_attachment: is started with its interfaces not attached.
    """

    translates = True

    def __init__(
        self,
        path: McrPath,
        *,
        busy_poll: bool = False,
        without_rules: bool = False,
        without_attachment: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.busy_poll = path, busy_poll
        self.without_rules, self.without_attachment = without_rules, without_attachment
        self.sends_frames = path == "kernel"
        self.label = f"MCR {path}{' busy-poll' if busy_poll else ''}"
        self.clients: list[ControlClient] = []
        self._workers: list[int] = []

    @property
    def ingress(self) -> str:
        return "packet" if self.path == "packet" else "xsk"

    def start(self, lab: Lab, lane: Lane, streams: Streams) -> None:
        for number, node in enumerate(lane.nodes):
            last = number == len(lane.nodes) - 1
            try:
                process = lab.supervisor(
                    node.namespace, "--metrics", "off", config=self._config(node, streams),
                    timeout_s=START_LIMIT_S,
                )  # fmt: skip
            except LabError as error:
                raise RelayRefusedError(_complaint(str(error))) from error
            self._processes.append(process)
            client = ControlClient(lab.runtime_directory / f"{node.namespace.name}.sock")
            self.clients.append(client)
            self._wait(process, lambda client=client: self._not_ready(client))  # type: ignore[misc]
            streams = streams if last else streams.translated(0)
        self._find_workers()

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()
        super().stop()

    def check_alive(self) -> None:
        """As for every relay; a worker that was replaced would run on any CPU."""
        super().check_alive()
        if any(not Path(f"/proc/{pid}").exists() for pid in self._workers):
            raise self._died(self._processes[0])

    def memory(self) -> dict[str, float]:
        megabytes = {"supervisor_mb": max(resident_bytes(each.pid) for each in self._processes) / 1e6}
        for row in self.interfaces():
            if row["worker_pid"] is not None:
                frames = sum(count for name, count in row.items() if name.startswith("frames_"))
                worker = resident_bytes(row["worker_pid"], frames * FRAME_BYTES) / 1e6
                megabytes["worker_mb"] = max(worker, megabytes.get("worker_mb", 0.0))
        return megabytes

    def exhausted_frames(self) -> int | None:
        if self.path == "kernel":
            return None
        return sum(int(row["fill_ring_empty"]) for row in self.interfaces())

    def interfaces(self) -> list[dict[str, Any]]:
        """The attached interfaces of every node, as `mcr status -j` has them."""
        rows = [row for client in self.clients for row in client.call("status")]
        return [row for row in rows if row["object"] == "interface"]

    def _find_workers(self) -> None:
        self._workers = [row["worker_pid"] for row in self.interfaces() if row["worker_pid"] is not None]
        for pid in self._workers:
            self._pin(pid)

    def _config(self, node: Node, streams: Streams) -> str:
        text = ""
        for interface in () if self.without_attachment else node.inputs:
            text += f'[[attach]]\ninterface = "{interface}"\ningress = "{self.ingress}"\n'
            text += f'mode = "{"auto" if self.path == "packet" else "native"}"\n'
            text += "busy_poll = true\n" if self.busy_poll else ""
        for rule in () if self.without_rules else self.rules(node, streams):
            text += "[[rule]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rule.items())
        return text

    def rules(self, node: Node, streams: Streams) -> list[dict[str, Any]]:
        """A rule for each stream, as TOML and `rule.add` take them."""
        outputs = [
            (interface, list(streams.translated(index).all())) for index, interface in enumerate(node.outputs)
        ]
        return [
            {
                "name": f"stream-{number}",
                "from": f"{group}%{node.inputs[number % len(node.inputs)]}:{port}",
                "to": [f"{out[number][0]}%{interface}:{out[number][1]},ttl=8" for interface, out in outputs],
                "path": "kernel" if self.path == "kernel" else "worker",
            }
            for number, (group, port) in enumerate(streams.all())
        ]

    def _not_ready(self, client: ControlClient) -> str:
        """Why it does not relay yet; empty if it does."""
        for row in client.call("status"):
            if row["object"] != "interface":
                continue
            if row["state"] != "attached":
                return f"{row['interface']} is pending: {row['reason']}"
            if row["worker_pid"] is None and self.path != "kernel":
                return "no worker yet"
        if self.without_attachment:
            return ""
        for row in client.call("rule.show"):
            if row["state"] != "active" or row["output_state"] != "active":
                return f"rule {row['rule']} is pending: {row['reason'] or row['output_reason']}"
        return ""


class Smcroute(Relay):
    """Kernel multicast routing set up by smcroute: static (S,G) routes, so that no packet asks the daemon.

    without_rules: is started with none.
    """

    label = PEER_LABEL

    def __init__(self, *, without_rules: bool = False) -> None:
        super().__init__()
        self.without_rules = without_rules

    def start(self, lab: Lab, lane: Lane, streams: Streams) -> None:
        program = _program("smcrouted", "smcroute")
        if len(lane.sources) + len(lane.sinks) > MAX_VIFS:
            raise RelayRefusedError(f"kernel multicast routing has {MAX_VIFS} interfaces")
        wanted = 0 if self.without_rules else len({group for group, _ in streams.all()})
        for node in lane.nodes:
            name = node.namespace.name
            base = lab.runtime_directory / f"{name}-smcroute"
            config = base.with_suffix(".conf")
            config.write_text(self._config(node, streams))
            files = ["-f", str(config), "-P", f"{base}.pid", "-u", f"{base}.sock"]
            process = lab.spawn(node.namespace, [program, "-n", "-N", "-i", name, *files])
            self._processes.append(process)

            def missing(node: Node = node) -> str:
                routes = lab.ip(node.namespace, "mroute show").count("resolved")
                return "" if routes >= wanted else f"{routes} of {wanted} routes are there"

            self._wait(process, missing)

    def control(self, lab: Lab, node: Node, *words: str) -> None:
        """Runs smcroutectl."""
        control_socket = f"{lab.runtime_directory / node.namespace.name}-smcroute.sock"
        program = _program("smcroutectl", "smcroute")
        lab.run(node.namespace, [program, "-i", node.namespace.name, "-u", control_socket, *words])

    def memory(self) -> dict[str, float]:
        return {"supervisor_mb": max(resident_bytes(process.pid) for process in self._processes) / 1e6}

    def _config(self, node: Node, streams: Streams) -> str:
        lines = [f"phyint {interface} enable" for interface in (*node.inputs, *node.outputs)]
        outputs = " ".join(node.outputs)
        inputs = {
            group: node.inputs[number % len(node.inputs)] for number, (group, _) in enumerate(streams.all())
        }
        for group, interface in () if self.without_rules else inputs.items():
            lines.append(f"mroute from {interface} source {SOURCE_ADDRESS} group {group} to {outputs}")
        return "\n".join(lines) + "\n"


class Socat(Relay):
    """socat, one stream to one output: it knows nothing else.

    What it takes without loss is a matter of its small socket buffer, and varies by a factor of ten.
    """

    label = "socat"
    has_throughput = False
    translates = True

    def start(self, lab: Lab, lane: Lane, streams: Streams) -> None:
        node = lane.nodes[0]
        if streams.count > 1 or len(lane.sinks) > 1 or len(lane.sources) > 1 or len(lane.nodes) > 1:
            raise RelayRefusedError("socat relays one stream to one output")
        to = streams.translated(0)
        address = json.loads(lab.ip(node.namespace, f"-j -4 address show dev {node.outputs[0]}"))
        local = address[0]["addr_info"][0]["local"]
        process = lab.spawn(
            node.namespace,
            [
                _program("socat", "socat"),
                "-u",
                f"UDP4-RECV:{streams.port},ip-add-membership={streams.group}:{node.inputs[0]}",
                f"UDP4-DATAGRAM:{to.group}:{to.port},ip-multicast-if={local},ip-multicast-ttl=8",
            ],
        )
        self._processes.append(process)

        def missing() -> str:
            joined = streams.group in lab.ip(node.namespace, f"maddress show dev {node.inputs[0]}")
            return "" if joined else f"{streams.group} is not joined"

        self._wait(process, missing)
        self._pin(process.pid)

    def memory(self) -> dict[str, float]:
        return {"worker_mb": resident_bytes(self._processes[0].pid) / 1e6}


def _program(name: str, package: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise McrError(f"{name} is not installed", f"apt install {package}")
    return path


def _complaint(text: str) -> str:
    """The line of a program's last words that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line.lower() or "cannot" in line]
    words = (wrong or lines or ["it said nothing"])[-1 if wrong else 0]
    return re.sub(r"^mcr: \S+\.toml:\d+: ", "", words)
