"""The worker process: `python -m mcr.uring_egress FD`, FD being its end of the supervisor's command socket.

All that Python does is start the C core and print its last words, one line, when it fails. It must
never import more than it needs: its memory is the worker's memory.
"""

import signal
import sys

from mcr.uring_egress._core import ffi, lib


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which then shuts us down
    message = ffi.new("char[]", 256)
    status = lib.mcr_worker_run(int(sys.argv[1]), message, len(message))
    if status:
        print(ffi.string(message).decode(errors="replace"), file=sys.stderr, flush=True)
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
