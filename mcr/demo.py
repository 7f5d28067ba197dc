"""`make demo`: a real stream through a real relay, on one machine and on one screen.

It makes three network namespaces, runs `mcr run`, `mcr send` and two `mcr listen` in them as a user would,
and shows what happens. It must never touch the machine's own network, nor leave anything behind, however it
ends.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click

from mcr import loader
from mcr.cli.common import Row
from mcr.cli.main import report
from mcr.control import ControlClient
from mcr.errors import ExitStatus, McrError
from mcr.limits import MAX_SCALE, VARIABLE, scaled, slow_machine

NAMESPACES = Path("/var/run/netns")
DRAWING = """\
MCR demo: one stream in, one multicast and one unicast output

 {source:^24}   {relay:^24}   {sinks:>23}
 +----------------------+   +----------------------+   +----------------------+
 |       mcr send       |   |       mcr run        |   |    2 x mcr listen    |
 |             10.1.0.1 |   | 10.1.0.2    10.2.0.1 |   | 10.2.0.2             |
 |                 eth0 |-->| in0             out0 |-->| eth0                 |
 +----------------------+   +----------------------+   +----------------------+
           239.1.1.1:5000 -->              --> 239.2.2.2:6000 and 10.2.0.2:6001
"""
NETWORK = """\
link add name eth0 netns {source} mtu 1500 type veth peer name in0 netns {relay} mtu 1500
link add name out0 netns {relay} mtu 1500 type veth peer name eth0 netns {sinks} mtu 1500
-n {source} address add 10.1.0.1/24 dev eth0
-n {relay} address add 10.1.0.2/24 dev in0
-n {relay} address add 10.2.0.1/24 dev out0
-n {sinks} address add 10.2.0.2/24 dev eth0
-n {source} link set eth0 up
-n {relay} link set in0 up
-n {relay} link set out0 up
-n {sinks} link set eth0 up"""
CONFIG = """\
[[attach]]
interface = "in0"

[[rule]]
name = "studio-cam-1"
from = "239.1.1.1%in0:5000"
to   = ["239.2.2.2%out0:6000,ttl=8", "10.2.0.2:6001"]
"""
SOURCE, SINKS, PAYLOAD_BYTES = "239.1.1.1%eth0:5000", ("239.2.2.2%eth0:6000", "10.2.0.2%eth0:6001"), 1316
HINTS = f"""\
Try next (`make install` puts mcr on your PATH):
  mcr attach eth0       becomes a relay, until Ctrl-C; then in another terminal
  mcr rule add cam --from 239.1.1.1%eth0:5000 --to 10.20.0.9:6000
  bpftool map dump pinned {loader.pin_dir("default") / "rules"}
"""
LOSSES = ("dropped_", "receive_ring_full", "fill_ring_empty", "socket_dropped")
ORDINARY_PPS, MEASURE_S = 50_000, 0.2  # datagrams of an ordinary machine to itself
POLL_S, SET_UP_S, STOP_S, SPARE_S = 0.02, 20.0, 10.0, 8.0  # SPARE_S: the sinks' time beyond count / rate


@dataclass(frozen=True, slots=True)
class Child:
    """An `mcr` command in a namespace; what it says goes to two files."""

    command: str
    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    def ended(self) -> bool:
        return self.process.poll() is not None

    def is_ready(self) -> bool:
        """Whether it has said so. Raises McrError if it ended instead."""
        if self.ended():
            raise self.failure()
        return "ready\n" in self.stderr.read_text(errors="replace")

    def answer(self) -> Row:
        """What it printed with -j at its end. Raises McrError if that is nothing."""
        if not (text := self.stdout.read_text()):
            raise self.failure()
        return dict(json.loads(text)[0])

    def failure(self) -> McrError:
        """Why it ended: its status and its last words."""
        cause, _, remedy = self.stderr.read_text(errors="replace").strip().rpartition("\n  remedy: ")
        words = ((cause or remedy).splitlines() or ["it said nothing"])[-1].removeprefix("mcr: ")
        status = f"mcr {self.command} ended with status {self.process.returncode}: {words}"
        return McrError(status, remedy if cause else "run it again, and look into dmesg")

    def stop(self) -> None:
        """Asks it to end, and makes it end if it does not."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(scaled(STOP_S))
        self.process.kill()
        self.process.wait()


