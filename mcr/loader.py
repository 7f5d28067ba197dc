"""Compiles, loads, pins and attaches the BPF side of one instance, and takes it away again.

BCC, and with it LLVM, is only ever imported in a short-lived child: `python -m mcr.loader DIRECTORY`
compiles, loads, pins everything into DIRECTORY and ends; the supervisor opens the pins. `--try` in place of
a directory does the same and pins nothing, for `mcr doctor` and for reports. Loading goes through libbpf,
because BCC knows neither program flags nor links. This module must never decide what to attach where, and
never replaces a program that it did not load.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mcr
from mcr._bpf import ffi, lib
from mcr.errors import ExitStatus, McrError
from mcr.limits import COMPILE_TIMEOUT_S, scaled, slow_machine

BPFFS = Path("/sys/fs/bpf")
MAP_NAMES = (
    "rules",
    "settings",
    "xsks",
    "rule_stats",
    "rule_counters",
    "output_counters",
    "worker_counters",
    "rule_latency",
    "kernel_outputs",
    "fan_out_outputs",
    "devices",
    "device_sets",
    "output_stats",
    "fragments",
    "fan_out_relayed",
    "egress_devices",
    "bulks",
    "no_metadata",
    "settled_rules",
    "settled_outputs",
    "hands",
    "traced",
    "traced_egress",
    "tap",
    "tap_events",
    "tap_reports",
)
PROGRAMS = {
    "mcr_relay": lib.MCR_PROGRAM_XDP,
    "mcr_egress": lib.MCR_PROGRAM_DEVMAP,
    "mcr_pass": lib.MCR_PROGRAM_XDP,
    "mcr_devmap_xmit": lib.MCR_PROGRAM_RAW_TRACEPOINT,
    "mcr_refused": lib.MCR_PROGRAM_RAW_TRACEPOINT,
}
# The same source compiled for a trace: the program, the array that hands over to it, and where in it.
TRACED_PROGRAMS = (
    ("mcr_trace_begin", lib.MCR_PROGRAM_XDP, "traced", 0),
    ("mcr_relay_traced", lib.MCR_PROGRAM_XDP, "traced", 1),
    ("mcr_egress", lib.MCR_PROGRAM_DEVMAP, "traced_egress", 0),
)
# What a program of the first compilation and its traced twin need not share; any other map must be pinned.
PRIVATE_MAPS = ("scratch", "tap_scratches")
PROGRAM_NAME = "mcr_relay"
HELPER_NAME = "mcr_pass"
GONE = "already gone"  # or not to be seen, for want of CAP_BPF
TRACEPOINTS = {"mcr_devmap_xmit": "xdp_devmap_xmit", "mcr_refused": "xdp_redirect_err"}
BPF_INSTRUCTION = struct.Struct("=BBhi")  # struct bpf_insn of linux/bpf.h, as are the two below
BPF_LOAD_64, BPF_PSEUDO_MAP_FD = 0x18, 1
VERIFIER_LOG_BYTES = (4 << 20, 64 << 20)  # the second if the first is too small
# What a refusal to load or to attach may have to do with neither.
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
GIVE_UP_POLL_S = 0.05
BUSY_RETRY_S = 1.0
OLDEST_KERNEL = (6, 1)
TRY, TRACED = "--try", "--traced"
TRY_BY_HAND = f"{sys.executable} -m mcr.loader {TRY}"

Mode = Literal["native", "generic"]


def bpf_source_dir() -> Path:
    """Where relay_kern.c is: inside the installed package, or beside it in a source tree."""
    package = Path(mcr.__file__).parent
    for directory in (package / "bpf", package.parent / "bpf"):
        if (directory / "relay_kern.c").is_file():
            return directory
    raise McrError("bpf/relay_kern.c is not installed", "install MCR again: make install")


def pin_dir(instance: str) -> Path:
    """The directory of an instance's pins."""
    return BPFFS / "mcr" / instance


