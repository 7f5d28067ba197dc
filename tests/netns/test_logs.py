"""The log of a real supervisor: JSON where asked for, at a level that can be changed."""

import json
import os
import signal
import sys
from typing import Any

from tests.netns.flows import GROUP_IN, GROUP_OUT, config, status
from tests.netns.lab import Lab, Namespace, Process


def rows(process: Process) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.stderr.read_text().splitlines()]


def spawn(lab: Lab, relay: Namespace, *arguments: str) -> Process:
    argv = [sys.executable, "-m", "mcr.cli.main", "--instance", relay.name, *arguments, "--log-json"]
    return lab.spawn(relay, argv)


def test_every_line_of_a_json_log_is_an_object_from_start_to_end(lab: Lab) -> None:
    relay = lab.topology_relay().relay
    path = lab.directory / "log.toml"
    path.write_text(config(("cam", GROUP_IN, [GROUP_OUT])))
    supervisor = spawn(lab, relay, "run", "-c", str(path))
    supervisor.wait_for('"message": "ready"', 30)
    assert lab.mcr(relay, "log").stdout == "info\n"
    worker = status(lab, relay)["worker_pid"]
    os.kill(worker, signal.SIGKILL)
    while status(lab, relay)["worker_pid"] in (None, worker):
        assert supervisor.child.poll() is None
    lab.mcr(relay, "log", "error")
    assert lab.mcr(relay, "log").stdout == "error\n"
    assert supervisor.terminate() == 0
    told = rows(supervisor)
    assert all(set(row) >= {"time", "level", "logger", "message"} for row in told)
    assert "stopping" not in [row["message"] for row in told]
    (died,) = [row for row in told if row["level"] == "error"]
    assert died["interface"] == "in0"
    assert f"worker {worker}" in died["message"]


def test_an_error_that_ends_a_supervisor_is_a_line_of_its_json_log(lab: Lab) -> None:
    relay = lab.namespace("relay")
    process = spawn(lab, relay, "run", "-c", "/nonexistent/mcr.toml")
    assert process.wait(30) == 1
    last = rows(process)[-1]
    assert (last["level"], last["message"]) == (
        "error",
        "cannot read /nonexistent/mcr.toml: No such file or directory",
    )
    assert last["remedy"]
