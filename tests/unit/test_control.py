"""Whatever a client of the control socket sends, or leaves unread, another client's calls are answered."""

import asyncio
import contextlib
import json
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcr import control
from mcr.control import ControlClient, ControlServer, Limits, Peer, TokenBucket, socket_path
from mcr.errors import ExitStatus, McrError
from mcr.jsonrpc import (
    BUSY,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    RequestError,
    parse_json,
    parse_request,
)
from tests.conftest import require

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

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.calls = Calls()
        self.server = ControlServer(path, self.calls, limits)
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
        except BaseException as error:
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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "a.sock"


@pytest.fixture
def server(path: Path) -> Iterator[Running]:
    with Running(path, Limits()) as running:
        yield running


def test_a_call_reaches_the_handler_with_the_peer_and_its_result_comes_back(server: Running) -> None:
    with ControlClient(server.path) as client:
        assert client.call("echo", name="ü", rules=[1, None, {"a": 1.5}]) == {
            "name": "ü",
            "rules": [1, None, {"a": 1.5}],
        }
        assert client.call("echo") == {}
    peer = Peer(os.getpid(), os.getuid(), os.getgid())
    assert server.calls.seen[1] == (peer, "echo", {})


def test_an_error_of_the_handler_is_the_same_error_at_the_client(server: Running) -> None:
    with ControlClient(server.path) as client:
        for _ in range(2):
            with pytest.raises(McrError) as failed:
                client.call("fail")
            assert failed.value == FAILURE
        assert client.call("echo") == {}


@pytest.mark.parametrize("method", ["crash", "unserialisable"])
def test_a_bug_of_the_handler_is_logged_and_told_without_a_traceback(
    server: Running, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ControlClient(server.path) as client:
        with pytest.raises(McrError) as failed:
            client.call(method)
        assert failed.value.cause == (
            "the supervisor refused the request: internal error, see the supervisor's log"
        )
        assert client.call("echo") == {}
    assert "Traceback" in caplog.text


def test_an_unknown_method_is_told(server: Running) -> None:
    with ControlClient(server.path) as client, pytest.raises(McrError, match="no method nonsense"):
        client.call("nonsense")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", PARSE_ERROR),
        (b"\xff\xfe{}", PARSE_ERROR),
        (b'{"jsonrpc": "2.0", "id": 1, "method"', PARSE_ERROR),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":{"a":NaN}}', PARSE_ERROR),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":{"a":-Infinity}}', PARSE_ERROR),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":{"a":1e999}}', PARSE_ERROR),
        (b"9" * 100_000, PARSE_ERROR),
        (b"[" * 500_000, PARSE_ERROR),
        (b'{"a":' * 100_000, PARSE_ERROR),
        (b"[]", INVALID_REQUEST),
        (b'[{"jsonrpc":"2.0","id":1,"method":"echo"}]', INVALID_REQUEST),
        (b"7", INVALID_REQUEST),
        (b"null", INVALID_REQUEST),
        (b"{}", INVALID_REQUEST),
        (b'{"jsonrpc":"1.0","id":1,"method":"echo"}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":1}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":1,"method":7}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":{},"method":"echo"}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":true,"method":"echo"}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":[1]}', INVALID_PARAMS),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":null}', INVALID_PARAMS),
    ],
)
def test_a_malformed_request_is_an_error_and_the_connection_goes_on(
    server: Running, line: bytes, code: int
) -> None:
    with server.connect() as raw:
        assert raw.error_code(line) == code
        raw.send(request("echo", "next", a=1))
        assert raw.answer() == {"jsonrpc": "2.0", "id": "next", "result": {"a": 1}}
    assert [method for _, method, _ in server.calls.seen] == ["echo"]


def test_batches_are_refused_in_words(server: Running) -> None:
    with server.connect() as raw:
        raw.send(b"[]\n")
        assert raw.answer()["error"]["message"] == "batches are not supported"


def test_a_notification_is_executed_and_not_answered(server: Running) -> None:
    with server.connect() as raw:
        raw.send(b'{"jsonrpc":"2.0","method":"fail"}\n{"jsonrpc":"2.0","method":"echo","params":{"n":1}}\n')
        raw.send(request("echo", 2))
        assert raw.answer()["id"] == 2
    assert [method for _, method, _ in server.calls.seen] == ["fail", "echo", "echo"]


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    with server.connect() as raw:
        raw.send(b"".join(request("echo", number) for number in range(500)))
        assert [raw.answer()["id"] for _ in range(500)] == list(range(500))


