"""One life of one worker process: start it, command it, read its last words, end it.

The command socket exists before the process does, so that a start cannot deadlock. This module must never
decide what a worker shall do nor whether it lives again; `seat.py` does.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from mcr import __version__
from mcr._bpf import ffi, lib
from mcr.background import answered
from mcr.desired import OutputSpec, RuleSpec, WorkerSetup, output_flags
from mcr.errors import McrError
from mcr.limits import scaled, slow_machine
from mcr.line_log import LineLog
from mcr.maps import MAX_QUEUES, address_bytes

REPLY_TIMEOUT_S = 3.0
SETUP_TIMEOUT_S = 10.0
SHUTDOWN_TIMEOUT_S = 1.5
EXIT_TIMEOUT_S = 0.5
SEND_RETRY_S = 0.001
HELLO = f"mcr {__version__} ABI {lib.MCR_ABI_VERSION:08x}"  # the first message of a worker like us
COMMAND = (sys.executable, "-m", "mcr.uring_egress")

log = logging.getLogger(__name__)


class WorkerGoneError(Exception):
    """The worker ended, or stopped answering, before it acknowledged a command."""


def _set_up_error(code: int, cause: str) -> McrError:
    remedies = {
        errno.EOPNOTSUPP: "choose --zero-copy off, or --ingress packet",
        errno.EBUSY: "end the other user of the interface's AF_XDP queues, or choose --ingress packet",
        errno.EMFILE: "raise the limit of open files (ulimit -n, LimitNOFILE=)",
        errno.ENOMEM: "free memory, or raise the limit of locked memory (ulimit -l, LimitMEMLOCK=)",
        errno.ENOBUFS: "raise the limit of locked memory (ulimit -l, LimitMEMLOCK=)",
        errno.EPERM: "run the supervisor as root, or with CAP_NET_RAW and CAP_BPF",
        errno.ENOSYS: "leave out --egress-threads",
        errno.EDQUOT: "raise fs.pipe-max-size (sysctl), or use fewer --egress-threads",
    }
    return McrError(cause, remedies.get(code, "see docs/KERNEL-SUPPORT.md"))


def _move(pid: int, cpu: int) -> None:
    try:
        os.sched_setaffinity(pid, {cpu})
    except ProcessLookupError:
        pass  # whoever greets it will see that it has gone
    except OSError as error:
        raise McrError(
            f"a worker cannot run on CPU {cpu}: {error.strerror}",
            "bring the CPU back, or attach with other --cpus",
        ) from error


def _close_descriptors_of(answer: "asyncio.Future[tuple[Any, list[int]]]") -> None:
    """Those of a reply that came, but that nobody waits for any more."""
    if answer.done() and not answer.cancelled() and answer.exception() is None:
        for fd in answer.result()[1]:
            os.close(fd)


class WorkerProcess:
    """A running worker. Commands may be issued side by side; they are carried out in order."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, command_socket: socket.socket) -> None:
        self.name = name
        self.process = process
        self.log = logging.getLogger(f"mcr.worker.{name}")
        self._socket = command_socket
        self._sequence = 0
        self._waiting: dict[int, asyncio.Future[tuple[Any, list[int]]]] = {}
        self._turn = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[str] = self._loop.create_future()
        self._loop.add_reader(command_socket, self._read_replies)
        assert process.stderr is not None
        self._lines = LineLog(self.log, logging.ERROR, worker=name, interface=name.partition("/")[0])
        self._stderr = asyncio.create_task(self._lines.follow(process.stderr), name=f"mcr-stderr-{name}")

    @classmethod
    async def spawn(
        cls, name: str, cpu: int | None = None, command: Sequence[str] = COMMAND
    ) -> "WorkerProcess":
        """Starts the process, on one CPU if one is given; it waits for its set-up. Raises McrError.

        command: what takes its socket's number.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                )
        except OSError as error:
            ours.close()
            raise McrError(
                f"cannot start a worker: {error.strerror}", "free memory or processes (ulimit -u)"
            ) from error
        except BaseException:
            ours.close()
            raise
        worker = cls(name, process, ours)
        try:
            if cpu is not None:
                _move(process.pid, cpu)  # before it is another user's, and allocates
        except McrError:
            worker.kill()
            await worker.end()
            raise
        return worker

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def last_words(self) -> str:
        """The last line that it wrote to its standard error."""
        return self._lines.last_words

    async def set_up(self, setup: WorkerSetup, fds: Sequence[int]) -> tuple[list[int], bool]:
        """Sends the first command, once the worker has said hello. Returns the AF_XDP sockets, the caller's
        to close, and whether they are zero-copy.

        fds: the counter maps (`Maps.counter_fds`), and the AF_PACKET socket of a packet ingress. Raises
        McrError when the worker cannot do it or is of another version, WorkerGoneError when it died.
        """
        await self._greet()
        command = ffi.new("struct mcr_command *", {"type": lib.MCR_SETUP})
        body = command.setup
        body.abi_version = lib.MCR_ABI_VERSION
        body.ingress = lib.MCR_INGRESS_XSK if setup.ingress == "xsk" else lib.MCR_INGRESS_PACKET
        body.ifindex = setup.ifindex
        body.queue_first, body.queue_count = setup.queue_first, setup.queue_count
        body.frame_count, body.frame_size = setup.frame_count, setup.frame_size
        body.zero_copy = {
            "auto": lib.MCR_ZERO_COPY_AUTO,
            "on": lib.MCR_ZERO_COPY_ON,
            "off": lib.MCR_ZERO_COPY_OFF,
        }[setup.zero_copy]
        body.busy_poll = setup.busy_poll
        body.verify_checksums = setup.verify_checksums
        body.worker_slot = setup.slot
        body.user_id, body.group_id = setup.user_id, setup.group_id
        body.egress_threads = setup.egress_threads
        for thread in range(len(body.cpus)):
            body.cpus[thread] = setup.cpus[thread] if thread < len(setup.cpus) else -1
        body.interface = os.fsencode(setup.interface)
        reply, sockets = await self._command(command, fds, scaled(SETUP_TIMEOUT_S))
        if reply.status:
            for fd in sockets:
                os.close(fd)
            raise _set_up_error(-reply.status, ffi.string(reply.message).decode(errors="replace"))
        return sockets, bool(reply.zero_copy)

    async def _greet(self) -> None:
        """A worker of another version would read other structs: the files were replaced since we started."""
        limit_s = scaled(SETUP_TIMEOUT_S)
        if not await answered(self._hello, limit_s):
            raise WorkerGoneError(slow_machine(f"no hello for {limit_s:g} s"))
        hello = self._hello.result()
        if not hello:
            raise WorkerGoneError("it ended before it said hello")
        if hello != HELLO:
            raise McrError(f"the worker is {hello}, but the supervisor is {HELLO}", "restart the supervisor")

    async def add_output(self, spec: OutputSpec, udp: socket.socket) -> None:
        """Adds or replaces an output. The worker gets a copy of the socket."""
        command = ffi.new("struct mcr_command *", {"type": lib.MCR_ADD_OUTPUT})
        body, output = command.output, spec.output
        body.output_id = spec.output_id
        body.flags = output_flags(output)
        body.family = udp.family
        body.dport = output.port or 0
        body.scope_id = spec.ifindex if output.group or output.address.is_link_local else 0
        body.gso_limit = spec.gso_limit
        body.dscp = output.dscp or 0
        ffi.memmove(body.daddr, address_bytes(output.address), 16)
        await self._done(command, (udp.fileno(),))

    async def delete_output(self, output_id: int) -> None:
        await self._done(ffi.new("struct mcr_command *", {"type": lib.MCR_DEL_OUTPUT, "id": output_id}))

    async def set_rule(self, spec: RuleSpec) -> None:
        """Adds or replaces a rule whose outputs the worker knows."""
        command = ffi.new("struct mcr_command *", {"type": lib.MCR_SET_RULE})
        body = command.rule
        ffi.memmove(ffi.addressof(body, "key"), spec.key, len(spec.key))
        body.rule_id = spec.rule_id
        body.frame_limit = spec.frame_limit
        body.output_count = len(spec.output_ids)
        for index, output_id in enumerate(spec.output_ids):
            body.output_ids[index] = output_id
        await self._done(command)

    async def delete_rule(self, rule_id: int) -> None:
        await self._done(ffi.new("struct mcr_command *", {"type": lib.MCR_DEL_RULE, "id": rule_id}))

    async def ping(self) -> None:
        """Asks for a sign of life; the worker also brings its counters up to date."""
        await self._done(ffi.new("struct mcr_command *", {"type": lib.MCR_PING}))

    async def shut_down(self) -> None:
        """Drains the worker and reaps it; one that does not end in time is killed."""
        with contextlib.suppress(WorkerGoneError, McrError):
            command = ffi.new("struct mcr_command *", {"type": lib.MCR_SHUTDOWN})
            await self._command(command, (), scaled(SHUTDOWN_TIMEOUT_S))
        await self.end()

    async def end(self) -> int:
        """Reaps the process, killing it if it runs on. Returns its exit status."""
        try:
            async with asyncio.timeout(scaled(EXIT_TIMEOUT_S)):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()
        self._hang_up()
        await asyncio.gather(self._stderr, return_exceptions=True)
        return self.process.returncode or 0

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)

    # --- the command socket

    async def _done(self, command: Any, fds: Sequence[int] = ()) -> None:
        reply, _ = await self._command(command, fds, scaled(REPLY_TIMEOUT_S))
        if reply.status:
            cause = ffi.string(reply.message).decode(errors="replace")
            raise McrError(f"worker {self.name}: {cause}", "see the log; restarting MCR helps")

    async def _command(self, command: Any, fds: Sequence[int], timeout_s: float) -> tuple[Any, list[int]]:
        self._sequence += 1
        command.sequence = sequence = self._sequence
        answer: asyncio.Future[tuple[Any, list[int]]] = self._loop.create_future()
        self._waiting[sequence] = answer
        try:
            sent = await self._send(bytes(ffi.buffer(command)), fds, timeout_s)
            in_time = sent and await answered(answer, timeout_s)
        except OSError as error:
            raise WorkerGoneError(f"its command socket broke: {error.strerror}") from error
        except asyncio.CancelledError:
            _close_descriptors_of(answer)
            raise
        finally:
            self._waiting.pop(sequence, None)
        if not in_time:
            self._hang_up()  # what it still has to say, and the descriptors in that, are the kernel's to drop
            raise WorkerGoneError(slow_machine(f"no answer for {timeout_s:g} s"))
        return answer.result()

    async def _send(self, data: bytes, fds: Sequence[int], timeout_s: float) -> bool:
        """Whether the worker has taken the command. Only the time in which we could have sent it counts."""
        async with self._turn:
            for _ in range(int(timeout_s / SEND_RETRY_S)):
                try:
                    socket.send_fds(self._socket, [data], list(fds))
                    return True
                except BlockingIOError:
                    await asyncio.sleep(SEND_RETRY_S)  # it reads thousands of commands in that time
        return False

    def _read_replies(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, ffi.sizeof("struct mcr_reply"), MAX_QUEUES)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if data and not self._hello.done():
                self._hello.set_result(data.decode(errors="replace"))
                continue
            if len(data) != ffi.sizeof("struct mcr_reply"):
                self._hang_up()
                return
            reply = ffi.new("struct mcr_reply *")
            ffi.memmove(reply, data, len(data))
            answer = self._waiting.get(reply.sequence)
            if answer is None or answer.done():
                for fd in fds:
                    os.close(fd)
            else:
                answer.set_result((reply, fds))

    def _hang_up(self) -> None:
        """Upon which the worker ends, if it has not."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(WorkerGoneError("it ended"))
        if not self._hello.done():
            self._hello.set_result("")
