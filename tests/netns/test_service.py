"""The supervisor as a service: what the shipped unit allows is enough, and systemd is told what happens."""

import configparser
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from mcr import privileges
from mcr.errors import ExitStatus
from tests.conftest import require
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
from tests.netns.lab import Lab, RelayTopology, processes_in
from tests.netns.test_confinement import proc_status
from tests.netns.test_membership import joined

UNIT = Path(__file__).parents[2] / "deploy" / "mcr.service"
KEEP = UNIT.with_name("mcr-keep.conf")
UNDER_UNIT = Path(__file__).parent / "under_unit.py"
EXPOSURE = 32  # of 100: what is left is what a relay is for, the network and its capabilities


def unit_capabilities() -> list[str]:
    """As setpriv(1) writes them: `net_admin`."""
    unit = configparser.ConfigParser(strict=False)
    unit.read(UNIT)
    return [name.removeprefix("CAP_").lower() for name in unit["Service"]["CapabilityBoundingSet"].split()]


def argv(lab: Lab, topology: RelayTopology) -> list[str]:
    path = lab.directory / "service.toml"
    path.write_text(config(("cam", GROUP_IN, [GROUP_OUT])))
    return [sys.executable, "-m", "mcr.cli.main", "--instance", topology.relay.name, "run", "-c", str(path)]


def test_capabilities_of_the_unit_are_enough(lab: Lab) -> None:
    topology = lab.topology_relay()
    bounding = ",".join(["-all", *(f"+{name}" for name in unit_capabilities())])
    confined = ["setpriv", "--bounding-set", bounding, "--no-new-privs", *argv(lab, topology)]
    supervisor = lab.spawn(topology.relay, confined)
    supervisor.wait_for("mcr: ready")
    assert status(lab, topology.relay)["state"] == "attached"
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)
    assert supervisor.terminate() == 0
    assert lab.leftovers(topology.relay) == []


def has_systemd_analyze() -> None:
    require("systemd-analyze", shutil.which("systemd-analyze") is not None, "it is not installed")


def test_supervisor_and_workers_work_under_all_that_the_unit_forbids(lab: Lab) -> None:
    has_systemd_analyze()
    require("x86_64", os.uname().machine == "x86_64", f"this is {os.uname().machine}")
    topology = lab.topology_relay()
    under = [sys.executable, str(UNDER_UNIT), str(UNIT), str(lab.directory), "--", *argv(lab, topology)]
    supervisor = lab.spawn(topology.relay, under)
    supervisor.wait_for("mcr: ready", 30)
    mine = proc_status(supervisor.pid)
    assert (mine["NoNewPrivs"], mine["Seccomp"], mine["CapEff"]) == ("1", "2", "000000c0000070e0")
    worker = status(lab, topology.relay)["worker_pid"]
    assert int(proc_status(worker)["CapEff"], 16) == 0
    assert int(proc_status(worker)["Seccomp_filters"]) == 2
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)
    lab.ask(
        topology.relay, "rule.add", name="late", **{"from": "239.1.1.5%in0:5000", "to": ["10.2.0.2:6001"]}
    )
    os.kill(worker, signal.SIGSTOP)  # to be killed by the supervisor, in 3 s
    while status(lab, topology.relay)["worker_pid"] in (None, worker):
        assert supervisor.child.poll() is None
        time.sleep(0.05)
    assert supervisor.terminate() == 0
    assert lab.leftovers(topology.relay) == []


def test_joins_outlive_a_supervisor_and_are_adopted_under_all_that_the_unit_forbids(lab: Lab) -> None:
    has_systemd_analyze()
    require("x86_64", os.uname().machine == "x86_64", f"this is {os.uname().machine}")
    topology = lab.topology_relay(gro=True)
    under = [sys.executable, str(UNDER_UNIT), str(UNIT), str(lab.directory), "--", *argv(lab, topology)]
    first = lab.spawn(topology.relay, [*under, "--on-exit", "keep"])
    first.wait_for("mcr: ready", 60)
    assert first.terminate() == 0
    (holder,) = processes_in(topology.relay)
    assert int(proc_status(holder)["CapEff"], 16) == 0
    assert ("in0", "239.1.1.1") in joined(lab, topology.relay)
    second = lab.spawn(topology.relay, under)
    second.wait_for("mcr: ready", 60)
    assert f"adopting pid {holder} and its 1 joins" in second.output()
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)
    assert second.terminate() == 0
    assert lab.leftovers(topology.relay) == []


