"""A worker that a test commands itself, through `WorkerProcess`, over the real XDP program and maps.

The calling thread is in the relay's namespace meanwhile. This module must never assert what a test is about.
"""

import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Literal

from mcr._bpf import ffi

from mcr import loader
from mcr.attached import NOBODY
from mcr.desired import FRAME_COUNT, OutputSpec, RuleSpec, WorkerSetup
from mcr.maps import Maps, lookups_needed, rule_key
from mcr.sockets import open_output, open_packets
from mcr.stream import Stream, parse_output, parse_stream
from mcr.worker import COMMAND, WorkerProcess
from tests.netns.lab import Lab, Namespace

FRAME_LIMIT, FRAME_SIZE, LARGEST_PAYLOAD, SLOT = 1522, 2048, 1472, 1


class Driven:
    """One worker on in0 of a namespace, with what it needs of the supervisor. Ids are the test's to give."""

    def __init__(self, maps: Maps, worker: WorkerProcess, ifindex: int, ingress: str) -> None:
        self.maps = maps
        self.worker = worker
        self._ifindex = ifindex
        self._ingress = ingress
        self._streams: list[Stream] = []

    async def add_output(self, output_id: int, text: str) -> None:
        output = parse_output(text)
        ifindex = socket.if_nametoindex(output.interface) if output.interface else 0
        with open_output(output, ifindex) as udp:
            await self.worker.add_output(OutputSpec(output_id, output, ifindex, LARGEST_PAYLOAD), udp)

    async def set_rule(self, rule_id: int, text: str, output_ids: Sequence[int]) -> None:
        stream = parse_stream(text)
        key = rule_key(stream, self._ifindex)
        spec = RuleSpec(rule_id, bytes(ffi.buffer(key)), FRAME_LIMIT, tuple(output_ids))
        await self.worker.set_rule(spec)
        if self._ingress == "xsk":
            self._streams.append(stream)
            self.maps.set_lookups(lookups_needed(self._streams))
            self.maps.set_rule(key, {"rule_id": rule_id, "xsk_base": 0, "frame_limit": FRAME_LIMIT})

    def leave_maps(self) -> None:
        """Takes its rules and its socket out of the maps, so that packets go to the stack."""
        for stream in self._streams:
            self.maps.delete_rule(rule_key(stream, self._ifindex))
        self.maps.delete_xsk(0)

    async def delete_rule(self, rule_id: int, text: str) -> None:
        if self._ingress == "xsk":
            self.maps.delete_rule(rule_key(parse_stream(text), self._ifindex))
        await self.worker.delete_rule(rule_id)


@contextlib.contextmanager
def loaded(lab: Lab, namespace: Namespace) -> Iterator[Maps]:
    """The program, attached to in0, and its maps."""
    with lab.inside(namespace):
        loader.load(namespace.name)
        try:
            with Maps(namespace.name) as maps:
                link = loader.attach(maps.program_fd, "in0", socket.if_nametoindex("in0"), "native")
                with contextlib.closing(link):
                    yield maps
        finally:
            loader.unload(namespace.name)


@contextlib.asynccontextmanager
async def driven(
    maps: Maps,
    ingress: Literal["xsk", "packet"],
    *,
    egress_threads: int = 0,
    cpus: tuple[int, ...] = (),
    command: Sequence[str] = COMMAND,
) -> AsyncIterator[Driven]:
    """A worker that takes the traffic of in0; shut down at the end, which must go well."""
    ifindex = socket.if_nametoindex("in0")
    setup = WorkerSetup(
        "in0", ifindex, SLOT, ingress, "auto", False, True, 0, 1, FRAME_SIZE, FRAME_COUNT, NOBODY, NOBODY,
        egress_threads, cpus,
    )  # fmt: skip
    worker = await WorkerProcess.spawn("in0", command=command)
    try:
        if ingress == "xsk":
            (xsk,), _ = await worker.set_up(setup, maps.counter_fds)
            maps.set_xsk(0, xsk)
            os.close(xsk)
        else:
            (packet,) = open_packets("in0", ifindex, 1)
            with packet:
                await worker.set_up(setup, (*maps.counter_fds, packet.fileno()))
            await worker.ping()  # opens the ingress
        relay = Driven(maps, worker, ifindex, ingress)
        yield relay
        relay.leave_maps()
        await worker.shut_down()
        ended = worker.process.returncode, worker.last_words
        assert ended == (0, ""), ended
    finally:
        if worker.process.returncode is None and sys.exc_info()[0] is not None:
            worker.kill()
            await worker.end()
