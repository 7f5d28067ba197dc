"""Loops and tasks outlive their errors, and a wait for another process counts only time that it had."""

import asyncio
import logging
import threading
import time

import pytest

from mcr.background import HELD_UP_S, Tasks, answered, every, in_thread, surviving
from mcr.errors import McrError

LOG = logging.getLogger("mcr.test")


def test_a_loop_outlives_every_error_and_says_each(caplog: pytest.LogCaptureFixture) -> None:
    errors = [McrError("a cause", "a remedy"), OSError(24, "Too many open files"), KeyError("x")]
    turns = 0

    async def turn() -> None:
        nonlocal turns
        turns += 1
        if turns <= len(errors):
            raise errors[turns - 1]

    async def run() -> None:
        loop = asyncio.create_task(every(0, turn, LOG, "a loop"))
        async with asyncio.timeout(20):
            while turns < 5:
                await asyncio.sleep(0)
        assert not loop.done()
        loop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop

    asyncio.run(run())
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        "a loop: a cause (a remedy)",
        "a loop: OSError: [Errno 24] Too many open files",
        "a loop: KeyError: 'x'",
    ]


def test_the_traceback_of_what_was_survived_is_for_the_level_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), surviving(LOG, "a block"):
        raise RuntimeError("broken")
    told = [(record.levelname, record.exc_info is not None) for record in caplog.records]
    assert told == [("ERROR", False), ("DEBUG", True)]


def test_tasks_are_forgotten_when_they_end_and_ended_together(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("no")

    async def run() -> None:
        tasks = Tasks(LOG)
        tasks.start(fail, "reload")
        tasks.start(asyncio.Event().wait, "waits")  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            while not caplog.records:
                await asyncio.sleep(0)
        await tasks.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert [record.message for record in caplog.records] == ["reload: ValueError: no"]


def test_an_answer_that_came_while_the_loop_was_held_up_counts() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        waiting = asyncio.create_task(answered(answer, 0.2))
        await asyncio.sleep(0)
        time.sleep(1.0)  # noqa: ASYNC251 - the loop is held up beyond the deadline
        loop.call_soon(answer.set_result, "yes")
        assert await waiting

    asyncio.run(run())


def test_a_wait_that_was_held_up_begins_anew_once_and_then_ends() -> None:
    async def run() -> None:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(answered(answer, 0.2))
        await asyncio.sleep(0)
        time.sleep(0.3 + HELD_UP_S)  # noqa: ASYNC251 - the loop is held up beyond the deadline
        began_s = time.monotonic()
        assert not await waiting
        assert time.monotonic() - began_s >= 0.2
        assert not answer.done()

    asyncio.run(run())


def test_a_cancelled_wait_for_a_thread_lasts_until_the_thread_has_ended() -> None:
    stop, ended = threading.Event(), threading.Event()

    def work() -> None:
        stop.wait(20)
        ended.set()

    async def run() -> None:
        waiting = asyncio.create_task(in_thread(work, on_cancel=stop.set))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert ended.is_set()

    asyncio.run(run())
