"""Everything that is wrong with a file is said at once, by `mcr check`, at a start and at a reload."""

import json
import os
import re
import signal

from tests.netns.flows import GROUP_IN, GROUP_OUT, config, wait_until
from tests.netns.lab import Lab, Namespace

ABSENT = """\
[[attach]]
interface = "in0"
[[attach]]
interface = "nope0"
[[rule]]
name = "a"
from = "239.1.1.1%in0:5000"
to = ["239.2.2.2%nope1:6000", "239.2.2.3%nope1:6000"]
[[rule]]
name = "b"
from = "239.1.1.2%in0:5000"
to = ["239.2.2.2%out0:6000"]
path = "quick"
[[rule]]
name = "c"
from = "239.1.1.3%lo:5000"
to = ["239.2.2.3%out0:6000,vlan=7"]
path = "kernel"
"""
WRONG = '[[attach]]\ninterface = "in0"\nworkers = 0\n[[ruel]]\n'


def pairs(text: str) -> list[tuple[str, str]]:
    """Cause and remedy of each error that a command has printed, and its last line."""
    return re.findall(r"^mcr: (.*)\n  remedy: (.+)$", text, re.MULTILINE)


def test_check_says_everything_with_its_line_and_remedy(lab: Lab) -> None:
    topology = lab.topology_relay()
    file = lab.directory / "wrong.toml"
    file.write_text(ABSENT)
    checked = lab.mcr(topology.relay, "check", str(file), check=False)
    assert (checked.returncode, checked.stdout) == (1, "")
    *found, (cause, remedy) = pairs(checked.stderr)
    assert found == [
        (f"{file}:3: there is no interface nope0", "see which there are: ip link"),
        (f"{file}:5: there is no interface nope1", "see which there are: ip link"),
        (f"{file}:13: path is 'quick'", 'choose one of "auto", "kernel", "worker"'),
    ]
    assert cause.startswith(f"{file}:14: rule 'c' cannot take the kernel path: lo is not Ethernet")
    assert remedy == 'choose the path "auto" or "worker"'
    assert checked.stderr.splitlines()[-1] == "mcr: 4 errors"
    file.write_text(config(("cam", GROUP_IN, [GROUP_OUT])))
    right = lab.mcr(topology.relay, "check", str(file))
    assert (right.stdout, right.stderr) == ("1 interfaces, 1 rules: no error\n", "")


def expected_errors(file: object) -> list[tuple[str, str]]:
    return [
        (f"{file}:3: workers is 0", "write a number from 1 to 64"),
        (f"{file}:4: unknown key 'ruel'", "did you mean rule?"),
    ]


def test_start_says_everything(lab: Lab) -> None:
    relay = lab.namespace("relay")
    file = lab.directory / "wrong.toml"
    file.write_text(WRONG)
    started = lab.mcr(relay, "run", "-c", str(file), check=False)
    assert (started.returncode, pairs(started.stderr)) == (1, expected_errors(file))
    logged = lab.mcr(relay, "run", "--log-json", "-c", str(file), check=False)
    lines = [json.loads(line) for line in logged.stderr.splitlines()]
    assert [(line["message"], line["remedy"]) for line in lines] == expected_errors(file)


def test_reload_says_everything_and_changes_nothing(lab: Lab) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])))
    before = rules(lab, topology.relay)
    file = lab.directory / f"{topology.relay.name}.toml"
    file.write_text(WRONG)
    refused = lab.mcr(topology.relay, "reload", check=False)
    assert (refused.returncode, pairs(refused.stderr)) == (1, expected_errors(file))
    assert refused.stderr.splitlines()[-1] == "mcr: 2 errors"
    os.kill(supervisor.child.pid, signal.SIGHUP)
    wanted = [f"reload changed nothing: {cause} ({remedy})" for cause, remedy in expected_errors(file)]
    wait_until(lambda: all(each in supervisor.output() for each in wanted), "both in the log")
    assert rules(lab, topology.relay) == before


def rules(lab: Lab, relay: Namespace) -> list[str]:
    return [row["rule"] for row in lab.ask(relay, "rule.show")]


def test_very_many_errors_are_counted(lab: Lab) -> None:
    relay = lab.namespace("relay")
    file = lab.directory / "wrong.toml"
    file.write_text("".join(f"k{number} = 1\n" for number in range(120)))
    checked = lab.mcr(relay, "check", str(file), check=False)
    assert len(pairs(checked.stderr)) == 50
    assert checked.stderr.splitlines()[-1] == "mcr: 120 errors, the first 50 are above"
