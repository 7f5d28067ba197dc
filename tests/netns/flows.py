"""Streams in the laboratory: sources, sinks and what they report; and the relay's own counts.

Sources and sinks are `mcr send` and `mcr listen`, real processes over ordinary sockets.
"""

import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.netns.lab import Lab, Namespace, Process, RelayTopology

Report = dict[str, Any]

GROUP_IN = "239.1.1.1%in0:5000"
GROUP_SENT = "239.1.1.1%eth0:5000"
GROUP_OUT = "239.2.2.2%out0:6000,ttl=8"
GROUP_HEARD = "239.2.2.2%eth0:6000"


def config(*rules: tuple[str, str, Sequence[str]], attach: str = "", path: str = "auto") -> str:
    """A TOML file that attaches in0 (attach: further lines of that table) and has these rules."""
    text = f'[[attach]]\ninterface = "in0"\n{attach}\n'
    for name, stream, outputs in rules:
        text += f'[[rule]]\nname = "{name}"\nfrom = "{stream}"\nto = {json.dumps(outputs)}\n'
        text += f'path = "{path}"\n'
    return text


def listen(lab: Lab, namespace: Namespace, stream: str, *options: str) -> Process:
    """A sink that is ready."""
    argv = [sys.executable, "-m", "mcr.cli.main", "listen", stream, "-j", "--timeout", "100", *options]
    process = lab.spawn(namespace, argv)
    process.wait_for("ready")
    return process


def spawn_send(lab: Lab, namespace: Namespace, stream: str, *options: str) -> Process:
    """A source that runs beside the test."""
    return lab.spawn(namespace, [sys.executable, "-m", "mcr.cli.main", "send", stream, "-j", *options])


def send(lab: Lab, namespace: Namespace, stream: str, *options: str) -> Report:
    """Sends to the end."""
    return report(spawn_send(lab, namespace, stream, *options))


def report(process: Process, timeout_s: float = 100) -> Report:
    """What a source or sink says when it has ended."""
    process.wait(timeout_s)
    rows: list[Report] = json.loads(process.stdout.read_text())
    return rows[0]


def stats(lab: Lab, relay: Namespace) -> list[Report]:
    return lab.ask(relay, "stats")


def rule_row(lab: Lab, relay: Namespace, name: str) -> Report:
    """A rule's row of `mcr stats`."""
    return next(row for row in stats(lab, relay) if row["object"] == "rule" and row["rule"] == name)


def status(lab: Lab, relay: Namespace) -> Report:
    """The row of the one attached interface."""
    (row,) = [row for row in lab.ask(relay, "status") if row["object"] == "interface"]
    return row


def assert_accounted(lab: Lab, relay: Namespace, count: int, worker_restarts: int = 0) -> None:
    """received = relayed + dropped, relayed = sent + dropped, nothing was dropped, no other worker died."""
    assert status(lab, relay)["worker_restarts"] == worker_restarts
    rule, *outputs = stats(lab, relay)
    assert (rule["received_packets"], rule["relayed_packets"], dropped(rule)) == (count, count, {})
    for output in outputs:
        assert (output["sent_packets"], dropped(output)) == (count, {})


def dropped(row: Report) -> dict[str, int]:
    """The reasons for which packets were dropped, without those that never occurred."""
    return {key.removeprefix("dropped_"): row[key] for key in row if key.startswith("dropped_") and row[key]}


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Returns as soon as the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def assert_whole(heard: Report, sent: Report) -> None:
    """Everything that was sent was heard: once, in order, bit for bit."""
    assert heard["packets"] == sent["packets"], heard
    counts = ("lost", "duplicates", "reordered", "corrupt", "ignored", "socket_dropped", "checksum_errors")
    assert {name: heard[name] for name in counts} == dict.fromkeys(counts, 0), heard
    assert heard["digest"] == sent["digest"]


def relay_one(
    lab: Lab, topology: RelayTopology, sent_to: str, heard_at: str, count: int, *options: str
) -> tuple[Report, Report]:
    """One stream through a running relay. Returns what was sent and what was heard."""
    sink = listen(lab, topology.dst, heard_at, "--expect", str(count), "--idle", "5", "--digest")
    sent = send(lab, topology.src, sent_to, "--count", str(count), "--digest", *options)
    return sent, report(sink)


def transfer_tcp(lab: Lab, src: Namespace, relay: Namespace, size: int) -> int:
    """Sends size bytes by TCP from src to the relay host. Returns how many arrived as they were."""
    with lab.inside(relay):
        listener = socket.create_server(("10.1.0.2", 7000))
    with lab.inside(src):
        client = socket.create_connection(("10.1.0.2", 7000))
    server, _ = listener.accept()
    chunk = bytes(range(256)) * 256
    arrived = 0
    with listener, client, server:
        while arrived < size:
            client.sendall(chunk)
            data = server.recv(len(chunk), socket.MSG_WAITALL)
            assert data == chunk
            arrived += len(data)
    return arrived
