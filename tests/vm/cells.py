"""The table of `make test-vm`: its rows, what may be missing and why, and the table as text.

Every cell must be `yes`, but those for which LIMITS has a reason; a limit that no longer holds is a failure
too, so that the table stays true. Pure: nothing here runs.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.vm.network import Lane

RELAY = "relay"
"""The column of what concerns no driver."""

FEATURES = {
    "attach": "attach, mode `auto`",
    "kernel": "kernel path, 1 output",
    "kernel-2": "kernel path, 2 outputs",
    "kernel-6": "kernel path, IPv6",
    "worker": "worker path, a group and a unicast output",
    "worker-6": "worker path, IPv6",
    "vlan": "rule with `vlan=`",
    "output": "output by it, from veth",
    "doctor": "doctor agrees",
    "trace": "trace, kernel and worker path",
    "capture": "capture, before and after",
    "generic": "generic mode: kernel and worker path",
    "packet": "AF_PACKET ingress, IPv4, IPv6 and `vlan=`",
    "jumbo": "MTU 9000: 8000 bytes by the kernel path",
    "jumbo-worker": "MTU 9000: 1316 bytes by the worker path",
    "link": "link down and up: both paths after it",
    "keep": "`--on-exit keep`: kernel path with no process",
    "adopt": "next start adopts it: counters continue, both paths",
    "accounted": "`mcr stats --check` at the end",
    "demo": "`make demo`: relayed N of N",
}

ONCE = ("trace", "capture", "accounted", "demo")
OF_THE_RELAY = ("doctor", *ONCE)
OF_STACKED = ("attach", "kernel", "worker", "output", "doctor", "generic", "packet", "link")
"""What is tried with devices that are made of others."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One answer of a run. evidence: what was seen, in a few words."""

    feature: str
    lane: str
    ok: bool
    evidence: str = ""

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run was made on."""

    suite: str
    kernel: str
    accelerator: str
    qemu: str

    @property
    def version(self) -> tuple[int, int]:
        """Of the kernel."""
        found = re.match(r"(\d+)\.(\d+)", self.kernel)
        assert found, self.kernel
        return int(found[1]), int(found[2])


@dataclass(frozen=True, slots=True)
class Limit:
    """Why cells may be `no`. lanes: empty for all. holds: on which machines."""

    reason: str
    features: tuple[str, ...]
    lanes: tuple[str, ...] = ()
    holds: Callable[[Machine], bool] = lambda _: True

    def covers(self, machine: Machine, feature: str, lane: str) -> bool:
        """Whether it is the reason for this cell."""
        return feature in self.features and (not self.lanes or lane in self.lanes) and self.holds(machine)


def _before(major: int, minor: int) -> Callable[[Machine], bool]:
    return lambda machine: machine.version < (major, minor)


LIMITS = (
    Limit(
        "QEMU's vmxnet3 delivers no frame above 1500 bytes, without MCR neither",
        ("jumbo",),
        ("vmxnet3",),
    ),
    Limit(
        "igb refuses an MTU of 9000 while an XDP program is attached (ip: Invalid argument)",
        ("jumbo", "jumbo-worker"),
        ("igb",),
    ),
    Limit(
        "before Linux 6.3 the kernel does not say which drivers transmit redirected frames: from an interface"
        " in native mode the worker path takes the rule",
        ("kernel", "kernel-2", "kernel-6", "jumbo", "keep"),
        ("veth", "virtio_net", "igb"),
        _before(6, 3),
    ),
    Limit(
        "the driver has no native XDP, and in generic mode clones cannot be told apart: the worker path takes"
        " a rule with several outputs",
        ("kernel-2",),
        ("e1000e",),
    ),
    Limit(
        "no hardware and without native XDP: `auto` takes AF_PACKET, which keeps datagrams apart, and with it"
        " the worker path",
        ("kernel",),
        ("bridge", "vlan", "macvlan"),
    ),
    Limit(
        "vmxnet3 has no native XDP before Linux 6.6, and later one that receives nothing after a link down"
        " and up: `auto` takes generic mode, where clones cannot be told apart",
        ("kernel-2",),
        ("vmxnet3",),
    ),
)


def wanted(lanes: Iterable[Lane]) -> list[tuple[str, str]]:
    """The cells that a run of these lanes must fill: feature and lane."""
    found = [(feature, RELAY) for feature in OF_THE_RELAY]
    for lane in lanes:
        own = [feature for feature in FEATURES if feature != "output" and feature not in ONCE]
        found += [(feature, lane.name) for feature in (OF_STACKED if lane.stacked else own)]
    return found


def limit_of(machine: Machine, feature: str, lane: str) -> Limit | None:
    """The first limit that covers a cell."""
    return next((limit for limit in LIMITS if limit.covers(machine, feature, lane)), None)


def faults(machine: Machine, cells: Sequence[Cell], lanes: Iterable[Lane]) -> list[str]:
    """What the run of these lanes shows that must not be, one line each."""
    filled = {(cell.feature, cell.lane) for cell in cells}
    found = [
        f"{lane}, {feature}: no answer" for feature, lane in wanted(lanes) if (feature, lane) not in filled
    ]
    for cell in cells:
        limit = limit_of(machine, cell.feature, cell.lane)
        if not cell.ok and limit is None:
            found.append(f"{cell.lane}, {cell.feature}: {cell.evidence}")
        elif cell.ok and limit is not None:
            found.append(
                f"{cell.lane}, {cell.feature}: works, so this limit is to be removed: {limit.reason}"
            )
    return found


def table(machine: Machine, cells: Iterable[Cell]) -> str:
    """The run as Markdown: features by drivers, and the limits that its footnotes name."""
    answers = {(cell.feature, cell.lane): cell for cell in cells}
    lanes = list(dict.fromkeys(lane for _, lane in answers if lane != RELAY))
    notes: list[str] = []
    lines = [
        f"**{machine.suite}**: Linux {machine.kernel}, {machine.qemu}, {machine.accelerator}",
        "",
        f"| | {' | '.join(lanes)} |",
        f"|---|{'---|' * len(lanes)}",
    ]
    for feature, title in FEATURES.items():
        row = [_word(machine, answers.get((feature, lane)), notes) for lane in lanes]
        if any(row):
            lines.append(f"| {title} | {' | '.join(row)} |")
    whole = [cell for cell in answers.values() if cell.lane == RELAY]
    lines += ["", *(f"- {FEATURES[cell.feature]}: {_word(machine, cell, notes)}" for cell in whole)]
    lines += [f"- [{number}] {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def _word(machine: Machine, cell: Cell | None, notes: list[str]) -> str:
    """What stands in a cell; a reason for `no` becomes a note."""
    if cell is None:
        return ""
    if cell.ok:
        return f"yes ({cell.evidence})" if cell.feature == "attach" else "yes"
    limit = limit_of(machine, cell.feature, cell.lane)
    note = limit.reason if limit else f"**fault**: {cell.evidence}"
    if note not in notes:
        notes.append(note)
    return f"no [{notes.index(note) + 1}]"


def save(path: Path, machine: Machine, cells: Sequence[Cell]) -> None:
    """Keeps a run, for `load`."""
    path.write_text(json.dumps({"machine": asdict(machine), "cells": [asdict(cell) for cell in cells]}))


def load(path: Path) -> tuple[Machine, list[Cell]]:
    """A run that was kept."""
    kept = json.loads(path.read_text())
    return Machine(**kept["machine"]), [Cell(**cell) for cell in kept["cells"]]
