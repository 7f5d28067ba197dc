"""`under_unit.py UNIT WRITABLE… -- COMMAND…`: runs a command confined as the unit says, where no systemd can.

What systemd would do with SystemCallFilter=, MemoryDenyWriteExecute=, CapabilityBoundingSet=, UMask=,
NoNewPrivileges= and a file system that is read-only but for bpffs and the WRITABLE directories is done by
hand: mounts in a namespace of its own, a seccomp filter, prctl. It must never loosen what the unit says.
"""

import ctypes
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

# linux/filter.h, linux/seccomp.h, linux/prctl.h, linux/audit.h, sched.h
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM = 1
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, FILTER_MODE = 22, 38, 24, 2
AUDIT_ARCH_X86_64 = 0xC000003E
CLONE_NEWNS = 0x20000
PROT_EXEC, PROT_WRITE = 4, 2
UNISTD = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
CAPABILITIES = Path("/usr/include/linux/capability.h")


class Unit:
    """A unit file; what a key says in several lines adds up."""

    def __init__(self, path: Path) -> None:
        self.lines = path.read_text().splitlines()

    def values(self, key: str) -> list[str]:
        return [line.partition("=")[2] for line in self.lines if line.startswith(f"{key}=")]


def expand(word: str) -> set[str]:
    """The system calls of a word of SystemCallFilter=, as systemd itself expands it."""
    if not word.startswith("@"):
        return {word}
    argv = ["systemd-analyze", "syscall-filter", word]
    listing = subprocess.run(argv, capture_output=True, text=True, check=True)
    names = (line.strip() for line in listing.stdout.splitlines()[1:])
    return {name for each in names if each and not each.startswith("#") for name in expand(each)}


def allowed(unit: Unit) -> set[str]:
    names: set[str] = set()
    for value in unit.values("SystemCallFilter"):
        listed = {name for word in value.lstrip("~").split() for name in expand(word)}
        names = names - listed if value.startswith("~") else names | listed
    return names


def jump(code: int, value: int, then: int, otherwise: int) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)


def statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def write_execute(numbers: dict[str, int]) -> list[bytes]:
    """MemoryDenyWriteExecute=: no mapping that can be written and executed, none that becomes executable."""
    refuse = statement(RETURN, REFUSE | EPERM)
    protection = statement(LOAD, 16 + 8 * 2)
    program = [
        jump(EQUAL, numbers["mmap"], 0, 4),
        protection,
        jump(ANY_BIT, PROT_EXEC, 0, 2),
        jump(ANY_BIT, PROT_WRITE, 0, 1),
        refuse,
    ]
    for name in ("mprotect", "pkey_mprotect"):
        program += [statement(LOAD, 0), jump(EQUAL, numbers[name], 0, 3)]
        program += [protection, jump(ANY_BIT, PROT_EXEC, 0, 1), refuse]
    return [*program, statement(LOAD, 0)]


def seccomp_filter(unit: Unit) -> bytes:
    numbers = {name: int(number) for name, number in re.findall(r"__NR_(\w+) (\d+)", UNISTD.read_text())}
    program = [
        statement(LOAD, 4),
        jump(EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        statement(RETURN, KILL),
        statement(LOAD, 0),
    ]
    if unit.values("MemoryDenyWriteExecute") == ["yes"]:
        program += write_execute(numbers)
    for name in sorted(allowed(unit) & numbers.keys()):
        program += [jump(EQUAL, numbers[name], 0, 1), statement(RETURN, ALLOW)]
    return b"".join([*program, statement(RETURN, REFUSE | EPERM)])


def checked(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def read_only(libc: ctypes.CDLL, writable: list[str]) -> None:
    """The whole tree but these directories and bpffs (ProtectSystem=strict, ProtectKernelTunables=)."""
    checked(libc.unshare(CLONE_NEWNS))
    commands = [["mount", "--make-rprivate", "/"]]
    commands += [["mount", "--bind", path, path] for path in (*writable, "/proc/sys")]
    commands += [["mount", "-o", "remount,bind,ro", path] for path in ("/proc/sys", "/sys", "/")]
    for command in commands:
        subprocess.run(command, check=True)


def drop_capabilities(libc: ctypes.CDLL, unit: Unit) -> None:
    """What is not in the bounding set is gone with the next execve (capabilities(7))."""
    kept = {name for value in unit.values("CapabilityBoundingSet") for name in value.split()}
    for name, number in re.findall(r"#define (CAP_\w+)\s+(\d+)\n", CAPABILITIES.read_text()):
        if name not in kept:
            checked(libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(int(number)), 0, 0, 0))


def main(arguments: list[str]) -> None:
    end = arguments.index("--")
    unit, writable, command = Unit(Path(arguments[0])), arguments[1:end], arguments[end + 1 :]
    program = seccomp_filter(unit)
    libc = ctypes.CDLL(None, use_errno=True)
    read_only(libc, writable)
    os.umask(int(unit.values("UMask")[0], 8))
    drop_capabilities(libc, unit)
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0))
    buffer = ctypes.create_string_buffer(program, len(program))
    whole = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(buffer))
    checked(libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(FILTER_MODE), whole, 0, 0))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
