"""What gets into the log, in which form, and what a process can do to it: say a few lines a second."""

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcr import line_log, logs
from mcr.errors import ExitStatus, McrError
from mcr.line_log import LINE_BYTES, LINES_PER_S, LineLog
from mcr.logs import harmless


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_json_line_has_time_level_logger_message_and_subject(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=True)
    logging.getLogger("mcr.attached").info("%s: up", "in0", extra={"interface": "in0"})
    try:
        raise ZeroDivisionError("nought")
    except ZeroDivisionError:
        logging.getLogger("mcr").exception("failed\x1b[2J")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {"level": "info", "logger": "mcr.attached", "message": "in0: up", "interface": "in0"}
    assert second["message"] == r"failed\x1b[2J"
    assert "ZeroDivisionError: nought" in second["exception"]


def test_a_plain_line_has_no_escape_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    logging.getLogger("mcr.x").warning("a\x1b[31mred\r\x00\x9b\u202eb")
    assert capsys.readouterr().err.endswith(r"WARNING mcr.x: a\x1b[31mred\r\x00\x9b\u202eb" + "\n")


def test_the_level_can_be_changed_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning")
    log = logging.getLogger("mcr.x")
    log.info("one")
    logs.set_level("debug")
    assert logs.level() == "debug"
    log.debug("two")
    logs.set_level("error")
    log.warning("three")
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()] == ["two"]
    with pytest.raises(McrError) as failed:
        logs.set_level("loud")
    assert failed.value.status == ExitStatus.USAGE
    assert logs.level() == "error"


@given(st.text())
def test_harmless_text_is_printable_and_stays_so(text: str) -> None:
    shown = harmless(text)
    assert harmless(shown) == shown
    assert all(character.isprintable() or ord(character) > 0x9F or character in "\t\n" for character in shown)
    shown.encode()


class Told(logging.Handler):
    """Every record that a logger was given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.fixture
def told() -> Iterator[Told]:
    handler, log = Told(), logging.getLogger("mcr.test")
    log.addHandler(handler)
    log.propagate = False
    yield handler
    log.removeHandler(handler)
    log.propagate = True


def follow(*pieces: bytes) -> LineLog:
    """A process that writes these pieces and ends."""

    async def run() -> LineLog:
        stream = asyncio.StreamReader()
        lines = LineLog(logging.getLogger("mcr.test"), logging.ERROR, worker="in0", interface="in0")
        for piece in pieces:
            stream.feed_data(piece)
        stream.feed_eof()
        await lines.follow(stream)
        return lines

    return asyncio.run(run())


def test_lines_are_logged_one_by_one_with_the_workers_name_however_they_arrive(told: Told) -> None:
    lines = follow(b"fir", b"st\nsecond\n\n", b"last without an end")
    assert told.messages == ["first", "second", "last without an end"]
    assert {(vars(record)["worker"], vars(record)["interface"]) for record in told.records} == {
        ("in0", "in0")
    }
    assert lines.last_words == "last without an end"


def test_a_line_that_is_too_long_is_cut_and_says_by_how_much(told: Told) -> None:
    lines = follow(*[b"x" * 10_000] * 1000, b"\nnext\n")
    assert told.messages == [f"{'x' * LINE_BYTES}… ({10_000_000 - LINE_BYTES} bytes more)", "next"]
    assert lines.last_words == "next"


def test_binary_garbage_is_made_harmless(told: Told) -> None:
    follow(b"\xff\xfe\x1b]0;title\x07\x00\rover\n")
    assert told.messages == [r"\xff\xfe\x1b]0;title\x07\x00\rover"]


def test_a_flood_is_cut_to_the_rate_and_its_count_is_kept(told: Told) -> None:
    count = LINES_PER_S * 50
    lines = follow(b"".join(b"line %d\n" % number for number in range(count)))
    shown = [message for message in told.messages if message.startswith("line ")]
    suppressed = [
        int(message.split()[0]) for message in told.messages if message.endswith(" lines suppressed")
    ]
    assert LINES_PER_S <= len(shown) < count
    assert len(shown) + sum(suppressed) == count
    assert lines.last_words == f"line {count - 1}"


def test_what_was_suppressed_is_told_though_no_line_follows(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_log, "TELL_AFTER_S", 0.01)

    async def run() -> None:
        stream = asyncio.StreamReader()
        lines = LineLog(logging.getLogger("mcr.test"), logging.ERROR)
        stream.feed_data(b"again\n" * (LINES_PER_S * 100))
        following = asyncio.create_task(lines.follow(stream))
        async with asyncio.timeout(20):
            while not told.messages or "suppressed" not in told.messages[-1]:
                await asyncio.sleep(0.01)
        stream.feed_eof()
        await following

    asyncio.run(run())
