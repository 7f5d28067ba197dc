"""What this kernel, this machine and this process can do for MCR: probes, each with an answer, what it saw,
and what to do.

An answer is yes, no, or can't tell, and a probe that could not find out never guesses. Nothing is kept: every
call looks again. What has to be tried is tried in a network namespace of its own, in a child
(`python -m mcr.features`), which ends with it. This module must never change anything nor touch an interface
that exists; interfaces are looked at in interface_features.py.
"""

import ctypes
import errno
import gzip
import importlib.util
import json
import os
import platform
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mcr import firewall, loader, procfs
from mcr._bpf import ffi, lib
from mcr.errors import ExitStatus, McrError
from mcr.limits import VARIABLE, scaled, slow_machine, time_scale
from mcr.loader import BPFFS, OLDEST_KERNEL
from mcr.privileges import ALWAYS, AS_ROOT, LOCK
from mcr.reasons import JOIN_LIMITS

Answer: TypeAlias = Literal["yes", "no", "can't tell"]

SLOW_S = 10.0  # to compile and load, for a second
SCRATCH_TIMEOUT_S = 20
CLONE_NEWNET = 0x40000000  # linux/sched.h
AF_XDP = 44  # linux/socket.h
IO_URING_SETUP = 425  # asm-generic/unistd.h, the same on every architecture
# linux/io_uring.h: CQSIZE, TASKRUN_FLAG, SINGLE_ISSUER and DEFER_TASKRUN, as open_uring in setup.c asks for
IO_URING_FLAGS = 1 << 3 | 1 << 9 | 1 << 12 | 1 << 13
IO_URING_PARAMS_BYTES, IO_URING_CQ_ENTRIES_AT, IO_URING_FLAGS_AT = 120, 4, 8
POOL_BYTES = 64 << 20  # the largest frame pool, 32 MiB, and io_uring's and the maps' own memory
# `r0 = XDP_PASS; exit` (linux/bpf.h)
PASS_PROGRAM = bytes.fromhex("b7000000020000009500000000000000")

CAP_SYS_ADMIN = 21  # linux/capability.h; it stands in for those that were split off it


