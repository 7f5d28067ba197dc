"""Starts, changes under traffic, deaths and ends: what happens to the packets, and what is left."""

import os
import signal
import sys
import time

import pytest

from mcr.control import ControlClient
from mcr.maps import Maps
from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    Report,
    assert_whole,
    config,
    dropped,
    listen,
    relay_one,
    report,
    rule_row,
    send,
    spawn_send,
    stats,
    status,
    wait_until,
)
from tests.netns.lab import Lab, Namespace, Process


def test_rules_come_and_go_without_a_loss_to_another(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("steady", GROUP_IN, [GROUP_OUT])))
    steady = listen(lab, topology.dst, GROUP_HEARD, "--expect", "100000", "--idle", "8", "--digest")
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "20000", "--count", "100000", "--digest")
    rounds = 0
    while source.child.poll() is None:
        add = ["rule", "add", "passing", "--from", "239.1.1.2%in0:5000"]
        lab.mcr(topology.relay, *add, "--to", "239.2.2.3%out0:6000")
        sink = listen(lab, topology.dst, "239.2.2.3%eth0:6000", "--expect", "200", "--idle", "5", "--digest")
        sent = send(lab, topology.src, "239.1.1.2%eth0:5000", "--rate", "5000", "--count", "200", "--digest")
        assert_whole(report(sink), sent)
        lab.mcr(topology.relay, "rule", "del", "passing")
        rounds += 1
    assert_whole(report(steady), report(source))
    assert rounds >= 2
    row = rule_row(lab, topology.relay, "steady")
    assert (row["received_packets"], row["relayed_packets"], dropped(row)) == (100_000, 100_000, {})


def test_changed_outputs_lose_nothing_at_the_unchanged_one(lab: Lab) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    path = lab.directory / f"{topology.relay.name}.toml"
    sink = listen(lab, topology.dst, GROUP_HEARD, "--expect", "60000", "--idle", "8", "--digest")
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "20000", "--count", "60000", "--digest")
    reloads = 0
    while source.child.poll() is None:
        outputs = [GROUP_OUT, f"10.2.0.2:{7000 + reloads}"]
        path.write_text(config(("cam", GROUP_IN, outputs)))
        lab.mcr(topology.relay, "reload")
        reloads += 1
    assert_whole(report(sink), report(source))
    assert reloads >= 3
    assert supervisor.child.poll() is None
    row = rule_row(lab, topology.relay, "cam")
    assert (row["received_packets"], row["relayed_packets"]) == (60_000, 60_000)


def test_killed_worker_is_replaced_within_a_second_with_its_rules(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    sink = listen(lab, topology.dst, GROUP_HEARD, "--idle", "3")
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "20000", "--count", "100000")
    wait_until(lambda: rule_row(lab, topology.relay, "cam")["relayed_packets"] > 5000, "traffic")
    worker = status(lab, topology.relay)["worker_pid"]
    os.kill(worker, signal.SIGKILL)
    killed_s = time.monotonic()
    before = rule_row(lab, topology.relay, "cam")["relayed_packets"]
    wait_until(
        lambda: rule_row(lab, topology.relay, "cam")["relayed_packets"] > before + 1000, "relaying again"
    )
    assert time.monotonic() - killed_s < 1 + 1000 / 20_000 + 0.5  # and the time to ask
    row = status(lab, topology.relay)
    assert row["worker_pid"] != worker
    assert (row["worker_restarts"], row["state"]) == (1, "attached")
    sent, heard = report(source), report(sink)
    rule, output = stats(lab, topology.relay)
    assert rule["received_packets"] == sent["packets"]
    lost = dropped(rule)
    assert rule["received_packets"] == rule["relayed_packets"] + sum(lost.values())
    assert set(lost) <= {"no_worker", "worker_died"}
    assert lost.get("worker_died", 0) <= 8192  # no more than its pool held
    assert output["relayed_packets"] == output["sent_packets"] + sum(dropped(output).values())
    assert output["sent_packets"] <= heard["packets"] <= rule["relayed_packets"]
    assert (heard["duplicates"], heard["corrupt"]) == (0, 0)


