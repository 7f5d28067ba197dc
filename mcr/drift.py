"""Drift: what is there has become something else than what was put there, without the supervisor.

Another tool detached the program, or somebody deleted an entry of a map or a pin. The supervisor compares
what it can read back with what it wants, at each change and every few seconds, and puts it right. This module
keeps what was found, for the log, `mcr status` and the metrics; it must never look or mend anything.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import Literal, get_args

Kind = Literal["link", "rules", "outputs", "devices", "settings", "sockets", "joins", "pins"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_LOGGED = 10

log = logging.getLogger(__name__)


class Drifts:
    """How often each kind of thing was found changed and put right. last is the latest of them, in words, and
    last_s its Unix time; 0 if there was none."""

    def __init__(self) -> None:
        self.counts: Counter[Kind] = Counter()
        self.last = ""
        self.last_s = 0.0

    @property
    def total(self) -> int:
        return self.counts.total()

    def note(self, kind: Kind, found: Iterable[str]) -> None:
        """found: one line for each, which says what was done about it."""
        lines = list(found)
        if not lines:
            return
        self.counts[kind] += len(lines)
        self.last, self.last_s = lines[-1], time.time()
        for line in lines[:MAX_LOGGED]:
            log.warning("drift: %s", line)
        if len(lines) > MAX_LOGGED:
            log.warning("drift: %d more of the same kind", len(lines) - MAX_LOGGED)