def test_surrogates_and_keys_that_repeat_come_back_as_json(server: Running) -> None:
    with server.connect() as raw:
        raw.send(b'{"jsonrpc":"2.0","id":"\\ud800","method":"echo","params":{"a":1,"a":"\\udfff"}}\n')
        assert raw.answer() == {"jsonrpc": "2.0", "id": "\ud800", "result": {"a": "\udfff"}}


@pytest.mark.parametrize("size", [(1 << 20) + 1, 2 << 20])
def test_a_request_that_is_too_long_is_refused_and_the_client_closed(server: Running, size: int) -> None:
    with steady_client(server.path), server.connect() as raw:
        with contextlib.suppress(ConnectionError):
            raw.send(b"x" * size)
        assert raw.answer()["error"]["code"] == INVALID_REQUEST
        assert raw.is_closed()


def test_a_request_of_the_largest_size_is_served(server: Running) -> None:
    empty = len(request("echo", text="")) - 1
    text = "x" * ((1 << 20) - empty)
    with ControlClient(server.path) as client:
        assert client.call("echo", text=text) == {"text": text}


def test_random_bytes_crash_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = random.Random(3)
    valid = request("echo", 1, a=[1, {"b": "c"}])[:-1]
    with Running(path, Limits(requests_per_s=NO_RATE_LIMIT)) as server, steady_client(path):
        for _ in range(20):
            with server.connect() as raw:
                for _ in range(200):
                    line = bytearray(source.choice((valid, source.randbytes(source.randrange(300)))))
                    for _ in range(source.randrange(5)):
                        position = source.randrange(len(line) + 1)
                        line[position : position + 1] = source.randbytes(1)
                    raw.send(bytes(line).replace(b"\n", b" ") + b"\n" + request("echo", "mark"))
                    while raw.answer()["id"] != "mark":
                        pass
                raw.send(source.randbytes(100))
    assert caplog.records == []


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_no_bytes_make_the_parser_raise_anything_but_its_own_error(line: bytes) -> None:
    with contextlib.suppress(RequestError):
        parse_request(parse_json(line))


def test_idle_clients_beyond_the_limit_are_told_and_hold_up_nobody(server: Running) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(steady_client(server.path))
        clients = [stack.enter_context(server.connect()) for _ in range(100)]
        for client in clients[63:]:
            answer = client.answer()
            assert (answer["id"], answer["error"]["code"]) == (None, BUSY)
            assert client.is_closed()
        with pytest.raises(McrError, match="more than 64 clients"):
            ControlClient(server.path).call("echo")
        for client in clients[:63]:
            client.send(request("echo"))
            assert client.answer()["result"] == {}
    until(lambda: server.server.client_count == 0)


def test_a_client_that_sends_a_byte_now_and_then_holds_up_nobody(server: Running) -> None:
    with steady_client(server.path) as durations_s, server.connect() as raw:
        for byte in request("echo", slow=True):
            raw.send(bytes((byte,)))
            time.sleep(0.01)
        assert raw.answer()["result"] == {"slow": True}
        assert len(durations_s) > 10


def test_a_client_that_is_silent_or_unfinished_for_too_long_is_closed(path: Path) -> None:
    with (
        Running(path, Limits(idle_timeout_s=0.3)) as server,
        server.connect() as idle,
        server.connect() as slow,
    ):
        slow.send(b'{"jsonrpc":')
        assert idle.is_closed()
        assert slow.is_closed()
        until(lambda: server.server.client_count == 0)


def test_a_client_that_does_not_read_is_disconnected_and_holds_up_nobody(path: Path) -> None:
    with (
        Running(path, Limits(write_timeout_s=0.5)) as server,
        steady_client(path),
        server.connect() as raw,
    ):
        raw.send(request("big", size=4 << 20) * 3)
        until(lambda: "big" in [method for _, method, _ in server.calls.seen])
        until(lambda: server.server.client_count == 1)  # the steady one
        with pytest.raises((ConnectionError, json.JSONDecodeError)):
            for _ in range(3):
                raw.answer()
    assert [method for _, method, _ in server.calls.seen].count("big") == 1


def test_an_answer_that_is_too_long_is_an_error(server: Running) -> None:
    with server.connect() as raw:
        raw.send(request("big", size=8 << 20))
        assert raw.answer()["error"]["code"] == INTERNAL_ERROR
        raw.send(request("big", size=(8 << 20) - 1000))
        assert len(raw.answer()["result"]) == (8 << 20) - 1000


