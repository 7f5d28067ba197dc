"""TOML to values: attachments, rules and settings, with `file:line` in every error.

A file is taken whole or not at all. `parse_attachment` and `parse_rule` take one table and also serve
requests that come from elsewhere, so that a file and a command accept the same. This module must never touch
the network or ask the machine about its interfaces; reading the files it is given is its only effect.
"""

import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, get_args

from mcr.errors import MAX_ERRORS, Faults, McrError, raise_all
from mcr.rule import (
    MCR_MAX_EGRESS_THREADS,
    MCR_MAX_INTERFACES,
    MCR_MAX_WORKERS,
    Origin,
    PathChoice,
    Rule,
    check_rule,
    check_rule_name,
    plan,
    rule_faults,
)
from mcr.stream import (
    Address,
    Output,
    check_interface_name,
    parse_address,
    parse_output,
    parse_port,
    parse_stream,
)
from mcr.toml_lines import KeyLines, KeyPath

Mode: TypeAlias = Literal["auto", "native", "generic"]
Ingress: TypeAlias = Literal["auto", "xsk", "packet"]
ZeroCopy: TypeAlias = Literal["auto", "on", "off"]
UdpChecksums: TypeAlias = Literal["verify", "trust"]
ControlRead: TypeAlias = Literal["group", "all"]

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_CPU = 8191  # NR_CPUS at most, linux/threads.h

_KEYS = ("metrics", "attach", "rule", "control")
_TLS_KEYS = ("tls_cert", "tls_key", "client_ca")
_METRICS_KEYS = ("listen", *_TLS_KEYS)
_CONTROL_KEYS = ("read",)
_ATTACH_KEYS = (
    *("interface", "mode", "ingress", "zero_copy", "udp_checksums", "busy_poll"),
    *("workers", "egress_threads", "cpus"),
)
_RULE_KEYS = ("name", "from", "to", "path")

_Word = TypeVar("_Word", bound=str)


@dataclass(frozen=True, slots=True)
class Attachment:
    """An interface to attach and how. Where it was asked for does not count in `==`.

    udp_checksums: whether the worker path verifies them where the device has not, or trusts them.
    cpus: of every thread of every worker in turn, used again from the start where there are fewer; empty
    where the kernel may choose.
    """

    interface: str
    mode: Mode = "auto"
    ingress: Ingress = "auto"
    zero_copy: ZeroCopy = "auto"
    udp_checksums: UdpChecksums = "verify"
    busy_poll: bool = False
    workers: int = 1
    egress_threads: int = 0
    cpus: tuple[int, ...] = ()
    origin: Origin | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for the metrics. client_ca: whoever scrapes must show a certificate of this authority."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """What the files say. metrics_listen is `ADDR:PORT`, None if there shall be no metrics.

    control_read: who may look by the control socket, the users who may also change something or all.
    """

    attachments: tuple[Attachment, ...] = ()
    rules: tuple[Rule, ...] = ()
    metrics_listen: str | None = None
    control_read: ControlRead = "group"
    metrics_tls: TlsFiles | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a table of the input stands: its file, the line of each key of that file, and its own key."""

    file: str = ""
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    path: KeyPath = ()

    def under(self, *path: str | int) -> "Place":
        """The place of what path names within this one."""
        return Place(self.file, self.lines, (*self.path, *path))

    @property
    def origin(self) -> Origin | None:
        """The line of this, or else of the nearest table or key around it; None outside of a file."""
        if not self.file:
            return None
        path = self.path
        while path and path not in self.lines:
            path = path[:-1]
        return Origin(self.file, self.lines.get(path, 1))

    @property
    def where(self) -> str:
        """`file:line`, empty outside of a file."""
        return str(self.origin or "")


NOWHERE = Place()


def load_config(paths: Sequence[Path]) -> Config:
    """The configuration that the files make together, in their order; the last `metrics.listen` and
    `control.read` count, and so do the last TLS files.

    Raises McrError for everything wrong in any of them, and for rules that cannot go together or that no
    interface whatsoever could carry. A rule's input interface need not be attached.
    """
    config, errors = read_config(paths)
    raise_all(errors)
    return config


def read_config(paths: Sequence[Path]) -> tuple[Config, list[McrError]]:
    """What is right in the files, and what is not, in the order of `by_position`."""
    faults, config = Faults(), Config()
    for path in paths:
        with faults:
            table, place = _read(path)
            config = _with_file(config, table, place, faults)
    faults.found += _attachments_faults(config.attachments)
    faults.found += rule_faults(config.rules)
    for rule in config.rules:
        with faults:
            plan(rule, {})
    return config, by_position(faults.found, paths)