class Stage:
    """Everything that the demo makes, and `cleanup`, which removes it.

    Signals are only noted, and `wait` alone acts on them, so that neither making nor removing is cut short.
    """

    def __init__(self) -> None:
        prefix = f"mcr-demo-{os.getpid()}"
        self.names = {role: f"{prefix}-{role}" for role in ("source", "relay", "sinks")}
        self.instance = self.names["relay"]
        self.pins = tuple(loader.pin_dir(self.instance + mark) for mark in ("", "~new", "~lock"))
        self.cleanup = contextlib.ExitStack()
        self._signal: int | None = None
        self._supervisor: Child | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note_signal)
        self.directory = Path(tempfile.mkdtemp(prefix=f"{prefix}-"))
        self.cleanup.callback(shutil.rmtree, self.directory)

    def _note_signal(self, number: int, _: FrameType | None) -> None:
        self._signal = number

    def wait(self, done: Callable[[], bool], timeout_s: float = SET_UP_S, late: str = "") -> bool:
        """Whether it is done in time; if it is not and `late` says what that means, that is an McrError.

        Also raises McrError after a signal, and if the supervisor has ended.
        """
        timeout_s = scaled(timeout_s)
        deadline_s = time.monotonic() + timeout_s
        while not done():
            if self._signal is not None:
                raise McrError(f"stopped by {signal.Signals(self._signal).name}", "run it again: make demo")
            if self._supervisor is not None and self._supervisor.ended():
                raise self._supervisor.failure()
            if time.monotonic() >= deadline_s:
                if late:
                    raise McrError(f"{late} after {timeout_s:.0f} s", slow_machine("see top and dmesg"))
                return False
            time.sleep(POLL_S)
        return True

    def make_network(self) -> None:
        """Makes the namespaces and their links, which have carrier when this returns."""
        for name in self.names.values():
            _ip("netns", "add", name)
            self.cleanup.callback(_ip, "netns", "delete", name)
            self.cleanup.callback(_kill_all_in, name)
        for line in NETWORK.format(**self.names).splitlines():
            _ip(*line.split())
        # The kernel drops what is sent before it has handled the carrier's coming.
        self.wait(lambda: all(map(_has_carrier, self.names.values())), late="a link is without carrier")

    def spawn(self, role: str, *command: str) -> Child:
        """Starts `mcr COMMAND` in a namespace. Not by `ip netns exec`, which hides bpffs."""
        name = " ".join(command[:2])
        stdout, stderr = (self.directory / f"{name}.{end}" for end in ("stdout", "stderr"))
        variables = dict.fromkeys(("MCR_RUNTIME_DIR", "MCR_STATE_DIR"), str(self.directory))
        program = ["nsenter", f"--net={NAMESPACES / self.names[role]}", sys.executable, "-m", "mcr.cli.main"]
        with stdout.open("wb") as out, stderr.open("wb") as err:
            process = subprocess.Popen(
                [*program, "--instance", self.instance, *command],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0, env=os.environ | variables,
            )  # fmt: skip
        self.cleanup.callback((child := Child(name, process, stdout, stderr)).stop)
        return child

    def start_supervisor(self) -> ControlClient:
        """Runs `mcr run` with CONFIG, until it is ready."""
        (file := self.directory / "demo.toml").write_text(CONFIG)
        for pin in self.pins:
            self.cleanup.callback(shutil.rmtree, pin, ignore_errors=True)  # if the supervisor is killed
        self._supervisor = self.spawn("relay", "run", "-c", str(file))
        self.wait(self._supervisor.is_ready, late="mcr run is not ready")
        return self.cleanup.enter_context(ControlClient(self.directory / f"{self.instance}.sock"))

    def supervisor_log(self) -> list[str]:
        """What the supervisor has said of errors."""
        text = self._supervisor.stderr.read_text(errors="replace") if self._supervisor else ""
        return [line for line in text.splitlines() if " ERROR " in line or " WARNING " in line]

    def leftovers(self) -> list[str]:
        """What is still there of all that it made."""
        made = (self.directory, *self.pins, *(NAMESPACES / name for name in self.names.values()))
        return [str(path) for path in made if path.exists()]


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, process_group=0)
    if done.returncode:
        cause = f"ip {' '.join(arguments)}: {done.stderr.strip()}".replace("\n", "; ")
        raise McrError(cause, "run it as root outside of unprivileged containers, which lack CAP_SYS_ADMIN")
    return done.stdout


