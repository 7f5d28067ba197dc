"""What runs in the virtual machine: `python -m tests.vm.guest FILE` writes a line for each cell to FILE.

One supervisor, and one process that sends and receives, carry every stream at once, since without KVM
starting a process takes seconds. A phase changes something for all drivers, sends a round of all streams,
and judges each driver by what arrived. It must run in a machine of its own, as root.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from mcr.control import ControlClient
from mcr.errors import McrError
from mcr.limits import VARIABLE
from tests.netns.lab import Lab, LabError, Process
from tests.vm import traffic
from tests.vm.cells import RELAY, Cell
from tests.vm.network import SMALL_FRAMES, VETH, VLAN_ID, Lane, Network, tagged_name
from tests.vm.traffic import IN_PORT, LARGE, SMALL, Place, Stream

COUNT = 200
FIRST_OUT_PORT = 6000
READY_S = 600.0
ASK_S = 300.0
COMMAND_S = 300.0
TAP_S = 100
DEMO_S = 900.0
ANEW_S = 60.0
TRACED = 5

Row = dict[str, Any]


class Rules:
    """The rules of a lane, by the feature that they show."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.streams: dict[str, Stream] = {}
        self._lines: list[str] = []
        first, second = (*lane.outward, *VETH.outward)[:2] if not lane.stacked else VETH.outward
        group = f"239.{lane.number}.0."
        to = f"239.{lane.number}.10"
        unicast = Place(second, f"10.{(VETH if lane.stacked else lane).number}.2.2")
        self._add("kernel", f"{group}1", Place(first, f"{to}0.1"))
        self._add("worker", f"{group}2", Place(first, f"{to}0.2"), unicast, path="worker")
        if lane.stacked:
            self._add_output(f"{group}3", Place(lane.outward[0], f"{to}0.3"))
            return
        self._add("kernel-2", f"{group}4", Place(first, f"{to}1.4"), Place(second, f"{to}2.4"))
        self._add("kernel-6", f"ff15::{lane.number}:1", Place(first, f"ff15::{lane.number}:101"))
        self._add(
            "worker-6", f"ff15::{lane.number}:2", Place(first, f"ff15::{lane.number}:102"), path="worker"
        )
        self._add("vlan", f"{group}5", Place(first, f"{to}0.5"), vlan=True)

    def _add(self, feature: str, group: str, *sinks: Place, path: str = "auto", vlan: bool = False) -> None:
        sender = tagged_name(self.lane) if vlan else self.lane.inward
        self._rule(feature, Place(sender, group), self.lane.inward, sinks, path, vlan)

    def _add_output(self, group: str, sink: Place) -> None:
        self._rule("output", Place(VETH.inward, group), VETH.inward, (sink,), "auto", False)

    def _rule(
        self, feature: str, source: Place, inward: str, sinks: tuple[Place, ...], path: str, vlan: bool
    ) -> None:
        name = f"{self.lane.short}-{feature}"
        port = FIRST_OUT_PORT + self.lane.number  # lanes share the place of a unicast output
        self.streams[feature] = Stream(name, source, sinks, port)
        stream = f"{_host(source)}%{inward}:{IN_PORT}" + (f",vlan={VLAN_ID}" if vlan else "")
        outputs = [_output(sink, port) for sink in sinks]
        self._lines += ["[[rule]]", f'name = "{name}"', f'from = "{stream}"']
        self._lines += [f"to = {json.dumps(outputs)}", f'path = "{path}"']

    def toml(self, **options: str) -> str:
        """The lane's part of the configuration. options: of the attachment."""
        table = {"interface": self.lane.inward} | options
        attach = (f'{key} = "{value}"' for key, value in table.items())
        return "\n".join(["[[attach]]", *attach, *self._lines, ""])


def _host(place: Place) -> str:
    return f"[{place.address}]" if ":" in place.address else place.address


def _output(sink: Place, port: int) -> str:
    """A unicast output's interface is the routing's choice."""
    if sink.address.startswith("10."):
        return f"{sink.address}:{port}"
    return f"{_host(sink)}%{sink.interface}:{port}"


