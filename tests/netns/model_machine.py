"""The steps of the model test, what each asks of the relay, and what is compared after it.

A step makes a change, by a request, in the file, to an interface or to a process, and says in the reference's
words what is asked for from then on. This module must never know how the relay does it.
"""

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition
from hypothesis.stateful import rule as step

from mcr.limits import scaled
from tests.netns.model_far import SOURCE6, SOURCES
from tests.netns.model_reference import (
    Asked,
    Attachment,
    Heard,
    Input,
    Links,
    Output,
    Placed,
    Rule,
    Sent,
    active_rules,
    becomes,
    difference,
    objection,
    takes,
    wanted,
)
from tests.netns.model_traffic import Traffic
from tests.netns.model_world import INTERFACES, World, configuration

REPAIRS_DRIFT = True  # whether what was changed by hand is put right again
PATIENCE_S = 20.0  # for what follows an event; a retry comes after 5 s
KILLS = 2  # of processes in a sequence: each waits longer than the one before, up to 10 s
SHORT_PATIENCE_S = 7.0  # once something has failed and the sequence is being shortened

NO_CPU = "1000"  # no machine of these tests has so many
A, B, SSM, A6 = "239.1.1.1", "239.1.1.2", "232.1.1.1", "ff15::1"
OUT1, OUT2, OUT3, OUT6 = "239.2.2.1", "239.2.2.2", "239.2.2.3", "ff15::2"
ALL_GROUPS = (A, B, SSM, A6, OUT1, OUT2, OUT3, OUT6)
IN_INTERFACES, OUT_INTERFACES = ("in0", "in1"), ("out0", "out1")
NAMES = ("r1", "r2", "r3", "r4", "r5")

INPUTS = [
    Input(address, interface, port, source)
    for address, port, source in (
        (A, 5000, ""), (B, 5000, ""), (A, 0, ""), (A, 5000, SOURCES[0]), (B, 5001, ""),
        (SSM, 5000, SOURCES[0]), (SSM, 0, SOURCES[1]), (A6, 5000, ""),
    )
    for interface in IN_INTERFACES
] + [Input(A, "in0", 5000, vlan=7)]  # fmt: skip
OUTPUTS = [
    Output(OUT1, "out0", 6000),
    Output(OUT1, "out1", 6000),
    Output(OUT2, "out0", 0),
    Output(OUT2, "out1", 6001, ttl=0, dscp=10),
    Output(OUT1, "out0", 6000, ttl=8),
    Output(OUT1, "out1", 6001, source="preserve"),
    Output(OUT3, "out0", 6001, dscp=0, source="10.2.0.77"),
    Output("10.2.0.2", "", 6000, ttl=7),
    Output(OUT6, "out0", 6000),
    Output(B, "in1", 5000),
    Output(A, "in0", 5000),
]
STREAMS = [
    Sent(interface, address, port, source)
    for interface in IN_INTERFACES
    for address, port in ((A, 5000), (A, 5001), (B, 5000), (B, 5001), (SSM, 5000), (SSM, 6000), (A6, 5000))
    for source in ((SOURCE6,) if address == A6 else SOURCES)
]


def _rule(parts: tuple[str, Input, tuple[Output, ...], str]) -> Rule:
    return Rule(*parts)


names = st.sampled_from(NAMES)
inputs = st.sampled_from(INPUTS)
outputs = st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=3).map(tuple)
paths = st.sampled_from(("auto", "auto", "auto", "worker", "kernel"))
rules = st.tuples(names, inputs, outputs, paths).map(_rule)
attachments = st.sampled_from(
    [Attachment(name) for name in (*IN_INTERFACES, *IN_INTERFACES, "out0")]
    + [Attachment("in0", mode="generic"), Attachment("in1", ingress="packet")]
)
all_interfaces = st.sampled_from((*IN_INTERFACES, *OUT_INTERFACES))

Rules = dict[str, Rule]
Attachments = dict[str, Attachment]
SPOILS: dict[str, Callable[[str, Rules], str]] = {
    "syntax": lambda text, rules: text + "[[rule\n",
    "unknown key": lambda text, rules: text + "[relay]\n",
    "loop": lambda text, rules: text + _toml("l1", A, "in0", B, "in1") + _toml("l2", B, "in1", A, "in0"),
    "its own input": lambda text, rules: text + _toml("l1", SSM, "in0", SSM, "in0"),
    "a name twice": lambda text, rules: text + 2 * _toml("n1", SSM, "in1", OUT1, "out0"),
    "an input twice": lambda text, rules: (
        text + _toml("i1", SSM, "in1", OUT1, "out0") + _toml("i2", SSM, "in1", OUT2, "out0")
    ),
    "a path that cannot be": lambda text, rules: (
        text
        + configuration([Rule("p1", Input(SSM, "in1", 5003), (Output("10.2.0.2", "", 6000),), "kernel")], [])
    ),
    "an attachment that fails": lambda text, rules: (
        text + configuration([], [Attachment("out1", cpus=NO_CPU)])
    ),
}


