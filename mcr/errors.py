"""The one kind of error that MCR shows to people: a cause and a remedy, one line each.

Anything else that reaches the command line is a bug. This module must never import the rest of MCR.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from types import TracebackType

MAX_ERRORS = 50  # of one request or set of files; the rest is counted


class ExitStatus(IntEnum):
    """Exit statuses of the `mcr` command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NO_SUPERVISOR = 3
    NOT_PERMITTED = 4


@dataclass
class McrError(Exception):
    """A request that cannot be done.

    cause: one line, what is wrong, naming the thing that is wrong.
    remedy: one line, what to do about it.
    where: `file:line` of the input at fault, empty if it did not come from a file.
    status: the exit status of a command that fails with this error.
    others: what else is wrong; unshown: how many more there are than that, see MAX_ERRORS.
    """

    cause: str
    remedy: str
    where: str = ""
    status: ExitStatus = ExitStatus.FAILED

    others: tuple["McrError", ...] = ()
    unshown: int = 0

    def __str__(self) -> str:
        """The first, and how many more there are."""
        more = len(self.others) + self.unshown
        text = f"{self.where}: {self.cause}" if self.where else self.cause
        return f"{text}, and {more} more error{'s' if more > 1 else ''}" if more else text

    def each(self) -> Iterator["McrError"]:
        """Every one that is kept, by itself."""
        yield replace(self, others=(), unshown=0)
        yield from self.others


def raise_all(errors: Iterable[McrError]) -> None:
    """Raises one error that stands for all of them, the first one first; nothing if there is none."""
    singles: list[McrError] = []
    unshown = 0
    for error in errors:
        singles += error.each()
        unshown += error.unshown
    if singles:
        first, *others = singles
        unshown += max(0, len(singles) - MAX_ERRORS)
        raise replace(first, others=tuple(others[: MAX_ERRORS - 1]), unshown=unshown)


class Faults:
    """Collects the errors of its `with` blocks, so that one mistake does not hide the next.

    What a block was to give is not there if that failed: `check` comes before it is used.
    """

    def __init__(self) -> None:
        self.found: list[McrError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, McrError):
            self.found.append(error)
            return True
        return False

    def check(self) -> None:
        """Raises what has been found."""
        raise_all(self.found)