class Trial:
    """The network, the supervisor in it, and where the cells go."""

    def __init__(self, lab: Lab, cells: TextIO) -> None:
        self.lab = lab
        self._cells = cells
        self.network = Network(lab)
        self.rules = {lane.name: Rules(lane) for lane in self.network.lanes}
        self.supervisor: Process | None = None

    @property
    def lanes(self) -> list[Lane]:
        return self.network.lanes

    @property
    def nics(self) -> list[Lane]:
        """Those that take part in every phase."""
        return [lane for lane in self.lanes if not lane.stacked]

    def say(self, feature: str, lane: str, wrong: str, evidence: str = "") -> None:
        """One cell: ok if nothing is wrong."""
        self._cells.write(Cell(feature, lane, not wrong, wrong or evidence).line() + "\n")
        self._cells.flush()

    def start(self) -> None:
        """A supervisor, ready, which leaves the kernel path when it ends."""
        self.supervisor = self.lab.supervisor(
            self.network.rel, "--on-exit", "keep", "-c", str(self.config()), timeout_s=READY_S
        )

    def config(self, **options: str) -> Path:
        """Writes the file. options: of every attachment."""
        path = self.lab.directory / "mcr.toml"
        path.write_text("".join(rules.toml(**options) for rules in self.rules.values()))
        return path

    def stop(self) -> None:
        assert self.supervisor
        self.supervisor.terminate(READY_S)

    def ask(self, method: str, **params: object) -> list[Row]:
        path = self.lab.runtime_directory / f"{self.network.rel.name}.sock"
        with ControlClient(path, timeout_s=ASK_S) as client:
            rows: list[Row] = client.call(method, **params)
        return rows

    def settle(self) -> None:
        """Returns once nothing is pending, or nothing has changed for a while: what is wrong will show."""
        seen, since = None, time.monotonic()
        while time.monotonic() - since < 20:
            rules = self.ask("rule.show")
            states = [(row["state"], row["output_state"], row["path"]) for row in rules]
            status = [row for row in self.ask("status") if row["object"] in ("interface", "membership")]
            waiting = [
                row for row in status if row.get("state") == "pending" or row.get("held") != row.get("wanted")
            ]
            if not waiting and all(state[:2] == ("active", "active") for state in states):
                return
            now = (states, [(row.get("state"), row.get("held")) for row in status])
            if now != seen:
                seen, since = now, time.monotonic()
            time.sleep(1)

    def set_mtu(self, mtu: int) -> None:
        """Returns once every NIC that takes the MTU is attached anew, for frames of another size."""

        def workers() -> dict[str, int]:
            rows = self.interfaces()
            names = [lane.inward for lane in self.nics if lane.name not in SMALL_FRAMES]
            return {name: rows[name]["worker_pid"] for name in names}

        before, deadline = workers(), time.monotonic() + ANEW_S
        self.network.set_mtu(mtu)
        while any(pid in (None, before[name]) for name, pid in workers().items()):
            if time.monotonic() > deadline:
                break  # what is wrong will show
            time.sleep(1)
        self.settle()

    def round(
        self, features: Sequence[str], lanes: Sequence[Lane] | None = None, size: int = SMALL
    ) -> dict[tuple[str, str], str]:
        """Sends the streams of these features. Returns what is wrong by lane and feature; empty is well."""
        chosen = {
            (lane.name, feature): stream
            for lane in (self.lanes if lanes is None else lanes)
            for feature, stream in self.rules[lane.name].streams.items()
            if feature in features
        }
        gen, snk = self.network.gen, self.network.snk
        before = self.counts()
        wrong = traffic.run(self.lab, gen, snk, list(chosen.values()), COUNT, size)
        after = self.counts() if wrong else {}
        for rule in wrong:
            gained = after.get(rule, Counter()) - before.get(rule, Counter())
            words = ", ".join(f"{name} {count}" for name, count in gained.items())
            wrong[rule] = f"{wrong[rule]} (MCR: {words or 'nothing'})"
        return {key: wrong.get(stream.rule, "") for key, stream in chosen.items()}

    def counts(self) -> dict[str, Counter[str]]:
        """By rule what it and all its outputs have counted so far; empty while no supervisor runs."""
        counts: dict[str, Counter[str]] = {}
        with suppress(McrError):
            for row in self.ask("stats"):
                counted = {
                    name.removesuffix("_packets"): value for name, value in row.items() if _counts(name)
                }
                counts.setdefault(row["rule"], Counter()).update(counted)
        return counts

    def paths(self) -> dict[str, tuple[str, str]]:
        """By rule: its path, and what it waits for or why it takes that path."""
        rows = self.ask("rule.show")
        return {row["rule"]: (row["path"], row["reason"] or row["path_reason"]) for row in rows}

    def interfaces(self) -> dict[str, Row]:
        """The rows of `mcr status` by interface."""
        return {row["interface"]: row for row in self.ask("status") if row["object"] == "interface"}

    def attach_anew(self, **options: str) -> None:
        """Everything, with these options, by a change of the file and a reload."""
        self.config(**options)
        self.ask("reload")
        self.settle()


