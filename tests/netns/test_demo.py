"""`make demo` as its users run it: it relays all, says so, and leaves nothing, however it ends.

The demo makes its own namespaces; their names and those of its directory and pins begin with mcr-demo-PID-.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcr.errors import ExitStatus
from tests.conftest import require
from tests.netns.lab import NAMESPACES, leftovers

LONG = ("--count", "200000", "--rate", "10000")


class Demo:
    """A running demo, whose output goes to a file."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.written = directory / "demo.output"
        with self.written.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mcr.demo", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.prefix = f"mcr-demo-{self.process.pid}-"

    def output(self) -> str:
        return self.written.read_text(errors="replace")

    def wait_until_it_counts(self) -> None:
        """Until the third line of counters: all five commands are running then."""
        deadline_s = time.monotonic() + 40
        while "\n 3." not in self.output():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline_s, self.output()
            time.sleep(0.05)

    def end(self) -> tuple[int, list[str]]:
        """Its exit status and the lines of its output, once it has left nothing."""
        status = self.process.wait(60)
        assert leftovers(self.prefix) == []
        assert list(Path(tempfile.gettempdir()).glob(f"{self.prefix}*")) == []
        return status, self.output().splitlines()


def supervisor_of(demo: Demo) -> int:
    """The process id of its `mcr run`."""
    told = subprocess.run(
        ["ip", "netns", "pids", f"{demo.prefix}relay"], capture_output=True, text=True, check=True
    )
    (pid,) = (
        int(pid) for pid in told.stdout.split() if b"\0run\0-c\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return pid


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Demo]]:
    """Demos to be ended with the test, in the way that lets them clean up."""
    require("root", os.geteuid() == 0, f"effective user id is {os.geteuid()}")
    demos: list[Demo] = []
    yield demos
    for demo in demos:
        demo.process.terminate()
        demo.process.wait(60)


def test_the_demo_relays_every_packet_to_both_outputs_and_leaves_nothing(
    started: list[Demo], tmp_path: Path
) -> None:
    started.append(demo := Demo(tmp_path, "--count", "20000", "--rate", "10000"))
    status, lines = demo.end()
    text = "\n".join(lines)
    assert (status, lines[-1]) == (ExitStatus.DONE, "relayed 20000 of 20000"), text
    assert "mcr run: in0 attached, mode native, ingress xsk; joined 1 of 1 groups" in text
    assert (
        text.count("20000 packets, SHA-256 equal to the sender's\n  lost 0, duplicates 0, reordered 0") == 2
    )
    assert max(map(len, lines)) <= 80
    assert "nothing is left" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda it: it.name)
def test_a_signal_in_the_middle_ends_the_demo_and_leaves_nothing(
    started: list[Demo], tmp_path: Path, number: signal.Signals
) -> None:
    started.append(demo := Demo(tmp_path, *LONG))
    demo.wait_until_it_counts()
    assert (NAMESPACES / f"{demo.prefix}relay").exists()
    demo.process.send_signal(number)
    status, lines = demo.end()
    assert status == ExitStatus.FAILED
    assert lines[-2:] == [f"mcr: stopped by {number.name}", "  remedy: run it again: make demo"]
    assert "Traceback" not in "\n".join(lines)


def test_a_signal_during_set_up_leaves_nothing(started: list[Demo], tmp_path: Path) -> None:
    started.append(demo := Demo(tmp_path, *LONG))
    deadline_s = time.monotonic() + 20
    while not (NAMESPACES / f"{demo.prefix}source").exists():
        assert time.monotonic() < deadline_s, demo.output()
    demo.process.send_signal(signal.SIGINT)
    status, lines = demo.end()
    assert (status, lines[-2]) == (ExitStatus.FAILED, "mcr: stopped by SIGINT"), "\n".join(lines)


def test_a_killed_supervisor_fails_the_demo_and_leaves_nothing(started: list[Demo], tmp_path: Path) -> None:
    started.append(demo := Demo(tmp_path, *LONG))
    demo.wait_until_it_counts()
    os.kill(supervisor_of(demo), signal.SIGKILL)
    status, lines = demo.end()
    assert status == ExitStatus.FAILED
    assert lines[-2].startswith("mcr: mcr run -c ended with status -9"), "\n".join(lines)


def test_packets_that_do_not_arrive_fail_the_demo_with_their_drop_reason(
    started: list[Demo], tmp_path: Path
) -> None:
    started.append(demo := Demo(tmp_path, "--count", "50000", "--rate", "10000"))
    demo.wait_until_it_counts()
    subprocess.run(["ip", "-n", f"{demo.prefix}relay", "link", "set", "out0", "down"], check=True)
    status, lines = demo.end()
    text = "\n".join(lines)
    last = re.fullmatch("relayed ([0-9]+) of 50000", lines[-1])
    assert status == ExitStatus.FAILED, text
    assert last is not None and 0 < int(last[1]) < 50000, text
    assert "239.2.2.2%eth0:6000 has not received exactly what was sent" in lines
    assert "10.2.0.2%eth0:6001 has not received exactly what was sent" in lines
    assert "\ndrop reason " in text


def test_without_root_the_demo_names_cause_and_remedy() -> None:
    require("root", os.geteuid() == 0, f"effective user id is {os.geteuid()}")
    nobody = 65534
    done = subprocess.run(
        [
            "setpriv",
            f"--reuid={nobody}",
            f"--regid={nobody}",
            "--clear-groups",
            sys.executable,
            "-m",
            "mcr.demo",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == ExitStatus.NOT_PERMITTED, done.stderr
    assert done.stdout == ""
    assert done.stderr == (
        "mcr: the demo makes network namespaces and loads BPF, for which it must be root\n"
        "  remedy: sudo make demo\n"
    )
