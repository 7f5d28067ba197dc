"""What a worker may still do after its set-up: next to nothing."""

import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    assert_whole,
    config,
    relay_one,
    status,
)
from tests.netns.lab import Lab


def proc_status(pid: int, thread: int | None = None) -> dict[str, str]:
    """What proc(5) tells of a process, or of one of its threads."""
    lines = Path(f"/proc/{pid}/task/{thread or pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("ingress", ["xsk", "packet"])
def test_worker_has_no_privilege_left_and_still_works(lab: Lab, ingress: str) -> None:
    topology = lab.topology_relay()
    attach = f'ingress = "{ingress}"'
    supervisor = lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT]), attach=attach))
    told = proc_status(status(lab, topology.relay)["worker_pid"])
    assert {name: int(told[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {
        "CapEff": 0,
        "CapPrm": 0,
        "CapInh": 0,
        "CapAmb": 0,
    }
    assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2")
    assert told["Uid"].split() == ["65534"] * 4
    assert told["Groups"] == ""
    lab.mcr(topology.relay, "rule", "add", "late", "--from", "239.1.1.5%in0:5000", "--to", "10.2.0.2:6001")
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)
    lab.mcr(topology.relay, "rule", "del", "late")
    assert supervisor.terminate() == 0
    assert "ERROR" not in supervisor.output()


@pytest.mark.parametrize(
    "attempt",
    [
        "os.open('/etc/passwd', os.O_RDONLY)",
        "os.execv('/bin/true', ['true'])",
        "socket.socket()",
        "os.fork()",
        "os.kill(os.getppid(), 0)",
    ],
)
def test_confined_process_that_tries_more_is_killed(attempt: str) -> None:
    assert_killed("mcr_core_confine()", attempt)


@pytest.mark.parametrize(
    "attempt",
    [
        "os.open('/etc/passwd', os.O_RDONLY)",
        "os.execv('/bin/true', ['true'])",
        "os.fork()",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)",
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)",
        "udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)",
        "os.stat('/etc/passwd')",
        "os.listdir('/')",
        "udp.bind(('127.0.0.1', 0))",
        "udp.connect(('127.0.0.1', 9))",
    ],
)
def test_process_of_the_joins_that_tries_more_is_killed(attempt: str) -> None:
    assert_killed("mcr_core_confine_joins(65534, 65534)", attempt)


@pytest.mark.parametrize("confine", ["mcr_core_confine()", "mcr_core_confine_joins(65534, 65534)"])
def test_the_time_may_be_asked_of_the_kernel(confine: str) -> None:
    """As the C library does where the vDSO cannot tell it: in a virtual machine without a stable TSC."""
    number = 228 if platform.machine() == "x86_64" else 113  # asm/unistd_64.h, asm-generic/unistd.h
    done = run_confined(confine, f"assert libc.syscall({number}, 1, timespec) == 0")
    assert (done.returncode, done.stdout) == (0, b"confinedsurvived"), done.stderr


def assert_killed(confine: str, attempt: str) -> None:
    done = run_confined(confine, attempt)
    assert (done.returncode, done.stdout) == (-signal.SIGSYS, b"confined"), done.stderr


def run_confined(confine: str, attempt: str) -> subprocess.CompletedProcess[bytes]:
    code = (
        "import ctypes, os, socket\n"
        "libc, timespec = ctypes.CDLL(None), (ctypes.c_long * 2)()\n"
        "udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "from mcr.uring_egress._core import lib\n"
        f"assert lib.{confine} == 0\n"
        "os.write(1, b'confined')\n"
        f"{attempt}\n"
        "os.write(1, b'survived')\n"
        "os._exit(0)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20)