def by_position(errors: Iterable[McrError], paths: Sequence[Path]) -> list[McrError]:
    """Single errors in the order of the files and of their lines; what has no line comes first."""
    files = {str(path): number for number, path in enumerate(paths)}

    def position(error: McrError) -> tuple[int, int]:
        file, _, line = error.where.rpartition(":")
        return (files[file], int(line)) if file in files and line.isdigit() else (-1, 0)

    return sorted((each for error in errors for each in error.each()), key=position)


def _with_file(before: Config, table: Mapping[str, object], place: Place, faults: Faults) -> Config:
    """The configuration with what a file adds to it, as far as that is right."""
    faults.found += _unknown_keys(table, _KEYS, place, "a configuration")
    listen, tls, read = before.metrics_listen, before.metrics_tls, before.control_read
    with faults:
        metrics, at = _settings(table, "metrics", _METRICS_KEYS, place, faults)
        with faults:
            listen = _metrics_listen(metrics, at, listen)
        with faults:
            tls = _metrics_tls(metrics, at, tls)
    with faults:
        control, at = _settings(table, "control", _CONTROL_KEYS, place, faults)
        read = _word(control, "read", get_args(ControlRead), read, at)
    attachments, rules = [*before.attachments], [*before.rules]
    for item, at in _tables(table, "attach", place, faults):
        with faults:
            attachments.append(parse_attachment(item, at))
    for item, at in _tables(table, "rule", place, faults):
        with faults:
            rules.append(parse_rule(item, at))
    return Config(tuple(attachments), tuple(rules), listen, read, tls)


def parse_attachment(table: Mapping[str, object], place: Place = NOWHERE) -> Attachment:
    """The attachment that a table of `interface` and options describes. Raises McrError."""
    faults = Faults()
    faults.found += _unknown_keys(table, _ATTACH_KEYS, place, "[[attach]]")
    with faults, _located(place.under("interface")):
        check_interface_name(interface := _text(table, "interface", place))
    with faults:
        mode: Mode = _word(table, "mode", get_args(Mode), "auto", place)
    with faults:
        ingress: Ingress = _word(table, "ingress", get_args(Ingress), "auto", place)
    with faults:
        zero_copy: ZeroCopy = _word(table, "zero_copy", get_args(ZeroCopy), "auto", place)
    with faults:
        checksums: UdpChecksums = _word(table, "udp_checksums", get_args(UdpChecksums), "verify", place)
    with faults:
        busy_poll = _flag(table, "busy_poll", place)
    with faults:
        workers = _number(table, "workers", 1, MCR_MAX_WORKERS, 1, place)
    with faults:
        threads = _number(table, "egress_threads", 0, MCR_MAX_EGRESS_THREADS, 0, place)
    with faults:
        cpus = _cpus(table, place)
    faults.check()
    found = Attachment(
        interface=interface,
        mode=mode,
        ingress=ingress,
        zero_copy=zero_copy,
        udp_checksums=checksums,
        busy_poll=busy_poll,
        workers=workers,
        egress_threads=threads,
        cpus=cpus,
        origin=place.origin,
    )
    raise_all(_attachment_faults(found, place))
    return found


def parse_rule(table: Mapping[str, object], place: Place = NOWHERE, *, temporary: bool = False) -> Rule:
    """The rule that a table of `name`, `from`, `to` and `path` describes, checked alone. Raises McrError."""
    faults = Faults()
    faults.found += _unknown_keys(table, _RULE_KEYS, place, "[[rule]]")
    with faults, _located(place.under("name")):
        check_rule_name(name := _text(table, "name", place))
    with faults, _located(place.under("from")):
        stream = parse_stream(_text(table, "from", place))
    with faults:
        outputs = _outputs(table, place)
    with faults:
        path: PathChoice = _word(table, "path", get_args(PathChoice), "auto", place)
    faults.check()
    rule = Rule(name, stream, outputs, path, place.origin, temporary)
    with _located(place.under("to")):
        check_rule(rule)
    return rule


def _outputs(table: Mapping[str, object], place: Place) -> tuple[Output, ...]:
    texts = _required(table, "to", place)
    place, faults, outputs = place.under("to"), Faults(), list[Output]()
    if not isinstance(texts, list):
        raise McrError(f"to is {_kind(texts)}, not an array of strings", 'write to = ["..."]', place.where)
    for index, text in enumerate(texts):
        with faults, _located(place.under(index)):
            if not isinstance(text, str):
                raise McrError(f"to holds {_kind(text)}", "put it in quotes")
            outputs.append(parse_output(text))
    faults.check()
    return tuple(outputs)


