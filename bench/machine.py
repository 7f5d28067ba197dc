"""The machine under the benchmark: whose the CPUs are, how busy they were, how much memory a process holds.

It reads /proc and sets priorities of its own threads and of relays. It must never change anything that
outlasts the benchmark.
"""

import contextlib
import os
import platform
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcr.errors import McrError

GENERATOR_CPU = 0
FIRST_PRIORITY = -20  # nice: of generator and relays alike, so that other work on the machine weighs little
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
PACKAGES = ("smcroute", "socat", "python3-bpfcc", "liburing-dev", "libxdp-dev")


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Of the whole machine, nanoseconds of all CPUs since it started; the host took `stolen`."""

    busy_ns: int
    stolen_ns: int

    @classmethod
    def now(cls) -> "CpuTime":
        """From the first line of /proc/stat: user nice system idle iowait irq softirq steal (proc(5))."""
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
        return cls((user + nice + system + irq + softirq) * TICK_NS, steal * TICK_NS)

    def since(self, earlier: "CpuTime") -> "CpuTime":
        return CpuTime(self.busy_ns - earlier.busy_ns, self.stolen_ns - earlier.stolen_ns)


def check() -> None:
    """Raises McrError where the benchmark cannot run."""
    if os.geteuid() != 0:
        raise McrError("the benchmark makes network namespaces and loads BPF", "run it as root")
    if len(os.sched_getaffinity(0)) < 2:
        raise McrError("fewer than 2 CPUs", "generator and relay need one each")


def described() -> dict[str, Any]:
    """What figures depend on: the CPUs, the kernel, the versions."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        **{package: _package_version(package) for package in PACKAGES},
    }


def _package_version(package: str) -> str:
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else "absent"


def worker_cpu(number: int) -> int:
    """The CPU of a relay's process number so: never the generator's."""
    others = sorted(os.sched_getaffinity(0) - {GENERATOR_CPU})
    return others[number % len(others)]


def pin(pid: int, cpu: int) -> None:
    """Keeps every thread of a process on one CPU, before everybody else."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {cpu})
            os.setpriority(os.PRIO_PROCESS, int(task.name), FIRST_PRIORITY)


@contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """The calling thread runs on one CPU for a while, before everybody else."""
    before, thread = os.sched_getaffinity(0), threading.get_native_id()
    priority = os.getpriority(os.PRIO_PROCESS, thread)
    os.sched_setaffinity(0, {cpu})
    os.setpriority(os.PRIO_PROCESS, thread, FIRST_PRIORITY)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, thread, priority)
        os.sched_setaffinity(0, before)


@contextmanager
def before_other_work() -> Iterator[None]:
    """The benchmark comes before the rest of the machine for a while.

    That is this session's processes, which nice alone does not do: the scheduler shares CPUs out among
    sessions first (autogroups, sched(7)), if it was built so. And the softirq threads, whose packets would
    otherwise wait for a generator that never sleeps.
    """
    with contextlib.ExitStack() as stack:
        path = Path("/proc/self/autogroup")
        if path.exists() and (nice := re.search(r"nice (-?\d+)", path.read_text())):
            stack.callback(path.write_text, nice[1])
            path.write_text(str(FIRST_PRIORITY))
        for pid in _softirq_threads():
            stack.callback(os.setpriority, os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))
            os.setpriority(os.PRIO_PROCESS, pid, FIRST_PRIORITY)
        yield


def _softirq_threads() -> list[int]:
    threads = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().startswith("ksoftirqd/"):
                threads.append(int(path.parent.name))
    return threads


def resident_bytes(pid: int, pool_bytes: int = 0) -> int:
    """Resident memory of a process, beside a pool of so many bytes: in its largest mapping."""
    sizes: list[int] = []
    resident: list[int] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            sizes.append(int(line.split()[1]) * 1024)
        elif line.startswith("Rss:"):
            resident.append(int(line.split()[1]) * 1024)
    largest = max(zip(sizes, resident, strict=True))[1]
    return sum(resident) - min(pool_bytes, largest)
