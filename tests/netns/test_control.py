"""The control socket of a real relay under hostile clients: it goes on answering, and no packet is lost."""

import contextlib
import json
import random
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mcr.errors import ExitStatus
from mcr.service import METHODS
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
from tests.netns.lab import Lab, Namespace

STATUS = b'{"jsonrpc":"2.0","id":1,"method":"status"}\n'


def socket_of(lab: Lab, relay: Namespace) -> Path:
    return lab.runtime_directory / f"{relay.name}.sock"


def connect(lab: Lab, relay: Namespace) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(socket_of(lab, relay)))  # waits while the backlog is full
    client.settimeout(20)
    return client


def drip(lab: Lab, relay: Namespace, ended: threading.Event) -> None:
    """One byte after the other of a request without an end."""
    with connect(lab, relay) as client:
        while not ended.wait(0.1):
            client.send(b"[")


def endless_line(lab: Lab, relay: Namespace, ended: threading.Event) -> None:
    """100 MB without a newline, on as many connections as it takes."""
    left = 100_000_000
    while left > 0 and not ended.is_set():
        with connect(lab, relay) as client, contextlib.suppress(ConnectionError):
            while left > 0:
                left -= client.send(b"x" * 65536)


def random_messages(lab: Lab, relay: Namespace, ended: threading.Event) -> None:
    """10,000 messages that are nearly requests, each answered by an error or by a result of a noun."""
    source = random.Random(5)
    words: list[object] = [
        "status",
        "stats",
        "rule.add",
        "log",
        "\x1b[31m",
        "",
        None,
        7,
        [],
        {},
        {"name": "x"},
        "2.0",
        -1,
    ]
    keys = ("jsonrpc", "id", "method", "params")
    with connect(lab, relay) as client, client.makefile("rb") as answers:
        for number in range(10_000):
            if ended.is_set():
                return
            message = {key: source.choice(words) for key in keys if source.random() < 0.9}
            client.sendall(json.dumps(message).encode() + b"\n")
            if number % 3 == 0:
                client.sendall(source.randbytes(20).replace(b"\n", b"") + b"\n")
            if number % 100 == 99:
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while answers.read1(1 << 20):
                        pass
                client.settimeout(20)


def comings_and_goings(lab: Lab, relay: Namespace, ended: threading.Event) -> None:
    """Clients that connect and leave at once, with and without a request that nobody waits for."""
    while not ended.is_set():
        with connect(lab, relay) as client, contextlib.suppress(ConnectionError):
            client.send(STATUS[: random.randrange(len(STATUS) + 1)])


def unread_answers(lab: Lab, relay: Namespace, ended: threading.Event) -> None:
    """A client that asks and asks, and reads nothing."""
    while not ended.is_set():
        with connect(lab, relay) as client:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                while True:
                    client.send(STATUS * 100)
            ended.wait(1)


Attacker = Callable[[Lab, Namespace, threading.Event], None]
ATTACKERS: tuple[Attacker, ...] = (drip, endless_line, random_messages, unread_answers)


@contextlib.contextmanager
def attack(lab: Lab, relay: Namespace, idle: int, attackers: Sequence[Attacker]) -> Iterator[None]:
    """All of that at once, for as long as the context lasts, beside so many idle clients."""
    ended = threading.Event()
    failures: list[BaseException] = []

    def run(attacker: Attacker) -> None:
        try:
            attacker(lab, relay, ended)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the supervisor had enough of it
        except BaseException as error:  # noqa: BLE001 - the test's own thread raises it
            failures.append(error)

    threads = [threading.Thread(target=run, args=(attacker,)) for attacker in attackers]
    with contextlib.ExitStack() as stack:
        for _ in range(idle):
            stack.enter_context(connect(lab, relay))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join(30)
    assert failures == []


ASK = """
import json, sys, time
from pathlib import Path
from mcr.control import ControlClient
durations_s = []
until_s = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until_s:
    began_s = time.monotonic()
    with ControlClient(Path(sys.argv[1])) as client:
        assert client.call("status")
    durations_s.append(time.monotonic() - began_s)
    time.sleep(0.01)
print(json.dumps(sorted(durations_s)))
"""


