"""What the tests of the control socket share: a server on a loop of its own, and clients good and bad."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mcr import control
from mcr.connection import Limits, Peer
from mcr.control import ControlClient
from mcr.control_server import ControlServer
from mcr.errors import ExitStatus, McrError
from mcr.jsonrpc import METHOD_NOT_FOUND, RequestError

Answer = dict[str, Any]
NO_RATE_LIMIT = 1_000_000
FAILURE = McrError("the rule a is unknown", "see: mcr rule show", "a.toml:7", ExitStatus.USAGE)


class Calls:
    """A handler, and what it was called with."""

    def __init__(self) -> None:
        self.seen: list[tuple[Peer, str, dict[str, Any]]] = []
        self.release = threading.Event()

    async def __call__(self, peer: Peer, method: str, params: dict[str, Any]) -> object:
        self.seen.append((peer, method, params))
        match method:
            case "echo":
                return params
            case "big":
                return "x" * int(params["size"])
            case "spin":
                deadline_s = time.thread_time() + float(params["seconds"])
                while time.thread_time() < deadline_s:
                    pass
                return "spun"
            case "fail":
                raise FAILURE
            case "crash":
                raise ZeroDivisionError
            case "unserialisable":
                return {1, 2}
            case "hang":
                while not self.release.is_set():
                    await asyncio.sleep(0.01)
                return "released"
        raise RequestError(METHOD_NOT_FOUND, f"no method {method}")


class Running:
    """A ControlServer on a loop of its own, in a thread."""

    def __init__(self, path: Path, limits: Limits, everyone_reads: bool = False) -> None:
        self.path = path
        self.calls = Calls()
        self.server = ControlServer(path, self.calls, limits, everyone_reads)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> "Running":
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.server.start(), self.loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.release.set()
        try:
            self.stop()
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(10)
            self.loop.close()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.close(), self.loop).result(10)

    def connections_of(self, uid: int) -> int:
        user = self.server._users.get(uid)
        return len(user.clients) if user else 0

    def call_once(self, method: str) -> object:
        with ControlClient(self.path) as client:
            return client.call(method)

    def connect(self) -> "Raw":
        return Raw(self.path)


class Raw:
    """A client without manners."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))  # blocks while the backlog is full
        self.socket.settimeout(10)
        self.lines = self.socket.makefile("rb")

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> Answer:
        answer: Answer = json.loads(self.lines.readline())
        assert answer["jsonrpc"] == "2.0"
        return answer

    def error_code(self, data: bytes) -> int:
        self.send(data + b"\n")
        code: int = self.answer()["error"]["code"]
        return code

    def is_closed(self) -> bool:
        """Whether the server hung up, and sent nothing else before."""
        try:
            return self.lines.readline() == b""
        except ConnectionResetError:
            return True


def request(method: str, identifier: object = 1, **params: object) -> bytes:
    message = {"jsonrpc": "2.0", "id": identifier, "method": method, "params": params}
    return json.dumps(message).encode() + b"\n"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def steady_client(path: Path) -> Iterator[list[float]]:
    """A client that calls all the time meanwhile, always with success; gives the durations in seconds."""
    durations_s: list[float] = []
    failures: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            with ControlClient(path) as client:
                while not ended.is_set():
                    began_s = time.monotonic()
                    assert client.call("echo", number=len(durations_s)) == {"number": len(durations_s)}
                    durations_s.append(time.monotonic() - began_s)
                    time.sleep(0.005)
        except BaseException as error:  # noqa: BLE001 - the test's own thread raises it
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: bool(durations_s or failures))
        yield durations_s
        served = len(durations_s)
        deadline = time.monotonic() + 10
        while len(durations_s) < served + 3 and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert failures == []
        assert len(durations_s) >= served + 3
    finally:
        ended.set()
        thread.join(20)
    assert max(durations_s) < 3


def call_as(path: Path, user_id: int, group_id: int, groups: list[int]) -> subprocess.CompletedProcess[str]:
    """A call by another user; prints the cause and the status of its error, or its result."""
    script = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(control.__file__).parent.parent)!r})
from mcr.control import ControlClient
from mcr.errors import McrError
os.setgroups({groups})
os.setgid({group_id})
os.setuid({user_id})
try:
    print(ControlClient(Path({str(path)!r})).call("echo"))
except McrError as error:
    print(int(error.status), error.cause)
"""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )


CROWD = """
import os, select, socket, sys
path, uid, count, behaviour = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
os.setgroups([]); os.setgid(uid); os.setuid(uid)
clients = []
for _ in range(count):
    clients.append(socket.socket(socket.AF_UNIX))
    clients[-1].connect(path)
for client in clients:
    client.setblocking(False)
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0 if behaviour == "flood" else None)[0]:
    for client in clients:
        try:
            client.send(b'{"jsonrpc":"2.0","id":1,"method":"echo"}\\n' * 10)
            client.recv(65536)
        except OSError:
            pass
"""


@contextlib.contextmanager
def crowd_of(path: Path, uid: int, count: int, behaviour: str = "idle") -> Iterator[subprocess.Popen[str]]:
    """Connections of another user that are idle, or with "flood" ask all the time."""
    argv = [sys.executable, "-c", CROWD, str(path), str(uid), str(count), behaviour]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
        assert crowd.stdout is not None
        try:
            assert crowd.stdout.readline() == "ready\n"
            yield crowd
        finally:
            crowd.communicate("enough\n", timeout=20)
