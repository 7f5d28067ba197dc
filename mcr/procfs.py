"""What /proc says of a process, and the numbers of sysctls.

It only reads. This module must never raise: where it may not read, or nothing is there, it says nothing.
"""

import re
from pathlib import Path


def status(pid: int | None, key: str) -> str:
    """A line of proc_pid_status(5), without its name; empty if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{key}:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def state(pid: int | None) -> str:
    """The letter of a process's state: T is stopped, Z dead; empty if it is not known."""
    return status(pid, "State")[:1]


def number(path: Path | str) -> int | None:
    """The number in a file, None if it cannot be read or holds none."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def sysctl(name: str) -> int | None:
    """By its name without interfaces, such as net.ipv4.igmp_max_msf."""
    return number(Path("/proc/sys", *name.split(".")))