def _has_carrier(name: str) -> bool:
    links = json.loads(_ip("-n", name, "-j", "link", "show", "type", "veth"))
    return all(link["operstate"] == "UP" for link in links)


def _kill_all_in(name: str) -> None:
    """Ends what a killed supervisor has left running. Raises McrError if something does not end."""
    deadline_s = time.monotonic() + scaled(STOP_S)
    while pids := _ip("netns", "pids", name).split():
        if time.monotonic() > deadline_s:
            raise McrError(f"processes {', '.join(pids)} in {name} survive SIGKILL", "look into dmesg")
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def _losses(client: ControlClient) -> Counter[str]:
    """Packets that the relay lost, by reason."""
    losses: Counter[str] = Counter()
    for row in (*client.call("stats"), *client.call("status")):
        losses.update({k.removeprefix("dropped_"): row[k] for k in row if k.startswith(LOSSES)})
    return +losses


def _watch(stage: Stage, client: ControlClient, children: list[Child]) -> None:
    """One line of counters a second, until all children have ended."""
    click.echo("\n  time   received    relayed   sent to 239.2.2.2   sent to 10.2.0.2    dropped")
    started_s = time.monotonic()
    for second in itertools.count(1):
        due_s = started_s + second - time.monotonic()
        ended = stage.wait(lambda: all(child.ended() for child in children), due_s)
        rule, group, host = client.call("stats")
        click.echo(
            f"{time.monotonic() - started_s:4.1f} s"
            f" {rule['received_packets']:10} {rule['relayed_packets']:10}"
            f" {group['sent_packets']:19} {host['sent_packets']:18} {_losses(client).total():10}"
        )
        if ended:
            return


def _describe(sink: Row, digest: str) -> str:
    p50, p99 = (f"{(sink[key] or 0) / 1000:.0f} µs" for key in ("latency_p50_ns", "latency_p99_ns"))
    counts = ", ".join(f"{key} {sink[key]}" for key in ("lost", "duplicates", "reordered"))
    verdict = "equal to" if sink["digest"] == digest else "unlike"
    return (
        f"mcr listen {sink['stream']}: {sink['packets']} packets, SHA-256 {verdict} the sender's\n"
        f"  {counts}; latency p50 {p50}, p99 {p99}"
    )


def _start_relay(stage: Stage) -> ControlClient:
    client = stage.start_supervisor()
    rows = {row["object"]: row for row in client.call("status")}
    interface, membership = rows["interface"], rows["membership"]
    if interface["state"] != "attached":
        raise McrError(f"in0 is not attached: {interface['reason']}", "see what it has: ip -d link")
    rule = client.call("rule.show")[0]
    click.echo(
        f"mcr run: in0 attached, mode {interface['mode']}, ingress {interface['ingress']}; "
        f"joined {membership['held']} of {membership['wanted']} groups"
    )
    click.echo(click.wrap_text(f"path {rule['path']}: {rule['path_reason']}", 80, "  ", "    "))
    return client