def _counts(name: str) -> bool:
    """Whether a column of `mcr stats` counts packets of one kind."""
    return name.startswith("dropped_") or name in ("received_packets", "sent_packets")


def _needs_kernel(trial: Trial, lane: Lane, feature: str, paths: Mapping[str, tuple[str, str]]) -> str:
    """Why a rule is not on the kernel path; empty if it is."""
    path, reason = paths[trial.rules[lane.name].streams[feature].rule]
    return "" if path == "kernel" else f"worker path: {reason}"


def _joined(*words: str) -> str:
    return "; ".join(word for word in words if word)


def begin(trial: Trial) -> None:
    """Attached as `auto` does it: every path of every driver."""
    trial.settle()
    interfaces = trial.interfaces()
    for lane in trial.lanes:
        row = interfaces[lane.inward]
        copies = " without copying" if row["zero_copy"] else ""
        trial.say("attach", lane.name, row["reason"], f"{row['mode']}, {row['ingress']}{copies}")
    wrong = trial.round(("kernel", "kernel-2", "kernel-6", "worker", "worker-6", "vlan", "output"))
    paths = trial.paths()
    for lane in trial.lanes:
        for feature in trial.rules[lane.name].streams:
            path = _needs_kernel(trial, lane, feature, paths) if feature.startswith("kernel") else ""
            trial.say(feature, lane.name, _joined(wrong[lane.name, feature], path))


def look(trial: Trial) -> None:
    """What the doctor says of the machine and of each interface."""
    lab, rel = trial.lab, trial.network.rel
    done = lab.mcr(rel, "doctor", "--json", check=False, timeout_s=COMMAND_S)
    checks: list[Row] = json.loads(done.stdout or "[]")
    interfaces = trial.interfaces()
    needed = [
        f"{row['check']}: {row['evidence']}" for row in checks if row["answer"] == "no" and row["needed"]
    ]
    trial.say("doctor", RELAY, _joined(*needed, "" if done.returncode == 0 else f"status {done.returncode}"))
    for lane in trial.lanes:
        own = {row["check"]: row for row in checks if row["interface"] == lane.inward}
        trial.say("doctor", lane.name, _disagrees(own, interfaces[lane.inward]["mode"]))


def _disagrees(checks: Mapping[str, Row], mode: str) -> str:
    """What the doctor says of an interface that is not so."""
    if not checks:
        return "doctor does not look at it"
    attached, native = checks["attached"], checks["native XDP"]
    wrong = "" if attached["answer"] == "yes" else f"attached: {attached['evidence']}"
    if native["answer"] == ("no" if mode == "native" else "yes"):
        wrong = _joined(wrong, f"native XDP {native['answer']}, but the mode is {mode}")
    return wrong


