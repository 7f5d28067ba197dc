"""What a process of ours writes to its standard error, in the supervisor's log line by line.

A process may write anything, as fast as it can. This module must never let it fill the log nor reach a
terminal with control characters; what is left out is counted.
"""

import asyncio
import logging
import time

from mcr.bucket import TokenBucket
from mcr.logs import harmless

LINES_PER_S = 20
LINE_BYTES = 1000  # what is shown of a line
READ_BYTES = 1 << 16
TELL_AFTER_S = 1.0


class LineLog:
    """Logs what a process writes, line by line: a second's worth of LINES_PER_S at once, long lines cut.

    `last_words` is the last line that was not empty, logged or not.
    """

    def __init__(self, log: logging.Logger, log_level: int, **subject: str) -> None:
        self.last_words = ""
        self._log = logging.LoggerAdapter(log, subject)
        self._level = log_level
        self._bucket = TokenBucket(LINES_PER_S, time.monotonic())
        self._suppressed = 0
        self._line = bytearray()
        self._cut = 0

    async def follow(self, stream: asyncio.StreamReader) -> None:
        """Reads to the end of the stream."""
        while True:
            try:
                async with asyncio.timeout(TELL_AFTER_S if self._suppressed else None):
                    data = await stream.read(READ_BYTES)
            except TimeoutError:
                self._tell_suppressed()
                continue
            if not data:
                break
            self.feed(data)
        if self._line or self._cut:
            self._end_line()
        self._tell_suppressed()

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the process, of a part of a line or of many."""
        *ended, rest = data.split(b"\n")
        for part in ended:
            self._append(part)
            self._end_line()
        self._append(rest)

    def _append(self, part: bytes) -> None:
        room = LINE_BYTES - len(self._line)
        self._line += part[:room]
        self._cut += max(0, len(part) - room)

    def _end_line(self) -> None:
        text = harmless(self._line.decode(errors="backslashreplace")).replace("\t", " ").rstrip()
        if self._cut:
            text += f"… ({self._cut} bytes more)"
        self._line.clear()
        self._cut = 0
        if not text:
            return
        self.last_words = text
        if not self._bucket.take(1, time.monotonic()):
            self._suppressed += 1
            return
        self._tell_suppressed()
        self._log.log(self._level, "%s", text)

    def _tell_suppressed(self) -> None:
        if self._suppressed:
            self._log.log(self._level, "%d lines suppressed", self._suppressed)
            self._suppressed = 0
