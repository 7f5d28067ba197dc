"""What /proc says of a process, and the numbers of sysctls.

It only reads. This module must never raise: where it may not read, or nothing is there, it says nothing.
"""

import re
import sys
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from mcr.stream import Address


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


def joined_groups() -> set[tuple[int, Address]] | None:
    """The ifindex and group of every multicast membership of the thread's network namespace, whoever holds it
    (/proc/net/igmp, /proc/net/igmp6); None if it cannot be read."""
    groups: set[tuple[int, Address]] = set()
    try:
        ifindex = 0
        for line in Path("/proc/thread-self/net/igmp").read_text().splitlines()[1:]:
            words = line.split()
            if line[0].isspace():  # a group of the interface above; its bytes as one number
                groups.add((ifindex, IPv4Address(int(words[0], 16).to_bytes(4, sys.byteorder))))
            else:
                ifindex = int(words[0])
        path = Path("/proc/thread-self/net/igmp6")
        for line in path.read_text().splitlines() if path.exists() else ():
            index, _, group, *_ = line.split()
            groups.add((int(index), IPv6Address(bytes.fromhex(group))))
    except (OSError, ValueError, IndexError):
        return None
    return groups


def number(path: Path | str) -> int | None:
    """The number in a file, None if it cannot be read or holds none."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def sysctl(name: str) -> int | None:
    """By its name without interfaces, such as net.ipv4.igmp_max_msf."""
    return number(Path("/proc/sys", *name.split(".")))
