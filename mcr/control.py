"""The control socket: JSON-RPC 2.0, one object a line, UTF-8, over a Unix stream socket.

The server half belongs to the supervisor's event loop: every limit is in `Limits`, every client has a task of
its own, and whatever a client sends, or fails to read, costs that client alone. The client half is what
commands use. This module knows no method and no rule; it must never let a client wait on another one, and
never answer anything that it read with a traceback.
"""

import asyncio
import contextlib
import fcntl
import grp
import logging
import os
import re
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mcr.errors import ExitStatus, McrError
from mcr.jsonrpc import (
    BUSY,
    INTERNAL_ERROR,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    REQUEST_FAILED,
    Request,
    RequestError,
    encode,
    encode_error,
    encode_mcr_error,
    encode_result,
    parse_json,
    parse_request,
    request_id,
)

SO_PEERGROUPS = 59  # asm-generic/socket.h; Python's socket module has no name for it
MAX_PEER_GROUPS = 256  # Python reads at most 1024 bytes of a socket option
MAX_ANSWER_BYTES = 64 << 20  # what a client takes
LISTEN_BACKLOG = 128
LOCK_WAIT_S = 1.0
CLOSE_GRACE_S = 1.0
PROBE_TIMEOUT_S = 1.0
SOCKET_MODE = 0o660
GROUP_NAME = "mcr"
SOCKET_PATH_BYTES = 107  # sun_path less its NUL, unix(7)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a control connection, as the kernel says (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may cost the supervisor."""

    clients: int = 64
    request_bytes: int = 1 << 20
    answer_bytes: int = 8 << 20
    requests_per_s: int = 1000
    bytes_per_token: int = 2048  # a longer request takes more of the requests_per_s
    write_timeout_s: float = 5.0
    idle_timeout_s: float = 600.0


Handler = Callable[[Peer, str, dict[str, Any]], Awaitable[object]]


def socket_path(instance: str) -> Path:
    """The control socket of an instance: `<instance>.sock` in /run/mcr, or in $MCR_RUNTIME_DIR.

    Raises McrError (usage) for a name that is not 1 to 32 of A-Z a-z 0-9 _ -.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", instance, re.ASCII):
        raise McrError(
            f"{instance!r} is not an instance name",
            "use 1 to 32 of the letters, digits, _ and -",
            status=ExitStatus.USAGE,
        )
    path = Path(os.environ.get("MCR_RUNTIME_DIR") or "/run/mcr") / f"{instance}.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise McrError(
            f"{path} is too long for a socket's path",
            "set MCR_RUNTIME_DIR to a shorter one",
            status=ExitStatus.USAGE,
        )
    return path


class TokenBucket:
    """`rate` tokens a second, at most one second's worth saved up."""

    def __init__(self, rate: int, now_s: float) -> None:
        self.rate = rate
        self.tokens = float(rate)
        self.refilled_s = now_s

    def take(self, amount: int, now_s: float) -> bool:
        """Takes the amount, all or nothing; False if there is not enough."""
        self.tokens = min(self.rate, self.tokens + (now_s - self.refilled_s) * self.rate)
        self.refilled_s = now_s
        if self.tokens < amount:
            return False
        self.tokens -= amount
        return True


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


def _bind(path: Path) -> socket.socket:
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
        path.chmod(SOCKET_MODE)
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


