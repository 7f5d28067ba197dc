"""The one kind of error that MCR shows to people: a cause and a remedy, one line each.

Anything else that reaches the command line is a bug. This module must never import the rest of MCR.
"""

from dataclasses import dataclass
from enum import IntEnum


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
    """

    cause: str
    remedy: str
    where: str = ""
    status: ExitStatus = ExitStatus.FAILED

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}" if self.where else self.cause