def show(stage: Stage, count: int, rate: float) -> tuple[int, list[str]]:
    """One run. Returns how many packets every sink got, once and whole, and what went wrong."""
    click.echo(f"{DRAWING.format(**stage.names)}\n{CONFIG}")
    stage.make_network()
    client = _start_relay(stage)
    number, limit_s = str(count), str(count / rate + scaled(SPARE_S))
    ends = ("--expect", number, "--idle", "2", "--timeout", limit_s, "--digest", "-j")
    sinks = [stage.spawn("sinks", "listen", stream, *ends) for stream in SINKS]
    stage.wait(lambda: all(sink.is_ready() for sink in sinks), late="mcr listen is not ready")
    load = ("--count", number, "--rate", str(rate), "--size", str(PAYLOAD_BYTES), "--duration", limit_s)
    source = stage.spawn("source", "send", SOURCE, *load, "--digest", "-j")
    megabits = f"{rate * PAYLOAD_BYTES * 8 / 1e6:.0f} Mbit/s"
    click.echo(f"mcr send: {count} packets of {PAYLOAD_BYTES} bytes, {rate:.0f} a second: {megabits}")
    _watch(stage, client, [source, *sinks])
    sent, received = source.answer(), [sink.answer() for sink in sinks]
    click.echo(f"\nmcr send {SOURCE}: {sent['packets']} packets\n  SHA-256 {sent['digest']}")
    for sink in received:
        click.echo(_describe(sink, sent["digest"]))
    wrong = [sink for sink in received if not sink["complete"] or sink["digest"] != sent["digest"]]
    faults = [f"{sink['stream']} has not received exactly what was sent" for sink in wrong]
    if wrong:
        faults += [f"drop reason {reason}: {lost} packets" for reason, lost in _losses(client).items()]
        faults += stage.supervisor_log()
    return min(sink["packets"] - sink["duplicates"] - sink["corrupt"] for sink in received), faults


def run(count: int, rate: float) -> ExitStatus:
    """Sets up, shows, cleans up and tells. Raises McrError."""
    if os.geteuid() != 0:
        needs = "the demo makes network namespaces and loads BPF, for which it must be root"
        raise McrError(needs, "sudo make demo", status=ExitStatus.NOT_PERMITTED)
    if missing := [tool for tool in ("ip", "nsenter") if not shutil.which(tool)]:
        raise McrError(f"not found: {', '.join(missing)}", "apt install iproute2 util-linux")
    stage = Stage()
    try:
        with stage.cleanup:
            relayed, faults = show(stage, count, rate)
    finally:
        left = stage.leftovers()
        nothing = "nothing is left: no process, pin, namespace or file"
        click.echo(f"\ncleaned up: {'left behind: ' + ', '.join(left) if left else nothing}\n")
    click.echo("\n".join(faults) or HINTS)
    click.echo(f"relayed {relayed} of {count}")
    return ExitStatus.FAILED if faults or left else ExitStatus.DONE


def _slowness() -> float:
    """How many times fewer datagrams a second this machine sends itself than an ordinary one; at least 1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near:
        near.bind(("127.0.0.1", 0))
        address, sent, end_s = near.getsockname(), 0, time.monotonic() + MEASURE_S
        while time.monotonic() < end_s:
            near.sendto(b"", address)
            sent += 1
    return max(1.0, ORDINARY_PPS * MEASURE_S / sent)


@click.command()
@click.option("--count", type=click.IntRange(min=1), help="Packets.  [default: 10 s of them]")
@click.option("--rate", type=click.FloatRange(min=1), help="Packets/s.  [default: 10000, or fewer if slow]")
def command(count: int | None, rate: float | None) -> None:
    """Relay one stream to two outputs through three network namespaces, and show it."""
    try:
        slowness = _slowness()
        if slowness > 1:
            click.echo(f"this machine is {slowness:.1f} times slower than others: fewer packets, more time")
            os.environ.setdefault(VARIABLE, str(min(slowness, MAX_SCALE)))
        rate = rate or max(1.0, 10_000 // slowness)
        sys.exit(run(count or int(10 * rate), rate))
    except McrError as error:
        report(error)
        sys.exit(error.status)


if __name__ == "__main__":
    command()
