"""A sign of life on standard error while something takes longer than a second.

On a terminal only, and gone when it is over. This module must never write to standard output.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

TICK_S = 1.0
CLEAR = "\r\x1b[K"  # to the start of the line, erase it (ECMA-48)


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """`reloading: 3 s`, each second from the first on."""
    if not sys.stderr.isatty():
        yield
        return
    over = threading.Event()
    ticking = threading.Thread(target=_tick, args=(what, over), daemon=True)
    ticking.start()
    try:
        yield
    finally:
        over.set()
        ticking.join()


def _tick(what: str, over: threading.Event) -> None:
    begin_s = time.monotonic()
    shown = False
    while not over.wait(TICK_S):
        sys.stderr.write(f"{CLEAR}{what}: {time.monotonic() - begin_s:.0f} s")
        sys.stderr.flush()
        shown = True
    if shown:
        sys.stderr.write(CLEAR)
        sys.stderr.flush()
