"""The laboratory of the network tests: namespaces, veth pairs and processes that vanish with the test.

Everything has a name that begins with the laboratory's prefix, so that whatever remains can be found. It must
never touch a namespace, process or pin of another name, nor the network of the machine itself.
"""

import contextlib
import ctypes
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mcr.control import ControlClient

NAMESPACES = Path("/var/run/netns")
PINS = Path("/sys/fs/bpf/mcr")
CLONE_NEWNET = 0x40000000  # linux/sched.h
SOCKET_PATH_LIMIT = 107  # bytes, unix(7)
POLL_S = 0.01
SETTLE_S = 10.0
# The kernel's own memberships: all nodes (RFC 1112, RFC 4291 2.7.1), all routers, solicited nodes.
KERNEL_GROUPS = {
    ipaddress.ip_address(group)
    for group in ("224.0.0.1", "ff01::1", "ff01::2", "ff02::1", "ff02::2", "ff05::2")
}
SOLICITED_NODES = ipaddress.ip_network("ff02::1:ff00:0/104")


class LabError(Exception):
    """The laboratory could not be set up, or a command in it did not do what the test relies on."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace. Its name is also the name of the MCR instance that runs in it."""

    name: str

    @property
    def path(self) -> Path:
        return NAMESPACES / self.name


@dataclass(frozen=True, slots=True)
class RelayTopology:
    """The namespaces of `Lab.topology_relay`."""

    src: Namespace
    relay: Namespace
    dst: Namespace