def test_clients_that_leave_in_the_middle_of_a_request_hold_up_nobody(server: Running) -> None:
    with steady_client(server.path):
        for _ in range(100):
            with server.connect() as raw:
                raw.send(b'{"jsonrpc": "2.0", "id": 1, "meth')
            with server.connect() as raw:
                raw.send(request("big", size=1 << 20))
        until(lambda: server.server.client_count == 1)


def test_a_request_cut_off_at_its_end_is_not_executed(server: Running) -> None:
    with server.connect() as raw:
        raw.send(request("echo")[:-1])
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.is_closed()
    assert server.calls.seen == []


def test_a_client_that_only_half_closes_still_gets_its_answers(server: Running) -> None:
    with server.connect() as raw:
        raw.send(request("echo", 1) + request("echo", 2))
        raw.socket.shutdown(socket.SHUT_WR)
        assert [raw.answer()["id"], raw.answer()["id"]] == [1, 2]
        assert raw.is_closed()


def test_a_request_that_takes_long_holds_up_only_its_own_client(server: Running) -> None:
    with server.connect() as raw, steady_client(server.path) as durations_s:
        raw.send(request("hang", 1) + request("echo", 2))
        until(lambda: len(durations_s) > 20)
        server.calls.release.set()
        assert [raw.answer()["id"], raw.answer()["id"]] == [1, 2]


def test_a_client_that_floods_is_slowed_down_and_told(path: Path) -> None:
    with (
        Running(path, Limits(requests_per_s=100)) as server,
        server.connect() as raw,
    ):
        raw.send(request("echo") * 300)
        answers = [raw.answer() for _ in range(300)]
        refused = [answer for answer in answers if "error" in answer]
        assert refused
        assert {answer["error"]["code"] for answer in refused} == {BUSY}
        assert all("error" not in answer for answer in answers[:100])
        assert len(server.calls.seen) == 300 - len(refused)


def test_a_flood_holds_up_nobody(server: Running) -> None:
    def flood(raw: Raw) -> None:
        with contextlib.suppress(OSError):
            while True:
                raw.send(b"\n" * 10_000)

    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(server.connect()) for _ in range(20)]
        floods = [threading.Thread(target=flood, args=(raw,)) for raw in raws]
        for thread in floods:
            thread.start()
        try:
            with steady_client(server.path) as durations_s:
                until(lambda: len(durations_s) > 50)
        finally:
            for raw in raws:
                raw.socket.shutdown(socket.SHUT_RDWR)
            for thread in floods:
                thread.join(10)


def test_tokens_are_saved_up_for_one_second_and_no_longer() -> None:
    bucket = TokenBucket(10, now_s=0.0)
    assert [bucket.take(1, 100.0) for _ in range(11)] == [True] * 10 + [False]
    assert bucket.take(1, 100.25)
    assert bucket.take(1, 100.25)
    assert not bucket.take(1, 100.25)


def test_close_removes_the_socket_and_disconnects_idle_and_busy_clients(path: Path) -> None:
    with Running(path, Limits()) as server, server.connect() as idle, server.connect() as busy:
        busy.send(request("hang"))
        until(lambda: len(server.calls.seen) == 1)
        server.stop()
        assert not path.exists()
        assert idle.is_closed()
        assert busy.is_closed()
        assert server.server.client_count == 0


def test_close_lets_a_request_that_is_nearly_done_be_answered(path: Path) -> None:
    with Running(path, Limits()) as server, server.connect() as busy:
        busy.send(request("hang"))
        until(lambda: len(server.calls.seen) == 1)
        threading.Timer(0.2, server.calls.release.set).start()
        server.stop()
        assert busy.answer()["result"] == "released"
        assert busy.is_closed()


