"""The worker process: `python -m mcr.uring_egress FD`, FD being its end of the supervisor's command socket.

All that Python does is say hello, start the C core and print its last words, one line, when it fails. It
must never import more than it needs: its memory is the worker's memory.
"""

import os
import signal
import sys

from mcr import __version__
from mcr.uring_egress._core import ffi, lib


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which then shuts us down
    try:
        os.write(int(sys.argv[1]), f"mcr {__version__} ABI {lib.MCR_ABI_VERSION:08x}".encode())
    except OSError:
        os._exit(1)  # the supervisor is gone
    message = ffi.new("char[]", 256)
    status = lib.mcr_worker_run(int(sys.argv[1]), message, len(message))
    if status:
        os.write(2, ffi.string(message) + b"\n")
    # The worker is confined now: Python's own way out needs more system calls than it is left with.
    os._exit(1 if status else 0)


if __name__ == "__main__":
    main()
