"""The commands for people, in real terminals of tmux: tables that fit, a live view, and completion."""

import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.netns.flows import GROUP_IN, GROUP_OUT, GROUP_SENT, config, spawn_send, wait_until
from tests.netns.lab import Lab, Namespace, Process, RelayTopology

SECOND = ("a-rule-with-a-name-of-great-length-0002", "10.9.9.9@232.1.1.3%in0:5000", ["10.2.0.9:1234"])
COLOUR = re.compile(r"\x1b\[3[0-7]m")  # SGR 30 to 37, ECMA-48


def argv(namespace: Namespace, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "mcr.cli.main", "--instance", namespace.name, *arguments]


@dataclass(frozen=True, slots=True)
class Terminal:
    """A terminal in a namespace, whose shell writes the status of the last command, and stays."""

    lab: Lab
    namespace: Namespace
    socket: Path

    def tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", str(self.socket), "-f", "/dev/null", *arguments]
        return self.lab.run(self.namespace, command).stdout

    def run(self, width: int, height: int, *command: str, environment: str = "") -> None:
        """Takes the place of an earlier command.

        The state of the terminal is in the files `before` and, when the command has ended, `after`."""
        before, after = (self.lab.directory / name for name in ("before", "after"))
        after.unlink(missing_ok=True)
        mcr = " ".join(argv(self.namespace, command))
        script = f"stty -g > {before}; {environment} {mcr}; echo status $?; stty -g > {after}; exec cat"
        if self.socket.exists():
            self.tmux("respawn-pane", "-k", script)
        else:
            self.tmux("new-session", "-d", "-x", str(width), "-y", str(height), script)

    def screen(self, *options: str) -> list[str]:
        return self.tmux("capture-pane", "-p", *options).splitlines()

    def wait_for(self, text: str) -> list[str]:
        """The screen with the text, which may be a regular expression."""
        wait_until(lambda: bool(re.search(text, "\n".join(self.screen()))), f"{text} on the screen", 20)
        return self.screen()

    def restored(self) -> bool:
        """Whether the terminal is as it was."""
        directory = self.lab.directory
        return (directory / "before").read_text() == (directory / "after").read_text()


@pytest.fixture
def topology(lab: Lab) -> RelayTopology:
    return lab.topology_relay(gro=True)


@pytest.fixture
def supervisor(lab: Lab, topology: RelayTopology) -> Process:
    rules = (("cam", GROUP_IN, [GROUP_OUT, "10.2.0.2:6001"]), SECOND)
    return lab.supervisor(topology.relay, config=config(*rules))


@pytest.fixture
def terminal(lab: Lab, topology: RelayTopology, supervisor: Process) -> Iterator[Terminal]:
    terminal = Terminal(lab, topology.relay, lab.directory / "tmux")
    yield terminal
    lab.run(topology.relay, ["tmux", "-S", str(terminal.socket), "kill-server"], check=False)


def test_top_shows_the_streams_at_any_size_and_restores_the_terminal(
    lab: Lab, topology: RelayTopology, terminal: Terminal
) -> None:
    spawn_send(lab, topology.src, GROUP_SENT, "--rate", "2000", "--duration", "100")
    terminal.run(80, 24, "top", "--interval", "0.2")
    screen = terminal.wait_for(r"cam +239\.1\.1\.1%in0:5000 +worker +[1-9]")
    assert len(screen) == 24 and max(map(len, screen)) <= 80
    assert screen[0].startswith(f"mcr top  {topology.relay.name}  2 rules")
    assert "in0 native xsk; joined 2 of 2" in screen[1]
    assert COLOUR.search("\n".join(terminal.screen("-e")))
    (other,) = [line for line in screen if line.startswith("a-rule-")]
    assert "…" in other and other.endswith("silent")
    assert screen[-1].startswith("q quit")
    terminal.tmux("resize-window", "-x", "200", "-y", "50")
    screen = terminal.wait_for("a-rule-with-a-name-of-great-length-0002 10.9.9.9@232.1.1.3%in0:5000 ")
    assert len(screen) == 50 and screen[-1].startswith("q quit")
    terminal.tmux("send-keys", "n")
    terminal.wait_for(r"\[n\]name")
    terminal.tmux("send-keys", "q")
    screen = terminal.wait_for("status 0")
    assert terminal.restored()
    assert "mcr top" not in "\n".join(screen)