class _Client:
    """One accepted connection: reads a request, answers it, reads the next."""

    def __init__(
        self,
        peer: Peer,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        handler: Handler,
        limits: Limits,
    ) -> None:
        self.peer = peer
        self.reader, self.writer = streams
        self.handler = handler
        self.limits = limits
        self.bucket = TokenBucket(limits.requests_per_s, time.monotonic())
        self.busy = False
        self.closing = False

    async def serve(self) -> None:
        """Serves until the client leaves, breaks a limit or `closing` is set."""
        while not self.closing and (line := await self._read_line()) is not None:
            self.busy = True
            try:
                rate = self.limits.requests_per_s
                cost = min(rate, 1 + len(line) // self.limits.bytes_per_token)
                if self.bucket.take(cost, time.monotonic()):
                    await self.send(await self._answer(line))
                else:
                    await self.send(encode_error(None, BUSY, f"more than {rate} requests a second"))
                    await asyncio.sleep(cost / rate)
            finally:
                self.busy = False
            await asyncio.sleep(0)  # a full read buffer never yields by itself

    async def _read_line(self) -> bytes | None:
        """The next request, without its newline; None when the client is to be closed."""
        try:
            async with asyncio.timeout(self.limits.idle_timeout_s):
                return (await self.reader.readuntil(b"\n"))[:-1]
        except asyncio.LimitOverrunError:
            limit = self.limits.request_bytes
            await self.send(encode_error(None, INVALID_REQUEST, f"a request is longer than {limit} bytes"))
        except (TimeoutError, asyncio.IncompleteReadError):
            pass
        return None

    async def _answer(self, line: bytes) -> bytes:
        """Executes one request and returns its answer, empty for a notification."""
        message: object = None
        try:
            message = parse_json(line)
            request = parse_request(message)
        except RequestError as error:
            return encode_error(request_id(message), error.code, error.message)
        answer = await self._execute(request)
        if len(answer) > self.limits.answer_bytes:
            limit = self.limits.answer_bytes
            answer = encode_error(request.id, INTERNAL_ERROR, f"the answer is longer than {limit} bytes")
        return b"" if request.notification else answer

    async def _execute(self, request: Request) -> bytes:
        try:
            return encode_result(request.id, await self.handler(self.peer, request.method, request.params))
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
        self.writer.write(data)
        async with asyncio.timeout(self.limits.write_timeout_s):
            await self.writer.drain()

    async def hang_up(self) -> None:
        """Closes the connection: what was written is still delivered, for as long as write_timeout_s."""
        self.writer.close()
        try:
            async with asyncio.timeout(self.limits.write_timeout_s):
                await self.writer.wait_closed()
        except (TimeoutError, OSError):
            self.writer.transport.abort()


class ControlServer:
    """The supervisor's end of the control socket.

    handler(peer, method, params) returns any JSON value, or raises McrError (told to the user as it is) or
    RequestError; anything else that it raises is logged and answered as an internal error. Requests of one
    client are handled one at a time, in order; those of different clients side by side.
    """

    def __init__(self, path: Path, handler: Handler, limits: Limits | None = None) -> None:
        self.path = path
        self.handler = handler
        self.limits = limits or Limits()
        self._clients: dict[asyncio.Task[None], _Client] = {}
        self._server: asyncio.Server | None = None
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
                listener = _bind(self.path)
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
        self._server = await asyncio.start_unix_server(
            self._accept, sock=listener, limit=self.limits.request_bytes
        )

    async def close(self) -> None:
        """Removes the socket file and disconnects every client.

        A request that is being handled gets CLOSE_GRACE_S to be answered, then it is cancelled.
        """
        if self._server is None:
            return
        self._server.close()
        self._server = None
        with contextlib.suppress(FileNotFoundError):
            status = self.path.stat()
            if (status.st_dev, status.st_ino) == self._inode:
                self.path.unlink()
        for task, client in self._clients.items():
            client.closing = True
            if not client.busy:
                task.cancel()
        for grace_s in (CLOSE_GRACE_S, CLOSE_GRACE_S):
            if tasks := list(self._clients):
                _, late = await asyncio.wait(tasks, timeout=grace_s)
                for task in late:
                    self._clients[task].writer.transport.abort()
                    task.cancel()

    def _may_call(self, peer: Peer, connection: socket.socket) -> bool:
        if peer.uid in (0, os.geteuid()) or peer.gid == self._gid:
            return True
        return self._gid in _peer_groups(connection)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        peer = _peer_of(connection)
        client = _Client(peer, (reader, writer), self.handler, self.limits)
        task = asyncio.current_task()
        assert task is not None
        full = len(self._clients) >= self.limits.clients
        try:
            if not full:
                self._clients[task] = client
            if self._server is None:
                return
            if full:
                await client.send(encode_error(None, BUSY, f"more than {self.limits.clients} clients"))
            elif not self._may_call(peer, connection):
                await client.send(encode_mcr_error(None, _not_permitted(self.path)))
            else:
                await client.serve()
        except (TimeoutError, ConnectionError):
            writer.transport.abort()
        except asyncio.CancelledError:
            log.debug("the client pid %d is disconnected", peer.pid)
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await client.hang_up()
            self._clients.pop(task, None)


def _not_permitted(path: Path) -> McrError:
    return McrError(
        f"this user may not use {path}",
        f"use sudo, or become a member of the socket's group (stat -c %G {path})",
        status=ExitStatus.NOT_PERMITTED,
    )


class ControlClient:
    """A command's end of the control socket; synchronous, one call at a time, a context manager.

    It connects at the first call. After an error of the connection the next call connects anew.
    """

    def __init__(self, path: Path, timeout_s: float = 10.0, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self.max_answer_bytes = max_answer_bytes
        self._connection: socket.socket | None = None
        self._buffer = bytearray()
        self._next_id = 1

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnects. A later call connects again."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._buffer.clear()

    def call(self, method: str, **params: object) -> Any:
        """The result of one request, within timeout_s.

        Raises McrError: the handler's own; NO_SUPERVISOR if none listens; NOT_PERMITTED if the socket refuses
        this user; FAILED if the supervisor does not answer in time, hangs up or breaks the protocol.
        """
        deadline_s = time.monotonic() + self.timeout_s
        identifier = self._next_id
        self._next_id += 1
        request = {"jsonrpc": "2.0", "id": identifier, "method": method, "params": params}
        try:
            answer = self._exchange(encode(request), deadline_s)
        except (TimeoutError, BlockingIOError):
            self.close()
            raise McrError(
                f"the supervisor at {self.path} did not answer within {self.timeout_s:g} s",
                "look into its log; if it hangs, restart it",
            ) from None
        except BaseException:
            self.close()
            raise
        return self._result(answer, identifier)

    def _exchange(self, request: bytes, deadline_s: float) -> bytes:
        connection = self._connection or self._connect(deadline_s)
        self._connection = connection
        try:
            connection.settimeout(_remaining_s(deadline_s))
            connection.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the supervisor hung up; the reason may be waiting to be read
        try:
            return self._read_line(connection, deadline_s)
        except ConnectionError:
            raise self._hung_up() from None

    def _connect(self, deadline_s: float) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(_remaining_s(deadline_s))
                connection.connect(str(self.path))
                return connection
            except BlockingIOError:  # the backlog is full, unix(7)
                connection.close()
                time.sleep(min(0.01, _remaining_s(deadline_s)))
            except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
                connection.close()
                raise McrError(
                    f"no supervisor is running at {self.path}",
                    "start one: mcr run, or mcr attach IFACE",
                    status=ExitStatus.NO_SUPERVISOR,
                ) from None
            except PermissionError:
                connection.close()
                raise _not_permitted(self.path) from None
            except BaseException:
                connection.close()
                raise

    def _read_line(self, connection: socket.socket, deadline_s: float) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self.max_answer_bytes:
                raise McrError(
                    f"the supervisor's answer is longer than {self.max_answer_bytes} bytes", "ask for less"
                )
            connection.settimeout(_remaining_s(deadline_s))
            data = connection.recv(1 << 18)
            if not data:
                raise self._hung_up()
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _hung_up(self) -> McrError:
        return McrError(
            f"the supervisor at {self.path} closed the connection without an answer",
            "see whether it still runs: mcr status",
        )

    def _result(self, line: bytes, identifier: int) -> Any:
        try:
            answer = parse_json(line)
            if not isinstance(answer, dict) or answer.get("id") not in (identifier, None):
                raise ValueError
            if answer.get("id") is None:
                self.close()  # it could not be told whose error this is, or nobody was let in
            if "error" in answer:
                raise _error_from(answer["error"])
            if answer["id"] is None:
                raise ValueError
            return answer["result"]
        except (RequestError, ValueError, TypeError, KeyError):
            self.close()
            raise McrError(
                f"the supervisor at {self.path} answered something that is not an answer",
                "see whether it is of the same version: mcr --version",
            ) from None


def _remaining_s(deadline_s: float) -> float:
    """Seconds left, more than 0. Raises TimeoutError when there are none."""
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s


def _error_from(error: dict[str, Any]) -> McrError:
    """The McrError that a JSON-RPC error object stands for.

    Raises TypeError, KeyError or ValueError if it is no such object.
    """
    code, message = int(error["code"]), str(error["message"])
    if code == REQUEST_FAILED:
        data = error["data"]
        return McrError(message, str(data["remedy"]), str(data["where"]), ExitStatus(data["status"]))
    remedies = {
        BUSY: "wait a moment, then try again",
        METHOD_NOT_FOUND: "use the mcr of the same version as the supervisor",
        INTERNAL_ERROR: "look into the supervisor's log",
    }
    return McrError(f"the supervisor refused the request: {message}", remedies.get(code, "check the request"))
