"""The one trace or capture that a supervisor runs at a time: started, read in parts and stopped by its id.

The traced programs and the workers tell, and none of them waits: this reads what they tell every few
milliseconds and keeps it for the client, up to a limit. Beyond it, it does not read, and what finds the
kernel's rings full is counted there. A trace ends by its count, its time, its client's silence or the
supervisor's end, and everything that it put in place is taken back. This module must never decode what is
told: clients do.
"""

import asyncio
import base64
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mcr import loader
from mcr._bpf import ffi, lib
from mcr.errors import McrError
from mcr.limits import scaled
from mcr.maps import Maps
from mcr.tap_egress import EgressTap

POLL_S = 0.01
LEASE_S = 3.0  # without a word from the client
SETTLE_S = 0.2  # for what workers have under way when the last packet has been taken
CHUNK_BYTES = 1 << 20
KEPT_BYTES = 8 << 20
RING_BYTES = 4 << 20  # more than the rings hold
FOREVER = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class TapRequest:
    """What shall be told.

    key: of the packets wanted, zero is any, where rule_id is 0. bytes_before, bytes_after: of each packet.
    reports: whether the workers shall report.
    """

    what: str
    key: Any
    rule_id: int
    limit: int
    timeout_s: float
    bytes_before: int = 0
    bytes_after: int = 0
    reports: bool = True


@dataclass(slots=True)
class _Run:
    """A trace or capture from its start until its client has read the rest."""

    number: int
    request: TapRequest
    reader: Any
    egress: Sequence[EgressTap]
    deadline_s: float
    heard_s: float
    lost: int = 0  # by sockets and workers' reports; the ring's own are in its map
    missed: int = 0
    kept: deque[bytes] = field(default_factory=deque)
    kept_bytes: int = 0
    settling: bool = False
    done: bool = False


class Tap:
    """Runs traces and captures for a supervisor."""

    def __init__(self, instance: str, maps: Maps) -> None:
        self._instance = instance
        self._maps = maps
        self._buffer = ffi.NULL
        self._loaded = False
        self._number = 0
        self._turn = asyncio.Lock()
        self._run: _Run | None = None
        self._collector: asyncio.Task[None] | None = None

    async def start(self, request: TapRequest, egress: Sequence[EgressTap] = ()) -> int:
        """Begins one. Returns its id. Raises McrError if another one runs; egress is this one's to close."""
        async with self._turn:
            try:
                if self._run is not None:
                    left_s = max(1.0, self._run.deadline_s - time.monotonic())
                    raise McrError(
                        f"another {self._run.request.what} is running",
                        f"wait until it ends, {left_s:.0f} s from now at the latest",
                    )
                if not self._loaded:
                    await asyncio.to_thread(loader.load_traced, self._instance)
                    self._loaded = True
                self._begin(request, egress)
            except BaseException:
                for tap in egress:
                    tap.close()
                raise
            return self._number

    def _begin(self, request: TapRequest, egress: Sequence[EgressTap]) -> None:
        reader = lib.mcr_tap_open(self._maps.descriptor("tap_events"), self._maps.descriptor("tap_reports"))
        if reader == ffi.NULL:
            raise McrError("cannot map the ring of trace events", "free memory, and try again")
        if self._buffer == ffi.NULL:
            self._buffer = ffi.new("char[]", CHUNK_BYTES)
        while lib.mcr_tap_read(reader, self._buffer, CHUNK_BYTES) > 0:
            pass  # what an earlier one left
        now_s = time.monotonic()
        self._number += 1
        self._run = _Run(self._number, request, reader, egress, now_s + request.timeout_s, now_s)
        self._maps.set_tap(
            request.key,
            rule_id=request.rule_id,
            deadline_ns=time.monotonic_ns() + int(request.timeout_s * 1e9),
            limit=request.limit,
            bytes_before=request.bytes_before,
            bytes_after=request.bytes_after,
        )
        lib.mcr_tap_want_reports(reader, request.reports)
        self._maps.set_tracing(True)
        self._collector = asyncio.create_task(self._collect(self._run), name="mcr-tap")

    async def read(self, number: int) -> dict[str, Any]:
        """What was told since the last time, as base64 of events; done says that there will be no more."""
        run = self._find(number)
        run.heard_s = time.monotonic()
        chunk = b""
        while run.kept and len(chunk) + len(run.kept[0]) <= CHUNK_BYTES:
            chunk += run.kept.popleft()
        run.kept_bytes -= len(chunk)
        taken, lost = self._maps.tap_counts()
        answer = {
            "events": base64.b64encode(chunk).decode(),
            "taken": taken,
            "lost": lost + run.lost,
            "done": run.done and not run.kept,
        }
        if answer["done"]:
            await self.stop(number)
        return answer

    async def stop(self, number: int) -> None:
        """Ends one, wherever it is; one that has ended is no error."""
        if self._run is not None and self._run.number == number:
            await self.close()

    async def close(self) -> None:
        """Ends what is running."""
        async with self._turn:
            if self._collector is not None:
                self._collector.cancel()
                await asyncio.gather(self._collector, return_exceptions=True)
            self._collector = self._run = None

    def _find(self, number: int) -> _Run:
        if self._run is None or self._run.number != number:
            raise McrError(f"trace {number} has ended", "begin another one, and read it every second")
        return self._run

    async def _collect(self, run: _Run) -> None:
        """From the start to the end, and then until the client has read the rest or is silent."""
        try:
            while not self._is_over(run):
                self._drain(run, KEPT_BYTES)
                await asyncio.sleep(POLL_S)
            self._hush(run)
            self._drain(run, KEPT_BYTES + RING_BYTES)  # what is left in the rings has been told after all
        finally:
            self._release(run)
        left_s = 0.0
        while left_s >= 0:
            await asyncio.sleep(left_s)
            left_s = run.heard_s + scaled(LEASE_S) - time.monotonic()
        self._run = None

    def _is_over(self, run: _Run) -> bool:
        now_s = time.monotonic()
        if not run.settling and self._maps.tap_counts()[0] >= run.request.limit:
            run.settling = True
            run.deadline_s = min(run.deadline_s, now_s + scaled(SETTLE_S))
        return now_s > run.deadline_s or now_s - run.heard_s > scaled(LEASE_S)

    def _hush(self, run: _Run) -> None:
        """Nothing more is told after this."""
        self._maps.set_tracing(False)
        lib.mcr_tap_want_reports(run.reader, 0)

    def _release(self, run: _Run) -> None:
        self._hush(run)
        lib.mcr_tap_close(run.reader)
        for tap in run.egress:
            tap.close()
        run.done = True

    def _drain(self, run: _Run, limit: int) -> None:
        """Reads what is there, as far as no more than so many bytes are kept then."""
        while run.kept_bytes <= limit - CHUNK_BYTES:
            length = lib.mcr_tap_read(run.reader, self._buffer, CHUNK_BYTES)
            if length > 0:
                self._keep(run, bytes(ffi.buffer(self._buffer, length)))
            if length < CHUNK_BYTES // 2:
                break
        for tap in run.egress:
            for event in tap.read(limit - run.kept_bytes):
                self._keep(run, event)
            run.lost += tap.lost()
        missed = int(lib.mcr_tap_missed(run.reader))
        run.lost += missed - run.missed
        run.missed = missed

    @staticmethod
    def _keep(run: _Run, chunk: bytes) -> None:
        run.kept.append(chunk)
        run.kept_bytes += len(chunk)