def link_dir(instance: str) -> Path:
    """Where links are pinned that shall outlive the supervisor, each under its interface's index."""
    return pin_dir(instance) / "links"


def helper_dir(instance: str) -> Path:
    """Where links of `mcr_pass` are pinned, in the same way."""
    return pin_dir(instance) / "helpers"


# --- in the child -----------------------------------------------------------------------------


def _compile(
    source_dir: Path, programs: Iterable[str] = tuple(PROGRAMS), traced: bool = False
) -> tuple[dict[str, int], dict[str, bytes]]:
    """Compiles relay_kern.c. Returns the descriptors of the maps, and the programs' instructions, by name."""
    os.environ["BCC_KERNEL_SOURCE"] = str(source_dir / "uapi_shim")
    try:
        from bcc import BPF
        from bcc.libbcc import lib as libbcc
    except ImportError as error:
        raise McrError(
            f"the BPF compiler is missing: {error}",
            "apt install python3-bpfcc, and run MCR with /usr/bin/python3",
        ) from error
    includes = ["/usr/include", f"/usr/include/{platform.machine()}-linux-gnu"]
    flags = [f"-I{source_dir}", *(word for path in includes for word in ("-idirafter", path))]
    flags += [f"-D{name}={value}" for name, value in _kernel_facts().items()]
    flags += ["-DMCR_TRACED=1"] if traced else []
    try:
        module = BPF(src_file=str(source_dir / "relay_kern.c"), cflags=flags)
        names = (*MAP_NAMES, *PRIVATE_MAPS) if traced else MAP_NAMES
        # Not module[name].map_fd: BCC does not understand every struct that may be in a map.
        descriptors = {name: int(libbcc.bpf_table_fd(module.module, name.encode())) for name in names}
        return descriptors, {name: bytes(module.dump_func(name)) for name in programs}
    except Exception as error:  # BCC raises bare Exceptions; the compiler's own words are on stderr
        raise McrError("relay_kern.c does not compile", f"see it whole: {TRY_BY_HAND}") from error


def _kernel_facts() -> dict[str, int]:
    """Where the running kernel keeps what the tracepoint programs look at: they are handed kernel structs."""
    return {
        "MCR_DEVICE_IFINDEX": _offset("net_device", "ifindex"),
        "MCR_PROGRAM_AUX": _offset("bpf_prog", "aux"),
        "MCR_PROGRAM_ID": _offset("bpf_prog_aux", "id"),
    }


def _offset(struct: str, member: str) -> int:
    offset = int(lib.mcr_member_offset(struct.encode(), member.encode()))
    if offset < 0:
        raise McrError(
            f"the kernel does not describe its struct {struct} (BTF): {os.strerror(-offset)}",
            "use a kernel with CONFIG_DEBUG_INFO_BTF, as Debian's have",
        )
    return offset


def _verifier_words(log: str) -> str:
    """The line of a verifier log that says what is wrong, the last one before its statistics, or nothing."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    wanted = [
        line for line in lines if not line.startswith(("processed ", "verification time", "stack depth"))
    ]
    return f": {wanted[-1]}" if wanted else ""


def _verifier_work(log: str) -> str:
    """The line of a verifier log that says how much it had to do: `processed N insns (limit 1000000) …`."""
    return next((line for line in log.splitlines() if line.startswith("processed ")), "no statistics")


def _load(name: str, kind: int, instructions: bytes) -> int:
    """Loads one program, and prints what the verifier had to do for it."""
    code, count = ffi.from_buffer(instructions), len(instructions) // 8
    for size in VERIFIER_LOG_BYTES:
        log = ffi.new("char[]", size)
        fd = int(lib.mcr_load_program(kind, name.encode(), code, count, log, len(log)))
        text = ffi.string(log).decode(errors="replace")
        if fd >= 0:
            print(f"{name}: {_verifier_work(text)}")
            return fd
        if fd != -errno.ENOSPC:  # of a log that found no room; else it is the verifier's own
            break
    if fd in (-errno.EPERM, -errno.EACCES) and not text:
        raise _not_permitted_to_load()
    sys.stderr.write(text)
    raise McrError(f"the kernel refused {name}: {os.strerror(-fd)}{_verifier_words(text)}", _remedy(-fd))


def kernel_version() -> tuple[int, int] | None:
    """The first two numbers of the running kernel's release, None if it does not begin with such."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(found[1]), int(found[2])) if found else None


