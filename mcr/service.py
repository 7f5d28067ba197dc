"""The supervisor as a process: control socket, metrics, signals; and its commands by name.

The lock of the instance comes first, so that two supervisors of one never meet in the maps. This module
must never decide anything about rules or interfaces.
"""

import asyncio
import contextlib
import logging
import resource
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from mcr import instance_lock, logs, metrics, privileges, views
from mcr.background import Tasks, surviving
from mcr.config import Attachment, Config, load_config, parse_attachment, parse_listen, parse_rule
from mcr.connection import Peer
from mcr.control import socket_path
from mcr.control_server import ControlServer
from mcr.errors import ExitStatus, McrError
from mcr.explain import MAX_PAYLOAD_BYTES, Query, explain
from mcr.jsonrpc import INVALID_PARAMS, METHOD_NOT_FOUND, RequestError
from mcr.notify import keep_alive, notify, reloading
from mcr.situation import gather
from mcr.stream import parse_stream
from mcr.supervisor import Supervisor
from mcr.tap_methods import capture_start, trace_read, trace_start, trace_stop

log = logging.getLogger(__name__)

T = TypeVar("T")
Method = Callable[[Supervisor, dict[str, Any]], Awaitable[object]]


def _text(params: dict[str, Any], key: str) -> str:
    value = params.get(key)
    if not isinstance(value, str):
        raise RequestError(INVALID_PARAMS, f"{key} must be a string")
    return value


def _name(params: dict[str, Any]) -> str | None:
    return _text(params, "name") if params.get("name") is not None else None


async def _attach(supervisor: Supervisor, params: dict[str, Any]) -> object:
    interface = await supervisor.attach(parse_attachment(params))
    return {
        "interface": interface.name,
        "mode": interface.mode or "none",
        "ingress": interface.ingress,
        "shortfall": interface.shortfall,
    }


async def _detach(supervisor: Supervisor, params: dict[str, Any]) -> object:
    await supervisor.detach(_text(params, "interface"))
    return None


async def _rule_add(supervisor: Supervisor, params: dict[str, Any]) -> object:
    temporary = params.pop("temporary", False)
    if not isinstance(temporary, bool):
        raise RequestError(INVALID_PARAMS, "temporary must be true or false")
    state = await supervisor.add_rule(parse_rule(params, temporary=temporary))
    return {
        "rule": state.rule.name,
        "path": state.path,
        "path_reason": state.reason,
        "pending": state.pending,
    }


async def _rule_del(supervisor: Supervisor, params: dict[str, Any]) -> object:
    names = params.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RequestError(INVALID_PARAMS, "names must be an array of strings")
    await supervisor.delete_rules(names)
    return None


async def _rule_show(supervisor: Supervisor, params: dict[str, Any]) -> object:
    return await views.rules(supervisor, _name(params))


async def _status(supervisor: Supervisor, _: dict[str, Any]) -> object:
    return views.status(supervisor)


async def _stats(supervisor: Supervisor, params: dict[str, Any]) -> object:
    if params.get("settle") is True:
        supervisor.rule_maps.watch()
    return await views.stats(supervisor, _name(params), latency=params.get("latency") is True)


async def _joins(supervisor: Supervisor, _: dict[str, Any]) -> object:
    return views.joins(supervisor)


async def _log(_: Supervisor, __: dict[str, Any]) -> object:
    return {"level": logs.level()}


async def _log_set(_: Supervisor, params: dict[str, Any]) -> object:
    logs.set_level(_text(params, "level"))
    return None


async def _reload_files(supervisor: Supervisor, _: dict[str, Any]) -> object:
    await supervisor.reload()
    return None


def _number(params: dict[str, Any], key: str, low: int, high: int) -> int | None:
    value = params.get(key)
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise RequestError(INVALID_PARAMS, f"{key} must be a number of {low}..{high}")
    return value


async def _explain(supervisor: Supervisor, params: dict[str, Any]) -> object:
    query = Query(
        parse_stream(_text(params, "stream")),
        _number(params, "ttl", 1, 255),
        _number(params, "size", 0, MAX_PAYLOAD_BYTES),
    )
    return explain(query, await gather(supervisor, query))