@dataclass(frozen=True, slots=True)
class Check:
    """One answer. interface is empty for what concerns the machine; needed: MCR cannot work if it is no."""

    check: str
    answer: Answer
    evidence: str
    remedy: str = ""
    needed: bool = False
    interface: str = ""

    def row(self) -> dict[str, Any]:
        """As a flat JSON object."""
        names = ("check", "interface", "answer", "evidence", "remedy", "needed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Relay:
    """A running supervisor: its process, and the rows of `mcr status` and `mcr rule show`."""

    pid: int
    status: list[dict[str, Any]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)


def host_checks(relay: Relay | None) -> Iterator[Check]:
    """Everything that concerns no interface, of the relay or, if there is none, of a relay to be started."""
    if relay is not None:
        yield from _of_relay(relay)
    process = relay.pid if relay is not None else os.getpid()
    yield _kernel()
    yield _proc()
    yield from _bpf(relay)
    yield _btf()
    yield _jit()
    yield _compiler()
    yield _af_xdp(relay)
    yield _io_uring(relay)
    yield _capabilities(process, relay is not None)
    yield _locked_memory(process)
    yield _open_files(process)
    yield _bpffs(relay)
    yield _cpus()
    yield from _join_limits()
    yield _firewall()
    yield _legacy_firewall()


# --- the supervisor


def no_supervisor(error: McrError) -> Check:
    """What it means that the supervisor did not answer."""
    if error.status == ExitStatus.NO_SUPERVISOR:
        return Check("supervisor", "no", error.cause, error.remedy)
    return Check("supervisor", "can't tell", error.cause, error.remedy)


def _of_relay(relay: Relay) -> Iterator[Check]:
    yield Check("supervisor", "yes", f"pid {relay.pid}")
    yield _same_namespace(relay.pid)
    waiting = {row["rule"]: row["reason"] for row in relay.rules if row["reason"]}
    names = {row["rule"] for row in relay.rules}
    if waiting:
        name, reason = next(iter(waiting.items()))
        evidence = f"{len(waiting)} of {len(names)} wait; {name}: {reason}"
        yield Check("rules active", "no", evidence, "see each: mcr rule show, mcr explain STREAM", True)
    else:
        yield Check("rules active", "yes", f"{len(names)} of {len(names)}")
    for row in relay.status:
        if row["object"] == "membership":
            yield _joins(row)


def _joins(row: dict[str, Any]) -> Check:
    evidence = f"{row['held']} of {row['wanted']} held"
    if not row["failed"]:
        return Check("groups joined", "yes", evidence)
    remedy = "mcr explain STREAM names the limit to raise"
    return Check("groups joined", "no", f"{evidence}: {row['reason']}", remedy, True)


def _same_namespace(pid: int) -> Check:
    name = "network namespace"
    try:
        theirs, ours = (Path(f"/proc/{who}/ns/net").stat().st_ino for who in (pid, "self"))
    except OSError as error:
        remedy = "run mcr doctor as root"
        return Check(name, "can't tell", f"/proc/{pid}/ns/net: {error.strerror}", remedy)
    if theirs == ours:
        return Check(name, "yes", "the supervisor's, too")
    remedy = f"nsenter --net=/proc/{pid}/ns/net mcr doctor"
    return Check(name, "no", "the supervisor is in another one, so what follows is not about it", remedy)


# --- the kernel


def _kernel() -> Check:
    release = platform.release()
    version = loader.kernel_version()
    if version is None:
        return Check("kernel", "can't tell", f"release {release!r}")
    if version >= OLDEST_KERNEL:
        return Check("kernel", "yes", f"Linux {release}")
    return Check("kernel", "no", f"Linux {release}", "use Linux 6.1 or later", True)


def _proc() -> Check:
    """Where there is none, MCR cannot find out what it may do."""
    if Path("/proc/self/status").exists():
        return Check("/proc", "yes", "mounted")
    return Check("/proc", "no", "it is not mounted", "mount -t proc proc /proc", True)


def _load_pass_program() -> int:
    """A descriptor of the smallest XDP program, attached to nothing, or -errno."""
    code, log = ffi.from_buffer(PASS_PROGRAM), ffi.new("char[]", 4096)
    return int(
        lib.mcr_load_program(lib.MCR_PROGRAM_XDP, b"mcr_doctor", code, len(PASS_PROGRAM) // 8, log, len(log))
    )


def _bpf(relay: Relay | None) -> Iterator[Check]:
    """Loading, and attaching in a scratch namespace."""
    fd = _load_pass_program()
    if fd >= 0:
        os.close(fd)
        yield from _programs()
        yield from _attaches()
    elif -fd in (errno.EPERM, errno.EACCES):
        evidence = "this process is not permitted to"
        if relay is not None:
            yield Check("BPF programs load", "yes", f"{evidence}, but the supervisor's are loaded")
        else:
            yield Check("BPF programs load", "can't tell", evidence, "run mcr doctor as root")
        yield Check("XDP attaches", "can't tell", evidence, "run mcr doctor as root")
    else:
        remedy = "use a kernel with CONFIG_BPF_SYSCALL"
        yield Check("BPF programs load", "no", os.strerror(-fd), remedy, True)


def _programs() -> Iterator[Check]:
    """Compiles and loads MCR's own, as a start and its first trace would; nothing of it stays."""
    for name, traced in (("BPF programs load", False), ("trace programs load", True)):
        try:
            seconds = loader.try_loading(traced)
        except McrError as error:
            answer: Answer = "can't tell" if error.status == ExitStatus.NOT_PERMITTED else "no"
            yield Check(name, answer, error.cause, error.remedy, needed=not traced)
            return
        evidence = f"MCR's own were compiled and loaded in {seconds:.1f} s, and released"
        if seconds > SLOW_S * time_scale():
            evidence += f"; a second is usual: see {VARIABLE} if a limit ends something"
        yield Check(name, "yes", evidence)


def _attaches() -> Iterator[Check]:
    """Asks a child that makes a network namespace and a veth pair of its own for both modes."""
    argv = [sys.executable, "-m", "mcr.features"]
    limit_s = scaled(SCRATCH_TIMEOUT_S)
    try:
        child = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s
        )
        tried: dict[str, int] = json.loads(child.stdout)
    except subprocess.TimeoutExpired:
        evidence = f"trying it in a scratch namespace took more than {limit_s:g} s"
        yield Check("XDP attaches", "can't tell", evidence, slow_machine("look at the machine's load"))
        return
    except (OSError, ValueError, subprocess.SubprocessError):
        evidence = "no scratch namespace could be made"
        yield Check("XDP attaches", "can't tell", evidence, "run mcr doctor as root")
        return
    failed = {mode: os.strerror(code) for mode, code in tried.items() if code}
    if not failed:
        evidence = f"{' and '.join(tried)}, on a veth in a scratch namespace"
        yield Check("XDP attaches", "yes", evidence)
        return
    evidence = ", ".join(f"{mode}: {words}" for mode, words in failed.items())
    neither = len(failed) == len(tried)
    remedy = "attach with --ingress packet" if neither else f"choose --mode {(tried.keys() - failed).pop()}"
    yield Check("XDP attaches", "no", f"on a veth in a scratch namespace: {evidence}", remedy)


def _btf() -> Check:
    if Path("/sys/kernel/btf/vmlinux").exists():
        return Check("BTF", "yes", "/sys/kernel/btf/vmlinux")
    if not Path("/sys/kernel").is_dir():
        return Check("BTF", "can't tell", "/sys is not mounted", "mount -t sysfs sysfs /sys")
    remedy = "use a kernel with CONFIG_DEBUG_INFO_BTF, as Debian's have"
    return Check("BTF", "no", "there is no /sys/kernel/btf/vmlinux", remedy, True)


def _jit() -> Check:
    """The sysctl exists in the first network namespace only."""
    value = procfs.sysctl("net.core.bpf_jit_enable")
    if value:
        return Check("BPF JIT", "yes", f"net.core.bpf_jit_enable is {value}")
    if value == 0:
        remedy = "sysctl -w net.core.bpf_jit_enable=1"
        return Check("BPF JIT", "no", "programs are interpreted, which is several times slower", remedy)
    if _kernel_option("CONFIG_BPF_JIT_ALWAYS_ON"):
        return Check("BPF JIT", "yes", "CONFIG_BPF_JIT_ALWAYS_ON")
    return Check("BPF JIT", "can't tell", "net.core.bpf_jit_enable cannot be read here")


def _kernel_option(name: str) -> bool:
    """Whether the running kernel was built with an option, as far as it tells."""
    try:
        with gzip.open("/proc/config.gz", "rt") as config:
            return any(line.rstrip() == f"{name}=y" for line in config)
    except OSError:
        return False


def _compiler() -> Check:
    if importlib.util.find_spec("bcc") is not None:
        return Check("BPF compiler", "yes", "bcc can be imported")
    remedy = "apt install python3-bpfcc, and run MCR with /usr/bin/python3"
    return Check("BPF compiler", "no", "bcc cannot be imported", remedy, True)


def _af_xdp(relay: Relay | None) -> Check:
    try:
        socket.socket(AF_XDP, socket.SOCK_RAW, 0).close()
    except PermissionError:
        used = relay is not None and any(
            row.get("ingress") == "xsk" and not row["reason"] for row in relay.status
        )
        if used:
            return Check("AF_XDP", "yes", "this process may not, but a worker uses it")
        return Check("AF_XDP", "can't tell", "not permitted to try", "run mcr doctor as root")
    except OSError as error:
        remedy = "use a kernel with CONFIG_XDP_SOCKETS, or attach with --ingress packet"
        return Check("AF_XDP", "no", error.strerror or str(error), remedy)
    return Check("AF_XDP", "yes", "a socket was opened")


def _io_uring(relay: Relay | None) -> Check:
    """The call of open_uring (setup.c), with fewer entries."""
    name = "io_uring"
    disabled = procfs.sysctl("kernel.io_uring_disabled")
    libc = ctypes.CDLL(None, use_errno=True)
    params = bytearray(IO_URING_PARAMS_BYTES)
    params[IO_URING_CQ_ENTRIES_AT : IO_URING_CQ_ENTRIES_AT + 4] = (16).to_bytes(4, sys.byteorder)
    params[IO_URING_FLAGS_AT : IO_URING_FLAGS_AT + 4] = IO_URING_FLAGS.to_bytes(4, sys.byteorder)
    memory = (ctypes.c_char * len(params)).from_buffer(params)
    fd = libc.syscall(ctypes.c_long(IO_URING_SETUP), ctypes.c_uint(8), memory)
    if fd >= 0:
        os.close(fd)
        return Check(name, "yes", "set up with SINGLE_ISSUER and DEFER_TASKRUN, and closed again")
    code = ctypes.get_errno()
    if code == errno.EPERM and disabled == 1 and relay is None:
        remedy = "run mcr doctor as root, or: sysctl -w kernel.io_uring_disabled=0"
        return Check(name, "can't tell", "kernel.io_uring_disabled is 1: only the privileged may", remedy)
    if (
        code == errno.EPERM
        and relay is not None
        and any(row.get("object") == "worker" and row["pid"] for row in relay.status)
    ):
        return Check(name, "yes", "this process may not, but a worker uses it")
    remedies = {
        errno.EPERM: "sysctl -w kernel.io_uring_disabled=0",
        errno.EINVAL: "use Linux 6.1 or later: DEFER_TASKRUN is missing",
        errno.ENOSYS: "use a kernel with CONFIG_IO_URING",
        errno.ENOMEM: "raise the limit of locked memory (ulimit -l, LimitMEMLOCK=)",
    }
    if code == errno.EPERM and disabled == 0:
        remedies[code] = "let it be called: a seccomp filter, such as a container's, forbids it"
    evidence = os.strerror(code) + (f", kernel.io_uring_disabled is {disabled}" if disabled else "")
    return Check(name, "no", evidence, remedies.get(code, "see docs/KERNEL-SUPPORT.md"), True)


# --- the process


def _held(pid: int) -> set[str] | None:
    """The effective capabilities of a process, of those that matter here; None if they are not known."""
    mask = procfs.status(pid, "CapEff")
    if not mask:
        return None
    bits = int(mask, 16)
    held = {each.name for each in (*ALWAYS, *AS_ROOT, LOCK) if bits >> each.number & 1}
    if bits >> CAP_SYS_ADMIN & 1:
        held |= {"CAP_BPF", "CAP_PERFMON"}
    return held


def _capabilities(pid: int, supervisor: bool) -> Check:
    who = f"the supervisor (pid {pid})" if supervisor else "this process"
    held = _held(pid)
    if held is None:
        remedy = "run mcr doctor as root"
        return Check("capabilities", "can't tell", f"/proc/{pid}/status cannot be read", remedy)
    root = procfs.status(pid, "Uid").split()[1:2] == ["0"]
    wanted = (*ALWAYS, *AS_ROOT) if root else ALWAYS
    missing = [f"{each.name} ({each.purpose})" for each in wanted if each.name not in held]
    if not missing:
        return Check("capabilities", "yes", f"{who} has all of {', '.join(each.name for each in wanted)}")
    verb = "run the supervisor" if supervisor else "run mcr"
    remedy = f"{verb} as root, or give it them: setpriv, or AmbientCapabilities= of its unit"
    return Check("capabilities", "no", f"{who} lacks {', '.join(missing)}", remedy, True)


def _limit(pid: int, what: str, hard: bool) -> int | None:
    """A line of proc_pid_limits(5), RLIM_INFINITY for unlimited; None if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/limits").read_text()
    except OSError:
        return None
    found = re.search(rf"^{what}\s+(\S+)\s+(\S+)", text, re.MULTILINE)
    if found is None:
        return None
    word = found[2 if hard else 1]
    return resource.RLIM_INFINITY if word == "unlimited" else int(word)


def _locked_memory(pid: int) -> Check:
    name, remedy = "locked memory", "raise it above 64 MiB (ulimit -l, LimitMEMLOCK=), or give CAP_IPC_LOCK"
    if LOCK.name in (_held(pid) or ()):
        return Check(name, "yes", f"pid {pid} has CAP_IPC_LOCK: no limit")
    limit = _limit(pid, "Max locked memory", hard=False)
    if limit is None:
        return Check(name, "can't tell", f"/proc/{pid}/limits cannot be read", "run mcr doctor as root")
    if limit == resource.RLIM_INFINITY or limit >= POOL_BYTES:
        words = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 20} MiB"
        return Check(name, "yes", words)
    return Check(name, "no", f"{limit >> 10} KiB for pid {pid}, without CAP_IPC_LOCK", remedy, True)


def _open_files(pid: int) -> Check:
    """Workers raise their limit to the hard one; io_uring's table of sockets counts against it."""
    limit = _limit(pid, "Max open files", hard=True)
    if limit is None:
        evidence = f"/proc/{pid}/limits cannot be read"
        return Check("open files", "can't tell", evidence, "run mcr doctor as root")
    least: int = lib.MCR_MAX_OUTPUTS
    if limit == resource.RLIM_INFINITY or limit > least:
        return Check("open files", "yes", f"hard limit {limit}, above {least}")
    remedy = "raise it: ulimit -Hn, LimitNOFILE="
    return Check("open files", "no", f"hard limit {limit}, must be above {least}", remedy, True)


# --- the machine


def _bpffs(relay: Relay | None) -> Check:
    name, mount = "bpffs", f"mount -t bpf bpf {BPFFS}"
    status = lib.mcr_is_bpffs(bytes(BPFFS))
    if status < 0:
        return Check(name, "can't tell", f"{BPFFS}: {os.strerror(-status)}", "mount -t sysfs sysfs /sys")
    if status == 0:
        helps_itself = os.geteuid() == 0
        evidence = f"not mounted at {BPFFS}" + ("; MCR mounts it when it starts" if helps_itself else "")
        return Check(name, "no", evidence, mount, not helps_itself)
    if relay is not None or os.access(BPFFS, os.W_OK | os.X_OK):
        writable = "and the supervisor's pins are there" if relay else "and writable"
        return Check(name, "yes", f"mounted at {BPFFS} {writable}")
    remedy = "run mcr as root, or give the directory to its user: chown"
    return Check(name, "no", f"{BPFFS} is not writable for user {os.geteuid()}", remedy, True)


def _cpus() -> Check:
    count = len(os.sched_getaffinity(0))
    if count > 1:
        return Check("CPUs", "yes", f"{count}")
    return Check("CPUs", "no", "one for the network stack and every worker", "give the machine two or more")


def _join_limits() -> Iterator[Check]:
    for sysctl, default in JOIN_LIMITS.items():
        check, value = f"joins: {sysctl.rpartition('.')[2]}", procfs.sysctl(sysctl)
        if value is None:
            yield Check(check, "can't tell", f"{sysctl} cannot be read")
        elif value < 1:
            yield Check(check, "no", f"{sysctl} is {value}", f"sysctl -w {sysctl}={default}", True)
        else:
            yield Check(check, "yes", f"{value}; joins are spread over sockets")


def _firewall() -> Check:
    name = "nftables lets it out"
    try:
        found = firewall.read_droppers()
    except PermissionError:
        return Check(name, "can't tell", "not permitted to read the rules", "run mcr doctor as root")
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP):
            return Check(name, "yes", "the kernel has no nftables, or no rules")
        return Check(name, "can't tell", error.strerror or str(error))
    if not found:
        return Check(name, "yes", "no rule on the way out drops anything")
    remedy = "let UDP to the outputs pass: nft list ruleset; `denied` in mcr stats counts what was dropped"
    if found[0].certain:
        return Check(name, "no", str(found[0]), remedy)
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return Check(name, "can't tell", f"{found[0]}{more}: whether it meets an output", remedy)