def _remedy(code: int) -> str:
    """For a program or map that the kernel has refused. Nothing depends on how an interface is attached."""
    version = kernel_version()
    if version is not None and version < OLDEST_KERNEL:
        return f"use Linux {'.'.join(map(str, OLDEST_KERNEL))} or later; this is {platform.release()}"
    remedies = {
        errno.EMFILE: "raise the limit of open files (ulimit -n, LimitNOFILE=)",
        errno.ENFILE: "raise fs.file-max (sysctl)",
        errno.EAGAIN: "raise the limit of processes (ulimit -u, LimitNPROC=, TasksMax=)",
        errno.ENOMEM: "free memory, or raise the memory limit of the service or container",
    }
    report = f"try another kernel or BPF compiler, and report it with all that this prints: {TRY_BY_HAND}"
    return remedies.get(code, report)


def _pin(fd: int, path: Path) -> None:
    status = lib.bpf_obj_pin(fd, bytes(path))
    if status < 0:
        raise McrError(f"cannot pin {path}: {os.strerror(-status)}", "mount bpffs writable at /sys/fs/bpf")


def compile_into(directory: Path) -> None:
    """What the child does: compile, load, pin every map and the program into directory."""
    descriptors, programs = _compile(bpf_source_dir())
    for name, fd in descriptors.items():
        _pin(fd, directory / name)
    for name, instructions in programs.items():
        _pin(_load(name, PROGRAMS[name], instructions), directory / name)


def compile_traced(directory: Path) -> None:
    """What the child does for the first trace: the traced programs, on the maps that are pinned in directory.

    They are not pinned: the arrays that hand over to them keep them.
    """
    descriptors, programs = _compile(
        bpf_source_dir(), [name for name, _, _, _ in TRACED_PROGRAMS], traced=True
    )
    pinned = {name: _open(directory / name) for name in MAP_NAMES}
    instead = {fd: pinned.get(name, fd) for name, fd in descriptors.items()}
    for name, kind, array, index in TRACED_PROGRAMS:
        program = ffi.new("int *", _load(name, kind, _with_maps(programs[name], instead)))
        status = lib.bpf_map_update_elem(pinned[array], ffi.new("__u32 *", index), program, 0)
        if status < 0:
            raise McrError(
                f"cannot put {name} in place: {os.strerror(-status)}",
                "start the supervisor again with the same version of MCR",
            )


def try_programs(traced: bool) -> None:
    """What the child does for who only wants to know: compile and load, and let go of all by ending."""
    os.nice(10)  # a relay may be running
    with contextlib.suppress(ImportError):  # compiling says what that means
        import bcc

        words = (platform.release(), platform.machine(), bcc.__version__, mcr.__version__)
        sys.stderr.write("Linux {} {}, bcc {}, MCR {}\n".format(*words))
    wanted = [(name, kind) for name, kind, _, _ in TRACED_PROGRAMS] if traced else list(PROGRAMS.items())
    _, programs = _compile(bpf_source_dir(), [name for name, _ in wanted], traced)
    for name, kind in wanted:
        _load(name, kind, programs[name])


def _with_maps(instructions: bytes, instead: Mapping[int, int]) -> bytes:
    """A program with other maps of the same layout: the loads of map descriptors (linux/bpf.h) say others.

    Raises McrError for a map that is neither pinned nor private: its twin would not see what is in it.
    """
    code = bytearray(instructions)
    for at in range(0, len(code), BPF_INSTRUCTION.size):
        opcode, registers, offset, value = BPF_INSTRUCTION.unpack_from(code, at)
        if opcode == BPF_LOAD_64 and registers >> 4 == BPF_PSEUDO_MAP_FD:
            if value not in instead:
                raise McrError("a traced program uses a map that is not pinned", "add it to loader.MAP_NAMES")
            BPF_INSTRUCTION.pack_into(code, at, opcode, registers, offset, instead[value])
    return bytes(code)


