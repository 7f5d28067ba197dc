"""The grammar of streams: text to value and back.

An input stream or an output is written `[SOURCE@]ADDRESS[%INTERFACE]:PORT[,option=value...]`, an IPv6 address
always in brackets. Parsing is strict: what it accepts has one meaning and one canonical text, which `str()`
gives and which parses to the same value again. This module must never do I/O: whether an interface exists or
an address is reachable is not its business.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal, TypeAlias

from mcr.errors import McrError

Address: TypeAlias = IPv4Address | IPv6Address

MAX_TEXT = 256
REMEMBERED = 8192  # texts: when a file is read again, most of them have been understood before
MAX_INTERFACE_BYTES = 15
DEFAULT_TTL = 64

_BROADCAST = IPv4Address("255.255.255.255")

_INPUT_OPTIONS = {"vlan": "vlan=1..4094 or vlan=OUTER.INNER"}
_OUTPUT_OPTIONS = {
    "ttl": "ttl=1..255 or ttl=decrement",
    "dscp": "dscp=0..63 or dscp=preserve",
    "source": "source=interface, source=preserve or source=ADDRESS",
    "vlan": "vlan=1..4094",
}

_PARTS = re.compile(
    r"""(?: (?P<source> \[[^\]]*\] | [^@%,\[\]]* ) @ )?
        (?P<address> \[[^\]]*\] | [^%:,\[\]]* )
        (?: % (?P<interface> [^:,]* ) )?
        (?: : (?P<port> [^,]* ) )?
        (?: , (?P<options> .* ) )?""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(r"0|[1-9][0-9]*")


@dataclass(frozen=True, slots=True)
class Stream:
    """An input stream.

    port: 1..65535, None for any (`*`).
    interface: where it arrives.
    source: the only source taken, None for any.
    vlan: the tag next to the IP header, 0 for none; vlan_outer: the tag around that one, 0 for none.
    """

    address: Address
    port: int | None
    interface: str
    source: Address | None = None
    vlan: int = 0
    vlan_outer: int = 0

    @property
    def group(self) -> bool:
        """Whether the address is a multicast group."""
        return self.address.is_multicast

    def __str__(self) -> str:
        source = f"{_address_text(self.source)}@" if self.source is not None else ""
        tags = f"{self.vlan_outer}.{self.vlan}" if self.vlan_outer else str(self.vlan)
        vlan = f",vlan={tags}" if self.vlan else ""
        return f"{source}{_endpoint_text(self.address, self.interface, self.port)}{vlan}"