def ask_all_the_time(lab: Lab, relay: Namespace, seconds: float) -> list[float]:
    """How long each of many `status` requests took, ascending; each on a new connection, as of a command."""
    argv = [sys.executable, "-c", ASK, str(socket_of(lab, relay)), str(seconds)]
    durations_s: list[float] = json.loads(lab.run(relay, argv, timeout_s=seconds + 30).stdout)
    return durations_s


def check_under_attack(lab: Lab, idle: int, seconds: int, attackers: Sequence[Attacker]) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT]), path="worker"))
    count = 1000 * (seconds + 2)
    sink = listen(lab, topology.dst, GROUP_HEARD, "--expect", str(count), "--idle", "3")
    with attack(lab, topology.relay, idle, attackers):
        source = spawn_send(lab, topology.src, GROUP_SENT, "--count", str(count), "--rate", "1000")
        durations_s = ask_all_the_time(lab, topology.relay, seconds)
        sent = report(source)
    assert_whole(report(sink), sent)
    assert len(durations_s) > seconds
    print(len(durations_s), "requests; median, worst:", durations_s[len(durations_s) // 2], durations_s[-1])
    assert durations_s[len(durations_s) * 9 // 10] < 0.1, durations_s
    assert supervisor.terminate() == 0
    assert "Traceback" not in supervisor.output()
    assert "\x1b" not in supervisor.output()


def test_hostile_clients_hold_up_neither_status_nor_a_packet(lab: Lab) -> None:
    check_under_attack(lab, 500, 2, ATTACKERS)


@pytest.mark.soak
def test_hostile_clients_hold_up_nothing_for_a_minute(lab: Lab) -> None:
    check_under_attack(lab, 1500, 60, (*ATTACKERS, comings_and_goings))


AS_NOBODY = """
import json, os, sys
from pathlib import Path
from mcr.control import ControlClient
from mcr.errors import McrError
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
answers = {}
for method, params in json.loads(sys.argv[2]).items():
    try:
        with ControlClient(Path(sys.argv[1])) as client:
            answers[method] = [0, str(client.call(method, **params)), ""]
    except McrError as error:
        answers[method] = [error.status, error.cause, error.remedy]
print(json.dumps(answers))
"""


@pytest.fixture
def open_lab(lab: Lab) -> Iterator[Lab]:
    """With a runtime directory that any user can reach: pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        lab.runtime_directory = Path(directory)
        yield lab


def as_nobody(lab: Lab, relay: Namespace, **calls: dict[str, object]) -> dict[str, tuple[int, str, str]]:
    """Exit status, result or cause, and remedy of each of these methods."""
    argv = [sys.executable, "-c", AS_NOBODY, str(socket_of(lab, relay)), json.dumps(calls)]
    answers: dict[str, tuple[int, str, str]] = json.loads(lab.run(relay, argv).stdout)
    return answers


def test_who_may_not_change_anything_may_look_if_the_file_says_so(open_lab: Lab) -> None:
    lab, topology = open_lab, open_lab.topology_relay()
    text = config(("cam", GROUP_IN, [GROUP_OUT])) + '[control]\nread = "all"\n'
    lab.supervisor(topology.relay, config=text)
    assert stat.S_IMODE(socket_of(lab, topology.relay).stat().st_mode) == 0o666
    params: dict[str, dict[str, object]] = {
        "detach": {"interface": "in0"},
        "rule.del": {"names": ["cam"]},
        "log.set": {"level": "error"},
        "explain": {"stream": GROUP_IN},
    }
    answers = as_nobody(lab, topology.relay, **{method: params.get(method, {}) for method in METHODS})
    for method, (_, only_reads) in METHODS.items():
        status, cause, remedy = answers[method]
        assert status == (ExitStatus.DONE if only_reads else ExitStatus.NOT_PERMITTED), (method, cause)
        if not only_reads:
            assert cause.startswith("this user may look and change nothing: ")
            assert remedy.startswith("use sudo, or become a member of the socket's group")
