"""The supervisor's half of the control socket: it lets clients in and shares itself out among them.

Every limit is in `Limits`. A client costs memory only for what it has sent and not finished, and time only
for what it asks, within limits of its own and of its user's; what it sends, or fails to read, costs that
client alone. No client can lock others out: when every place is taken, the user with the most connections
loses the one that has been idle longest. This module knows no method and no rule; it must never let a client
wait on another one, and never answer anything that it read with a traceback.
"""

import asyncio
import contextlib
import fcntl
import grp
import logging
import os
import socket
import stat
import struct
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mcr.bucket import TokenBucket
from mcr.control import not_permitted
from mcr.errors import ExitStatus, McrError
from mcr.jsonrpc import (
    BUSY,
    INTERNAL_ERROR,
    INVALID_REQUEST,
    Request,
    RequestError,
    encode_error,
    encode_mcr_error,
    encode_result,
    parse_json,
    parse_request,
    request_id,
)

SO_PEERGROUPS = 59  # asm-generic/socket.h; Python's socket module has no name for it
MAX_PEER_GROUPS = 256  # Python reads at most 1024 bytes of a socket option
LISTEN_BACKLOG = 128  # also how many are accepted before anything else is done
READ_BYTES = 1 << 16
LOCK_WAIT_S = 1.0
CLOSE_GRACE_S = 1.0
PROBE_TIMEOUT_S = 1.0
SOCKET_MODE = 0o660
SOCKET_MODE_ALL = 0o666
GROUP_NAME = "mcr"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a control connection, as the kernel says (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int
    may_write: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may cost the supervisor.

    Costs are counted in tokens: one for a request, one for each `bytes_per_token` of it and one for each
    `seconds_per_token` that the supervisor's processor spent on it.
    """

    clients: int = 1024
    request_bytes: int = 1 << 20
    unfinished_bytes: int = 8 << 20  # received of all clients together and not yet executed
    answer_bytes: int = 8 << 20
    unsent_bytes: int = 32 << 20  # answers that the clients together have not read
    requests_per_s: int = 1000  # tokens a second of each client
    user_requests_per_s: int = 3000  # tokens a second of each user but root
    bytes_per_token: int = 2048
    seconds_per_token: float = 0.0002
    write_timeout_s: float = 5.0
    idle_timeout_s: float = 600.0


_T = TypeVar("_T")
Handler = Callable[[Peer, str, dict[str, Any]], Awaitable[object]]


@dataclass(slots=True)
class _User:
    """What a user's clients have together. `clients` is in the order of the last request, oldest first."""

    bucket: TokenBucket
    clients: dict["_Client", None] = field(default_factory=dict)


def _peer_of(connection: socket.socket) -> Peer:
    size = struct.calcsize("3i")
    return Peer(*struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)))


def _peer_groups(connection: socket.socket) -> set[int]:
    """The supplementary groups of the peer when it connected; none where the kernel does not tell.

    It does since 4.13, and Python takes no more than 256 of them.
    """
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, MAX_PEER_GROUPS * 4)
    except OSError:
        return set()
    return set(struct.unpack(f"{len(packed) // 4}I", packed))


def _is_alive(path: Path) -> bool:
    """Whether a server accepts connections at the path. Raises OSError if that cannot be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except (BlockingIOError, TimeoutError):
            return True  # its backlog is full
    return True


def _bind(path: Path, mode: int) -> socket.socket:
    """A bound socket with its mode and group set; it listens only then, so that nobody is let in before."""
    if path.is_symlink() or (path.exists() and not path.is_socket()):
        raise McrError(f"{path} exists and is not a socket", f"move it away: mv {path} {path}.old")
    if _is_alive(path):
        raise McrError(
            f"a supervisor is already running at {path}", "stop that one, or choose another --instance"
        )
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        with contextlib.suppress(KeyError, PermissionError):
            os.chown(path, -1, grp.getgrnam(GROUP_NAME).gr_gid)
        path.chmod(mode)
        listener.listen(LISTEN_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


async def _lock_directory(directory: Path) -> int:
    """A descriptor that holds the directory's lock, so that two servers cannot both replace one stale socket.

    Anyone may hold that lock, so after LOCK_WAIT_S this goes on without it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while time.monotonic() < deadline_s:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            await asyncio.sleep(0.01)
    return descriptor


@types.coroutine
def _timed(work: Coroutine[Any, Any, _T]) -> Generator[Any, None, tuple[_T, float]]:
    """The result of the work, and the seconds that the processor spent on it, its waiting left out."""
    spent_s = 0.0
    error: BaseException | None = None
    while True:
        started_s = time.thread_time()
        try:
            awaited = work.send(None) if error is None else work.throw(error)
        except StopIteration as end:
            return end.value, spent_s + time.thread_time() - started_s
        spent_s += time.thread_time() - started_s
        error = None
        try:
            yield awaited
        except BaseException as raised:
            error = raised


