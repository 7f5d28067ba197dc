"""One life of the process that holds the joins: started here, or left by an earlier supervisor and adopted.

A supervisor that keeps the kernel path leaves the process to the next one, which finds it at a socket beside
the control socket. The process that can be found there is the one that counts: another one ends as soon as
its own supervisor's connection does. This module must never end a process before its successor holds the
joins, and never trust what a process says of itself: its id comes from the kernel.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import _cffi_backend

from mcr import __version__
from mcr.limits import scaled, slow_machine
from mcr.line_log import LineLog

START_TIMEOUT_S = 60.0  # of Python, on a machine that may be busy
REPLY_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 2.0
MAX_LINE_BYTES = 16 << 20
# All that the process finds modules in: it starts without site packages, to be small.
IMPORT_PATHS = (Path(__file__).resolve().parent.parent, Path(_cffi_backend.__file__).resolve().parent)

log = logging.getLogger("mcr.membership")


@dataclass(frozen=True, slots=True)
class Refuge:
    """Where joins outlive their supervisor.

    address: of the process's socket. links: a directory; with its last entry, what the joins are kept for has
    gone, and the process ends.
    """

    address: Path
    links: Path

    @property
    def aside(self) -> Path:
        """The address of a process that does not hold the joins yet. No longer than the address."""
        return self.address.with_suffix(".jnew")

    def publish(self) -> None:
        """Puts the process that is aside in the place of an earlier one, which can no longer be found."""
        with contextlib.suppress(FileNotFoundError):
            self.aside.rename(self.address)

    def withdraw(self) -> None:
        """No process can be found any more."""
        self.aside.unlink(missing_ok=True)
        self.address.unlink(missing_ok=True)

    @contextlib.contextmanager
    def descriptors(self) -> Iterator[tuple[int, int, int]]:
        """What a process needs to be found later: its socket, which is aside, the links and its address."""
        self.links.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            os.fchmod(listener.fileno(), 0o600)  # which the file gets, less the umask
            self.aside.unlink(missing_ok=True)
            listener.bind(str(self.aside))
            links = os.open(self.links, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, links)
            address = os.open(self.aside, os.O_PATH)
            stack.callback(os.close, address)
            yield listener.fileno(), links, address


class Life:
    """A process that runs, and the connection to it.

    `version`: of the MCR that it belongs to, `held`: how many joins it held, both known once it was met.
    """

    def __init__(
        self,
        pid: int,
        pidfd: int,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        child: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.pid = pid
        self.version = ""
        self.held = 0
        self._reader, self._writer = streams
        self._child = child
        self._logging: asyncio.Task[None] | None = None
        if child is not None:
            self._logging = asyncio.create_task(_follow(child), name="mcr-membership-stderr")
        self._sequence = 0
        self._ended = asyncio.Event()
        self._pidfd = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._note_end)

    @classmethod
    async def start(cls, user_id: int, group_id: int, refuge: Refuge | None) -> Self:
        """A new process, which can be adopted if there is a refuge. Raises OSError if it does not start."""
        with contextlib.ExitStack() as stack:
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            kept = stack.enter_context(refuge.descriptors()) if refuge is not None else ()
            fds = (theirs.fileno(), *kept)
            arguments = map(str, (user_id, group_id, *fds))
            child = subprocess.Popen(  # noqa: ASYNC220 - asyncio would not leave a child to the next supervisor
                [*(sys.executable, "-s", "-S", "-P", "-m", "mcr.membership_process"), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=fds,
                env={"PYTHONPATH": os.pathsep.join(map(str, IMPORT_PATHS))},
                cwd="/",
                start_new_session=True,  # the terminal that the supervisor ran on may be closed
            )
            streams = await asyncio.open_connection(sock=ours.dup(), limit=MAX_LINE_BYTES)
        life = cls(child.pid, os.pidfd_open(child.pid), streams, child)
        try:
            await life.meet(START_TIMEOUT_S)
            if life.version != __version__:
                raise OSError(f"it belongs to MCR {life.version}: start this supervisor again")
        except ValueError as error:
            raise OSError(f"it ended with status {await life.end()}") from error
        except BaseException:
            life.kill()
            await life.end()
            raise
        return life

    @classmethod
    async def find(cls, refuge: Refuge) -> Self | None:
        """The process that an earlier supervisor left, if there is one. Nothing has been heard of it yet."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connection.connect(str(refuge.address))
            # Those of the last one that called listen(), which the process did (unix(7), SO_PEERCRED).
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid, user_id, _ = struct.unpack("3i", peer)
            if user_id not in (0, os.geteuid()):
                raise PermissionError(f"user {user_id} holds it")
            pidfd = os.pidfd_open(pid)
            return cls(pid, pidfd, await asyncio.open_connection(sock=connection, limit=MAX_LINE_BYTES))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        except OSError as error:
            log.warning("the joins of an earlier supervisor, at %s, stay alone: %s", refuge.address, error)
            connection.close()
        return None

    async def meet(self, timeout_s: float | None = None) -> None:
        """Waits for its first words. Raises OSError (TimeoutError), or ValueError if it has none."""
        self.version, *held = (await self._line(timeout_s or REPLY_TIMEOUT_S)).split()
        if self.version == __version__:
            self.held = int("".join(held))

    async def request(self, joins: Iterable[str], keep: bool) -> tuple[int, dict[str, int]]:
        """Sends the complete set, returns how many are held and the refused ones with their errno.

        keep: whether it is to hold them when this supervisor has ended. Raises OSError (TimeoutError if it is
        silent) or ValueError when the process is dead or broken.
        """
        self._sequence += 1
        words = (str(self._sequence), "keep" if keep else "end", *joins)
        self._writer.write(" ".join(words).encode() + b"\n")
        while True:
            sequence, held, *refused = (await self._line(REPLY_TIMEOUT_S)).split()
            if int(sequence) == self._sequence:  # an older one answers a request that was cancelled
                pairs = (text.rpartition(",") for text in refused)
                return int(held), {join: int(number) for join, _, number in pairs}

    async def _line(self, timeout_s: float) -> str:
        """In two looks: what arrived while this loop was held up is there for the second one."""
        timeout_s = scaled(timeout_s)
        for _ in range(2):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s / 2):
                    return (await self._reader.readline()).decode()
        raise TimeoutError(slow_machine(f"it has been silent for {timeout_s:g} s"))

    def kill(self) -> None:
        """Does nothing to one that has been ended or let go."""
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> None:
        """Returns when the process has ended."""
        await self._ended.wait()

    def let_go(self) -> None:
        """Closes the connection. It goes on without this supervisor if that was asked of it."""
        self._writer.close()
        if self._logging is not None:
            self._logging.cancel()
        self._close()

    async def end(self) -> int | None:
        """Closes the connection, upon which it leaves everything and exits; it must not be found any more.

        It is killed if it has not ended after STOP_TIMEOUT_S. Returns its exit status if it is a child.
        """
        self._writer.close()
        try:
            async with asyncio.timeout(scaled(STOP_TIMEOUT_S)):
                await self.wait()
        except TimeoutError:
            self.kill()
            await self.wait()
        if self._logging is not None:
            await self._logging
        self._close()
        return None if self._child is None else self._child.wait()

    def _note_end(self) -> None:
        self._ended.set()
        asyncio.get_running_loop().remove_reader(self._pidfd)

    def _close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1


async def _follow(child: subprocess.Popen[bytes]) -> None:
    """Logs what the process writes to its standard error."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), child.stderr)
    try:
        await LineLog(log, logging.WARNING, worker="membership").follow(reader)
    finally:
        transport.close()