def tap(trial: Trial) -> None:
    """A trace of each path, and a capture before and after; a relay runs one of them at a time."""
    lane = trial.nics[1]  # a NIC, not the veth that other tests have
    traced = (_traced(trial, lane, feature) for feature in ("kernel", "worker"))
    trial.say("trace", RELAY, _joined(*traced))
    rule, path = trial.rules[lane.name].streams["worker"].rule, trial.lab.directory / "pcapng"
    wrong, process = _tapped(
        trial, lane, "worker", "capture", rule, "--write", str(path), "--count", str(3 * COUNT)
    )
    whole = f"{COUNT} packets before, {2 * COUNT} after"  # of a rule with two outputs
    trial.say("capture", RELAY, wrong or ("" if whole in process.output() else process.output()[-200:]))


def _tapped(trial: Trial, lane: Lane, feature: str, *command: str) -> tuple[str, Process]:
    """A round of one stream while a command listens. Returns what is wrong, and the command, ended."""
    argv = [sys.executable, "-m", "mcr.cli.main", "--instance", trial.network.rel.name, *command]
    process = trial.lab.spawn(trial.network.rel, [*argv, "--timeout", str(TAP_S)])
    process.wait_for("ing ", COMMAND_S)  # tracing …, capturing …
    wrong = trial.round((feature,), [lane])[lane.name, feature]
    status = process.wait(2 * COMMAND_S)
    return _joined(wrong, f"status {status}: {process.output()[-200:]}" if status else ""), process


def _traced(trial: Trial, lane: Lane, feature: str) -> str:
    """What is wrong with a trace: every packet must be relayed, and every output must say that it sent it."""
    stream = f"{trial.rules[lane.name].streams[feature].source.address}%{lane.inward}:{IN_PORT}"
    wrong, process = _tapped(trial, lane, feature, "trace", stream, "--count", str(TRACED), "--json")
    if wrong:
        return wrong
    rows = json.loads(process.stdout.read_text())
    seen = [f"{row['object']} {row['verdict']} {row['reason']}".strip() for row in rows]
    sent = len(trial.rules[lane.name].streams[feature].sinks) * TRACED
    expected = {"packet relayed": TRACED, "output sent": sent}
    counted = {words: seen.count(words) for words in dict.fromkeys(seen)}
    return "" if counted == expected else f"traced {counted}"


def generic(trial: Trial) -> None:
    """Everything attached in generic mode."""
    _anew(trial, "generic", ("kernel", "worker"), mode="generic")


def packet(trial: Trial) -> None:
    """AF_PACKET as the ingress."""
    _anew(trial, "packet", ("worker", "worker-6", "vlan"), ingress="packet")


def _anew(trial: Trial, feature: str, streams: Sequence[str], **options: str) -> None:
    trial.attach_anew(**options)
    interfaces = trial.interfaces()
    wrong = trial.round(streams)
    for lane in trial.lanes:
        found = (words for (name, _), words in wrong.items() if name == lane.name)
        trial.say(feature, lane.name, _joined(interfaces[lane.inward]["reason"], *found))


def link(trial: Trial) -> None:
    """Attached as `auto` does it again; every interface goes down and comes back."""
    trial.attach_anew()
    trial.network.interrupt()
    trial.settle()
    wrong = trial.round(("kernel", "worker"))
    for lane in trial.lanes:
        found = (wrong[lane.name, feature] for feature in ("kernel", "worker"))
        trial.say("link", lane.name, _joined(*found))


def jumbo(trial: Trial) -> None:
    """MTU 9000 while attached, and back."""
    trial.set_mtu(9000)
    paths = trial.paths()
    large = trial.round(("kernel",), trial.nics, LARGE)
    small = trial.round(("worker",), trial.nics)
    for lane in trial.nics:
        refused = "the MTU stays 1500" if lane.name in SMALL_FRAMES else ""
        path = _needs_kernel(trial, lane, "kernel", paths)
        trial.say("jumbo", lane.name, refused or _joined(large[lane.name, "kernel"], path))
        trial.say("jumbo-worker", lane.name, refused or small[lane.name, "worker"])
    trial.set_mtu(1500)


