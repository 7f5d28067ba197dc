"""JSON-RPC 2.0: text to value and back, one object a line, and nothing else.

Strict in what it takes and bounded in what it says of it. This module must never do I/O and knows no method.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from mcr.errors import McrError

ROWS_AT_ONCE = 200
END = b"]}\n"  # of an answer whose result is a list

PARSE_ERROR = -32700  # these five: JSON-RPC 2.0 specification, section 5.1
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
BUSY = -32000
REQUEST_FAILED = 1  # an McrError: its cause is the message, the rest is in data


@dataclass
class RequestError(Exception):
    """A request that is answered with a JSON-RPC error of this code.

    Handlers raise it with METHOD_NOT_FOUND or INVALID_PARAMS.
    """

    code: int
    message: str


@dataclass(frozen=True, slots=True)
class Request:
    """A well-formed request. A notification has no id and gets no answer."""

    method: str
    params: dict[str, Any]
    id: int | str | None
    notification: bool


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_json(line: bytes) -> object:
    """One JSON value (RFC 8259, so no NaN). Raises RequestError PARSE_ERROR for anything else."""
    try:
        return json.loads(line.decode("utf-8"), parse_float=_finite, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(PARSE_ERROR, f"not JSON that can be read: {str(error)[:100]}") from None


def request_id(message: object) -> int | str | None:
    """The id to answer with: the message's own where it has a proper one, else null."""
    value = message.get("id") if isinstance(message, dict) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def parse_request(message: object) -> Request:
    """Checks a parsed message against JSON-RPC 2.0. Raises RequestError INVALID_REQUEST or INVALID_PARAMS."""
    if isinstance(message, list):
        raise RequestError(INVALID_REQUEST, "batches are not supported")
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise RequestError(INVALID_REQUEST, 'a request is an object with "jsonrpc": "2.0"')
    method, params, identifier = message.get("method"), message.get("params", {}), request_id(message)
    if not isinstance(method, str):
        raise RequestError(INVALID_REQUEST, "the method is not a string")
    if identifier is None and message.get("id") is not None:
        raise RequestError(INVALID_REQUEST, "the id is neither an integer nor a string")
    if not isinstance(params, dict):
        raise RequestError(INVALID_PARAMS, "the params are not an object")
    return Request(method, params, identifier, "id" not in message)


def encode(message: object) -> bytes:
    """One line: the message."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def encode_error(identifier: int | str | None, code: int, message: str, data: object = None) -> bytes:
    """One line: a JSON-RPC error answer."""
    error: dict[str, object] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return encode({"jsonrpc": "2.0", "id": identifier, "error": error})


def encode_mcr_error(identifier: int | str | None, error: McrError) -> bytes:
    """One line: an McrError as an answer, from which ControlClient makes the same McrError again."""
    data = {
        "remedy": error.remedy,
        "where": error.where,
        "status": int(error.status),
        "others": [
            {"cause": each.cause, "remedy": each.remedy, "where": each.where} for each in error.others
        ],
        "unshown": error.unshown,
    }
    return encode_error(identifier, REQUEST_FAILED, error.cause, data)


def result_pieces(identifier: int | str | None, result: object) -> Iterator[bytes]:
    """The line of encode_result in pieces, of which each takes little time: a long list a part at a time."""
    if not isinstance(result, list) or len(result) <= ROWS_AT_ONCE:
        yield encode_result(identifier, result)
        return
    empty = encode_result(identifier, [])
    yield empty[: -len(END)]
    for first in range(0, len(result), ROWS_AT_ONCE):
        rows = encode(result[first : first + ROWS_AT_ONCE])[len(b"[") : -len(b"]\n")]
        yield b"," + rows if first else rows
    yield END


def encode_result(identifier: int | str | None, result: object) -> bytes:
    """One line: a result. Raises TypeError or ValueError for one that is not JSON."""
    return encode({"jsonrpc": "2.0", "id": identifier, "result": result})
