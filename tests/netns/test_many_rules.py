"""Two thousand rules: added by one reload, then one of them changed, while streams run through others."""

import threading
import time
from pathlib import Path

import pytest

from mcr.control import ControlClient
from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    assert_whole,
    config,
    listen,
    report,
    spawn_send,
)
from tests.netns.lab import Lab

RULES = 2000
STEADY = (("steady", GROUP_IN, [GROUP_OUT]),)


def text(path: str, changed: int | None = None) -> str:
    """The steady rule and RULES others; one of those may be changed."""
    rules = []
    for number in range(RULES):
        host, port = f"{number // 250 + 1}.{number % 250 + 1}", 6000 + (number == changed)
        rules.append((f"r{number}", f"239.3.{host}%in0:5000", [f"239.4.{host}%out0:{port}"]))
    return config(*STEADY, *rules, path=path)


class Asker:
    """Asks for the status all the time; knows the longest time that an answer took."""

    def __init__(self, control_socket: Path) -> None:
        self.longest_s = 0.0
        self.asked = 0
        self._client = ControlClient(control_socket)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> "Asker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(0.005):
            began_s = time.monotonic()
            self._client.call("status")
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            self.asked += 1


def add_and_change(lab: Lab, path: str) -> tuple[float, float, float]:
    """Returns the seconds of the adding reload, of the changing one, and of the slowest status meanwhile."""
    topology = lab.topology_relay(gro=True)
    lab.supervisor(topology.relay, config=config(*STEADY, path=path))
    file = lab.directory / f"{topology.relay.name}.toml"
    control_socket = lab.runtime_directory / f"{topology.relay.name}.sock"
    client = ControlClient(control_socket)
    sink = listen(lab, topology.dst, GROUP_HEARD, "--idle", "2", "--digest")
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "5000", "--count", "10000000", "--digest")
    with Asker(control_socket) as asker:

        def reload(new: str) -> float:
            file.write_text(new)
            began_s = time.monotonic()
            client.call("reload")
            return time.monotonic() - began_s

        added_s = reload(text(path))
        before = {row["rule"]: row for row in client.call("rule.show")}
        assert len(before) == RULES + 1
        assert {row["state"] + row["output_state"] for row in before.values()} == {"activeactive"}
        changed_s = reload(text(path, changed=7))
        after = {row["rule"]: row for row in client.call("rule.show")}
    assert {name for name in before if before[name] != after[name]} == {"r7"}
    assert (after["r7"]["rule_id"], after["r7"]["to"]) == (before["r7"]["rule_id"], "239.4.1.8%out0:6001")
    source.terminate()
    sent, heard = report(source), report(sink)
    assert_whole(heard, sent)
    rule, output = client.call("stats", name="steady")
    assert rule["received_packets"] == rule["relayed_packets"] == output["sent_packets"] == sent["packets"]
    status = next(row for row in client.call("status") if row["object"] == "interface")
    assert (status["rules"], status["worker_restarts"]) == (RULES + 1, 0)
    return added_s, changed_s, asker.longest_s


def test_one_changed_rule_of_two_thousand_costs_the_others_nothing(lab: Lab) -> None:
    added_s, changed_s, longest_s = add_and_change(lab, "worker")
    assert (added_s < 30, changed_s < 5, longest_s < 3) == (True,) * 3  # wide: the machine may be busy


@pytest.mark.soak
@pytest.mark.parametrize("path", ["worker", "kernel"])
def test_a_change_beside_two_thousand_rules_is_applied_in_a_moment(lab: Lab, path: str) -> None:
    """The best of ten: the machine may be busy. Of a reload, most of the time goes into reading the file."""
    added_s, reloaded_s, longest_s = add_and_change(lab, path)
    client = ControlClient(next(lab.runtime_directory.glob("*.sock")))
    rule = {"name": "more", "from": "239.1.1.2%in0:5000", "to": ["239.2.2.3%out0:6000"], "path": path}
    applied_s, asked_s = [], []
    for _ in range(10):
        for method, params in (("rule.add", rule | {"temporary": True}), ("rule.del", {"names": ["more"]})):
            began_s = time.monotonic()
            client.call(method, **params)
            applied_s.append(time.monotonic() - began_s)
        began_s = time.monotonic()
        client.call("status")
        asked_s.append(time.monotonic() - began_s)
    print(
        f"2000 added in {added_s:.3f} s, one changed by a reload in {reloaded_s:.3f} s, by a command in "
        f"{min(applied_s):.3f} s (median {sorted(applied_s)[10]:.3f} s); status in {min(asked_s):.4f} s, "
        f"during the reloads at most {longest_s:.3f} s"
    )
    assert min(applied_s) < 0.1
    assert min(asked_s) < 0.1
    assert longest_s < 1