# name: (method, whether it only reads)
METHODS: dict[str, tuple[Method, bool]] = {
    "attach": (_attach, False),
    "detach": (_detach, False),
    "rule.add": (_rule_add, False),
    "rule.del": (_rule_del, False),
    "rule.show": (_rule_show, True),
    "status": (_status, True),
    "stats": (_stats, True),
    "reload": (_reload_files, False),
    "explain": (_explain, True),
    "joins": (_joins, True),
    "log": (_log, True),
    "log.set": (_log_set, False),
    "trace.start": (trace_start, False),
    "capture.start": (capture_start, False),
    "trace.read": (trace_read, False),
    "trace.stop": (trace_stop, False),
}


class Service:
    """Answers control requests for a supervisor that may still be starting."""

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None

    async def handle(self, peer: Peer, method: str, params: dict[str, Any]) -> object:
        if method not in METHODS:
            raise RequestError(METHOD_NOT_FOUND, f"there is no method {method:.64}")
        call, only_reads = METHODS[method]
        if not only_reads and not peer.may_write:
            raise _read_only(method)
        if self.supervisor is None:
            raise McrError("the supervisor is starting", "try again in a moment")
        log.debug("pid %d (uid %d): %s", peer.pid, peer.uid, method)
        return await call(self.supervisor, params)


def _read_only(method: str) -> McrError:
    return McrError(
        f"this user may look and change nothing: {method} needs root or the group of the control socket",
        "use sudo, or become a member of the socket's group (mcr, where there is one)",
        status=ExitStatus.NOT_PERMITTED,
    )


def _metrics_address(config: Config, option: str | None) -> tuple[str, int] | None:
    """The command line's --metrics counts more than the files'."""
    text = option if option is not None else config.metrics_listen
    listen = parse_listen(text) if text is not None else None
    return (str(listen[0]), listen[1]) if listen else None


def _raise_file_limit() -> None:
    """Clients, maps and workers take descriptors; the soft limit is for select(2), unused here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def run(
    instance: str,
    config_paths: Sequence[Path] = (),
    metrics_option: str | None = None,
    attachment: Attachment | None = None,
    on_exit: Literal["detach", "keep"] = "detach",
    replace_kept: bool = False,
    ready: Callable[[Supervisor], None] = lambda _: None,
) -> None:
    """Runs a supervisor until SIGTERM or SIGINT; SIGHUP reloads. Raises McrError.

    attachment: an interface to attach at once. on_exit="keep" leaves the kernel path and the joins, and
    replace_kept starts afresh where an earlier supervisor has left it. ready is called when everything asked
    for is in place. A signal that comes before that ends the start at once.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    config = load_config(config_paths)
    address = _metrics_address(config, metrics_option)
    privileges.check()
    service = Service()
    _raise_file_limit()
    everyone_reads = config.control_read == "all"
    server = ControlServer(socket_path(instance), service.handle, everyone_reads=everyone_reads)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(instance_lock.held(instance))
        await server.start()
        stack.push_async_callback(server.close)

        async def start() -> Supervisor:
            supervisor = await stack.enter_async_context(
                Supervisor(instance, config_paths, on_exit, replace_kept)
            )
            if attachment is not None:
                await supervisor.attach(attachment)
            return supervisor

        supervisor = await _unless(stop, start())
        if supervisor is not None:
            if address is not None:
                listen = metrics.Listen(*address, config.metrics_tls)
                stack.enter_context(metrics.serve(supervisor, listen, lambda: server.client_count))
            reloads = Tasks(log)
            stack.push_async_callback(reloads.stop)
            loop.add_signal_handler(signal.SIGHUP, reloads.start, partial(_reload, supervisor), "reload")
            service.supervisor = supervisor
            ready(supervisor)
            alive = asyncio.create_task(keep_alive(), name="mcr-watchdog")
            stack.callback(alive.cancel)
            notify("READY=1", _status_line(supervisor))
            await stop.wait()
        log.info("stopping")
        notify("STOPPING=1")
        service.supervisor = None


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What work returns; None if it is stopped before, which it cleans up after."""
    doing, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([doing, stopped], return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        doing.cancel()
        await asyncio.gather(doing, return_exceptions=True)
        return None
    finally:
        stopped.cancel()


def _status_line(supervisor: Supervisor) -> str:
    attached = sum(1 for interface in supervisor.attached.values() if not interface.pending)
    return f"STATUS={attached} interfaces attached, {len(supervisor.desired.rules)} rules"


async def _reload(supervisor: Supervisor) -> None:
    reloading()
    with surviving(log, "reload changed nothing"):
        await supervisor.reload()
        log.info("reloaded")
    notify("READY=1", _status_line(supervisor))