@dataclass(frozen=True, slots=True)
class Output:
    """One destination of a rule.

    port: 1..65535, None (`*`) keeps the packet's port.
    interface: where it leaves; empty lets routing choose, which only a unicast address can.
    ttl: 1..255 (hop limit in IPv6), None sends the packet's own less one. The default is 64, not the packet's
        own, because many senders use TTL 1.
    dscp: 0..63, None keeps the packet's.
    source: an address, or that of the interface, or the packet's own (`preserve`).
    vlan: the tag to send with, 0 for none.
    """

    address: Address
    port: int | None
    interface: str = ""
    ttl: int | None = DEFAULT_TTL
    dscp: int | None = None
    source: Address | Literal["interface", "preserve"] = "interface"
    vlan: int = 0

    @property
    def group(self) -> bool:
        """Whether the address is a multicast group."""
        return self.address.is_multicast

    def __str__(self) -> str:
        options = []
        if self.ttl != DEFAULT_TTL:
            options.append(f",ttl={'decrement' if self.ttl is None else self.ttl}")
        if self.dscp is not None:
            options.append(f",dscp={self.dscp}")
        if self.source != "interface":
            source = self.source if isinstance(self.source, str) else _address_text(self.source)
            options.append(f",source={source}")
        if self.vlan:
            options.append(f",vlan={self.vlan}")
        return _endpoint_text(self.address, self.interface, self.port) + "".join(options)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What inputs and outputs have in common; interface is None where the text names none."""

    source: str | None
    address: Address
    interface: str | None
    port: int | None
    options: Mapping[str, str]


@lru_cache(REMEMBERED)
def parse_stream(text: str) -> Stream:
    """The input stream that text describes, such as `10.0.0.7@232.1.1.1%eth0:5000,vlan=100`.

    Raises McrError. An input needs its interface.
    """
    try:
        return _input(_split(text, _INPUT_OPTIONS))
    except McrError as error:
        raise McrError(f"stream {_quote(text)}: {error.cause}", error.remedy) from None


@lru_cache(REMEMBERED)
def parse_output(text: str) -> Output:
    """The output that text describes, such as `239.2.2.2%eth1:6000,ttl=8` or `10.20.0.9:6000`.

    Raises McrError. A group needs the interface to leave by, and so does an IPv6 link-local address.
    """
    try:
        return _output(_split(text, _OUTPUT_OPTIONS))
    except McrError as error:
        raise McrError(f"output {_quote(text)}: {error.cause}", error.remedy) from None


def parse_address(text: str) -> Address:
    """The address that text describes: IPv4 as it is, IPv6 in brackets. Raises McrError.

    IPv4-mapped IPv6 addresses (RFC 4291 section 2.5.5.2) are refused: MCR means IPv4 by them, others do not.
    """
    bracketed = text.startswith("[") and text.endswith("]")
    bare = text[1:-1] if bracketed else text
    if "%" in bare:
        raise McrError(
            f"address {_quote(text)} has an interface inside",
            "write the interface after the brackets, as in [fe80::1]%eth0:5000",
        )
    try:
        address_value = ip_address(bare)
    except ValueError:
        raise McrError(
            f"{_quote(text)} is not an IP address", "write one such as 239.1.1.1 or [ff15::1]"
        ) from None
    if isinstance(address_value, IPv4Address):
        if bracketed:
            raise McrError("an IPv4 address takes no brackets", f"write {address_value}")
    elif not bracketed:
        raise _no_brackets(bare)
    elif address_value.ipv4_mapped is not None:
        raise McrError(f"{text} is an IPv4-mapped address", f"write {address_value.ipv4_mapped}")
    return address_value


def parse_port(text: str) -> int:
    """The port 1..65535 that text describes in decimal digits. Raises McrError."""
    return _number("port", text, 1, 65535, "write a port of 1..65535")


def check_interface_name(name: str) -> None:
    """Raises McrError unless Linux could have an interface of that name and a stream can name it.

    The rules are those of dev_valid_name() in the kernel's net/core/dev.c (1 to 15 bytes, not `.` or `..`, no
    `/`, `:` or white space), and no `,` nor unprintable character.
    """
    remedy = "use a name that `ip link` shows"
    if not name:
        raise McrError("the interface name is empty", remedy)
    if not name.isprintable() or re.search(r"[\s/:,]", name) or name in (".", ".."):
        raise McrError(f"{_quote(name)} cannot be the name of an interface", remedy)
    if len(name.encode()) > MAX_INTERFACE_BYTES:
        raise McrError(f"interface name {_quote(name)} is longer than {MAX_INTERFACE_BYTES} bytes", remedy)


def _split(text: str, known: Mapping[str, str]) -> _Parts:
    if not text:
        raise McrError("it is empty", "write ADDRESS%INTERFACE:PORT, as in 239.1.1.1%eth0:5000")
    if len(text) > MAX_TEXT:
        raise McrError(f"it is longer than {MAX_TEXT} characters", "shorten it")
    parts = _PARTS.fullmatch(text)
    if parts is None:
        raise McrError("it is malformed", "write [SOURCE@]ADDRESS%INTERFACE:PORT, as in [ff15::1]%eth0:5000")
    _refuse_bare_ipv6(parts["address"], parts["port"])
    address = parse_address(parts["address"])
    _check_destination(address)
    if parts["interface"] is not None:
        check_interface_name(parts["interface"])
    return _Parts(
        source=parts["source"],
        address=address,
        interface=parts["interface"],
        port=_port(parts["port"]),
        options=_options(parts["options"], known),
    )


def _input(parts: _Parts) -> Stream:
    if parts.address.is_loopback:
        raise McrError(
            f"no interface receives the loopback address {parts.address}",
            "use the address that the sender sends to",
        )
    if parts.interface is None:
        raise McrError("it names no interface", "add %INTERFACE after the address, as in 239.1.1.1%eth0:5000")
    source = parse_address(parts.source) if parts.source is not None else None
    if source is not None:
        _check_source(source, parts.address)
    vlan_outer, vlan = _input_tags(parts.options)
    return Stream(parts.address, parts.port, parts.interface, source, vlan, vlan_outer)


def _output(parts: _Parts) -> Output:
    if parts.source is not None:
        raise McrError("SOURCE@ is for inputs", "use the option source=ADDRESS")
    if parts.interface is None and parts.address.is_multicast:
        raise McrError(
            f"group {parts.address} needs an interface to leave by",
            "add %INTERFACE after the address, as in 239.2.2.2%eth1:6000",
        )
    if parts.interface is None and isinstance(parts.address, IPv6Address) and parts.address.is_link_local:
        raise McrError(
            f"link-local address {parts.address} needs an interface to leave by",
            "add %INTERFACE after the address, as in [fe80::1]%eth1:6000",
        )
    return Output(
        address=parts.address,
        port=parts.port,
        interface=parts.interface or "",
        ttl=_word_or_number(parts.options, "ttl", "decrement", 1, 255, DEFAULT_TTL),
        dscp=_word_or_number(parts.options, "dscp", "preserve", 0, 63, None),
        source=_output_source(parts),
        vlan=_tag(parts.options["vlan"], _OUTPUT_OPTIONS) if "vlan" in parts.options else 0,
    )


def _output_source(parts: _Parts) -> Address | Literal["interface", "preserve"]:
    text = parts.options.get("source", "interface")
    if text == "interface":
        return "interface"
    if text == "preserve":
        return "preserve"
    source = parse_address(text)
    _check_source(source, parts.address)
    return source


def _check_destination(address: Address) -> None:
    remedy = "use a multicast group or the unicast address of a host"
    if address.is_unspecified:
        raise McrError(f"{address} is no destination", remedy)
    if address == _BROADCAST:
        raise McrError("255.255.255.255 is the broadcast address, which MCR does not relay", remedy)
    if isinstance(address, IPv6Address) and address.is_multicast and address.packed[1] & 0x0F < 2:
        raise McrError(
            f"group {address} has a scope that never leaves a host (RFC 4291 section 2.7)",
            "use a group of link-local or wider scope, as in ff15::1",
        )


def _check_source(source: Address, destination: Address) -> None:
    if source.version != destination.version:
        raise McrError(
            f"source {source} is IPv{source.version} but the destination is IPv{destination.version}",
            f"use an IPv{destination.version} source",
        )
    if source.is_multicast or source.is_unspecified or source == _BROADCAST:
        raise McrError(f"source {source} is not a unicast address", "use the unicast address of the sender")


def _port(text: str | None) -> int | None:
    if not text:
        raise McrError("it has no port", "add :PORT, as in 239.1.1.1%eth0:5000, or :* for any")
    return None if text == "*" else _number("port", text, 1, 65535, "write a port of 1..65535, or *")


def _options(text: str | None, known: Mapping[str, str]) -> dict[str, str]:
    """Option names and values; known maps each name allowed here to the form it is written in."""
    options: dict[str, str] = {}
    for item in text.split(",") if text is not None else ():
        name, _, value = item.partition("=")
        if name not in known:
            raise _unknown_option(name, known)
        if name in options:
            raise McrError(f"option {name} is given twice", "give it once")
        if not value:
            raise McrError(f"option {name} has no value", f"write {known[name]}")
        options[name] = value
    return options


def _unknown_option(name: str, known: Mapping[str, str]) -> McrError:
    if not name:
        return McrError(
            "there is an empty option", "write option=value after each comma, or remove the comma"
        )
    if name in _OUTPUT_OPTIONS:
        return McrError(f"option {name} belongs to outputs", "move it to the rule's outputs")
    return McrError(f"there is no option {_quote(name)}", f"the options here are {', '.join(known)}")


def _input_tags(options: Mapping[str, str]) -> tuple[int, int]:
    """The outer tag and the one next to the IP header, each 0 if there is none."""
    if "vlan" not in options:
        return 0, 0
    outer, dot, inner = options["vlan"].rpartition(".")
    return (_tag(outer, _INPUT_OPTIONS) if dot else 0), _tag(inner, _INPUT_OPTIONS)


def _tag(text: str, known: Mapping[str, str]) -> int:
    return _number("vlan", text, 1, 4094, f"write {known['vlan']}")


def _word_or_number(
    options: Mapping[str, str], name: str, word: str, low: int, high: int, default: int | None
) -> int | None:
    """The number of an option that can also be one word, which is None."""
    if name not in options:
        return default
    if options[name] == word:
        return None
    return _number(name, options[name], low, high, f"write {_OUTPUT_OPTIONS[name]}")


def _number(what: str, text: str, low: int, high: int, remedy: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise McrError(f"{what} {_quote(text)} is not a number", remedy)
    if len(text) > len(str(high)) or not low <= int(text) <= high:
        raise McrError(f"{what} {_printable(text)} is not within {low}..{high}", remedy)
    return int(text)


def _refuse_bare_ipv6(address: str, port: str | None) -> None:
    """Raises McrError if what was cut at the first colon is an IPv6 address without brackets."""
    if port is None or ":" not in port or address.startswith("["):
        return
    bare = f"{address}:{port}".partition("%")[0]
    for candidate in (bare, bare.rpartition(":")[0]):
        if _is_ipv6(candidate):
            raise _no_brackets(candidate)


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _no_brackets(address: str) -> McrError:
    return McrError(f"IPv6 address {address} is not in brackets", f"write [{address}]")


def _address_text(address: Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)


def _endpoint_text(address: Address, interface: str, port: int | None) -> str:
    zone = f"%{interface}" if interface else ""
    return f"{_address_text(address)}{zone}:{'*' if port is None else port}"


def _quote(text: str) -> str:
    """text in quotes, on one line and not endless, for use in an error."""
    return repr(text) if len(text) <= MAX_TEXT else f"{text[:32]!r}..."


def _printable(text: str) -> str:
    return repr(text)[1:-1]