def _child_main(directory: str, *options: str) -> int:
    traced = TRACED in options
    try:
        if directory == TRY:
            try_programs(traced)
        elif traced:
            compile_traced(Path(directory))
        else:
            compile_into(Path(directory))
    except McrError as error:
        print(json.dumps({"cause": error.cause, "remedy": error.remedy, "status": int(error.status)}))
        return 1
    return 0


# --- in the supervisor ------------------------------------------------------------------------


def ensure_bpffs() -> None:
    """Mounts bpffs at /sys/fs/bpf where it is missing."""
    if lib.mcr_is_bpffs(bytes(BPFFS)) == 1:
        return
    status = lib.mcr_mount_bpffs(bytes(BPFFS))
    if status < 0:
        raise McrError(
            f"bpffs is not mounted at {BPFFS} and cannot be: {os.strerror(-status)}",
            f"as root: mount -t bpf bpf {BPFFS}",
            status=ExitStatus.NOT_PERMITTED if status == -errno.EPERM else ExitStatus.FAILED,
        )


def load(instance: str, given_up: threading.Event | None = None) -> None:
    """Compiles and pins the BPF side of an instance: aside first, then put in place by one rename.

    Pins that an earlier supervisor left behind by dying are replaced. given_up: as soon as another thread
    sets it, the child is killed, and McrError raised.
    """
    ensure_bpffs()
    final, staging = pin_dir(instance), pin_dir(f"{instance}~new")
    _remove(staging)
    try:
        staging.mkdir(parents=True)
        _in_child(staging, given_up=given_up)
        _remove(final)
        staging.rename(final)
    except PermissionError as error:
        raise _not_permitted_to_load() from error
    except OSError as error:
        raise McrError(f"cannot write {staging}: {error.strerror}", "see: ls -l /sys/fs/bpf/mcr") from error
    finally:
        _remove(staging)


def load_traced(instance: str) -> None:
    """Compiles the programs that work while a trace runs, and puts them where the others find them."""
    _in_child(pin_dir(instance), TRACED)


def try_loading(traced: bool) -> float:
    """Compiles and loads what a start needs, or its first trace. Returns the seconds that it took.

    Nothing is pinned, attached or kept. Raises McrError, as the start would.
    """
    begin_s = time.monotonic()
    _in_child(TRY, *([TRACED] if traced else []))
    return time.monotonic() - begin_s


def _in_child(directory: Path | str, *options: str, given_up: threading.Event | None = None) -> None:
    command = [sys.executable, "-m", "mcr.loader", str(directory), *options]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise McrError(
            f"cannot start the BPF compiler: {error.strerror}",
            _remedy(error.errno or 0),
        ) from error
    with child:
        try:
            stdout, stderr = _communicate(child, given_up)
        finally:
            child.kill()  # where it has ended this does nothing
    if child.returncode:
        raise _child_error(child.returncode, stdout, stderr)


def _communicate(child: subprocess.Popen[str], given_up: threading.Event | None) -> tuple[str, str]:
    limit_s = scaled(COMPILE_TIMEOUT_S)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.communicate(timeout=GIVE_UP_POLL_S)
        if given_up is not None and given_up.is_set():
            raise McrError("compiling was given up", "start again")
    raise McrError(
        f"compiling took more than {limit_s:g} s", slow_machine("look at the machine's load and memory")
    )


