"""Work that goes on behind the commands: it outlives its own errors, and the time in which we were held up.

One failure of a round must never be the end of a loop that keeps the relay in order: it is logged, and the
loop continues. This module must never decide what is done, nor how often.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from mcr.errors import McrError

HELD_UP_S = 0.5  # later than this a timer was not late by chance

T = TypeVar("T")
Logger = logging.Logger | logging.LoggerAdapter[Any]


def cause_of(error: BaseException) -> str:
    """One line: an error of ours as it is, any other with its kind."""
    return str(error) if isinstance(error, McrError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def surviving(log: Logger, what: str) -> Iterator[None]:
    """What ends the block early is logged, at level debug with its traceback, and goes no further."""
    try:
        yield
    except Exception as error:
        if isinstance(error, McrError):
            _say_each(error, log, what)
        else:
            log.error("%s: %s", what, cause_of(error))
        log.debug("%s failed here:", what, exc_info=True)


def _say_each(error: McrError, log: Logger, what: str) -> None:
    for each in error.each():
        log.error("%s: %s (%s)", what, each, each.remedy)
    if error.unshown:
        log.error("%s: %d more errors: mcr check FILE", what, error.unshown)


async def every(interval_s: float, turn: Callable[[], Awaitable[None]], log: Logger, what: str) -> None:
    """Takes a turn after each interval, for ever."""
    while True:
        await asyncio.sleep(interval_s)
        with surviving(log, what):
            await turn()


class Tasks:
    """Tasks that nobody waits for: kept while they run, their errors logged, ended together."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        task = asyncio.create_task(self._do(work, name), name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _do(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        with surviving(self._log, name):
            await work()

    async def stop(self) -> None:
        """Cancels all of them, and returns when they have ended."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


async def answered(answer: asyncio.Future[Any], timeout_s: float) -> bool:
    """Whether the answer of another process has come within timeout_s of the time in which it could be read.

    While this process is stopped or its loop busy, the other one may have answered: what has arrived is read
    before the judgement, and a wait that was held up does not count. The future is left as it is.
    """
    loop = asyncio.get_running_loop()
    while True:
        deadline_s = loop.time() + timeout_s
        await asyncio.wait([answer], timeout=timeout_s)
        if answer.done() or loop.time() < deadline_s + HELD_UP_S:
            return answer.done()


async def in_thread(work: Callable[[], T], on_cancel: Callable[[], None] = lambda: None) -> T:
    """Does blocking work in a thread, to its end: a cancellation takes effect only when that has come.

    on_cancel: called then, to hasten it.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        on_cancel()
        await asyncio.gather(thread, return_exceptions=True)
        raise
