"""What `mcr top` shows: streams and a terminal's size in, lines out.

Pure, so that tests see what a user sees. A line's style only stresses what its words say already. This module
must never touch a terminal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mcr.cli.streams import Stream
from mcr.cli.tables import amount, duration, fit

Style = Literal["plain", "head", "bad", "quiet"]

SMALLEST = (56, 5)  # columns and lines
FIXED = (("PATH", 6), ("PKT/S", 6), ("BIT/S", 6), ("LOSS/S", 6), ("P99", 6), ("STATE", 7))
LONGEST_RULE, SHORTEST_RULE = 32, 8
SORTS: dict[str, tuple[str, Callable[[Stream], tuple[object, ...]]]] = {
    "r": ("rate", lambda each: (-(each.received_packets or 0), each.rule)),
    "b": ("bit rate", lambda each: (-(each.received_bits or 0), each.rule)),
    "l": ("loss", lambda each: (-(each.lost_packets or 0), each.rule)),
    "p": ("p99", lambda each: (-(each.latency_p99_s or 0), each.rule)),
    "n": ("name", lambda each: (each.rule,)),
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the screen."""

    text: str
    style: Style = "plain"


@dataclass(frozen=True, slots=True)
class View:
    """What there is to show. notice: why it is old, empty while it is not. interfaces: a line about them."""

    instance: str
    streams: Sequence[Stream] = field(default_factory=tuple)
    interfaces: str = ""
    notice: str = ""
    sort: str = "r"
    first: int = 0


def scrolled(view: View, lines: int, height: int) -> View:
    """The view moved down by so many lines, as far as there are streams."""
    last = max(0, len(view.streams) - _room(height))
    return replace(view, first=min(last, max(0, view.first + lines)))


def render(view: View, width: int, height: int) -> list[Line]:
    """As many lines as the terminal has, none longer than it is wide."""
    if width < SMALLEST[0] or height < SMALLEST[1]:
        return [Line(fit("too small", width))][:height]
    room = _room(height)
    view = scrolled(view, 0, height)
    ordered = sorted(view.streams, key=SORTS[view.sort][1])
    shown = ordered[view.first : view.first + room]
    widths = _name_widths(ordered, width)
    body = [Line(_row(each, widths), _style(each)) for each in shown]
    body += [Line("")] * (room - len(body))
    if not view.streams and not view.notice:
        body[0] = Line("there is no rule (mcr rule add)")
    lines = [Line(_summary(view)), _second(view), Line(_heads(widths), "head"), *body]
    lines.append(Line(_foot(view, len(shown)), "quiet"))
    return [replace(line, text=fit(line.text, width)) for line in lines]


def _room(height: int) -> int:
    return max(1, height - 4)


def _summary(view: View) -> str:
    def total(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return amount(sum(known)) if known else "-"

    received = total([each.received_packets for each in view.streams])
    bits = total([each.received_bits for each in view.streams])
    lost = total([each.lost_packets for each in view.streams])
    count = len(view.streams)
    return (
        f"mcr top  {view.instance}  {count} rule{'' if count == 1 else 's'}  "
        f"{received} packets/s  {bits} bit/s  {lost} lost/s"
    )


def _second(view: View) -> Line:
    return Line(view.notice, "bad") if view.notice else Line(view.interfaces)


def _foot(view: View, shown: int) -> str:
    keys = "  ".join(
        f"[{key}]{name}" if key == view.sort else f"{key} {name}" for key, (name, _) in SORTS.items()
    )
    return f"q quit  sort: {keys}  {view.first + min(1, shown)}-{view.first + shown} of {len(view.streams)}"


def _name_widths(streams: Sequence[Stream], width: int) -> tuple[int, int]:
    """Of the rule's name and of its stream: what the numbers leave."""
    left = width - sum(size + 1 for _, size in FIXED) - 1
    rule = max(4, *(len(each.rule) for each in streams)) if streams else 4
    stream = max(6, *(len(each.stream) for each in streams)) if streams else 6
    if rule + stream <= left:
        return rule, stream
    rule = min(rule, LONGEST_RULE, max(SHORTEST_RULE, left // 2, left - stream))
    if left - rule < SHORTEST_RULE:
        return left + 1, 0  # the stream is left out
    return rule, left - rule


def _heads(widths: tuple[int, int]) -> str:
    path, *numbers, state = FIXED
    cells = [f"{name:>{size}}" for name, size in numbers]
    return _line("RULE", "STREAM", f"{path[0]:<{path[1]}}", cells, state[0], widths)


def _row(each: Stream, widths: tuple[int, int]) -> str:
    numbers = (
        amount(each.received_packets),
        amount(each.received_bits),
        amount(each.lost_packets),
        duration(each.latency_p99_s),
    )
    cells = [f"{number:>{size}}" for number, (_, size) in zip(numbers, FIXED[1:-1], strict=True)]
    return _line(each.rule, each.stream, f"{each.path:<{FIXED[0][1]}}", cells, each.state, widths)


def _line(rule: str, stream: str, path: str, cells: list[str], state: str, widths: tuple[int, int]) -> str:
    names = [f"{fit(rule, widths[0]):<{widths[0]}}"]
    if widths[1]:
        names.append(f"{fit(stream, widths[1]):<{widths[1]}}")
    return " ".join([*names, path, *cells, state])


def _style(each: Stream) -> Style:
    return {"loss": "bad", "silent": "bad", "pending": "quiet"}.get(each.state, "plain")  # type: ignore[return-value]