@pytest.mark.soak
def test_twenty_four_killed_workers_cost_only_the_time_without_one(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT]), path="worker"))
    client = ControlClient(lab.runtime_directory / f"{topology.relay.name}.sock")
    sink = listen(lab, topology.dst, GROUP_HEARD, "--idle", "15", "--timeout", "600")
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "50000", "--count", "100000000")

    def relayed() -> int:
        return int(client.call("stats")[0]["relayed_packets"])

    def state() -> Report:
        return next(row for row in client.call("status") if row["object"] == "interface")

    before, waited_s = 0, 0.0
    for kill in range(1, 25):
        wait_until(lambda: relayed() > before + 5000, "relaying", timeout_s=20)  # noqa: B023
        worker = state()["worker_pid"]
        os.kill(worker, signal.SIGKILL)
        killed_s = time.monotonic()
        wait_until(lambda: state()["worker_pid"] != worker, "its end")  # noqa: B023
        wait_until(lambda: not state()["reason"], "the next one", timeout_s=20)
        waited_s += time.monotonic() - killed_s
        before = relayed()
        assert state()["worker_restarts"] == kill
    wait_until(lambda: relayed() > before + 5000, "relaying", timeout_s=20)
    source.child.send_signal(signal.SIGINT)
    sent, heard = report(source), report(sink, timeout_s=60)
    rule, output = stats(lab, topology.relay)
    assert rule["received_packets"] == sent["packets"]
    assert rule["received_packets"] == rule["relayed_packets"] + sum(dropped(rule).values())
    assert dropped(rule).get("worker_died", 0) <= 24 * 8192
    assert dropped(rule)["no_worker"] <= 50_000 * waited_s * 1.2
    # A worker that is killed may have sent what it had no time to count.
    assert output["sent_packets"] <= heard["packets"] <= rule["relayed_packets"]
    assert (heard["duplicates"], heard["corrupt"]) == (0, 0)


@pytest.mark.parametrize("ingress", ["xsk", pytest.param("packet", marks=pytest.mark.soak)])
def test_the_end_at_full_load_is_quick_and_accounts_for_every_packet(lab: Lab, ingress: str) -> None:
    topology = lab.topology_relay()
    attach = f'ingress = "{ingress}"'
    text = config(("cam", GROUP_IN, [GROUP_OUT]), attach=attach, path="worker")
    supervisor = lab.supervisor(topology.relay, config=text)
    client = ControlClient(lab.runtime_directory / f"{topology.relay.name}.sock")
    sink = listen(lab, topology.dst, GROUP_HEARD, "--idle", "1")
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "1000000", "--count", "100000000")
    wait_until(lambda: client.call("stats")[0]["relayed_packets"] > 50_000, "traffic")
    with Maps(topology.relay.name) as maps:  # what is held open outlives the supervisor
        (row,) = client.call("rule.show")
        began_s = time.monotonic()
        assert supervisor.terminate(10) == 0
        assert time.monotonic() - began_s < 2 + 2  # and what a busy machine may add
        rule, output = maps.rule_counts(row["rule_id"]), maps.output_counts(row["output_id"])
        worker = maps.worker_counts(0)
    source.child.kill()
    heard = report(sink)
    lost_before = worker.receive_ring_full + worker.fill_ring_empty
    if not rule.dropped["receive_ring_full"] and ingress == "xsk":
        assert rule.received_packets == rule.relayed_packets + sum(rule.dropped.values()) + lost_before
    else:
        assert rule.received_packets == rule.relayed_packets + sum(rule.dropped.values())
    assert rule.relayed_packets == output.sent_packets + sum(output.dropped.values())
    assert heard["packets"] + heard["socket_dropped"] == output.sent_packets
    assert (worker.frames_in_flight, worker.frames_receive) == (0, 0)
    assert lab.leftovers(topology.relay) == []


def test_silent_worker_is_killed_and_replaced(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    worker = status(lab, topology.relay)["worker_pid"]
    os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: status(lab, topology.relay)["worker_pid"] not in (worker, None), "a new worker")
    wait_until(lambda: status(lab, topology.relay)["state"] == "attached", "attached")
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ingress", ["xsk", "packet"])
def test_nothing_is_left_after_the_end(lab: Lab, ingress: str, number: signal.Signals) -> None:
    topology = lab.topology_relay()
    rules = (("v4", GROUP_IN, [GROUP_OUT]), ("v6", "[ff15::1]%in0:5000", ["[ff15::2]%out0:6000"]))
    supervisor = lab.supervisor(topology.relay, config=config(*rules, attach=f'ingress = "{ingress}"'))
    assert lab.leftovers(topology.relay) != []
    source = spawn_send(lab, topology.src, GROUP_SENT, "--rate", "50000", "--count", "200000")
    wait_until(lambda: rule_row(lab, topology.relay, "v4")["relayed_packets"] > 5000, "traffic")
    supervisor.child.send_signal(number)
    assert supervisor.wait(3) == 0
    assert lab.leftovers(topology.relay) == []
    source.child.kill()


