"""Tables and numbers for people: rows in, lines out.

Pure. A table that is wider than it may be cuts names, with …, and never a number. This module must never
print, nor ask how wide the terminal is.
"""

from collections.abc import Collection, Mapping, Sequence

NARROWEST = 8  # of a name that is cut, columns
_PREFIXES = ("", "k", "M", "G", "T")


def table(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str],
    width: int | None = None,
    names: Collection[str] = (),
    numbers: Collection[str] = (),
) -> list[str]:
    """Aligned columns under their names; numbers to the right.

    names: the columns that may be cut to fit width. numbers: those that are numbers though they are text.
    """
    cells = [[text(row.get(column)) for column in columns] for row in rows]
    heads = [column.replace("_", " ").upper() for column in columns]
    widths = [max(len(line[index]) for line in (heads, *cells)) for index in range(len(columns))]
    if width is not None:
        _narrow(widths, [index for index, column in enumerate(columns) if column in names], width)
    right = [
        column in numbers or all(isinstance(row.get(column), int | float | None) for row in rows)
        for column in columns
    ]
    return [
        "  ".join(
            fit(cell, size).rjust(size) if is_right else fit(cell, size).ljust(size)
            for cell, size, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in (heads, *cells)
    ]


def _narrow(widths: list[int], cuttable: Sequence[int], width: int) -> None:
    """Takes columns from the widest of the names until the table fits, or none can be cut any more."""
    while sum(widths) + 2 * (len(widths) - 1) > width and cuttable:
        widest = max(cuttable, key=lambda index: widths[index])
        if widths[widest] <= NARROWEST:
            return
        widths[widest] -= 1


def fit(cell: str, width: int) -> str:
    """The text, cut to this many columns."""
    return cell if len(cell) <= width else cell[: width - 1] + "…"


def text(value: object) -> str:
    """A cell."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def amount(value: float | None) -> str:
    """Three digits and a prefix, at most 5 columns: 0, 999, 1.02k, 12.6M, 845G."""
    if value is None:
        return "-"
    prefix = 0
    while value >= 999.5 and prefix < len(_PREFIXES) - 1:
        value /= 1000
        prefix += 1
    if prefix == 0:
        return f"{value:.0f}" if value >= 9.95 or value == int(value) else f"{value:.1f}"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{_PREFIXES[prefix]}"


def duration(seconds: float | None) -> str:
    """At most 6 columns: 740ns, 12.3µs, 1.02ms, 4.30s."""
    if seconds is None:
        return "-"
    for unit, scale in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            value = seconds * scale
            digits = 0 if unit == "ns" or value >= 99.95 else 1 if value >= 9.995 else 2
            return f"{value:.{digits}f}{unit}"
    return f"{seconds:.2f}s" if seconds < 99 else f"{seconds:.0f}s"
