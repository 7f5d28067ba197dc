"""One connection to the control socket, as the supervisor sees it: requests in, answers out, one at a time.

A client costs memory only for what it has sent and not finished, and time only for what it asks, both within
`Limits`; it has a task only while a request of it is handled. This module knows no method and no rule; it
must never let a client wait on another one, and never answer anything that it read with a traceback.
"""

import asyncio
import logging
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from mcr.bucket import TokenBucket
from mcr.errors import McrError
from mcr.jsonrpc import (
    BUSY,
    INTERNAL_ERROR,
    INVALID_REQUEST,
    Request,
    RequestError,
    encode_error,
    encode_mcr_error,
    parse_json,
    parse_request,
    request_id,
    result_pieces,
)
from mcr.limits import scaled

if TYPE_CHECKING:
    from mcr.control_server import ControlServer

READ_BYTES = 1 << 16

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
    connections_per_s: int = 1000  # of each process
    request_bytes: int = 1 << 20
    unfinished_bytes: int = 8 << 20  # received of all clients together and not yet executed
    answer_bytes: int = 8 << 20
    unsent_bytes: int = 32 << 20  # answers that the clients together have not read
    requests_per_s: int = 1000  # tokens a second of each client
    user_requests_per_s: int = 3000  # tokens a second of each user but root
    bytes_per_token: int = 2048
    seconds_per_token: float = field(default_factory=lambda: scaled(0.0002))
    write_timeout_s: float = 5.0
    idle_timeout_s: float = 600.0


_T = TypeVar("_T")
Handler = Callable[[Peer, str, dict[str, Any]], Awaitable[object]]


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
        except BaseException as raised:  # noqa: BLE001 - thrown into the work, whose it is
            error = raised


class Connection(asyncio.BufferedProtocol):
    """One accepted connection. It has a task only while a request of it is handled."""

    __slots__ = (
        "bucket",
        "closing",
        "connected",
        "ended",
        "last_request_s",
        "last_words",
        "peer",
        "searched",
        "server",
        "task",
        "transport",
        "unfinished",
        "written",
    )

    transport: asyncio.Transport  # not there yet for a moment after the accept: see `connected`

    def __init__(self, server: "ControlServer", peer: Peer) -> None:
        self.server = server
        self.peer = peer
        self.last_request_s = time.monotonic()
        self.bucket = TokenBucket(server.limits.requests_per_s, self.last_request_s)
        self.connected = False
        self.unfinished = bytearray()
        self.searched = 0
        self.task: asyncio.Task[None] | None = None
        self.written: asyncio.Future[None] | None = None
        self.ended = False  # the client has sent its last byte
        self.closing = False
        self.last_words = b""

    # --- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.connected = transport, True
        transport.set_write_buffer_limits(high=0)  # so that `send` ends when everything is written
        if self.closing:
            self.hang_up(self.last_words)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.server.scratch

    def buffer_updated(self, nbytes: int) -> None:
        self.unfinished += self.server.scratch[:nbytes]
        self.server.unfinished_bytes += nbytes
        self._proceed()
        self.server.check_unfinished()

    def eof_received(self) -> bool:
        self.ended = True
        if self.unfinished and not self.unfinished.endswith(b"\n"):  # its end is the end of its last line
            self.unfinished += b"\n"
            self.server.unfinished_bytes += 1
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
        """Takes the tokens for what a request cost; a second's debt is the most."""
        limits, now_s = self.server.limits, time.monotonic()
        cost = min(2 * limits.requests_per_s, spent_s / limits.seconds_per_token)
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
            pieces: list[bytes] = []
            for piece in result_pieces(request.id, result):
                if pieces:
                    await asyncio.sleep(0)
                pieces.append(piece)
            return b"".join(pieces)
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
        if not self.connected:
            self.last_words = last_words
        if not self.connected or self.transport.is_closing():
            return
        if last_words:
            self.transport.write(last_words)
        self.transport.close()
        if self.transport.get_write_buffer_size():
            loop = asyncio.get_running_loop()
            loop.call_later(self.server.limits.write_timeout_s, self.transport.abort)