def test_killed_supervisor_takes_its_workers_and_programs_with_it(lab: Lab) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    supervisor.child.kill()
    supervisor.wait()

    def only_files_remain() -> bool:
        remaining = lab.leftovers(topology.relay)
        return all(line.startswith(("pin ", "file ")) for line in remaining)

    wait_until(only_files_remain, "processes, programs and memberships gone")
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)


def mcr(namespace: Namespace, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "mcr.cli.main", "--instance", namespace.name, *arguments]


def test_attach_becomes_the_supervisor_where_none_runs(lab: Lab) -> None:
    topology = lab.topology_relay()
    foreground = lab.spawn(topology.relay, mcr(topology.relay, "attach", "in0"))
    foreground.wait_for("Ctrl-C ends it")
    assert "attached in0: mode native, ingress xsk" in foreground.output()
    lab.mcr(topology.relay, "rule", "add", "cam", "--from", GROUP_IN, "--to", GROUP_OUT)
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)
    foreground.child.send_signal(signal.SIGINT)
    assert foreground.wait(3) == 0
    assert lab.leftovers(topology.relay) == []


def test_attach_and_detach_in_a_running_supervisor(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay)
    lab.mcr(topology.relay, "rule", "add", "cam", "--from", GROUP_IN, "--to", GROUP_OUT)
    rows = lab.ask(topology.relay, "rule.show")
    assert (rows[0]["state"], rows[0]["reason"]) == ("pending", "in0 is not attached (mcr attach in0)")
    for mode in ("native", "generic"):
        done = lab.mcr(topology.relay, "attach", "in0", "--mode", mode)
        assert done.stdout == f"attached in0: mode {mode}, ingress xsk\n"
        sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
        assert_whole(heard, sent)
        lab.mcr(topology.relay, "detach", "in0")
        assert "xdp" not in lab.ip(topology.relay, "link show in0")


def test_second_supervisor_of_an_instance_is_refused_and_harms_nothing(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    second = lab.mcr(topology.relay, "run", check=False)
    assert second.returncode == 1
    assert "already" in second.stderr
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)


def test_two_instances_relay_side_by_side(lab: Lab) -> None:
    topology = lab.topology_relay()
    other = Namespace(f"{topology.relay.name}-b")
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    second = lab.spawn(topology.relay, mcr(other, "attach", "out0"))
    second.wait_for("Ctrl-C ends it")
    argv = mcr(other, "rule", "add", "back", "--from", "239.3.3.3%out0:5000", "--to", "239.4.4.4%in0:6000")
    lab.run(topology.relay, argv)
    back = listen(lab, topology.src, "239.4.4.4%eth0:6000", "--expect", "1000", "--idle", "5", "--digest")
    options = ("--rate", "10000", "--count", "1000", "--digest")
    sent_back = send(lab, topology.dst, "239.3.3.3%eth0:5000", *options)
    assert_whole(report(back), sent_back)
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)
    assert second.terminate() == 0


def test_interface_that_vanishes_and_returns_is_followed(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    lab.ip(topology.relay, "link delete in0")
    wait_until(lambda: status(lab, topology.relay)["reason"] == "there is no interface in0", "pending")
    lab.veth(
        topology.src,
        "eth0",
        topology.relay,
        "in0",
        addresses_a=("10.1.0.1/24",),
        addresses_b=("10.1.0.2/24",),
    )
    wait_until(lambda: status(lab, topology.relay)["state"] == "attached", "attached again")
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)


def test_output_interface_that_vanishes_and_returns_is_followed(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    lab.ip(topology.relay, "link delete out0")

    def output_state() -> str:
        rows = lab.ask(topology.relay, "rule.show")
        return str(rows[0]["output_state"])

    wait_until(lambda: output_state() == "pending", "pending")
    lab.veth(
        topology.relay,
        "out0",
        topology.dst,
        "eth0",
        addresses_a=("10.2.0.1/24",),
        addresses_b=("10.2.0.2/24",),
    )
    wait_until(lambda: output_state() == "active", "active again")
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)


def test_wrong_file_changes_nothing_on_reload(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    path = lab.directory / f"{topology.relay.name}.toml"
    good = ("new", "239.1.1.7%in0:5000", ["10.2.0.2:7007"])
    bad = ("cam", GROUP_IN, ["239.2.2.2%out0:70000"])
    path.write_text(config(good, bad))
    done = lab.mcr(topology.relay, "reload", check=False)
    assert done.returncode == 1
    assert f"{path}:12: " in done.stderr
    assert done.stderr.count("\n") == 2
    assert [row["rule"] for row in stats(lab, topology.relay) if row["object"] == "rule"] == ["cam"]
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)


