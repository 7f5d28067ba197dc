"""The control socket: JSON-RPC 2.0, one object a line, UTF-8, over a Unix stream socket.

Where it is, and the half that commands use; the supervisor's half is control_server.py. This module knows no
method and no rule, and must never import what a command that only asks does not need.
"""

import os
import re
import socket
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from mcr.errors import ExitStatus, McrError
from mcr.jsonrpc import (
    BUSY,
    INTERNAL_ERROR,
    METHOD_NOT_FOUND,
    REQUEST_FAILED,
    RequestError,
    encode,
    parse_json,
)
from mcr.limits import scaled, slow_machine

MAX_ANSWER_BYTES = 64 << 20  # what a client takes
SOCKET_PATH_BYTES = 107  # sun_path less its NUL, unix(7)


def socket_path(instance: str) -> Path:
    """The control socket of an instance: `<instance>.sock` in /run/mcr, or in $MCR_RUNTIME_DIR.

    Raises McrError (usage) for a name that is not 1 to 32 of A-Z a-z 0-9 _ -.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", instance, re.ASCII):
        raise McrError(
            f"{instance!r} is not an instance name",
            "use 1 to 32 of the letters, digits, _ and -",
            status=ExitStatus.USAGE,
        )
    path = Path(os.environ.get("MCR_RUNTIME_DIR") or "/run/mcr") / f"{instance}.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise McrError(
            f"{path} is too long for a socket's path",
            "set MCR_RUNTIME_DIR to a shorter one",
            status=ExitStatus.USAGE,
        )
    return path


def not_permitted(path: Path) -> McrError:
    return McrError(
        f"this user may not use {path}",
        f"use sudo, or become a member of the socket's group (stat -c %G {path})",
        status=ExitStatus.NOT_PERMITTED,
    )


class ControlClient:
    """A command's end of the control socket; synchronous, one call at a time, a context manager.

    It connects at the first call. After an error of the connection the next call connects anew.
    """

    def __init__(self, path: Path, timeout_s: float = 10.0, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        self.path = path
        self.timeout_s = scaled(timeout_s)
        self.max_answer_bytes = max_answer_bytes
        self._connection: socket.socket | None = None
        self._buffer = bytearray()
        self._next_id = 1

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnects. A later call connects again."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._buffer.clear()

    def call(self, method: str, **params: object) -> Any:
        """The result of one request, within timeout_s.

        Raises McrError: the handler's own; NO_SUPERVISOR if none listens; NOT_PERMITTED if the socket refuses
        this user; FAILED if the supervisor does not answer in time, hangs up or breaks the protocol.
        """
        deadline_s = time.monotonic() + self.timeout_s
        identifier = self._next_id
        self._next_id += 1
        request = {"jsonrpc": "2.0", "id": identifier, "method": method, "params": params}
        try:
            answer = self._exchange(encode(request), deadline_s)
        except (TimeoutError, BlockingIOError):
            self.close()
            raise McrError(
                f"the supervisor at {self.path} did not answer within {self.timeout_s:g} s",
                slow_machine("look into its log; if it hangs, restart it"),
            ) from None
        except BaseException:
            self.close()
            raise
        return self._result(answer, identifier)

    def _exchange(self, request: bytes, deadline_s: float) -> bytes:
        connection = self._connection or self._connect(deadline_s)
        self._connection = connection
        try:
            connection.settimeout(_remaining_s(deadline_s))
            connection.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the supervisor hung up; the reason may be waiting to be read
        try:
            return self._read_line(connection, deadline_s)
        except ConnectionError:
            raise self._hung_up() from None

    def _connect(self, deadline_s: float) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # A blocking connect waits its turn while the backlog is full; Python's timeout would not.
                timeout = struct.pack("ll", *divmod(int(_remaining_s(deadline_s) * 1e6) + 1, 1_000_000))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
                connection.connect(str(self.path))
                return connection
            except BlockingIOError:  # that timeout, socket(7)
                connection.close()
            except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
                connection.close()
                raise McrError(
                    f"no supervisor is running at {self.path}",
                    "start one: mcr run, or mcr attach IFACE",
                    status=ExitStatus.NO_SUPERVISOR,
                ) from None
            except PermissionError:
                connection.close()
                raise not_permitted(self.path) from None
            except BaseException:
                connection.close()
                raise

    def _read_line(self, connection: socket.socket, deadline_s: float) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self.max_answer_bytes:
                raise McrError(
                    f"the supervisor's answer is longer than {self.max_answer_bytes} bytes", "ask for less"
                )
            connection.settimeout(_remaining_s(deadline_s))
            data = connection.recv(1 << 18)
            if not data:
                raise self._hung_up()
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _hung_up(self) -> McrError:
        return McrError(
            f"the supervisor at {self.path} closed the connection without an answer",
            "see whether it still runs: mcr status",
        )

    def _result(self, line: bytes, identifier: int) -> Any:
        try:
            answer = parse_json(line)
            if not isinstance(answer, dict) or answer.get("id") not in (identifier, None):
                raise ValueError
            if answer.get("id") is None:
                self.close()  # it could not be told whose error this is, or nobody was let in
            if "error" in answer:
                raise _error_from(answer["error"])
            if answer["id"] is None:
                raise ValueError
            return answer["result"]
        except (RequestError, ValueError, TypeError, KeyError):
            self.close()
            raise McrError(
                f"the supervisor at {self.path} answered something that is not an answer",
                "see whether it is of the same version: mcr --version",
            ) from None


def _remaining_s(deadline_s: float) -> float:
    """Seconds left, more than 0. Raises TimeoutError when there are none."""
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s


def _error_from(error: dict[str, Any]) -> McrError:
    """The McrError that a JSON-RPC error object stands for.

    Raises TypeError, KeyError or ValueError if it is no such object.
    """
    code, message = int(error["code"]), str(error["message"])
    if code == REQUEST_FAILED:
        data = error["data"]
        others = [
            McrError(str(each["cause"]), str(each["remedy"]), str(each["where"]))
            for each in data.get("others", ())  # not of an older supervisor
        ]
        return McrError(
            message,
            str(data["remedy"]),
            str(data["where"]),
            ExitStatus(data["status"]),
            tuple(others),
            int(data.get("unshown", 0)),
        )
    remedies = {
        BUSY: "wait a moment, then try again",
        METHOD_NOT_FOUND: "use the mcr of the same version as the supervisor",
        INTERNAL_ERROR: "look into the supervisor's log",
    }
    return McrError(f"the supervisor refused the request: {message}", remedies.get(code, "check the request"))