def test_the_socket_and_its_directory_have_their_modes_whatever_the_umask(path: Path) -> None:
    umask = os.umask(0o077)
    try:
        with Running(path, Limits()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    finally:
        os.umask(umask)


def test_the_socket_of_a_dead_server_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.listen()
    dead.close()
    with Running(path, Limits()), ControlClient(path) as client:
        assert client.call("echo") == {}
    assert not path.exists()


def test_a_live_server_is_never_replaced(server: Running) -> None:
    second = ControlServer(server.path, server.calls)
    with pytest.raises(McrError, match="already running"):
        asyncio.run(second.start())
    asyncio.run(second.close())
    with ControlClient(server.path) as client:
        assert client.call("echo") == {}


def test_of_many_servers_that_replace_one_dead_socket_exactly_one_succeeds(path: Path) -> None:
    path.parent.mkdir()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()

    async def race() -> list[BaseException | None]:
        servers = [ControlServer(path, Calls()) for _ in range(8)]
        ends = await asyncio.gather(*(server.start() for server in servers), return_exceptions=True)
        for server in servers:
            await server.close()
        return ends

    ends = asyncio.run(race())
    assert [type(end) for end in ends if end is not None] == [McrError] * 7
    assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(McrError, match="is not a socket"):
        asyncio.run(ControlServer(path, Calls()).start())
    assert path.read_text() == "mine"


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(McrError, match="cannot create the control socket"):
        asyncio.run(ControlServer(tmp_path / "file" / "a.sock", Calls()).start())


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


def test_only_root_the_server_and_the_sockets_group_may_call() -> None:
    require("root", os.geteuid() == 0, f"effective user id is {os.geteuid()}")
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are closed to other users
        Path(directory).chmod(0o755)
        path = Path(directory) / "a.sock"
        refused = f"{ExitStatus.NOT_PERMITTED:d} this user may not use {path}\n"
        with Running(path, Limits()) as server:
            group_id = path.stat().st_gid
            assert call_as(path, 65534, 65534, []).stdout == refused
            assert call_as(path, 65534, 65534, [4242, group_id]).stdout == "{}\n"
            assert call_as(path, 65534, group_id, []).stdout == "{}\n"
            path.chmod(0o666)  # the server checks by itself, too
            assert call_as(path, 65534, 65534, []).stdout == refused
            assert call_as(path, 65534, 65534, [4242]).stdout == refused
        assert [peer.uid for peer, _, _ in server.calls.seen] == [65534, 65534]


def test_no_supervisor_is_told_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    expected = McrError(
        f"no supervisor is running at {path}",
        "start one: mcr run, or mcr attach IFACE",
        status=ExitStatus.NO_SUPERVISOR,
    )
    with pytest.raises(McrError) as failed:
        ControlClient(path).call("echo")
    assert failed.value == expected
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(McrError) as failed:
        ControlClient(path).call("echo")
    assert failed.value == expected


@contextlib.contextmanager
def impostor(path: Path, answer: bytes | None) -> Iterator[None]:
    """A server that reads one request, answers with these bytes and hangs up; with None it stays silent."""
    ended = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(1 << 16)
                if answer is None:
                    ended.wait(20)
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(10)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (None, "did not answer within 0.3 s"),
        (b"", "closed the connection without an answer"),
        (b'{"jsonrpc":"2.0","id":1,"res', "closed the connection without an answer"),
        (b"\xff\n", "answered something that is not an answer"),
        (b"[]\n", "answered something that is not an answer"),
        (b'{"jsonrpc":"2.0","id":1}\n', "answered something that is not an answer"),
        (b'{"jsonrpc":"2.0","id":2,"result":1}\n', "answered something that is not an answer"),
        (b'{"jsonrpc":"2.0","id":1,"error":7}\n', "answered something that is not an answer"),
        (b'{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"a"}}\n', "answered something that is not an"),
        (b"x" * 200_000, "answer is longer than 100000 bytes"),
    ],
)
def test_a_server_that_misbehaves_is_one_clear_error(
    tmp_path: Path, answer: bytes | None, cause: str
) -> None:
    path = tmp_path / "a.sock"
    with impostor(path, answer), ControlClient(path, timeout_s=0.3, max_answer_bytes=100_000) as client:
        with pytest.raises(McrError) as failed:
            client.call("echo")
        assert cause in failed.value.cause
        assert failed.value.remedy
        assert failed.value.status == ExitStatus.FAILED


def test_a_server_whose_backlog_is_full_is_not_waited_for_without_end(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        stack.enter_context(Raw(path))
        with pytest.raises(McrError, match=r"did not answer within 0\.2 s"):
            ControlClient(path, timeout_s=0.2).call("echo")


def test_the_socket_path_is_of_the_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MCR_RUNTIME_DIR", raising=False)
    assert socket_path("default") == Path("/run/mcr/default.sock")
    monkeypatch.setenv("MCR_RUNTIME_DIR", "/tmp/elsewhere")
    assert socket_path("A-z_9" + "x" * 27) == Path("/tmp/elsewhere") / f"A-z_9{'x' * 27}.sock"


@pytest.mark.parametrize("name", ["", "x" * 33, "a/b", "..", "a.b", "a b", "ü", "a\n", "a\0"])
def test_a_bad_instance_name_is_refused(name: str) -> None:
    with pytest.raises(McrError) as failed:
        socket_path(name)
    assert failed.value.status == ExitStatus.USAGE


def test_a_runtime_directory_that_is_too_long_for_a_socket_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MCR_RUNTIME_DIR", "/" + "x" * 120)
    with pytest.raises(McrError, match="too long"):
        socket_path("default")
