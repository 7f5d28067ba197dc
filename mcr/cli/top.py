"""`mcr top`: a live view of the streams on the whole terminal.

curses does the terminal, `screen.py` decides what is on it. However it ends, the terminal is as it was.
"""

import contextlib
import curses
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import click

from mcr.cli.common import Row, Settings
from mcr.cli.screen import SORTS, Line, Style, View, render, scrolled
from mcr.cli.streams import Reading, streams
from mcr.control import ControlClient, socket_path
from mcr.errors import ExitStatus, McrError

ANSWER_WITHIN_S = 2.0
_COLOURS: dict[Style, int] = {"bad": curses.COLOR_RED, "head": curses.COLOR_CYAN}
_ATTRIBUTES: dict[Style, int] = {
    "plain": curses.A_NORMAL,
    "head": curses.A_REVERSE,
    "bad": curses.A_BOLD,
    "quiet": curses.A_DIM,
}


@dataclass(slots=True)
class _Source:
    """The supervisor, which may come and go."""

    client: ControlClient
    view: View
    before: Reading | None = None
    _now: Reading | None = field(default=None, init=False)

    def read(self) -> None:
        """A new view; or the old one with a notice."""
        try:
            rows = self.client.call("stats", latency=True)
            interfaces = _interfaces(self.client.call("status"))
        except McrError as error:
            if error.status == ExitStatus.NOT_PERMITTED:
                raise
            self.view = replace(self.view, notice=f"this is old, trying again: {error.cause}")
            self.client.close()
            return
        self.before, self._now = self._now, Reading(time.monotonic(), rows)
        shown = streams(self.before, self._now)
        self.view = replace(self.view, streams=shown, interfaces=interfaces, notice="")


def _interfaces(rows: list[Row]) -> str:
    """`in0 native xsk, out0 pending; joined 3 of 3`."""
    told = []
    for row in rows:
        if row["object"] == "interface":
            how = "pending" if row["reason"] else f"{row['mode']} {row['ingress']}"
            told.append(f"{row['interface']} {how}")
    joined = [f"joined {row['held']} of {row['wanted']}" for row in rows if row["object"] == "membership"]
    return "; ".join([", ".join(told) or "no interface is attached", *joined])


@contextlib.contextmanager
def _terminal() -> Iterator[Any]:
    """The whole terminal, until it is given back as it was. Raises curses.error where TERM cannot do it.

    Not curses.wrapper, which begins to colour whatever NO_COLOR says.
    """
    screen = curses.initscr()
    try:
        curses.noecho()
        curses.cbreak()
        screen.keypad(True)
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
        yield screen
    finally:
        screen.keypad(False)
        curses.nocbreak()
        curses.echo()
        curses.endwin()


def _styles() -> dict[Style, int]:
    """Colours only where the terminal has them and NO_COLOR (https://no-color.org) is not set."""
    styles = dict(_ATTRIBUTES)
    if os.environ.get("NO_COLOR") or not curses.has_colors():
        return styles
    curses.start_color()
    curses.use_default_colors()
    for number, (style, colour) in enumerate(_COLOURS.items(), 1):
        curses.init_pair(number, colour, -1)
        styles[style] |= curses.color_pair(number)
    return styles


def _fitted(screen: Any) -> tuple[int, int]:
    """Height and width, as they are now: a signal that comes between two keys may have been missed."""
    size = os.get_terminal_size(sys.stdout.fileno())
    if (size.lines, size.columns) != screen.getmaxyx():
        curses.resizeterm(size.lines, size.columns)
    height, width = screen.getmaxyx()
    return height, width


def _draw(screen: Any, lines: list[Line], styles: dict[Style, int]) -> None:
    screen.erase()
    for number, line in enumerate(lines):
        with contextlib.suppress(curses.error):  # the last cell of the screen, and a screen that just shrank
            screen.addstr(number, 0, line.text, styles[line.style])
    screen.refresh()


def _pressed(view: View, key: int, height: int) -> View:
    """The view after a key."""
    steps = {
        curses.KEY_DOWN: 1,
        curses.KEY_UP: -1,
        curses.KEY_NPAGE: height - 4,
        curses.KEY_PPAGE: 4 - height,
        curses.KEY_HOME: -len(view.streams),
        curses.KEY_END: len(view.streams),
    }
    if key in steps:
        return scrolled(view, steps[key], height)
    if 0 <= key < 256 and chr(key) in SORTS:
        return replace(view, sort=chr(key), first=0)
    return view


def _run(screen: Any, source: _Source, interval_s: float) -> None:
    styles = _styles()
    due_s = time.monotonic()
    while True:
        if time.monotonic() >= due_s:
            source.read()
            due_s = max(due_s + interval_s, time.monotonic())
        height, width = _fitted(screen)
        _draw(screen, render(source.view, width, height), styles)
        screen.timeout(max(1, int(1000 * (due_s - time.monotonic()))))
        key = screen.getch()
        if key == ord("q"):
            return
        if key not in (-1, curses.KEY_RESIZE):
            source.view = _pressed(source.view, key, height)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end it like any error, so that the terminal is restored."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command(name="top")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.1, 60),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds between two readings.",
)
@click.pass_obj
def command(settings: Settings, interval_s: float) -> None:
    """Watch the streams on the whole terminal: rate, bit rate, loss, latency, path and state.

    Keys: r, b, l, p and n sort by rate, bit rate, loss, latency and name; arrows scroll; q quits.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise McrError("top needs a terminal", "use: mcr stats --watch", status=ExitStatus.USAGE)
    with ControlClient(socket_path(settings.instance), timeout_s=ANSWER_WITHIN_S) as client:
        client.call("status")  # no supervisor at all is an error, one that goes away later is not
        source = _Source(client, View(settings.instance))
        try:
            curses.setupterm()  # raises where initscr would end the process
            with _ended_by_signals(), _terminal() as screen:
                _run(screen, source, interval_s)
        except curses.error as error:
            raise McrError(
                f"this terminal cannot show it: {error}", "set TERM, or use: mcr stats --watch"
            ) from error