@dataclass(frozen=True, slots=True)
class Process:
    """A process in a namespace; its output goes to two files."""

    child: subprocess.Popen[bytes]
    namespace: Namespace
    command: str
    stdout: Path
    stderr: Path

    @property
    def pid(self) -> int:
        return self.child.pid

    def output(self) -> str:
        """Everything written so far, standard output first."""
        return self.stdout.read_text(errors="replace") + self.stderr.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 10.0) -> None:
        """Returns as soon as the text is in the output; LabError if the process ends or time is up before."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.child.poll() is not None  # before reading, so that the last words are read
            if text in self.output():
                return
            if ended:
                raise LabError(f"{self.described()} ended without {text!r}")
            if time.monotonic() > deadline:
                raise LabError(f"{self.described()} did not write {text!r} within {timeout_s} s")
            time.sleep(POLL_S)

    def wait(self, timeout_s: float = 10.0) -> int:
        """The exit status (-N for signal N); LabError if the process does not end in time."""
        try:
            return self.child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.described()} did not end within {timeout_s} s") from None

    def terminate(self, timeout_s: float = 10.0) -> int:
        """Sends SIGTERM and returns the exit status."""
        self.child.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def described(self) -> str:
        """Its command, state and output, for an error."""
        return f"{self.command} (pid {self.pid}, status {self.child.returncode})\n{self.output()}\n"


class Lab:
    """A context manager that owns namespaces, processes and instances, and removes them in any case."""

    def __init__(self, prefix: str, directory: Path) -> None:
        self.prefix = prefix
        self.directory = directory
        self.runtime_directory = directory / "run"
        self.state_directory = directory / "state"
        self._cleanup = contextlib.ExitStack()
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        self.runtime_directory.mkdir()
        self.state_directory.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def namespace(self, label: str) -> Namespace:
        """Creates a namespace with `lo` up, where IPv6 addresses are usable at once."""
        namespace = Namespace(f"{self.prefix}-{label}")
        control_socket = self.runtime_directory / f"{namespace.name}.sock"
        if len(os.fsencode(control_socket)) > SOCKET_PATH_LIMIT:
            raise LabError(f"{control_socket} is too long for a socket: set TMPDIR to a shorter directory")
        self._cleanup.callback(_delete_namespace, namespace)
        self._cleanup.callback(_remove_pins, namespace)
        self._cleanup.callback(self._kill_processes, namespace)
        _checked(["ip", "netns", "add", namespace.name])
        self.run(
            namespace,
            ["sysctl", "-qw", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"],
        )
        self.ip(namespace, "link set lo up")
        return namespace

    def ip(self, namespace: Namespace, arguments: str) -> str:
        """Runs `ip ARGUMENTS` in the namespace and returns what it printed."""
        return _checked(["ip", "-n", namespace.name, *arguments.split()]).stdout

    def veth(
        self,
        a: Namespace,
        interface_a: str,
        b: Namespace,
        interface_b: str,
        *,
        addresses_a: Sequence[str] = (),
        addresses_b: Sequence[str] = (),
        mtu: int = 1500,
        queues: int = 1,
        gro: bool | None = None,
        index_a: int | None = None,
    ) -> None:
        """Joins two namespaces by a veth pair, up and with carrier on both ends.

        addresses: with prefix length, of either family. mtu: bytes. queues: receive and transmit queues of
        each end. gro: generic receive offload of both ends, None for the driver's default. index_a: of
        interface_a, None for the kernel's choice.
        """
        settings = f"mtu {mtu} numrxqueues {queues} numtxqueues {queues}"
        index = "" if index_a is None else f"index {index_a}"
        _checked(
            f"ip link add name {interface_a} {index} {settings} netns {a.name} type veth"
            f" peer name {interface_b} {settings} netns {b.name}".split()
        )
        ends = ((a, interface_a, addresses_a), (b, interface_b, addresses_b))
        for namespace, interface, addresses in ends:
            for address in addresses:
                self.ip(namespace, f"address add {address} dev {interface}")
            self.ip(namespace, f"link set {interface} up")
        for namespace, interface, _ in ends:
            self._wait_until_up(namespace, interface)
            if gro is not None:  # once it is up: only then does the kernel tell the peer's XDP features anew
                self.run(namespace, ["ethtool", "-K", interface, "gro", "on" if gro else "off"])

    def _wait_until_up(self, namespace: Namespace, interface: str) -> None:
        """The kernel drops what is sent before it has handled the carrier's coming."""
        deadline = time.monotonic() + SETTLE_S
        while json.loads(self.ip(namespace, f"-j link show dev {interface}"))[0]["operstate"] != "UP":
            if time.monotonic() > deadline:
                raise LabError(f"{interface} in {namespace.name} has no carrier after {SETTLE_S} s")
            time.sleep(POLL_S)

    def topology_relay(self, *, mtu: int = 1500, queues: int = 1, gro: bool | None = None) -> RelayTopology:
        """The standard topology.

             src                          relay                          dst
            +------------------+         +--------------------+         +------------------+
            | eth0             |  veth   | in0           out0 |  veth   |             eth0 |
            | 10.1.0.1/24      |---------| 10.1.0.2  10.2.0.1 |---------|      10.2.0.2/24 |
            | fd01::1/64       |         | fd01::2    fd02::1 |         |       fd02::2/64 |
            +------------------+         +--------------------+         +------------------+

        Nothing is routed between the two networks, and multicast sockets name their interface.
        """
        topology = RelayTopology(self.namespace("src"), self.namespace("relay"), self.namespace("dst"))
        self.veth(
            topology.src, "eth0", topology.relay, "in0",
            addresses_a=("10.1.0.1/24", "fd01::1/64"), addresses_b=("10.1.0.2/24", "fd01::2/64"),
            mtu=mtu, queues=queues, gro=gro,
        )  # fmt: skip
        self.veth(
            topology.relay, "out0", topology.dst, "eth0",
            addresses_a=("10.2.0.1/24", "fd02::1/64"), addresses_b=("10.2.0.2/24", "fd02::2/64"),
            mtu=mtu, queues=queues, gro=gro,
        )  # fmt: skip
        return topology

    @contextlib.contextmanager
    def inside(self, namespace: Namespace) -> Iterator[None]:
        """The calling thread is in the namespace for a while (setns(2)).

        Sockets opened then stay there, and so do processes started then. Unlike `ip netns exec` this leaves
        the mounts alone, so bpffs stays visible.
        """
        with Path("/proc/thread-self/ns/net").open("rb") as home, namespace.path.open("rb") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def run(
        self, namespace: Namespace, argv: Sequence[str], *, check: bool = True, timeout_s: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end. With check, a status other than 0 is a LabError with its output."""
        with self.inside(namespace):
            return _checked(argv, check=check, timeout_s=timeout_s, env=self._environment())

    def spawn(self, namespace: Namespace, argv: Sequence[str]) -> Process:
        """Starts a command, which is running when this returns; it is killed when the laboratory closes."""
        name = f"{len(self._processes)}-{Path(argv[0]).name}"
        stdout, stderr = self.directory / f"{name}.stdout", self.directory / f"{name}.stderr"
        with stdout.open("wb") as out, stderr.open("wb") as err, self.inside(namespace):
            child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=self._environment()
            )
        process = Process(child, namespace, " ".join(argv), stdout, stderr)
        self._processes.append(process)
        return process

    def mcr(
        self, namespace: Namespace, *arguments: str, check: bool = True, timeout_s: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs `mcr --instance NAME ARGUMENTS`, the instance being the one of the namespace."""
        return self.run(namespace, _mcr(namespace, arguments), check=check, timeout_s=timeout_s)

    def supervisor(
        self, namespace: Namespace, *arguments: str, config: str | None = None, timeout_s: float = 60.0
    ) -> Process:
        """Starts `mcr run ARGUMENTS` with the TOML text as its file, and returns once it answers."""
        files: list[str] = []
        if config is not None:
            path = self.directory / f"{namespace.name}.toml"
            path.write_text(config)
            files = ["-c", str(path)]
        process = self.spawn(namespace, _mcr(namespace, ("run", *files, *arguments)))
        process.wait_for("mcr: ready", timeout_s)
        return process

    def ask(self, namespace: Namespace, method: str, **params: object) -> list[dict[str, Any]]:
        """One request to the instance's control socket, without the time that a command takes to start."""
        path = self.runtime_directory / f"{namespace.name}.sock"
        with ControlClient(path, timeout_s=30) as client:
            rows: list[dict[str, Any]] = client.call(method, **params)
        return rows

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "MCR_LAB": self.prefix,
            "MCR_RUNTIME_DIR": str(self.runtime_directory),
            "MCR_STATE_DIR": str(self.state_directory),
            "PYTHONUNBUFFERED": "1",
        }

    def _kill_processes(self, namespace: Namespace) -> None:
        for process in self._processes:
            if process.namespace == namespace:
                process.child.kill()
                process.child.wait(SETTLE_S)
        deadline = time.monotonic() + SETTLE_S
        while pids := processes_in(namespace):  # what they left behind
            if time.monotonic() > deadline:
                raise LabError(f"processes {pids} in {namespace.name} survive SIGKILL")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)

    def leftovers(self, namespace: Namespace) -> list[str]:
        """What is left of an instance and everything else that ran in the namespace, which still exists.

        Processes, pins, files in the runtime directory, XDP programs, and memberships that the kernel does
        not hold by itself.
        """
        remaining = [f"process {pid}: {_command_line(pid)}" for pid in processes_in(namespace)]
        remaining += [f"pin {path}" for path in _pins(namespace.name)]
        remaining += [f"file {path}" for path in sorted(self.runtime_directory.glob(f"{namespace.name}*"))]
        for link in json.loads(self.ip(namespace, "-j link show")):
            if "xdp" in link:
                remaining.append(f"XDP program on {link['ifname']}")
        for link in json.loads(self.ip(namespace, "-j maddress show")):
            groups = (ipaddress.ip_address(entry["address"]) for entry in link["maddr"] if "address" in entry)
            for group in groups:
                if group not in KERNEL_GROUPS and group not in SOLICITED_NODES:
                    remaining.append(f"membership {group} on {link['ifname']}")
        return remaining