class _Client(asyncio.BufferedProtocol):
    """One accepted connection. It has a task only while a request of it is handled."""

    __slots__ = (
        "bucket",
        "closing",
        "ended",
        "last_request_s",
        "peer",
        "searched",
        "server",
        "task",
        "transport",
        "unfinished",
        "written",
    )

    transport: asyncio.Transport
    peer: Peer

    def __init__(self, server: "ControlServer") -> None:
        self.server = server
        self.last_request_s = time.monotonic()
        self.bucket = TokenBucket(server.limits.requests_per_s, self.last_request_s)
        self.unfinished = bytearray()
        self.searched = 0
        self.task: asyncio.Task[None] | None = None
        self.written: asyncio.Future[None] | None = None
        self.ended = False  # the client has sent its last byte
        self.closing = False

    # --- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=0)  # so that `send` ends when everything is written
        self.server.admit(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.server.scratch

    def buffer_updated(self, nbytes: int) -> None:
        self.unfinished += self.server.scratch[:nbytes]
        self.server.unfinished_bytes += nbytes
        self._proceed()
        self.server.check_unfinished()

    def eof_received(self) -> bool:
        self.ended = True
        self._proceed()
        return True  # answers may still be read

    def pause_writing(self) -> None:
        self.written = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self.written is not None and not self.written.done():
            self.written.set_result(None)
        self.written = None

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = True
        if self.written is not None and not self.written.done():
            self.written.set_exception(ConnectionResetError())
        self.written = None
        self.forget_received()
        if self.task is None:
            self.server.release(self)

    # --- requests

    def _proceed(self) -> None:
        """Starts on the next request, if it is whole and none is being handled."""
        if self.closing:
            self.forget_received()
        elif self.task is not None:
            if len(self.unfinished) > READ_BYTES:
                self.transport.pause_reading()
        elif self.unfinished.find(b"\n", self.searched) >= 0:
            self.task = asyncio.create_task(self._serve(), name="mcr-request")
            self.task.add_done_callback(self._served)
        elif len(self.unfinished) > self.server.limits.request_bytes:
            self._refuse_length()
        elif self.ended:
            self.hang_up()
        else:
            self.searched = len(self.unfinished)

    def _refuse_length(self) -> None:
        limit = self.server.limits.request_bytes
        self.hang_up(encode_error(None, INVALID_REQUEST, f"a request is longer than {limit} bytes"))

    def _forget(self, count: int) -> None:
        del self.unfinished[:count]
        self.searched = 0
        self.server.unfinished_bytes -= count

    def forget_received(self) -> None:
        """Gives up what has been received and not executed."""
        self._forget(len(self.unfinished))

    def _take_line(self) -> bytes | None:
        end = self.unfinished.find(b"\n")
        if end < 0:
            return None
        if end > self.server.limits.request_bytes:
            self._refuse_length()
            return None
        line = bytes(self.unfinished[:end])
        self._forget(end + 1)
        return line

    async def _serve(self) -> None:
        """Handles what has been received, one request after the other, in order."""
        while not self.closing and (line := self._take_line()) is not None:
            self.last_request_s = time.monotonic()
            self.server.was_active(self)
            if wait_s := self._over_rate(len(line)):
                rate = self.server.limits.requests_per_s
                cause = f"more than {rate} requests a second, or fewer that cost as much"
                await self.send(encode_error(None, BUSY, cause))
                await asyncio.sleep(wait_s)
            elif self.server.unsent_bytes > self.server.limits.unsent_bytes:
                await self.send(encode_error(None, BUSY, "other clients have not read their answers"))
            else:
                answer, spent_s = await _timed(self._answer(line))
                self._charge(spent_s)
                await self.send(answer)
            await asyncio.sleep(0)  # what has been received already never yields by itself

    def _served(self, task: asyncio.Task[None]) -> None:
        self.task = None
        cause = None if task.cancelled() else task.exception()
        if cause is not None and not isinstance(cause, TimeoutError | ConnectionError):
            log.error("a client could not be served", exc_info=cause)
        if cause is not None or task.cancelled():
            self.transport.abort()
        if self.closing or self.transport.is_closing():
            self.hang_up()
            self.forget_received()
            if self.transport.is_closing():
                self.server.release(self)
        else:
            self.transport.resume_reading()
            self._proceed()

    def _over_rate(self, length: int) -> float:
        """Takes the tokens of a request; if there are too few, the seconds to wait, else 0."""
        limits, now_s = self.server.limits, self.last_request_s
        cost = min(limits.requests_per_s, 1 + length // limits.bytes_per_token)
        if not self.bucket.take(cost, now_s):
            return cost / limits.requests_per_s
        user = self.server.user_of(self)
        if self.peer.uid and not user.bucket.take(min(cost, limits.user_requests_per_s), now_s):
            return len(user.clients) / limits.user_requests_per_s + 0.05
        return 0.0

    def _charge(self, spent_s: float) -> None:
        """Takes the tokens for what a request cost; a second's worth is the most."""
        limits, now_s = self.server.limits, time.monotonic()
        cost = min(limits.requests_per_s, spent_s / limits.seconds_per_token)
        self.bucket.charge(cost, now_s)
        self.server.user_of(self).bucket.charge(cost, now_s)

    async def _answer(self, line: bytes) -> bytes:
        """Executes one request and returns its answer, empty for a notification."""
        message: object = None
        try:
            message = parse_json(line)
            request = parse_request(message)
        except RequestError as error:
            return encode_error(request_id(message), error.code, error.message)
        answer = await self._execute(request)
        if len(answer) > self.server.limits.answer_bytes:
            limit = self.server.limits.answer_bytes
            answer = encode_error(request.id, INTERNAL_ERROR, f"the answer is longer than {limit} bytes")
        return b"" if request.notification else answer

    async def _execute(self, request: Request) -> bytes:
        try:
            result = await self.server.handler(self.peer, request.method, request.params)
            return encode_result(request.id, result)
        except McrError as error:
            return encode_mcr_error(request.id, error)
        except RequestError as error:
            return encode_error(request.id, error.code, error.message)
        except Exception:
            log.exception("the request %.64r of pid %d failed", request.method, self.peer.pid)
            return encode_error(request.id, INTERNAL_ERROR, "internal error, see the supervisor's log")

    async def send(self, data: bytes) -> None:
        """Writes to a client that must read. Raises TimeoutError if it does not within write_timeout_s."""
        if not data:
            return
        if self.transport.is_closing():
            raise ConnectionResetError
        self.server.unsent_bytes += len(data)
        try:
            self.transport.write(data)
            if self.written is not None:
                async with asyncio.timeout(self.server.limits.write_timeout_s):
                    await asyncio.shield(self.written)
        finally:
            self.server.unsent_bytes -= len(data)

    def hang_up(self, last_words: bytes = b"") -> None:
        """Closes the connection: what was written is still delivered, for as long as write_timeout_s."""
        self.closing = True
        if self.transport.is_closing():
            return
        if last_words:
            self.transport.write(last_words)
        self.transport.close()
        if self.transport.get_write_buffer_size():
            loop = asyncio.get_running_loop()
            loop.call_later(self.server.limits.write_timeout_s, self.transport.abort)


class ControlServer:
    """The supervisor's end of the control socket.

    handler(peer, method, params) returns any JSON value, or raises McrError (told to the user as it is) or
    RequestError; anything else that it raises is logged and answered as an internal error. Requests of one
    client are handled one at a time, in order; those of different clients side by side. everyone_reads lets
    any local user in, as a peer that may not write; the handler must know what that means.
    """

    def __init__(
        self, path: Path, handler: Handler, limits: Limits | None = None, everyone_reads: bool = False
    ) -> None:
        self.path = path
        self.handler = handler
        self.limits = limits or Limits()
        self.everyone_reads = everyone_reads
        self.scratch = memoryview(bytearray(READ_BYTES))  # every client reads through it, none keeps it
        self.unfinished_bytes = 0
        self.unsent_bytes = 0
        self._clients: set[_Client] = set()
        self._users: dict[int, _User] = {}
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._inode = (0, 0)
        self._gid = -1

    @property
    def client_count(self) -> int:
        """How many clients are connected."""
        return len(self._clients)

    async def start(self) -> None:
        """Creates the socket (and its directory, 0755) and serves it.

        Raises McrError if a live server has it, or if it cannot be created. A dead one's file is replaced.
        """
        directory = self.path.parent
        try:
            if not directory.is_dir():
                directory.mkdir(parents=True, exist_ok=True)
                directory.chmod(0o755)
            lock = await _lock_directory(directory)
            try:
                listener = _bind(self.path, SOCKET_MODE_ALL if self.everyone_reads else SOCKET_MODE)
            finally:
                os.close(lock)
        except OSError as error:
            denied = isinstance(error, PermissionError)
            raise McrError(
                f"cannot create the control socket {self.path}: {error.strerror or error}",
                "run mcr as root" if denied else "set MCR_RUNTIME_DIR to another directory",
                status=ExitStatus.NOT_PERMITTED if denied else ExitStatus.FAILED,
            ) from error
        status = self.path.stat()
        self._inode, self._gid = (status.st_dev, status.st_ino), status.st_gid
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: _Client(self), sock=listener, backlog=LISTEN_BACKLOG
        )
        self._sweep()

    async def close(self) -> None:
        """Removes the socket file and disconnects every client.

        A request that is being handled gets CLOSE_GRACE_S to be answered, then it is cancelled.
        """
        if self._server is None:
            return
        self._server.close()
        self._server = None
        if self._sweeper is not None:
            self._sweeper.cancel()
        with contextlib.suppress(FileNotFoundError):
            status = self.path.stat()
            if (status.st_dev, status.st_ino) == self._inode and stat.S_ISSOCK(status.st_mode):
                self.path.unlink()
        for client in list(self._clients):
            client.closing = True
            if client.task is None:
                client.hang_up()
        await self._end_tasks()
        for client in list(self._clients):
            client.hang_up()
        for _ in range(2):  # the transports close at the loop's next turn
            await asyncio.sleep(0)

    async def _end_tasks(self) -> None:
        for grace_s in (CLOSE_GRACE_S, CLOSE_GRACE_S):
            tasks = {client.task: client for client in self._clients if client.task is not None}
            if not tasks:
                return
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                tasks[task].transport.abort()
                task.cancel()

    # --- who is let in

    def admit(self, client: _Client) -> None:
        """Gives a new connection its place, or tells it why not."""
        connection = client.transport.get_extra_info("socket")
        peer = _peer_of(connection)
        may_write = self._may_write(peer, connection)
        client.peer = Peer(peer.pid, peer.uid, peer.gid, may_write)
        if self._server is None:
            client.hang_up()
        elif not may_write and not self.everyone_reads:
            client.hang_up(encode_mcr_error(None, not_permitted(self.path)))
        elif not self._make_room(peer.uid):
            client.hang_up(encode_error(None, BUSY, f"{len(self._clients)} clients are being served"))
        else:
            self._clients.add(client)
            self.user_of(client).clients[client] = None

    def _may_write(self, peer: Peer, connection: socket.socket) -> bool:
        if peer.uid in (0, os.geteuid()) or peer.gid == self._gid:
            return True
        return self._gid in _peer_groups(connection)

    def _make_room(self, uid: int) -> bool:
        """Whether there is a place for one more of that user's, if need be at the cost of another client.

        That is the one that has been idle longest of the user who, with the new one, has the most. A request
        is never cut off. Root gets in even if everybody is being served.
        """
        if len(self._clients) < self.limits.clients:
            return True
        largest = max(self._users, key=lambda each: len(self._users[each].clients) + (each == uid))
        idle = next((client for client in self._users[largest].clients if client.task is None), None)
        if idle is not None:
            self.release(idle)
            idle.hang_up(encode_error(None, BUSY, "disconnected to make room for another client"))
        return idle is not None or uid == 0

    def user_of(self, client: _Client) -> _User:
        """What the client shares with the other clients of its user."""
        uid = client.peer.uid
        if uid not in self._users:
            bucket = TokenBucket(self.limits.user_requests_per_s, time.monotonic())
            self._users[uid] = _User(bucket)
        return self._users[uid]

    def was_active(self, client: _Client) -> None:
        """Moves the client behind all others in the order of idleness."""
        clients = self.user_of(client).clients
        if clients.pop(client, client) is None:
            clients[client] = None

    def release(self, client: _Client) -> None:
        """Gives the client's place away."""
        if client in self._clients:
            self._clients.discard(client)
            self.user_of(client).clients.pop(client, None)

    def check_unfinished(self) -> None:
        """Disconnects whoever holds most, while all clients together hold too much."""
        while self.unfinished_bytes > self.limits.unfinished_bytes:
            largest = max(self._clients, key=lambda client: len(client.unfinished), default=None)
            if largest is None or not largest.unfinished:
                return
            largest.hang_up(encode_error(None, BUSY, "too much is waiting to be executed"))
            largest.forget_received()

    def _sweep(self) -> None:
        """Disconnects who has asked nothing for too long, and forgets users of whom nobody is left."""
        now_s = time.monotonic()
        for uid, user in list(self._users.items()):
            for client in list(user.clients):
                if now_s - client.last_request_s < self.limits.idle_timeout_s:
                    break
                if client.task is None:
                    client.hang_up()
            if not user.clients and now_s - user.bucket.refilled_s > 1:
                del self._users[uid]
        interval_s = min(10.0, self.limits.idle_timeout_s / 4)
        self._sweeper = asyncio.get_running_loop().call_later(interval_s, self._sweep)
