"""How MCR logs: the one place for levels, and for plain text or JSON.

A log line may quote what a hostile sender or client wrote: this module must never let a control character of
theirs reach a terminal.
"""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

from mcr.errors import ExitStatus, McrError

LEVELS = ("debug", "info", "warning", "error")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# What a terminal or a line-based tool could take for more than text: control characters, invisible marks of
# direction, and separators other than the newline and tab of a traceback.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)

_SUBJECTS = ("worker", "interface")


def harmless(text: str) -> str:
    """The text with what is not printable as escapes, such as `\\x1b`."""
    return _HARMFUL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


class _JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message; worker, interface, remedy, exception where known."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": harmless(record.getMessage()),
        }
        for key in (*_SUBJECTS, "remedy"):
            if hasattr(record, key):
                row[key] = getattr(record, key)
        if record.exc_info:
            row["exception"] = harmless(self.formatException(record.exc_info))
        return json.dumps(row)


def configure(level: str = "info", as_json: bool = False) -> None:
    """Logs to standard error from this level on; the last call counts. Raises McrError for no known level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if as_json else _PlainFormatter(FORMAT))
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a line that cannot be written is lost, and needs no further ones
    set_level(level)


def set_level(level: str) -> None:
    """Raises McrError for an unknown level."""
    if level not in LEVELS:
        raise McrError(
            f"{level[:32]!r} is not a log level",
            f"choose one of {', '.join(LEVELS)}",
            status=ExitStatus.USAGE,
        )
    logging.getLogger().setLevel(level.upper())


def level() -> str:
    """The level from which on lines are logged."""
    return logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()
