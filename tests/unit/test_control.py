"""Whatever a client of the control socket sends, or leaves unread, another client's calls are answered."""

import asyncio
import contextlib
import os
import random
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcr.bucket import TokenBucket
from mcr.connection import Limits, Peer
from mcr.control import ControlClient, socket_path
from mcr.control_server import ControlServer
from mcr.errors import ExitStatus, McrError
from mcr.jsonrpc import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    PARSE_ERROR,
    RequestError,
    encode_result,
    parse_json,
    parse_request,
    result_pieces,
)
from tests.conftest import require
from tests.unit.control_peers import (
    FAILURE,
    NO_RATE_LIMIT,
    Calls,
    Raw,
    Running,
    call_as,
    request,
    steady_client,
    until,
)


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
    peer = Peer(os.getpid(), os.getuid(), os.getgid(), may_write=True)
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


def test_a_last_request_without_its_newline_is_answered(server: Running) -> None:
    with server.connect() as client:
        client.send(request("echo", 1, n=1) + request("echo", 2, n=2).rstrip(b"\n"))
        client.socket.shutdown(socket.SHUT_WR)
        assert [client.answer()["id"] for _ in range(2)] == [1, 2]
        assert client.is_closed()


@pytest.mark.parametrize("rows", [0, 1, 200, 201, 1000])
def test_a_long_list_is_encoded_in_pieces_that_are_the_same_line(rows: int) -> None:
    result = [{"name": f"ü{number}", "count": number} for number in range(rows)]
    pieces = list(result_pieces("x", result))
    assert b"".join(pieces) == encode_result("x", result)
    assert max(map(len, pieces)) < 12000


@pytest.mark.parametrize("everything", [False, True])
def test_a_socket_whose_file_is_removed_is_made_again(path: Path, everything: bool) -> None:
    with Running(path, Limits()) as server, ControlClient(path) as connected:
        assert connected.call("echo", n=1) == {"n": 1}
        shutil.rmtree(path.parent) if everything else path.unlink()
        until(path.exists)
        assert server.call_once("echo") == {}
        assert connected.call("echo", n=2) == {"n": 2}
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert not path.exists()


def test_a_socket_that_another_server_has_taken_is_left_to_it(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Running(path, Limits()):
        path.unlink()
        with Running(path, Limits()) as second:
            inode = path.stat().st_ino
            until(lambda: any("is already running" in record.message for record in caplog.records))
            assert path.stat().st_ino == inode
            assert second.call_once("echo") == {}
        until(path.exists)


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
