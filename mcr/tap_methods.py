"""The control methods of traces and captures: what a client may ask for, within limits.

A client that polls drives a trace: `trace.start` (or `capture.start`) gives an id, `trace.read` what was told
since the last time, `trace.stop` ends it. This module must never touch a map; `tap.py` does.
"""

import asyncio
import time
from typing import TYPE_CHECKING, Any

from mcr import netlink
from mcr._bpf import ffi
from mcr.errors import McrError
from mcr.jsonrpc import INVALID_PARAMS, RequestError
from mcr.maps import rule_key
from mcr.stream import Output, parse_stream
from mcr.tap import FOREVER, TapRequest
from mcr.tap_egress import EgressTap
from mcr.tap_events import LARGEST_SNAPLEN

if TYPE_CHECKING:
    from mcr.supervisor import Supervisor

MAX_TRACED = 10_000
MAX_TIMEOUT_S = 3600.0


def _text(params: dict[str, Any], key: str) -> str:
    value = params.get(key)
    if not isinstance(value, str):
        raise RequestError(INVALID_PARAMS, f"{key} must be a string")
    return value


def _number(params: dict[str, Any], key: str, low: float, high: float) -> float:
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(INVALID_PARAMS, f"{key} must be a number of {low:g} to {high:g}")
    return value


def _check_attached(supervisor: "Supervisor", interface: str) -> None:
    attached = supervisor.attached.get(interface)
    if attached is None:
        raise McrError(f"{interface} is not attached", f"mcr attach {interface}")
    if attached.pending:
        raise McrError(f"{interface} is pending: {attached.pending}", "see: mcr status")
    if not attached.mode:
        raise McrError(
            f"{interface} has no XDP program, which is where traces and captures are taken",
            f"attach {interface} with --ingress xsk, or use tcpdump",
        )


def _begun(supervisor: "Supervisor", number: int) -> dict[str, Any]:
    """What a client needs to understand the events."""
    return {
        "id": number,
        "to_real_time_ns": time.time_ns() - time.monotonic_ns(),
        "interfaces": [
            {"ifindex": facts.ifindex, "interface": facts.name, "ethernet": facts.ethernet}
            for facts in supervisor.facts.values()
        ],
    }


async def trace_start(supervisor: "Supervisor", params: dict[str, Any]) -> object:
    stream = parse_stream(_text(params, "stream"))
    _check_attached(supervisor, stream.interface)
    request = TapRequest(
        what="trace",
        key=rule_key(stream, supervisor.facts[stream.interface].ifindex),
        rule_id=0,
        limit=int(_number(params, "count", 1, MAX_TRACED)),
        timeout_s=_number(params, "timeout_s", 0.01, MAX_TIMEOUT_S),
    )
    return _begun(supervisor, await supervisor.tap.start(request))


async def capture_start(supervisor: "Supervisor", params: dict[str, Any]) -> object:
    name, what = _text(params, "rule"), _text(params, "what")
    if what not in ("before", "after", "both"):
        raise RequestError(INVALID_PARAMS, "what must be before, after or both")
    snaplen = int(_number(params, "snaplen", 1, LARGEST_SNAPLEN))
    count = params.get("count")
    state = supervisor.rules.get(name)
    if state is None:
        raise McrError(f"there is no rule {name!r}", "see which there are: mcr rule show")
    _check_attached(supervisor, state.rule.stream.interface)
    request = TapRequest(
        what="capture",
        key=ffi.new("struct mcr_rule_key *"),
        rule_id=state.rule_id,
        limit=FOREVER if count is None else int(_number(params, "count", 1, FOREVER)),
        timeout_s=_number(params, "timeout_s", 0.01, MAX_TIMEOUT_S),
        bytes_before=0 if what == "after" else snaplen,
        bytes_after=0 if what == "before" else snaplen,
        reports=False,
    )
    egress: list[EgressTap] = []
    try:
        for output in state.outputs if what != "before" else ():
            if not output.pending:
                facts = await _leaves_by(supervisor, output.output)
                egress.append(EgressTap(state.rule_id, output.output_id, output.output, facts, snaplen))
    except BaseException:
        for tap in egress:
            tap.close()
        raise
    return _begun(supervisor, await supervisor.tap.start(request, egress))


async def _leaves_by(supervisor: "Supervisor", output: Output) -> Any:
    """The interface that the output leaves by now: its own, or that of the route."""
    if output.interface:
        return supervisor.facts[output.interface]
    route = await asyncio.to_thread(netlink.route_to, output.address, 0)
    for facts in supervisor.facts.values():
        if facts.ifindex == route.ifindex:
            return facts
    raise McrError(f"there is no route to {output.address}", f"see: ip route get {output.address}")


async def trace_read(supervisor: "Supervisor", params: dict[str, Any]) -> object:
    return await supervisor.tap.read(int(_number(params, "id", 1, FOREVER)))


async def trace_stop(supervisor: "Supervisor", params: dict[str, Any]) -> object:
    await supervisor.tap.stop(int(_number(params, "id", 1, FOREVER)))
    return None