def parse_listen(text: str) -> tuple[Address, int] | None:
    """The address and port of `ADDR:PORT`, such as `127.0.0.1:9931` or `[::1]:9931`; None for `off`.

    Raises McrError.
    """
    if text == "off":
        return None
    address, colon, port = text.rpartition(":")
    if not colon or not address:
        raise McrError(
            f"{_shown(text)} is not an address and a port",
            'write ADDR:PORT such as "127.0.0.1:9931", or "off"',
        )
    return parse_address(address), parse_port(port)


def _settings(
    table: Mapping[str, object], key: str, keys: Sequence[str], place: Place, faults: Faults
) -> tuple[Mapping[str, object], Place]:
    """The one table of that name, empty if there is none, and its place. Raises McrError if it is none."""
    settings = table.get(key, {})
    place = place.under(key)
    if not isinstance(settings, dict):
        raise McrError(f"{key} is {_kind(settings)}, not a table", f"write [{key}]", place.where)
    faults.found += _unknown_keys(settings, keys, place, f"[{key}]")
    return settings, place


def _metrics_listen(metrics: Mapping[str, object], place: Place, before: str | None) -> str | None:
    """What the file says, or before if it says nothing."""
    if "listen" not in metrics:
        return before
    text = _text(metrics, "listen", place)
    with _located(place.under("listen")):
        return text if parse_listen(text) else None


def _metrics_tls(metrics: Mapping[str, object], place: Place, before: TlsFiles | None) -> TlsFiles | None:
    """What the file says, or before if it names no TLS file."""
    faults = Faults()
    paths: dict[str, Path] = {}
    for key in (key for key in _TLS_KEYS if key in metrics):
        with faults:
            paths[key] = Path(text := _text(metrics, key, place))
            if not text.startswith("/"):
                raise McrError(f"{key} is not an absolute path", "write it from / on", place.under(key).where)
    faults.check()
    if not paths:
        return before
    for key in _TLS_KEYS[:2]:
        if key not in paths:
            raise McrError(f"{key} is missing beside {next(iter(paths))}", f'add {key} = "/..."', place.where)
    return TlsFiles(paths["tls_cert"], paths["tls_key"], paths.get("client_ca"))


def _attachment_faults(attachment: Attachment, place: Place) -> Iterator[McrError]:
    interface = attachment.interface
    if attachment.ingress == "packet" and attachment.mode != "auto":
        yield McrError(
            f"{interface}: mode {attachment.mode} is for XDP, but packet ingress attaches no XDP program",
            "remove mode, or choose the ingress xsk",
            place.under("mode").where,
        )
    if attachment.ingress == "packet" and attachment.zero_copy == "on":
        yield McrError(
            f"{interface}: zero copy is for AF_XDP, but packet ingress uses no AF_XDP socket",
            "remove zero_copy, or choose the ingress xsk",
            place.under("zero_copy").where,
        )
    if attachment.mode == "generic" and attachment.zero_copy == "on":
        yield McrError(
            f"{interface}: generic mode always copies, so zero copy cannot be on",
            "remove zero_copy, or choose the mode native",
            place.under("zero_copy").where,
        )


def _attachments_faults(attachments: Sequence[Attachment]) -> Iterator[McrError]:
    seen: dict[str, Attachment] = {}
    for attachment in attachments:
        where = str(attachment.origin or "")
        first = seen.setdefault(attachment.interface, attachment)
        if first is not attachment:
            yield McrError(
                f"{attachment.interface} is attached twice (first at {first.origin})",
                "remove one of the two",
                where,
            )
        elif len(seen) == MCR_MAX_INTERFACES + 1:
            yield McrError(
                f"there are more than {MCR_MAX_INTERFACES} attachments",
                "share them out among several instances",
                where,
            )


@contextmanager
def _located(place: Place) -> Iterator[None]:
    """Points errors that have no place, or a wider one, to place."""
    try:
        yield
    except McrError as error:
        where = place.where
        raise replace(
            error, where=where, others=tuple(replace(each, where=where) for each in error.others)
        ) from None


def _unknown_keys(
    table: Mapping[str, object], known: Sequence[str], place: Place, what: str
) -> Iterator[McrError]:
    found = 0
    for key in table:
        if key in known:
            continue
        found += 1
        near = get_close_matches(key[:64], known, n=1) if found <= MAX_ERRORS else []
        yield McrError(
            f"unknown key {_shown(key)}",
            f"did you mean {near[0]}?" if near else f"the keys of {what} are {', '.join(known)}",
            place.under(key).where,
        )


