"""On which line of a TOML text each table, key and array element stands, which tomllib does not tell.

Usually only the tables' own lines are asked for, and those are found without reading every token; the rest is
looked for when an error needs it. The text must be TOML that tomllib has accepted. This module must never
look at a value.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]

# A header of an array of tables on a line of its own. Without strings of several lines and quoted keys, what
# looks so is one: as a value, in an array, a bare word would have to be one of those left out here.
_TABLE = re.compile(
    r"^[ \t]*\[\[[ \t]*(?!(?:true|false|inf|nan)\b)([A-Za-z_]+)[ \t]*\]\][ \t]*(?:#.*)?$", re.MULTILINE
)
_NEEDS_SCAN = re.compile(r"""\"{3}|'{3}|\[\[[ \t]*["']""")


class KeyLines(Mapping[KeyPath, int]):
    """The line, from 1, by path: `("rule", 0)` is the first `[[rule]]`, `("rule", 0, "to", 1)` an element."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tables = _table_lines(text)
        self._scanned: dict[KeyPath, int] | None = None

    def __getitem__(self, path: KeyPath) -> int:
        return self._tables[path] if path in self._tables else self._all[path]

    def __iter__(self) -> Iterator[KeyPath]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def _all(self) -> dict[KeyPath, int]:
        if self._scanned is None:
            self._scanned = _Scanner(self._text).scan()
        return self._scanned


def _table_lines(text: str) -> dict[KeyPath, int]:
    """Of the elements of arrays of tables; none where it takes the whole scan to know."""
    if _NEEDS_SCAN.search(text):
        return {}
    lines: dict[KeyPath, int] = {}
    counts: dict[str, int] = {}
    line, end = 1, 0
    for match in _TABLE.finditer(text):
        line += text.count("\n", end, match.start())
        end, key = match.start(), match[1]
        counts[key] = counts.get(key, -1) + 1
        lines[key, counts[key]] = line
    return lines


_TOKEN = re.compile(
    r"""(?P<space> [ \t]+ | \#[^\n]* )
      | (?P<newline> \n )
      | (?P<string> \"{3} (?: \\. | [^\\] )*? \"{3,5} | '{3} .*? '{3,5} | " (?: \\. | [^"\\] )* " | '[^']*' )
      | (?P<mark> [][{}=,.] )
      | (?P<bare> [^][{}=,.\s\#"']+ )
      | (?P<other> . )""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(slots=True)
class _Scanner:
    """Finds the line of each table, key and array element of a text that is known to be TOML.

    tomllib gives no positions, and this gives nothing else: it knows strings, comments and brackets, no
    values. What stands inside an inline table, or an array inside an array, is not looked into.
    """

    text: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    counts: dict[KeyPath, int] = field(default_factory=dict)
    prefix: KeyPath = ()

    def scan(self) -> dict[KeyPath, int]:
        statement: list[tuple[str, str, int]] = []
        depth = 0
        line = 1
        in_value = False
        for match in _TOKEN.finditer(self.text):
            kind, token = match.lastgroup or "", match[0]
            if kind == "newline" and not (in_value and depth):
                self._statement(statement)
                statement, depth, in_value = [], 0, False
            elif kind not in ("space", "newline"):
                statement.append((kind, token, line))
                in_value = in_value or token == "="
                depth += (token in ("[", "{")) - (token in ("]", "}"))
            line += token.count("\n")
        self._statement(statement)
        return self.lines

    def _statement(self, tokens: Sequence[tuple[str, str, int]]) -> None:
        """Takes the tokens of one table header or one key and its value."""
        if not tokens:
            return
        if tokens[0][1] == "[":
            self._header(tokens)
        else:
            self._key_and_value(tokens)

    def _header(self, tokens: Sequence[tuple[str, str, int]]) -> None:
        keys = _keys(tokens)
        is_array = tokens[1][1] == "["
        path: KeyPath = ()
        for depth, key in enumerate(keys, 1):
            path = (*path, key)
            self.lines.setdefault(path, tokens[0][2])
            if is_array and depth == len(keys):
                self.counts[path] = self.counts.get(path, -1) + 1
            if path in self.counts:
                path = (*path, self.counts[path])
                self.lines.setdefault(path, tokens[0][2])
        self.prefix = path

    def _key_and_value(self, tokens: Sequence[tuple[str, str, int]]) -> None:
        equals = next(index for index, token in enumerate(tokens) if token[:2] == ("mark", "="))
        path = self.prefix
        for key in _keys(tokens[:equals]):
            path = (*path, key)
            self.lines.setdefault(path, tokens[0][2])
        if tokens[equals + 1][:2] == ("mark", "["):
            for index, line in enumerate(_element_lines(tokens[equals + 1 :])):
                self.lines[(*path, index)] = line


def _keys(tokens: Sequence[tuple[str, str, int]]) -> list[str]:
    """The keys of a dotted key, with or without the brackets of a header."""
    return [_key(token) for kind, token, _ in tokens if kind in ("bare", "string")]


def _key(token: str) -> str:
    return next(iter(tomllib.loads(f"{token} = 0"))) if token[0] in "\"'" else token


def _element_lines(tokens: Sequence[tuple[str, str, int]]) -> Iterator[int]:
    """The line of each element of an array, whose tokens begin with its `[`."""
    depth = 0
    fresh = False
    for kind, token, line in tokens:
        if fresh and token != "]":
            yield line
        mark = token if kind == "mark" else ""
        fresh = (depth, mark) in ((0, "["), (1, ","))
        depth += (mark in ("[", "{")) - (mark in ("]", "}"))