def keep(trial: Trial) -> None:
    """The supervisor ends and leaves the kernel path; the next one adopts it."""
    paths = trial.paths()
    by_kernel = {lane.name: _needs_kernel(trial, lane, "kernel", paths) for lane in trial.nics}
    before = trial.counts()
    trial.stop()
    lanes = [lane for lane in trial.nics if not by_kernel[lane.name]]
    wrong = trial.round(("kernel",), lanes)
    kept = {}
    for lane in trial.nics:
        missing = by_kernel[lane.name] or wrong[lane.name, "kernel"]
        trial.say("keep", lane.name, missing)
        kept[lane] = not missing
    trial.start()
    trial.settle()
    after = trial.counts()
    wrong = trial.round(("kernel", "worker"), trial.nics)
    for lane in trial.nics:
        rule = trial.rules[lane.name].streams["kernel"].rule
        counted = after[rule]["sent"] - before[rule]["sent"]
        expected = COUNT if lane in lanes else 0
        lost = f"counted {counted} of {expected} meanwhile" if kept[lane] and counted != expected else ""
        trial.say("adopt", lane.name, _joined(lost, wrong[lane.name, "kernel"], wrong[lane.name, "worker"]))


def account(trial: Trial) -> None:
    """Every packet of the whole run."""
    done = trial.lab.mcr(trial.network.rel, "stats", "--check", check=False, timeout_s=COMMAND_S)
    trial.say("accounted", RELAY, "" if done.returncode == 0 else (done.stdout + done.stderr)[-500:])


def demo(trial: Trial) -> None:
    """As a newcomer runs it, who knows of no time scale."""
    trial.stop()
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    argv = [sys.executable, "-m", "mcr.demo"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=DEMO_S)
    last = done.stdout.strip().rpartition("\n")[2]
    whole = re.fullmatch(r"relayed (\d+) of \1", last)
    trial.say("demo", RELAY, "" if whole and not done.returncode else (done.stdout + done.stderr)[-500:])


PHASES: tuple[Callable[[Trial], None], ...] = (
    begin,
    look,
    tap,
    generic,
    packet,
    link,
    jumbo,
    keep,
    account,
    demo,
)


def run(cells: TextIO) -> None:
    """Every phase. The cells of one that fails are missing, which fails the run."""
    with tempfile.TemporaryDirectory() as directory, Lab("vm", Path(directory)) as lab:
        begun = time.monotonic()
        trial = Trial(lab, cells)
        _log(f"network after {time.monotonic() - begun:.0f} s: {[lane.name for lane in trial.lanes]}")
        trial.start()
        _log(f"supervisor ready after {time.monotonic() - begun:.0f} s")
        for phase in _chosen():
            try:
                phase(trial)
            except Exception:  # noqa: BLE001 (the other phases have their turn whatever this one did)
                traceback.print_exc()
            _log(f"{phase.__name__} done after {time.monotonic() - begun:.0f} s")
        with suppress(LabError, OSError):
            trial.stop()
        for words in _written(lab):
            _log(words)


def _chosen() -> list[Callable[[Trial], None]]:
    """The phases that the kernel's command line names (mcr.phases=begin,keep), or all."""
    words = dict(word.partition("=")[::2] for word in Path("/proc/cmdline").read_text().split())
    names = words.get("mcr.phases", "")
    return [phase for phase in PHASES if not names or phase.__name__ in names.split(",")]


def _written(lab: Lab) -> Iterator[str]:
    """What each process wrote on standard error."""
    for path in sorted(lab.directory.glob("*.stderr")):
        if text := path.read_text(errors="replace").strip():
            yield f"{path.name}:\n{text}"


def _log(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("MCR_TIME_SCALE", "20")
    with Path(sys.argv[1]).open("w") as stream:
        run(stream)
