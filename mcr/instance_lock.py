"""One supervisor for each instance: a lock that lies where what it protects does, among the pins.

A control socket's file can be removed by whoever cleans /run, and an abstract socket is a network namespace's
own, while instances of all of them share the pins. This module must never wait for the lock.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mcr import loader
from mcr.errors import ExitStatus, McrError


def lock_dir(instance: str) -> Path:
    """The directory that is locked; no instance has its name."""
    return loader.pin_dir(f"{instance}~lock")


@contextlib.contextmanager
def held(instance: str) -> Iterator[None]:
    """The lock, and the directory for as long. Raises McrError if a supervisor of the instance is running."""
    loader.ensure_bpffs()
    directory = lock_dir(instance)
    try:
        descriptor = _lock(directory)
    except BlockingIOError:
        raise McrError(
            f"a supervisor of instance {instance} is already running",
            "stop that one, or choose another --instance",
        ) from None
    except OSError as error:
        raise McrError(
            f"cannot lock {directory}: {error.strerror}",
            "run mcr as root, with bpffs writable",
            status=ExitStatus.NOT_PERMITTED if isinstance(error, PermissionError) else ExitStatus.FAILED,
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()
            directory.parent.rmdir()  # only when no other instance has pins
        os.close(descriptor)


def _lock(directory: Path) -> int:
    """A descriptor of the locked directory. Raises BlockingIOError if another has the lock."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened, contextlib.suppress(FileNotFoundError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == directory.stat().st_ino:
                opened.pop_all()
                return descriptor
            # else: who had it has removed it meanwhile