def _child_error(status: int, stdout: str, stderr: str) -> McrError:
    """The child's own error, with the compiler's first complaint in front of its remedy."""
    try:
        error = json.loads(stdout.splitlines()[-1])
    except (ValueError, IndexError):
        words = stderr.strip().splitlines() or ["it said nothing"]
        return McrError(
            f"the BPF compiler died (exit status {status}): {words[-1]}",
            f"see it whole: {TRY_BY_HAND}",
        )
    if "Operation not permitted" in stderr:
        return _not_permitted_to_load()
    for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # the compiler makes the maps
        if f"error: {os.strerror(code)}" in stderr:
            return McrError(f"cannot make the BPF maps: {os.strerror(code)}", _remedy(code))
    complaints = [line.strip() for line in stderr.splitlines() if "error:" in line]
    cause = f"{error['cause']}: {complaints[0]}" if complaints else error["cause"]
    return McrError(cause, error["remedy"], status=ExitStatus(error["status"]))


def _not_permitted_to_load() -> McrError:
    return McrError(
        "not permitted to load BPF programs",
        "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
        status=ExitStatus.NOT_PERMITTED,
    )


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def unload(instance: str) -> None:
    """Removes every pin of an instance; the kernel frees what nobody holds any more."""
    _remove(pin_dir(instance))
    with contextlib.suppress(OSError):
        (BPFFS / "mcr").rmdir()  # only when no other instance has pins


def open_pin(instance: str, name: str) -> int:
    """A descriptor of a pinned map or program, close-on-exec. Raises McrError if it is not there."""
    return _open(pin_dir(instance) / name)


def _open(path: Path) -> int:
    fd = int(lib.bpf_obj_get(bytes(path)))
    if fd < 0:
        remedy = _remedy(-fd) if -fd in NO_ROOM else "start a supervisor: mcr run"
        raise McrError(f"cannot open {path}: {os.strerror(-fd)}", remedy)
    os.set_inheritable(fd, False)
    return fd


def pin_missing(instance: str, fds: Mapping[str, int]) -> list[str]:
    """Pins those of the open maps, programs and links, by name, whose pin has gone. Returns their names."""
    directory = pin_dir(instance)
    directory.mkdir(parents=True, exist_ok=True)
    missing = [name for name in fds if not (directory / name).exists()]
    for name in missing:
        _pin(fds[name], directory / name)
    return missing


@dataclass(slots=True)
class Link:
    """An XDP program attached to an interface, for as long as the descriptor is open or the link is pinned.

    Usually it is held, not pinned: when a supervisor dies, however it dies, the kernel detaches the program
    and the interface's traffic goes to the stack again instead of to a worker that is gone.
    """

    fd: int
    mode: Mode
    pin: Path | None = None

    def keep(self, path: Path) -> None:
        """Pins the link, so that it outlives this process."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _pin(self.fd, path)
        self.pin = path

    def unpin(self) -> None:
        """It ends with this process."""
        if self.pin is not None:
            self.pin.unlink(missing_ok=True)
            self.pin = None

    def runs(self, program_id: int, ifindex: int) -> bool:
        """Whether it still attaches the program to the interface."""
        found = ffi.new("uint32_t *")
        return bool(lib.mcr_link_target(self.fd, found) == ifindex and found[0] == program_id)

    def let_go(self) -> None:
        """Closes the descriptor; a pinned link goes on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        """Detaches the program."""
        self.unpin()
        self.let_go()


def adopt_link(instance: str, ifindex: int, interface: str) -> Link | None:
    """The link that an earlier supervisor pinned for the interface, None if there is none."""
    from mcr.netlink import xdp_program

    path = link_dir(instance) / str(ifindex)
    if not path.exists():
        return None
    attached = xdp_program(interface)
    if attached is None or attached.mode == "offload":
        return None
    return Link(open_pin(instance, f"links/{ifindex}"), attached.mode, path)


def drop_links(instance: str, but: set[int]) -> None:
    """Detaches what an earlier supervisor left attached, but from these interfaces."""
    for path in link_dir(instance).glob("*"):
        if path.name not in {str(ifindex) for ifindex in but}:
            path.unlink()


class XdpUnsupportedError(McrError):
    """The interface cannot run XDP in the mode asked for."""


def tracepoint_pin(program: str) -> str:
    """The name of the pin of a program's link to its tracepoint."""
    return f"tracepoint_{program}"