rarely = st.sampled_from((False,) * 9 + (True,))
spoils = st.sampled_from((*("",) * 24, *SPOILS))


def _toml(name: str, group: str, interface: str, to: str, by: str) -> str:
    return configuration([Rule(name, Input(group, interface, 5009), (Output(to, by, 5009),))], [])


@dataclass(frozen=True)
class Fate:
    """What becomes of a stream: the rule that takes it, its path, and what is heard of it."""

    rule: str
    path: str
    heard: tuple[Heard, ...]


class RelayMachine(RuleBasedStateMachine):
    """Sequences of changes to one relay. `asked` is all that it remembers, with the ids and counts of
    rules.
    """

    world: ClassVar[World]
    tainted: ClassVar[bool] = True  # the relay is not known to be as it should
    failed_once: ClassVar[bool] = False
    steps: ClassVar[int] = 0
    outcomes: ClassVar[Counter[str]] = Counter()
    kills_in_life: ClassVar[int] = 0  # of the supervisor

    def __init__(self) -> None:
        super().__init__()
        self.asked = Asked()
        self.away: dict[str, str] = {}
        self.ids: dict[str, int] = {}
        self.received: Counter[str] = Counter()
        self.kills = 0
        self.struck: set[str] = set()  # by the step: the streams of a path and input interface, or all

    # --- between sequences

    def _begin_anew(self) -> None:
        """The relay has no rule and no attachment, and runs."""
        cls, world = type(self), self.world
        world.write("")
        if cls.tainted or world.keep or cls.kills_in_life > KILLS or not self._emptied():
            world.clean()
            world.start(keep=False)
            cls.kills_in_life = 0
        cls.tainted = True
        self._settle(PATIENCE_S)

    def _emptied(self) -> bool:
        """By requests, which is quicker than a start; whether none was refused."""
        rows = self.world.ask("rule.show")
        names = sorted({row["rule"] for row in rows if not row["origin"].startswith(str(self.world.file))})
        refused = bool(names) and self.world.call("rule.del", names=names)
        refused = refused or self.world.call("reload")
        for row in self.world.ask("status"):
            if row["object"] == "interface":
                refused = refused or self.world.call("detach", interface=row["interface"])
        return not refused

    def teardown(self) -> None:
        cls, world = type(self), self.world
        if cls.tainted:
            cls.failed_once = True
        for name, how in self.away.items():
            world.come_back(name, how)
        world.make_usual()
        if not cls.tainted and world.supervisor is not None:
            world.noticed()

    # --- after each step

    def _check(self, patience_s: float = PATIENCE_S) -> None:
        """The relay becomes what it should be, relays what it should, and stays so."""
        cls = type(self)
        cls.tainted = True
        cls.steps += 1
        self._settle(patience_s)
        self._probe()
        self._settle(patience_s)
        cls.tainted = False

    def _settle(self, patience_s: float) -> None:
        patience_s = min(patience_s, SHORT_PATIENCE_S) if type(self).failed_once else patience_s
        deadline = time.monotonic() + scaled(patience_s)
        while True:
            links, ids = self.world.links(), self.world.ids()
            want, found = wanted(self.asked, links), self.world.found()
            for key, number in self.ids.items():
                want[f"id of {key}"], found[f"id of {key}"] = str(number), str(ids.get(key, "none"))
            if not (differs := difference(want, found)):
                break
            assert time.monotonic() < deadline, (
                f"the relay is not what was asked for:\n{differs}\n{self._log()}"
            )
            time.sleep(0.02)
        of_rules = [number for key, number in ids.items() if " -> " not in key]
        assert len(set(of_rules)) == len(of_rules), ids
        self.ids = ids

    def _keep_ids(self, kept: Iterable[str]) -> None:
        """Only the ids and counts of these rules must stay as they are, as far as they have the same
        outputs.
        """
        kept = set(kept)
        texts = {
            f"{rule.name} -> {output}" for rule in self.asked.all_rules for output in rule.outputs
        } | kept
        self.ids = {
            key: number for key, number in self.ids.items() if key.split(" ")[0] in kept and key in texts
        }
        self.received = Counter({name: count for name, count in self.received.items() if name in kept})

    def _rename(self, old: str, new: str) -> None:
        """A rule that is only renamed takes its ids and counts along."""
        self.ids = {
            (new + key[len(old) :] if key.split(" ")[0] == old else key): n for key, n in self.ids.items()
        }
        self.received[new] = self.received.pop(old, 0)

    def _probe(self) -> None:
        """One datagram of each stream."""
        links = self.world.links()
        self._send_through(active_rules(self.asked, links), links)
        self._count()

    def _send_through(self, active: list[Placed], links: Links, workers: bool = True) -> None:
        """workers: whether there are any, so that what takes the worker path is heard."""
        sent = self.world.send(
            each for each in STREAMS if each.interface in links and links[each.interface].up
        )
        want = []
        for number, stream in sent.items():
            if (placed := takes(active, stream)) is not None:
                self.received[placed.rule.name] += 1
                if workers or placed.path == "kernel":
                    want += [(number, heard) for heard in becomes(placed, stream, links, "out0")]
        heard = self.world.hear(len(want), scaled(SHORT_PATIENCE_S) if want else 0)
        missing, surplus = Counter(want) - Counter(heard), Counter(heard) - Counter(want)
        lines = [f"  missing: {sent[number]} as {each}" for number, each in missing]
        lines += [f"  surplus: {sent.get(number, 'an earlier one')} as {each}" for number, each in surplus]
        assert not lines, "packets went wrong:\n" + "\n".join(lines) + "\n" + self._log()

    def _count(self) -> None:
        deadline = time.monotonic() + scaled(SHORT_PATIENCE_S)
        want = {rule.name: self.received[rule.name] for rule in self.asked.all_rules}
        while (found := self.world.received()) != want:
            assert time.monotonic() < deadline, f"received: wanted {want}, found {found}\n{self._log()}"
            time.sleep(0.01)

    def _log(self) -> str:
        supervisor = self.world.supervisor
        return "" if supervisor is None else "log:\n" + "\n".join(supervisor.output().splitlines()[-12:])

    # --- requests

    def _request(self, new: Asked, refused: str, error: str, renamed: tuple[str, str] | None = None) -> None:
        """What came of a request that would make `new` of what is asked, unless the reference refuses it."""
        assert bool(error) == bool(refused), (
            f"wanted refused: {refused or 'no'}; found: {error or 'accepted'}\n{self._log()}"
        )
        type(self).outcomes[refused.split(" ")[-1] if refused else "accepted"] += 1
        if not refused:
            before = {rule.name for rule in self.asked.all_rules}
            self.asked = new
            if renamed is not None:
                self._rename(*renamed)
                before.add(renamed[1])
            self._keep_ids(before & {rule.name for rule in new.all_rules})
        self._check()

    def _objection(self, new: Asked) -> str:
        return objection(new, self.world.links(), self.asked)

    @step(rule=rules, clash=rarely)
    def add(self, rule: Rule, clash: bool) -> None:
        """clash: also where there is a rule of that name."""
        taken = {each.name for each in self.asked.all_rules}
        if rule.name in taken and not clash:
            free = [name for name in NAMES if name not in taken]
            if not free:
                return
            rule = replace(rule, name=free[0])
        new = replace(self.asked, rules={**self.asked.rules, rule.name: rule})
        interfaces = {
            rule.input.interface,
            *(output.interface for output in rule.outputs if output.interface),
        }
        refused = ""
        if interfaces & self.away.keys():
            refused = "an interface is absent"
        elif rule.name in taken:
            refused = "the name is taken"
        refused = refused or self._objection(new)
        texts = [str(output) for output in rule.outputs]
        error = self.world.call(
            "rule.add", name=rule.name, **{"from": str(rule.input)}, to=texts, path=rule.path
        )
        self._request(new, refused, error)

    @precondition(lambda self: self.asked.rules)
    @step(position=st.integers(0, 4), more=st.lists(names, max_size=1))
    def delete(self, position: int, more: list[str]) -> None:
        """more: perhaps a rule of the file, or none."""
        there = sorted(self.asked.rules)
        chosen = sorted({there[position % len(there)], *more})
        left = {name: rule for name, rule in self.asked.rules.items() if name not in chosen}
        new = replace(self.asked, rules=left)
        refused = "" if set(chosen) <= self.asked.rules.keys() else "not all of them are from commands"
        refused = refused or self._objection(new)
        self._request(new, refused, self.world.call("rule.del", names=chosen))

    @step(attachment=attachments, cpus=st.sampled_from(("", "", "", NO_CPU)))
    def attach(self, attachment: Attachment, cpus: str) -> None:
        attachment = replace(attachment, cpus=cpus)
        new = replace(self.asked, attachments={**self.asked.attachments, attachment.interface: attachment})
        refused = ""
        if attachment.interface in self.away:
            refused = "it is absent"
        elif attachment.interface in self.asked.all_attachments:
            refused = "it is attached"
        refused = refused or self._objection(new)
        error = self.world.call(
            "attach",
            interface=attachment.interface,
            mode=attachment.mode,
            ingress=attachment.ingress,
            **({"cpus": attachment.cpus} if attachment.cpus else {}),
        )
        self._request(new, refused, error)

    @step(interface=st.sampled_from((*IN_INTERFACES, "out0")))
    def detach(self, interface: str) -> None:
        left = {name: each for name, each in self.asked.attachments.items() if name != interface}
        new = replace(self.asked, attachments=left)
        refused = (
            ""
            if interface in self.asked.attachments and interface not in self.asked.file_attachments
            else "no"
        )
        self._request(new, refused or self._objection(new), self.world.call("detach", interface=interface))

    # --- reloads

    def _reload(self, new: Asked, spoil: str = "", renamed: tuple[str, str] | None = None) -> None:
        """Of a file that says this, spoilt or not; a file that is refused is put back as it was."""
        text = configuration(new.file_rules.values(), new.file_attachments.values())
        if spoil == "an attachment that fails" and "out1" in self.away:
            spoil = "syntax"  # what is absent waits
        refused = spoil or self._objection(new)
        if not refused and new.file_rules.keys() & new.rules.keys():
            refused = "a name is in the file and from a command"
        self.world.write(SPOILS[spoil](text, dict(new.file_rules)) if spoil else text)
        error = self.world.call("reload")
        if refused:
            old = self.asked
            self.world.write(configuration(old.file_rules.values(), old.file_attachments.values()))
        self._request(new, refused, error, renamed)

    def _with_file(self, rules: Iterable[Rule]) -> Asked:
        return self.asked.with_file(rules, self.asked.file_attachments.values())

    @initialize(
        first=st.lists(rules, max_size=4, unique_by=(lambda rule: rule.name, lambda rule: rule.input))
    )
    def begin(self, first: list[Rule]) -> None:
        self._begin_anew()
        self._reload(self.asked.with_file(first, [Attachment(name) for name in IN_INTERFACES]))

    @step(rule=rules, spoil=spoils)
    def put_into_file(self, rule: Rule, spoil: str) -> None:
        """Adds a rule, or changes all of it."""
        self._reload(self._with_file({**self.asked.file_rules, rule.name: rule}.values()), spoil)

    @step(chosen=st.lists(names, min_size=1, max_size=3, unique=True), spoil=spoils)
    def drop_from_file(self, chosen: list[str], spoil: str) -> None:
        left = [rule for name, rule in self.asked.file_rules.items() if name not in chosen]
        self._reload(self._with_file(left), spoil)

    @precondition(lambda self: len(self.asked.file_rules) > 1)
    @step(by=st.integers(1, 3))
    def rotate_inputs(self, by: int) -> None:
        """Two rules swap their inputs; more hand them round."""
        rules = list(self.asked.file_rules.values())
        turned = [replace(rule, input=rules[(n + by) % len(rules)].input) for n, rule in enumerate(rules)]
        self._reload(self._with_file(turned))

    @precondition(lambda self: self.asked.file_rules)
    @step(position=st.integers(0, 4), new=inputs)
    def shift_inputs(self, position: int, new: Input) -> None:
        """Each rule takes the input of the next, the last one a new one."""
        rules = list(self.asked.file_rules.values())
        following = [rule.input for rule in rules[1:]] + [new]
        shifted = [replace(rule, input=stream) for rule, stream in zip(rules, following, strict=True)]
        self._reload(self._with_file(shifted))

    @precondition(lambda self: self.asked.file_rules)
    @step(position=st.integers(0, 4), new=names)
    def rename(self, position: int, new: str) -> None:
        rules = list(self.asked.file_rules.values())
        old = rules[position % len(rules)]
        rules[position % len(rules)] = replace(old, name=new)
        kept = {rule.name for rule in self.asked.all_rules} - {old.name}
        if new == old.name or new in kept:
            return
        self._reload(self._with_file(rules), renamed=(old.name, new))

    @precondition(lambda self: self.asked.file_rules)
    @step(
        position=st.integers(0, 4),
        to=outputs,
        path=paths,
        stream=inputs,
        what=st.sampled_from(("input", "outputs", "path")),
    )
    def change_in_file(self, position: int, to: Any, path: str, stream: Input, what: str) -> None:
        rules = list(self.asked.file_rules.values())
        number = position % len(rules)
        changes: dict[str, Any] = {"input": stream, "outputs": to, "path": path}
        rules[number] = replace(rules[number], **{what: changes[what]})
        self._reload(self._with_file(rules))

    @step(chosen=st.lists(attachments, max_size=3, unique_by=lambda each: each.interface))
    def attach_by_file(self, chosen: list[Attachment]) -> None:
        self._reload(self.asked.with_file(self.asked.file_rules.values(), chosen))

    # --- interfaces

    @step(name=all_interfaces, how=st.sampled_from(("deleted", "parked", "renamed")))
    def leave_or_come_back(self, name: str, how: str) -> None:
        if name in self.away:
            self.world.come_back(name, self.away.pop(name))
        else:
            self.world.leave(name, how)
            self.away[name] = how
        self._noticed()

    def _noticed(self) -> None:
        self.world.noticed()
        self._check()

    @precondition(lambda self: not self.away.keys() & set(IN_INTERFACES))
    @step()
    def exchange_names(self) -> None:
        self.world.exchange(*IN_INTERFACES)
        self._noticed()

    @step(name=all_interfaces, mtu=st.sampled_from((1400, 1500, 2000)))
    def set_mtu(self, name: str, mtu: int) -> None:
        if name not in self.away:
            self.world.ip(f"link set {name} mtu {mtu}")
            self._noticed()

    @step(name=all_interfaces, last=st.integers(1, 3))
    def set_mac(self, name: str, last: int) -> None:
        if name not in self.away:
            self.world.ip(f"link set {name} address 02:00:00:00:{ord(name[0]):02x}:{last:02x}")
            self._noticed()

    @step(name=st.sampled_from(OUT_INTERFACES), on=st.booleans())
    def set_far_gro(self, name: str, on: bool) -> None:
        if name not in self.away:
            self.world.set_gro(name, on)
            self._noticed()

    @step(name=st.sampled_from(OUT_INTERFACES), last=st.sampled_from((1, 7)))
    def set_address(self, name: str, last: int) -> None:
        if name not in self.away:
            net = {"out0": 2, "out1": 4}[name]
            self.world.set_ipv4(name, f"10.{net}.0.{last}")
            self._noticed()

    @step(name=st.sampled_from(OUT_INTERFACES), up=st.booleans())
    def set_up(self, name: str, up: bool) -> None:
        if name not in self.away:
            self.world.set_up(name, up)
            self._noticed()

    # --- what somebody does by hand

    @precondition(lambda self: REPAIRS_DRIFT)
    @step(position=st.integers(0, 4))
    def delete_entry(self, position: int) -> None:
        self.struck.add("all")
        self.world.delete_entry(position)
        self._check()

    @precondition(lambda self: REPAIRS_DRIFT)
    @step(name=st.sampled_from(IN_INTERFACES))
    def detach_program(self, name: str) -> None:
        self.struck |= {f"worker {name}", f"kernel {name}"}
        self.world.detach_program(name)
        self._check()

    @precondition(lambda self: REPAIRS_DRIFT)
    @step()
    def remove_control_socket(self) -> None:
        self.world.remove_control_socket()
        self._check()

    # --- deaths and starts

    @precondition(lambda self: self.kills < KILLS)
    @step(interface=st.sampled_from(IN_INTERFACES))
    def kill_worker(self, interface: str) -> None:
        self.kills += 1
        type(self).kills_in_life += 1
        self.struck.add(f"worker {interface}")
        self.world.kill("worker", interface)
        self._check()

    @precondition(lambda self: self.kills < KILLS)
    @step()
    def kill_joins(self) -> None:
        self.kills += 1
        type(self).kills_in_life += 1
        self.world.kill("membership")
        self._check()

    @step(number=st.sampled_from((signal.SIGTERM, signal.SIGKILL)), keep=st.booleans())
    def restart(self, number: signal.Signals, keep: bool) -> None:
        """keep: how the next one will end."""
        cls, world = type(self), self.world
        if objection(self.asked, self.world.links()):
            return  # an interface has changed since it was accepted, and a start would be refused
        cls.tainted = True
        forwards = world.keep and any(
            each.ingress != "packet" and name in world.links()
            for name, each in self.asked.all_attachments.items()
        )
        self.struck |= {f"worker {name}" for name in IN_INTERFACES} if forwards else {"all"}
        ended_keeping, killed = world.keep, number == signal.SIGKILL
        world.stop(number)
        if forwards:
            self._assert_kept(killed)
        else:
            self.ids.clear()
            self.received.clear()
        if not ended_keeping:
            self._assert_ended(killed)
        world.start(keep)
        cls.kills_in_life = 0
        self.asked = replace(self.asked, attachments={})
        self._check()

    def _assert_kept(self, killed: bool) -> None:
        """The kernel path relays with no process but that of the joins; a kill leaves all entries."""
        links = self.world.links()
        want = {key: how for key, how in wanted(self.asked, links).items() if key.startswith("joined ")}
        assert not (differs := difference(want, self.world.joins())), f"without a supervisor:\n{differs}"
        packet = {name for name, each in self.asked.all_attachments.items() if each.ingress == "packet"}
        active = [each for each in active_rules(self.asked, links) if each.rule.input.interface not in packet]
        left = [each for each in active if killed or each.path == "kernel"]
        self._send_through(left, links, workers=False)

    def _assert_ended(self, killed: bool) -> None:
        left = self.world.lab.leftovers(self.world.relay)
        assert [line for line in left if not (killed and line.startswith(("pin ", "file ")))] == []


