"""No client of the control socket can cost others more than a moment, nor lock them out."""

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcr.connection import Limits
from mcr.control import ControlClient
from mcr.errors import McrError
from mcr.jsonrpc import (
    BUSY,
    INTERNAL_ERROR,
    PARSE_ERROR,
)
from tests.conftest import require
from tests.unit.control_peers import (
    Raw,
    Running,
    crowd_of,
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


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A path that any user can reach: pytest's own directories are closed to other users."""
    require("root", os.geteuid() == 0, f"effective user id is {os.geteuid()}")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory) / "a.sock"


def told_to_go(client: Raw) -> bool:
    """Whether the server has disconnected the client to make room, and said so."""
    answer = client.answer()
    return (answer["id"], answer["error"]["code"]) == (None, BUSY) and client.is_closed()


def test_where_every_place_is_taken_the_longest_idle_client_makes_room(path: Path) -> None:
    with Running(path, Limits(clients=20)) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(20)]
        until(lambda: server.server.client_count == 20)
        clients[0].send(request("echo"))
        assert clients[0].answer()["result"] == {}
        newer = [stack.enter_context(server.connect()) for _ in range(10)]
        assert all(told_to_go(client) for client in clients[1:11])
        for client in (clients[0], *clients[11:], *newer):
            client.send(request("echo"))
            assert client.answer()["result"] == {}
        assert server.server.client_count == 20


def test_a_request_that_is_being_handled_is_never_cut_off_and_root_gets_in(path: Path) -> None:
    with Running(path, Limits(clients=2)) as server, server.connect() as one, server.connect() as two:
        for client in (one, two):
            client.send(request("hang"))
        until(lambda: len(server.calls.seen) == 2)
        with ControlClient(path) as third:
            assert third.call("echo") == {}
            server.calls.release.set()
            assert [client.answer()["result"] for client in (one, two)] == ["released"] * 2


def test_the_user_with_the_most_connections_makes_room_for_the_others(open_path: Path) -> None:
    with (
        Running(open_path, Limits(clients=30), everyone_reads=True) as server,
        server.connect() as mine,
        crowd_of(open_path, 1001, 5),
        crowd_of(open_path, 1002, 100),
    ):
        until(lambda: server.connections_of(1002) == 24)
        assert [server.connections_of(uid) for uid in (0, 1001)] == [1, 5]
        with crowd_of(open_path, 1003, 60):
            until(lambda: server.connections_of(1003) == 12)
            assert [server.connections_of(uid) for uid in (0, 1001, 1002)] == [1, 5, 12]
            mine.send(request("echo"))
            assert mine.answer()["result"] == {}


def test_a_user_whose_clients_ask_too_much_delays_no_other_user(open_path: Path) -> None:
    limits = Limits(user_requests_per_s=200)
    started_s = time.monotonic()
    with Running(open_path, limits, everyone_reads=True) as server:
        with crowd_of(open_path, 1001, 50, "flood"), steady_client(open_path) as durations_s:
            until(lambda: len(durations_s) > 100)
        asked = sum(1 for peer, _, _ in server.calls.seen if peer.uid == 1001)
        assert 200 <= asked <= 200 * (2 + time.monotonic() - started_s)
        assert sorted(durations_s)[len(durations_s) // 2] < 0.1


def test_unfinished_requests_take_no_more_memory_than_the_limit(path: Path) -> None:
    limits = Limits(request_bytes=100_000, unfinished_bytes=1_000_000)
    with Running(path, limits) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(30)]
        for client in clients:
            client.send(b"x" * 90_000)
        until(lambda: server.server.client_count == 11)
        assert 900_000 <= server.server.unfinished_bytes <= 1_000_000
        assert server.call_once("echo") == {}
    assert server.server.unfinished_bytes == 0


def test_answers_that_nobody_reads_take_no_more_memory_than_the_limit(path: Path) -> None:
    limits = Limits(unsent_bytes=8 << 20, write_timeout_s=20)
    with Running(path, limits) as server, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(server.connect()).send(request("big", size=4 << 20))
        until(lambda: server.server.unsent_bytes > 8 << 20)
        with pytest.raises(McrError, match="other clients have not read their answers"):
            server.call_once("echo")
        assert server.server.unsent_bytes < 16 << 20
    assert server.server.unsent_bytes == 0


def test_a_costly_request_is_paid_for_before_the_next_one(path: Path) -> None:
    with (
        Running(path, Limits(requests_per_s=100, seconds_per_token=0.001)) as server,
        server.connect() as raw,
    ):
        raw.send(request("spin", 1, seconds=0.2) + request("echo", 2))
        assert raw.answer()["result"] == "spun"
        assert raw.answer()["error"]["code"] == BUSY
        assert server.call_once("echo") == {}


def test_an_idle_client_takes_little_memory(path: Path) -> None:
    with Running(path, Limits()) as server, contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(500)]
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for each in sockets:
            each.connect(str(path))
        until(lambda: server.server.client_count == 500)
        assert tracemalloc.get_traced_memory()[0] / 500 < 8000


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
        raw.send(request("echo")[:-2])
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.answer()["error"]["code"] == PARSE_ERROR
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
        Running(path, Limits(requests_per_s=100, seconds_per_token=1.0)) as server,
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
