"""How long MCR waits for what may never come, and the one factor by which a slow machine lengthens it.

Every such limit is `scaled(seconds)`, at the moment of the wait. The factor is the environment's, so that
child processes have it too. It is never derived from a measurement: a moment's load at the start must not
make a dead worker harder to notice for as long as the supervisor runs. Intervals, and what protects MCR from
clients, are not limits of this kind. This module must never import more of MCR than its errors.
"""

import os

from mcr.errors import ExitStatus, McrError

VARIABLE = "MCR_TIME_SCALE"
MAX_SCALE = 1000.0
# Only a compiler that hangs is ended by this: a second is usual, and there is no reason to be impatient.
COMPILE_TIMEOUT_S = 600.0


def time_scale() -> float:
    """The factor, 1 where the environment has none. Raises McrError (usage) for what is no factor."""
    text = os.environ.get(VARIABLE) or "1"
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 1.0 <= scale <= MAX_SCALE:
        raise McrError(
            f"{VARIABLE}={text} is not a factor for time limits",
            f"set it to a number from 1 to {MAX_SCALE:g}, or unset it",
            status=ExitStatus.USAGE,
        )
    return scale


def scaled(seconds: float) -> float:
    """A limit of so many seconds on an ordinary machine, as it is on this one."""
    return seconds * time_scale()


def slow_machine(text: str) -> str:
    """A text about what a limit has ended, with what lengthens it."""
    return f"{text}; on a slow machine set {VARIABLE}={min(2 * time_scale(), MAX_SCALE):g}"