def _legacy_firewall() -> Check:
    """Tables of the old iptables, which nftables does not show; they have no netlink."""
    name, tables = "iptables lets it out", set[str]()
    for listing in ("ip_tables_names", "ip6_tables_names"):
        try:
            tables |= {f"{listing.partition('_')[0]} {table}" for table in _lines(f"/proc/net/{listing}")}
        except FileNotFoundError:
            continue
        except OSError:
            evidence = "not permitted to read the tables"
            return Check(name, "can't tell", evidence, "run mcr doctor as root")
    if not tables:
        return Check(name, "yes", "no legacy table is in use")
    remedy = "see: iptables-legacy -S OUTPUT, ip6tables-legacy -S OUTPUT"
    return Check(name, "can't tell", f"legacy tables are in use: {', '.join(sorted(tables))}", remedy)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().split()


# --- in the child


def _try_attaching() -> dict[str, int]:
    """0 or the errno of attaching in each mode, to a veth in a namespace that ends with this process."""
    from pyroute2 import IPRoute

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    with IPRoute() as links:
        links.link("add", ifname="doctor0", kind="veth", peer={"ifname": "doctor1"})
    program, ifindex = _load_pass_program(), socket.if_nametoindex("doctor0")
    tried: dict[str, int] = {}
    for mode in ("native", "generic"):
        link = int(lib.mcr_link_xdp(program, ifindex, mode == "generic"))
        tried[mode] = max(0, -link)
        if link >= 0:
            os.close(link)
    return tried


if __name__ == "__main__":
    print(json.dumps(_try_attaching()))
