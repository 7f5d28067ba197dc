"""Rules from commands outlive the supervisor, however it ends; nothing else in their file does harm."""

from pathlib import Path

import pytest

from tests.netns.flows import GROUP_HEARD, GROUP_IN, GROUP_OUT, GROUP_SENT, assert_whole, config, relay_one
from tests.netns.lab import Lab, Namespace


def shown(lab: Lab, relay: Namespace) -> dict[str, str]:
    """The origin of each rule."""
    rows = lab.ask(relay, "rule.show")
    return {row["rule"]: row["origin"] for row in rows}


def state_file(lab: Lab, relay: Namespace) -> Path:
    return lab.state_directory / relay.name / "rules.toml"


def test_added_rule_outlives_a_killed_supervisor_and_a_temporary_one_does_not(lab: Lab) -> None:
    topology = lab.topology_relay()
    first = lab.supervisor(topology.relay, config=config())
    add = ("rule", "add")
    lab.mcr(topology.relay, *add, "cam", "--from", GROUP_IN, "--to", GROUP_OUT, "--to", "10.2.0.2:*,dscp=46")
    lab.mcr(
        topology.relay, *add, "brief", "--from", "239.1.1.2%in0:*", "--to", "10.2.0.2:6002", "--temporary"
    )
    lab.mcr(topology.relay, *add, "gone", "--from", "239.1.1.3%in0:1", "--to", "10.2.0.2:6003")
    lab.mcr(topology.relay, "rule", "del", "gone")
    assert shown(lab, topology.relay) == {"cam": "command", "brief": "temporary"}
    first.child.kill()
    first.wait()
    lab.supervisor(topology.relay, config=config())
    assert shown(lab, topology.relay) == {"cam": "command"}
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert_whole(heard, sent)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff\x00",
        b'[[rule]]\nname = "cam"\nfrom = "239.1',
        b'[[rule]]\nname = "cam"\n',
        b"[other]\n",
        b'[[attach]]\ninterface = "in0"\n',
        b'[[rule]]\nname = "cam"\nfrom = "239.1.1.9%in0:5"\nto = ["10.2.0.2:6"]\n[control]\nread = "all"\n',
    ],
    ids=["empty", "binary", "torn", "incomplete", "foreign", "attachment", "settings"],
)
def test_torn_or_foreign_file_is_set_aside_and_not_fatal(lab: Lab, content: bytes) -> None:
    topology = lab.topology_relay()
    path = state_file(lab, topology.relay)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    supervisor = lab.supervisor(topology.relay, config=config(("file", GROUP_IN, [GROUP_OUT])))
    assert list(shown(lab, topology.relay)) == ["file"]
    aside = list(path.parent.glob("rules.toml.*.bad"))
    if content:
        assert [each.read_bytes() for each in aside] == [content]
        assert "saved rules are not used" in supervisor.output()
    lab.mcr(topology.relay, "rule", "add", "new", "--from", "239.1.1.2%in0:1", "--to", "10.2.0.2:6002")
    assert 'name = "new"' in path.read_text()


def test_saved_rule_that_collides_with_a_file_is_set_aside(lab: Lab) -> None:
    topology = lab.topology_relay()
    first = lab.supervisor(topology.relay, config=config())
    lab.mcr(topology.relay, "rule", "add", "cam", "--from", GROUP_IN, "--to", GROUP_OUT)
    assert first.terminate() == 0
    second = lab.supervisor(topology.relay, config=config(("other", GROUP_IN, [GROUP_OUT])))
    assert list(shown(lab, topology.relay)) == ["other"]
    assert "saved rules are not used" in second.output()


def test_rule_that_cannot_be_saved_is_refused_and_not_in_force(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config())
    state_file(lab, topology.relay).parent.write_text("a file where the directory should be")
    add = ("rule", "add", "cam", "--from", GROUP_IN, "--to", GROUP_OUT)
    refused = lab.mcr(topology.relay, *add, check=False)
    assert refused.returncode == 1
    assert "the rules cannot be saved" in refused.stderr
    assert shown(lab, topology.relay) == {}
    lab.mcr(topology.relay, *add, "--temporary")
    assert shown(lab, topology.relay) == {"cam": "temporary"}
