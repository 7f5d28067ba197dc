"""What `mcr trace` and `mcr capture` share: a client that polls a running trace and gives its events.

It must never leave one running: however the loop over `events` ends, the trace is stopped.
"""

import base64
import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from mcr.cli.common import Settings
from mcr.control import ControlClient, socket_path
from mcr.errors import McrError
from mcr.limits import COMPILE_TIMEOUT_S
from mcr.tap_events import Event, decode

POLL_S = 0.05
START_TIMEOUT_S = COMPILE_TIMEOUT_S + 10.0  # the first one of a supervisor compiles its programs


class Tapping:
    """A running trace or capture, until it is left. lost: events that found no room, so far."""

    def __init__(self, settings: Settings, method: str, **params: object) -> None:
        self._client = ControlClient(socket_path(settings.instance), timeout_s=START_TIMEOUT_S)
        self._method, self._params = method, params
        self._stack = contextlib.ExitStack()
        self._id = 0
        self.lost = 0
        self.to_real_time_ns = 0
        self.interfaces: dict[int, dict[str, Any]] = {}
        self.outputs: dict[int, dict[str, Any]] = {}
        self.rules: dict[int, list[dict[str, Any]]] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._client)
            self._learn_rules()
            started = self._client.call(self._method, **self._params)
            self._id = started["id"]
            self.to_real_time_ns = started["to_real_time_ns"]
            self.interfaces = {row["ifindex"]: row for row in started["interfaces"]}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack, contextlib.suppress(McrError):
            self._client.call("trace.stop", id=self._id)

    def _learn_rules(self) -> None:
        """Rules by rule_id, a row for each output, and the same rows by output_id."""
        rows = self._client.call("rule.show")
        self.outputs = {row["output_id"]: row for row in rows}
        self.rules = {}
        for row in rows:
            self.rules.setdefault(row["rule_id"], []).append(row)

    def interface(self, ifindex: int) -> str:
        """The name of an interface."""
        return str(self.interfaces.get(ifindex, {"interface": f"interface {ifindex}"})["interface"])

    def events(self) -> Iterator[list[Event]]:
        """What was told, a list at each look, which may be empty; ends when there will be no more."""
        while True:
            answer = self._client.call("trace.read", id=self._id)
            self.lost = answer["lost"]
            found = list(decode(base64.b64decode(answer["events"])))
            if any(event.rule_id and event.rule_id not in self.rules for event in found):
                self._learn_rules()
            yield found
            if answer["done"]:
                return
            if not found:
                time.sleep(POLL_S)
