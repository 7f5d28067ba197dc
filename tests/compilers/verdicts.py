"""What the verifier had to do for each program, next to what it had to do when that was recorded.

Pure. A program that costs the verifier much more than before is on its way to being refused: by an older
kernel, or by this one after the next change. It must never let a program pass that has no recorded number.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mcr.loader import PROGRAMS, TRACED_PROGRAMS

GROWTH_LIMIT = 1.5
TRACED = "traced "
EVERY_PROGRAM = (*PROGRAMS, *(TRACED + name for name, *_ in TRACED_PROGRAMS))


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one program; counts are of instructions that the verifier processed, None where there is none."""

    program: str
    count: int | None
    recorded: int | None

    @property
    def fault(self) -> str:
        """Why the program does not pass; empty if it does."""
        if self.count is None:
            return "was not loaded"
        if self.recorded is None:
            return "has no recorded number"
        if self.count > self.recorded * GROWTH_LIMIT:
            return f"costs the verifier more than {GROWTH_LIMIT:.1f} times what was recorded"
        return ""

    def __str__(self) -> str:
        compared = f"{self.count / self.recorded:7.2f} x" if self.count and self.recorded else "        -"
        return f"{self.program:24} {_number(self.count)} {_number(self.recorded)} {compared}"


def _number(count: int | None) -> str:
    return "        -" if count is None else f"{count:9}"


def counts(printed: str) -> dict[str, int]:
    """By program, from what the loader printed; behind the line `traced` are the traced ones."""
    found, prefix = {}, ""
    for line in printed.splitlines():
        if line == TRACED.strip():
            prefix = TRACED
        elif match := re.match(r"(\w+): processed (\d+) insns ", line):
            found[prefix + match[1]] = int(match[2])
    return found


def judge(counted: Mapping[str, int], recorded: Mapping[str, int]) -> list[Verdict]:
    """One for every program that there is."""
    return [Verdict(name, counted.get(name), recorded.get(name)) for name in EVERY_PROGRAM]