def trace_redirects(instance: str, program: str, program_fd: int, keep: bool) -> int:
    """Attaches a program to its tracepoint, for as long as the returned descriptor is open or pinned.

    It is adopted if it is pinned already, and pinned if it shall be kept.
    """
    pin = tracepoint_pin(program)
    path = pin_dir(instance) / pin
    if path.exists():
        return open_pin(instance, pin)
    fd = int(lib.bpf_raw_tracepoint_open(TRACEPOINTS[program].encode(), program_fd))
    if fd < 0:
        raise McrError(
            f"cannot attach to the tracepoint {TRACEPOINTS[program]}: {os.strerror(-fd)}",
            "run as root, or with CAP_PERFMON",
        )
    os.set_inheritable(fd, False)
    if keep:
        _pin(fd, path)
    return fd


def program_name(program_id: int) -> str:
    """The name of a loaded BPF program, or a text that says it has gone."""
    name = ffi.new("char[16]")
    if lib.mcr_program_name(program_id, name) < 0:
        return GONE
    return ffi.string(name).decode(errors="replace") or "without a name"


def attach(
    program_fd: int,
    interface: str,
    ifindex: int,
    mode: Literal["auto", "native", "generic"],
    patiently: bool = True,
) -> Link:
    """Attaches the program to an interface by a bpf_link.

    mode: `native` runs in the driver, `generic` in the stack, `auto` is native where the driver can.
    patiently: blocks for up to BUSY_RETRY_S while there is another program, whose holder may have just died.
    Returns the link with the mode obtained. Raises McrError naming another program that is in the way, and
    XdpUnsupportedError.
    """
    modes: tuple[Mode, ...] = ("native", "generic") if mode == "auto" else (mode,)
    status = 0
    for wanted in modes:
        status = _link(program_fd, ifindex, wanted, BUSY_RETRY_S if patiently else 0)
        if status >= 0:
            os.set_inheritable(status, False)
            return Link(status, wanted)
        if -status in (errno.EBUSY, errno.EEXIST, errno.EPERM, errno.ENODEV, *NO_ROOM):
            break
    raise _attach_error(interface, ifindex, modes[-1], -status)


def _link(program_fd: int, ifindex: int, mode: Mode, retry_s: float) -> int:
    """Retries while busy: a link whose holder has just died is released a moment later."""
    deadline = time.monotonic() + retry_s
    while True:
        status = int(lib.mcr_link_xdp(program_fd, ifindex, mode == "generic"))
        if status != -errno.EBUSY or time.monotonic() > deadline:
            return status
        time.sleep(0.02)


def _attach_error(interface: str, ifindex: int, mode: Mode, code: int) -> McrError:
    if code in NO_ROOM:
        return McrError(f"cannot attach XDP to {interface}: {os.strerror(code)}", _remedy(code))
    try:
        socket.if_indextoname(ifindex)
    except OSError:
        return McrError(f"{interface} has just gone", "see which interfaces there are: ip link")
    if code in (errno.EBUSY, errno.EEXIST):
        from mcr.netlink import xdp_program

        other = xdp_program(interface)
        words = (
            f"{program_name(other.program_id)} (id {other.program_id}, {other.mode})"
            if other
            else "which has gone"
        )
        return McrError(
            f"another XDP program is attached to {interface}: {words}",
            f"detach it: ip link set dev {interface} xdp off, or stop the program that holds it",
        )
    if code == errno.EPERM:
        return McrError(
            f"not permitted to attach XDP to {interface}",
            "run as root, or with CAP_BPF and CAP_NET_ADMIN",
            status=ExitStatus.NOT_PERMITTED,
        )
    remedy = "choose --mode generic" if mode == "native" else "choose --ingress packet, which needs no XDP"
    return XdpUnsupportedError(f"{interface} cannot run XDP in {mode} mode: {os.strerror(code)}", remedy)


if __name__ == "__main__":
    sys.exit(_child_main(*sys.argv[1:]))