class TrafficMachine(RelayMachine):
    """The same, under traffic of every stream: what a step does not touch loses, doubles and reorders
    nothing.

    A step touches a stream if the reference says that it goes another way or arrives otherwise, if one of its
    interfaces changes or is attached otherwise, or if the process that relays it is struck.
    """

    traffic: ClassVar[Traffic]

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[Sent, Fate] = {}
        self.before_links: Links = {}
        self.before_attachments: dict[str, Attachment] = {}

    def _check(self, patience_s: float = PATIENCE_S) -> None:
        cls = type(self)
        cls.tainted = True
        cls.steps += 1
        self._settle(patience_s)
        self._judge_step()
        time.sleep(0.05)
        self._judge(
            "after the step", {stream: fate.heard for stream, fate in self.before.items()}, set(self.before)
        )
        self._settle(patience_s)
        self.struck.clear()
        cls.tainted = False

    def _assert_kept(self, killed: bool) -> None:
        """The traffic of the whole step is judged."""

    def _judge_step(self) -> None:
        links = self.world.links()
        after = self._fates(links)
        changed = {name for name in INTERFACES if links.get(name) != self.before_links.get(name)}
        attachments = dict(self.asked.all_attachments)
        changed |= {name for name in INTERFACES if attachments.get(name) != self.before_attachments.get(name)}
        expected, ordered = {}, set()
        for stream, fate in self.before.items():
            now = after.get(stream)
            if now is None or fate.heard != now.heard or self._is_struck(stream, fate, changed):
                continue
            expected[stream] = fate.heard
            if fate == now:
                ordered.add(stream)
        self._judge("during the step", expected, ordered)
        self.before, self.before_links, self.before_attachments = after, links, attachments

    def _is_struck(self, stream: Sent, fate: Fate, changed: set[str]) -> bool:
        """changed: interfaces."""
        places = {stream.interface, *(heard.interface for heard in fate.heard)}
        return (
            bool(places & changed) or "all" in self.struck or f"{fate.path} {stream.interface}" in self.struck
        )

    def _fates(self, links: Links) -> dict[Sent, Fate]:
        active = active_rules(self.asked, links)
        fates = {}
        for stream in STREAMS:
            placed = takes(active, stream)
            heard = () if placed is None else tuple(becomes(placed, stream, links, "out0"))
            fates[stream] = Fate(placed.rule.name if placed else "", placed.path if placed else "", heard)
        present = {name for name, link in links.items() if link.up}
        return {stream: fate for stream, fate in fates.items() if stream.interface in present}

    def _judge(self, when: str, expected: dict[Sent, tuple[Heard, ...]], ordered: set[Sent]) -> None:
        wrong = self.traffic.judge(expected, self.traffic.border(), ordered)
        assert not wrong, f"{when} packets went wrong:\n{wrong}\n{self._log()}"