def test_top_survives_a_restart_of_the_supervisor_and_says_so(
    lab: Lab, topology: RelayTopology, supervisor: Process, terminal: Terminal
) -> None:
    terminal.run(80, 24, "top", "--interval", "0.2", environment="NO_COLOR=1")
    terminal.wait_for("cam ")
    supervisor.terminate()
    screen = terminal.wait_for("this is old, trying again: no supervisor is running")
    assert any(line.startswith("cam ") for line in screen)
    assert not COLOUR.search("\n".join(terminal.screen("-e"))), "in spite of NO_COLOR"
    lab.supervisor(topology.relay, config=config(("new", GROUP_IN, [GROUP_OUT])))
    screen = terminal.wait_for("new +239")
    assert "joined 1 of 1" in screen[1]
    (pid,) = _pids_of(topology.relay, "top")
    os.kill(pid, signal.SIGTERM)
    terminal.wait_for("status 143")
    assert terminal.restored()


def _pids_of(namespace: Namespace, command: str) -> list[int]:
    wanted = "\0".join(argv(namespace, (command,)))
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists() and path.read_text(errors="replace").startswith(wanted)
    ]


def test_tables_fit_80_columns_and_watching_shows_rates(
    lab: Lab, topology: RelayTopology, terminal: Terminal
) -> None:
    for command, heads in (("status", "INTERFACE"), ("rule show", "RULE"), ("stats", "STREAM")):
        terminal.run(80, 24, *command.split())
        screen = terminal.wait_for("status 0")
        table = screen[: screen.index("status 0")]
        assert table[0].startswith(heads)
        assert not any(line.startswith(" ") and not line.startswith("  -> ") for line in table), "it wraps"
    spawn_send(lab, topology.src, GROUP_SENT, "--rate", "2000", "--duration", "100")
    terminal.run(80, 24, "stats", "cam", "--watch")
    screen = terminal.wait_for(r"cam +239\.1\.1\.1%\S+ +[1-9][\d.]*k? ")
    assert screen[0].split()[:4] == ["STREAM", "RECEIVED/S", "RELAYED/S", "SENT/S"]
    terminal.tmux("send-keys", "C-c")
    terminal.wait_for("status 130")
    assert SECOND[0] in lab.mcr(topology.relay, "rule", "show").stdout, "what goes to a program is not cut"
    terminal.run(80, 24, "top", environment="TERM=nonsense")
    terminal.wait_for("this terminal cannot show it(.|\\n)*status 1")
    done = lab.mcr(topology.relay, "top", check=False)
    assert done.returncode == 2
    assert done.stderr == "mcr: top needs a terminal\n  remedy: use: mcr stats --watch\n"


def test_the_shell_completes_rules_and_interfaces(
    lab: Lab, topology: RelayTopology, supervisor: Process
) -> None:
    program = lab.directory / "mcr"
    program.write_text(f'#!/bin/sh\nexec {" ".join(argv(topology.relay, ()))} "$@"\n')
    program.chmod(0o755)
    script = f"""
source <({program} completion bash)
try() {{
    COMP_WORDS=(mcr "$@"); COMP_CWORD=$#; COMPREPLY=()
    _mcr_completion {program}
    echo "${{COMPREPLY[*]}}"
}}
try --instance {topology.relay.name} stats c
try --instance {topology.relay.name} rule del a-
try attach ""
try det
try --instance nobody stats ""
"""
    done = lab.run(topology.relay, ["bash", "-c", script])
    assert done.stdout.splitlines() == ["cam", SECOND[0], "in0 lo out0", "detach", ""]
    assert done.stderr == ""