def complaints(unit: Path) -> list[str]:
    """What systemd has to say of a unit and its drop-ins."""
    argv = ["systemd-analyze", "verify", str(unit)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    return [line for line in done.stderr.splitlines() if "mcr.service" in line or "keep.conf" in line]


def test_drop_in_that_keeps_is_understood_and_spares_the_process_of_the_joins(tmp_path: Path) -> None:
    has_systemd_analyze()
    unit, drop_in = tmp_path / "mcr.service", tmp_path / "mcr.service.d" / "keep.conf"
    drop_in.parent.mkdir()
    program = shutil.which("true") or ""
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/mcr", program))
    text = KEEP.read_text().replace("/usr/local/bin/mcr", program)
    drop_in.write_text(text)
    assert {"KillMode=process", "RuntimeDirectoryPreserve=yes"} < set(text.splitlines())
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert [line for line in done.stderr.splitlines() if "mcr.service" in line or "keep.conf" in line] == []
    drop_in.write_text(text.replace("KillMode=process", "KillMode=mercy"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert "keep.conf" in done.stderr


FORBIDDEN = """
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
def refused(call):
    try:
        return bool(call())
    except OSError:
        return True
failed = ctypes.c_void_p(-1).value
attempts = {
    "write and execute": lambda: libc.mmap(None, 4096, 6, 0x22, -1, 0) == failed,
    "write /etc": lambda: os.open("/etc/mcr-must-not-be", os.O_CREAT | os.O_WRONLY) and 0,
    "a sysctl": lambda: os.open("/proc/sys/net/ipv4/ip_forward", os.O_WRONLY) and 0,
    "a namespace": lambda: libc.unshare(0x20000),
    "a mount": lambda: libc.mount(b"none", b"/mnt", b"tmpfs", 0, None),
    "a key": lambda: libc.syscall(248, 0, 0, 0, 0, 0),
}
print([name for name, call in attempts.items() if not refused(call)])
"""


def test_confinement_by_hand_is_what_the_unit_says(lab: Lab) -> None:
    has_systemd_analyze()
    require("x86_64", os.uname().machine == "x86_64", f"this is {os.uname().machine}")
    under = [sys.executable, str(UNDER_UNIT), str(UNIT), "--", sys.executable, "-c", FORBIDDEN]
    assert lab.run(lab.namespace("relay"), under).stdout == "[]\n"


def make(*arguments: str) -> str:
    argv = ["make", "--no-print-directory", "-C", str(UNIT.parents[1]), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_install_service_keeps_a_configuration_and_uninstall_leaves_nothing_else(tmp_path: Path) -> None:
    where = (f"DESTDIR={tmp_path}", "PREFIX=/opt/x")
    config_path = tmp_path / "etc" / "mcr" / "mcr.toml"
    make("install-service", *where)
    assert config_path.read_text() == (UNIT.parent / "mcr.toml").read_text()
    unit = tmp_path / "opt" / "x" / "lib" / "systemd" / "system" / "mcr.service"
    assert "ExecStart=/opt/x/bin/mcr run" in unit.read_text()
    config_path.write_text("# mine\n")
    assert "kept" in make("install-service", *where)
    assert config_path.read_text() == "# mine\n"
    installed = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert installed == {"mcr.service", "mcr.conf", "50-mcr.conf", "mcr.toml"}
    make("uninstall-service", *where)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [config_path]


def run_without(lab: Lab, topology: RelayTopology, capability: str) -> subprocess.CompletedProcess[str]:
    """`mcr run` with every capability of the unit but one."""
    names = [name for name in unit_capabilities() if name != capability]
    bounding = ",".join(["-all", *(f"+{name}" for name in names)])
    confined = ["setpriv", "--bounding-set", bounding, "--no-new-privs", *argv(lab, topology)]
    return lab.run(topology.relay, confined, check=False)


def test_each_missing_capability_is_named_before_anything_is_started(lab: Lab) -> None:
    topology = RelayTopology(*[lab.namespace("relay")] * 3)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    purposes = {
        each.name: each.purpose for each in (*privileges.ALWAYS, *privileges.AS_ROOT, privileges.LOCK)
    }
    for capability in unit_capabilities():
        name = f"CAP_{capability.upper()}"
        if name == privileges.LOCK.name and not 0 <= soft < privileges.LOCKED_BYTES:
            continue
        done = run_without(lab, topology, capability)
        assert done.returncode == ExitStatus.NOT_PERMITTED
        assert done.stderr == (
            f"mcr: missing {name} ({purposes[name]})\n"
            f"  remedy: run it as root, or grant it {name} as the unit in deploy/ does\n"
        )
        assert lab.leftovers(topology.relay) == []


def test_the_unit_grants_what_privileges_lists_and_nothing_else() -> None:
    listed = {each.name for each in (*privileges.ALWAYS, *privileges.AS_ROOT, privileges.LOCK)}
    assert {f"CAP_{name.upper()}" for name in unit_capabilities()} == listed


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    has_systemd_analyze()
    unit = tmp_path / "mcr.service"
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/mcr", "/bin/true"))  # it must be there
    verified = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    argv = ["systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE}", str(unit)]
    judged = subprocess.run(argv, capture_output=True, text=True)
    assert judged.returncode == 0, judged.stdout


def test_systemd_is_told_of_start_reload_life_and_stop(lab: Lab) -> None:
    topology = lab.topology_relay()
    path = lab.directory / "notify"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(path))
    listener.settimeout(60)
    variables = [f"NOTIFY_SOCKET={path}", "WATCHDOG_USEC=200000"]
    supervisor = lab.spawn(topology.relay, ["env", *variables, *argv(lab, topology)])
    heard: list[str] = []

    def wait_for(assignment: str) -> None:
        deadline = time.monotonic() + 60
        while assignment not in heard:
            assert time.monotonic() < deadline, heard
            heard.extend(listener.recv(4096).decode().split("\n"))

    with listener:
        wait_for("READY=1")
        wait_for("STATUS=1 interfaces attached, 1 rules")
        wait_for("WATCHDOG=1")
        heard.clear()
        os.kill(supervisor.pid, signal.SIGHUP)
        wait_for("RELOADING=1")
        wait_for("READY=1")
        supervisor.child.send_signal(signal.SIGTERM)
        wait_for("STOPPING=1")
        assert supervisor.wait() == 0
