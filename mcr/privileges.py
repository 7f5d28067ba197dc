"""What a supervisor needs of the kernel's capabilities, and what for: checked before anything is started.

The unit in deploy/ grants exactly these. This module must never change what the process may do.
"""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mcr.errors import ExitStatus, McrError

LOCKED_BYTES = 32 << 20  # the frames of one worker


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability (linux/capability.h, capabilities(7)) and what a supervisor does with it."""

    name: str
    number: int
    purpose: str


ALWAYS = (
    Capability("CAP_BPF", 39, "to load BPF programs and maps"),
    Capability("CAP_PERFMON", 38, "to load XDP programs that compare pointers, and the tracepoint program"),
    Capability("CAP_NET_ADMIN", 12, "to attach XDP programs"),
    Capability("CAP_NET_RAW", 13, "to open AF_XDP and AF_PACKET sockets"),
)
AS_ROOT = (
    Capability("CAP_SETUID", 7, "to run workers as nobody"),
    Capability("CAP_SETGID", 6, "to run workers in no group"),
    Capability("CAP_KILL", 5, "to end a worker that is silent, which is nobody's"),
)
LOCK = Capability("CAP_IPC_LOCK", 14, "to lock the frames of workers in memory, as ulimit -l is too low")


def needed() -> Iterator[Capability]:
    """What this process needs to be a supervisor."""
    yield from ALWAYS
    if os.geteuid() == 0:
        yield from AS_ROOT
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and soft < LOCKED_BYTES:
        yield LOCK


def check() -> None:
    """Raises McrError that names each capability that is missing, and what for."""
    effective = _effective()
    missing = [each for each in needed() if not effective >> each.number & 1]
    if not missing:
        return
    names = " ".join(each.name for each in missing)
    raise McrError(
        "missing " + ", ".join(f"{each.name} ({each.purpose})" for each in missing),
        f"run it as root, or grant it {names} as the unit in deploy/ does",
        status=ExitStatus.NOT_PERMITTED,
    )


def _effective() -> int:
    """The effective set of this process (proc(5))."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError as error:
        raise McrError(f"/proc cannot be read: {error.strerror}", "mount -t proc proc /proc") from error
    for line in text.splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0