def _tables(
    table: Mapping[str, object], key: str, place: Place, faults: Faults
) -> Iterator[tuple[dict[str, object], Place]]:
    items = table.get(key, [])
    place = place.under(key)
    if not isinstance(items, list):
        items = []
        faults.found.append(
            McrError(f"{key} is {_kind(table[key])}, not an array of tables", f"write [[{key}]]", place.where)
        )
    for index, item in enumerate(items):
        if isinstance(item, dict):
            yield item, place.under(index)
        else:
            where = place.under(index).where
            faults.found.append(McrError(f"{key} holds {_kind(item)}", f"write [[{key}]]", where))


def _text(table: Mapping[str, object], key: str, place: Place) -> str:
    value = _required(table, key, place)
    if not isinstance(value, str):
        raise McrError(f"{key} is {_kind(value)}, not a string", "put it in quotes", place.under(key).where)
    return value


def _required(table: Mapping[str, object], key: str, place: Place) -> object:
    if key not in table:
        raise McrError(f"{key} is missing", f"add {key} = ...", place.where)
    return table[key]


def _word(
    table: Mapping[str, object], key: str, words: tuple[_Word, ...], default: _Word, place: Place
) -> _Word:
    value = table.get(key, default)
    for word in words:
        if value == word:
            return word
    shown = _shown(value) if isinstance(value, str) else _kind(value)
    listed = ", ".join(f'"{word}"' for word in words)
    raise McrError(f"{key} is {shown}", f"choose one of {listed}", place.under(key).where)


def _flag(table: Mapping[str, object], key: str, place: Place) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise McrError(
            f"{key} is {_kind(value)}, not true or false", "write true or false", place.under(key).where
        )
    return value


def _number(table: Mapping[str, object], key: str, least: int, most: int, default: int, place: Place) -> int:
    value = table.get(key, default)
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    shown = str(value)[:32] if isinstance(value, int) and not isinstance(value, bool) else _kind(value)
    raise McrError(f"{key} is {shown}", f"write a number from {least} to {most}", place.under(key).where)


def _cpus(table: Mapping[str, object], place: Place) -> tuple[int, ...]:
    """`0,2-3` as (0, 2, 3), in that order (cpuset(7), list format)."""
    if "cpus" not in table:
        return ()
    text = _text(table, "cpus", place)
    cpus: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > MAX_CPU:
            raise McrError(
                f"cpus is {_shown(text)}",
                'write CPU numbers such as "2,3" or "2-5"',
                place.under("cpus").where,
            )
        cpus += range(first, last + 1)
    return tuple(cpus)


def _kind(value: object) -> str:
    """What sort of value this is, in TOML's words."""
    kinds = (
        (bool, "a boolean"),
        (str, "a string"),
        (int, "an integer"),
        (float, "a float"),
        (list, "an array"),
        (dict, "a table"),
    )
    return next(
        (word for kind, word in kinds if isinstance(value, kind)), "a date or time" if value else "nothing"
    )


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 64 else f"{text[:32]!r}..."


def _read(path: Path) -> tuple[dict[str, object], Place]:
    """The top table of a file, and its place. Raises McrError."""
    text = _read_text(path)
    remedy = "correct the TOML there (https://toml.io)"
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        cause, line = _syntax_error(str(error), text)
        raise McrError(f"TOML syntax: {cause}", remedy, f"{path}:{line}") from None
    except RecursionError:
        raise McrError("arrays or tables are nested too deeply", remedy, str(path)) from None
    except ValueError as error:
        raise McrError(f"TOML value: {error}", remedy, str(path)) from None
    return table, Place(str(path), KeyLines(text))


def _read_text(path: Path) -> str:
    """The text of a file, its line ends as `\\n`."""
    try:
        data = _read_bytes(path)
    except OSError as error:
        remedy = "name a TOML file that this user may read"
        raise McrError(f"cannot read {path}: {error.strerror}", remedy) from None
    if len(data) > MAX_FILE_BYTES:
        raise McrError(f"{path} is larger than {MAX_FILE_BYTES} bytes", "split it into several files")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise McrError("the file is not UTF-8", "save it as UTF-8", f"{path}:{line}") from None


def _read_bytes(path: Path) -> bytes:
    """At most one byte more than a file may have. Never waits: O_NONBLOCK opens a FIFO that has no writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise McrError(f"{path} is not a regular file", "name a TOML file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)


def _syntax_error(message: str, text: str) -> tuple[str, int]:
    """The cause and the line of an error of tomllib, which puts the position in brackets behind the cause."""
    cause, _, position = message.rpartition(" (at ")
    numbers = re.fullmatch(r"line (\d+), column \d+\)", position)
    if numbers:
        return cause, int(numbers[1])
    return cause or message, text.count("\n", 0, len(text.rstrip())) + 1