def leftovers(prefix: str) -> list[str]:
    """What is left on the machine of the laboratories whose names begin so: namespaces, processes, pins."""
    remaining = [f"namespace {path.name}" for path in sorted(NAMESPACES.glob(f"{prefix}*"))]
    mark = os.fsencode(prefix)
    for pid in _pids():
        with contextlib.suppress(OSError):
            told = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            if mark in told and pid != os.getpid():
                remaining.append(f"process {pid}: {_command_line(pid)}")
    if os.geteuid() == 0:
        remaining += [f"pin {path}" for path in _pins(prefix)]
    return remaining


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def processes_in(namespace: Namespace) -> list[int]:
    """Ids of the processes in a namespace; a process that has ended is in none."""
    if not namespace.path.exists():
        return []
    inode = namespace.path.stat().st_ino
    found = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/ns/net").stat().st_ino == inode and pid != os.getpid():
                found.append(pid)
    return found


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def _pins(prefix: str) -> list[Path]:
    return [path for top in sorted(PINS.glob(f"{prefix}*")) for path in (top, *sorted(top.rglob("*")))]


def _remove_pins(namespace: Namespace) -> None:
    """Those of its instance, what a supervisor had staged when it was killed, and its lock."""
    for directory in (PINS / f"{namespace.name}{suffix}" for suffix in ("", "~new", "~lock")):
        if directory.exists():
            shutil.rmtree(directory)


def _delete_namespace(namespace: Namespace) -> None:
    if namespace.path.exists():
        _checked(["ip", "netns", "delete", namespace.name])


def _enter(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _mcr(namespace: Namespace, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "mcr.cli.main", "--instance", namespace.name, *arguments]


def _checked(
    argv: Sequence[str], *, check: bool = True, timeout_s: float = 30.0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        argv,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=env,
    )
    if check and done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done
