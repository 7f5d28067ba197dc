"""Tells systemd what the supervisor is doing (sd_notify(3)); does nothing where nobody listens.

This module must never fail: a service manager that does not answer is no reason to stop relaying.
"""

import asyncio
import contextlib
import os
import socket
import time


def notify(*assignments: str) -> None:
    """Sends assignments such as `READY=1` to $NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    path = "\0" + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        datagram.setblocking(False)
        datagram.sendto("\n".join(assignments).encode(), path)


def reloading() -> None:
    """Says that a reload has begun; READY=1 says that it has ended."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval_s() -> float | None:
    """Half of what WatchdogSec= allows between signs of life, None without it (sd_watchdog_enabled(3))."""
    text, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not text.isdigit() or int(text) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(text) / 2e6


async def keep_alive() -> None:
    """Signs of life from the event loop for as long as it runs."""
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
