"""From the rules that are in a map to those that are wanted, one entry at a time: in which order.

Pure. At every moment each stream is taken by the rule that had it before or by the one that gets it, never
by a third or by none: entries are put by precedence, the most specific first, and only then are those deleted
whose key nobody wants, the least specific first. This module must never do I/O.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def plan_switch(
    in_place: Mapping[K, V], wanted: Mapping[K, V], precedence: Callable[[K], int]
) -> list[tuple[K, V | None]]:
    """The steps that make of the entries in place those that are wanted; what is equal is not touched.

    Each is a key and the value to put there, or None to delete it.
    precedence: of the keys that take one packet, the one with the lowest number wins.
    """
    puts = [key for key, value in wanted.items() if _differs(in_place.get(key), value)]
    deletes = [key for key in in_place if key not in wanted]
    return [
        *((key, wanted[key]) for key in sorted(puts, key=precedence)),
        *((key, None) for key in sorted(deletes, key=precedence, reverse=True)),
    ]


def _differs(old: V | None, new: V) -> bool:
    return old is not new and old != new