RULE = ("rule", "add", "new", "--from")
WRONG_REQUESTS = [
    (("attach", "nosuch0"), 1, "there is no interface nosuch0"),
    (("attach", "in0"), 1, "in0 is attached already"),
    (("attach", "out0", "--mode", "native", "--ingress", "packet"), 1, "packet"),
    (("attach", "out0", "--mode", "fast"), 2, "fast"),
    (("detach", "out0"), 1, "out0 is not attached"),
    (("detach", "in0"), 1, "in0 is attached by"),
    (("rule", "del", "nosuch"), 1, "there is no rule 'nosuch'"),
    (("rule", "del", "cam"), 1, "comes from"),
    (("rule", "show", "nosuch"), 1, "there is no rule 'nosuch'"),
    (("stats", "nosuch"), 1, "there is no rule 'nosuch'"),
    ((*RULE, "239.1.1.9%nosuch0:5000", "--to", GROUP_OUT), 1, "there is no interface nosuch0"),
    ((*RULE, "239.1.1.9%in0:5000", "--to", "239.2.2.2%nosuch0:1"), 1, "there is no interface nosuch0"),
    ((*RULE, "239.1.1.9:5000", "--to", GROUP_OUT), 1, "names no interface"),
    ((*RULE, "239.1.1.9%in0:70000", "--to", GROUP_OUT), 1, "not within 1..65535"),
    ((*RULE, "239.1.1.9%in0:0", "--to", GROUP_OUT), 1, "not within 1..65535"),
    ((*RULE, "239.1.1%in0:5000", "--to", GROUP_OUT), 1, "not an IP address"),
    ((*RULE, GROUP_IN, "--to", "239.2.2.9%out0:6000"), 1, "have the same input"),
    ((*RULE, "239.1.1.9%in0:5000", "--to", "239.1.1.9%in0:5000"), 1, "sends to its own input"),
    ((*RULE, "239.1.1.9%in0:5000", "--to", "239.2.2.2%out0:6000,speed=9"), 1, "no option 'speed'"),
    ((*RULE, "239.1.1.9%in0:5000", "--to", "239.2.2.2:6000"), 1, "needs an interface"),
    ((*RULE, "239.1.1.9%in0:5000", "--to", "10.2.0.2:6000", "--path", "kernel"), 1, "unicast where a group"),
    (("rule", "add", "bad name", "--from", "239.1.1.9%in0:5000", "--to", GROUP_OUT), 1, "name of a rule"),
    (("rule", "add", "cam", "--from", "239.1.1.9%in0:5000", "--to", GROUP_OUT), 1, "rule 'cam' already"),
    (("nosuch",), 2, "nosuch"),
    (("check", "/nosuch.toml"), 1, "cannot read /nosuch.toml"),
]


def test_wrong_requests_get_a_cause_and_a_remedy_and_change_nothing(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    for arguments, code, cause in WRONG_REQUESTS:
        done = lab.mcr(topology.relay, *arguments, check=False)
        assert done.returncode == code, (arguments, done.stderr)
        assert cause in done.stderr, arguments
        assert "Traceback" not in done.stderr
        if code == 1:
            first, second = done.stderr.splitlines()
            assert first.startswith("mcr: ")
            assert second.startswith("  remedy: ")
    assert [row["rule"] for row in stats(lab, topology.relay) if row["object"] == "rule"] == ["cam"]


def test_loop_among_rules_is_refused(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("there", GROUP_IN, ["239.2.2.2%out0:6000"])))
    lab.mcr(topology.relay, "attach", "out0")
    back = ("rule", "add", "back", "--from", "239.2.2.2%out0:6000", "--to", "239.1.1.1%in0:5000")
    done = lab.mcr(topology.relay, *back, check=False)
    assert done.returncode == 1
    assert "rules form a loop: 'there' -> 'back' -> 'there'" in done.stderr


def test_no_supervisor_and_no_permission_have_exit_statuses_of_their_own(lab: Lab) -> None:
    namespace = lab.namespace("none")
    assert lab.mcr(namespace, "status", check=False).returncode == 3
    process: Process = lab.supervisor(namespace)
    lab.runtime_directory.chmod(0o755)
    lab.directory.chmod(0o755)
    argv = ["setpriv", "--reuid", "65534", "--clear-groups", *mcr(namespace, "status")]
    done = lab.run(namespace, argv, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (4, 2), done.stderr
    assert process.terminate() == 0
