"""The supervisor's half of the control socket: it lets clients in and shares itself out among them.

No client can lock others out: when every place is taken, the user with the most connections loses the one
that has been idle longest, and root always gets in. This module must never read a request nor answer one;
connection.py does.
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mcr.background import Tasks, every
from mcr.bucket import TokenBucket
from mcr.connection import READ_BYTES, Connection, Handler, Limits, Peer
from mcr.control import not_permitted
from mcr.errors import ExitStatus, McrError
from mcr.jsonrpc import (
    BUSY,
    encode_error,
    encode_mcr_error,
)
from mcr.limits import scaled

SO_PEERGROUPS = 59  # asm-generic/socket.h; Python's socket module has no name for it
MAX_PEER_GROUPS = 256  # Python reads at most 1024 bytes of a socket option
LISTEN_BACKLOG = 128
ACCEPTED_AT_ONCE, REFUSED_AT_ONCE = 32, 256
ACCEPT_RETRY_S = 0.5
SWEEP_INTERVAL_S = 10.0
HOLD_INTERVAL_S = 2.0
LOCK_WAIT_S = 1.0
CLOSE_GRACE_S = 1.0
PROBE_TIMEOUT_S = 1.0
SOCKET_MODE = 0o660
SOCKET_MODE_ALL = 0o666
GROUP_NAME = "mcr"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _User:
    """What a user's clients have together. `clients` is in the order of the last request, oldest first."""

    bucket: TokenBucket
    clients: dict[Connection, None] = field(default_factory=dict)


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
        probe.settimeout(scaled(PROBE_TIMEOUT_S))
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
    deadline_s = time.monotonic() + scaled(LOCK_WAIT_S)
    while time.monotonic() < deadline_s:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            await asyncio.sleep(0.01)
    return descriptor


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
        self._clients: set[Connection] = set()
        self._users: dict[int, _User] = {}
        self._processes: dict[int, TokenBucket] = {}
        self._connecting: set[asyncio.Task[Any]] = set()
        self._listener: socket.socket | None = None
        self._loops = Tasks(log)
        self._trouble = ""
        self._inode = (0, 0)
        self._gid = -1

    @property
    def client_count(self) -> int:
        """How many clients are connected."""
        return len(self._clients)

    async def start(self) -> None:
        """Creates the socket (and its directory, 0755) and serves it.

        Raises McrError if a live server has it, or if it cannot be created. A dead one's file is replaced.
        The file is made again if it is removed: what cleans directories knows nothing of sockets in use.
        """
        await self._listen()
        sweep_s = min(SWEEP_INTERVAL_S, self.limits.idle_timeout_s / 4)
        sweep = partial(every, sweep_s, self._sweep, log, "sweeping the clients")
        hold = partial(every, HOLD_INTERVAL_S, self._hold, log, f"making {self.path} again")
        self._loops.start(sweep, "mcr-control-sweep")
        self._loops.start(hold, "mcr-control-path")

    async def _hold(self) -> None:
        if self._has_path():
            return
        try:
            await self._listen()
        except McrError as error:
            if error.cause != self._trouble:
                log.error("%s (%s)", error, error.remedy)
            self._trouble = error.cause
            return
        self._trouble = ""
        log.warning("%s had gone: made again", self.path)

    def _has_path(self) -> bool:
        """Whether the file is still this server's."""
        try:
            status = self.path.lstat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._inode and stat.S_ISSOCK(status.st_mode)

    async def _listen(self) -> None:
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
        self._close_listener()
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _close_listener(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def close(self) -> None:
        """Removes the socket file and disconnects every client.

        A request that is being handled gets CLOSE_GRACE_S to be answered, then it is cancelled.
        """
        if self._listener is None:
            return
        await self._loops.stop()
        self._close_listener()
        if self._has_path():
            self.path.unlink(missing_ok=True)
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
        for _ in range(2):
            tasks = {client.task: client for client in self._clients if client.task is not None}
            if not tasks:
                return
            _, late = await asyncio.wait(tasks, timeout=scaled(CLOSE_GRACE_S))
            for task in late:
                tasks[task].transport.abort()
                task.cancel()

    # --- who is let in

    def _accept(self, listener: socket.socket) -> None:
        full = len(self._clients) + ACCEPTED_AT_ONCE
        for _ in range(REFUSED_AT_ONCE):
            if len(self._clients) >= full:
                return
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptor or no memory left: connections wait in the backlog
                log.error("cannot accept a client: %s", error.strerror)
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener)
                loop.call_later(ACCEPT_RETRY_S, self._accept_again, listener)
                return
            with contextlib.suppress(OSError):  # it has left already
                self._admit(connection)

    def _accept_again(self, listener: socket.socket) -> None:
        if self._listener is listener:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _admit(self, connection: socket.socket) -> None:
        """Gives a new connection its place, or tells it why not, which costs next to nothing."""
        connection.setblocking(False)
        peer = self._peer_of(connection)
        if refusal := self._refusal(peer):
            with connection:
                connection.send(refusal)
            return
        client = Connection(self, peer)
        self._clients.add(client)
        self.user_of(client).clients[client] = None
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(lambda: client, connection))
        self._connecting.add(task)  # the loop itself keeps no task alive
        task.add_done_callback(self._connecting.discard)

    def _peer_of(self, connection: socket.socket) -> Peer:
        size = struct.calcsize("3i")
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid, uid, gid = struct.unpack("3i", packed)
        may_write = uid in (0, os.geteuid()) or self._gid in (gid, *_peer_groups(connection))
        return Peer(pid, uid, gid, may_write)

    def _refusal(self, peer: Peer) -> bytes:
        """Why the peer is not let in; empty if it is."""
        now_s = time.monotonic()
        if peer.pid not in self._processes:
            self._processes[peer.pid] = TokenBucket(self.limits.connections_per_s, now_s)
        if not self._processes[peer.pid].take(1, now_s):
            return encode_error(None, BUSY, f"more than {self.limits.connections_per_s} connections a second")
        if not peer.may_write and not self.everyone_reads:
            return encode_mcr_error(None, not_permitted(self.path))
        if not self._make_room(peer.uid):
            return encode_error(None, BUSY, f"{len(self._clients)} clients are being served")
        return b""

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

    def user_of(self, client: Connection) -> _User:
        """What the client shares with the other clients of its user."""
        uid = client.peer.uid
        if uid not in self._users:
            bucket = TokenBucket(self.limits.user_requests_per_s, time.monotonic())
            self._users[uid] = _User(bucket)
        return self._users[uid]

    def was_active(self, client: Connection) -> None:
        """Moves the client behind all others in the order of idleness."""
        clients = self.user_of(client).clients
        if clients.pop(client, client) is None:
            clients[client] = None

    def release(self, client: Connection) -> None:
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

    async def _sweep(self) -> None:
        """Disconnects who has asked nothing for too long, and forgets users and processes that are gone."""
        now_s = time.monotonic()
        for uid, user in list(self._users.items()):
            for client in list(user.clients):
                if now_s - client.last_request_s < self.limits.idle_timeout_s:
                    break
                if client.task is None:
                    client.hang_up()
            if not user.clients and now_s - user.bucket.refilled_s > 1:
                del self._users[uid]
        for pid, bucket in list(self._processes.items()):
            if now_s - bucket.refilled_s > 1:
                del self._processes[pid]
