"""`without_ipv6.py COMMAND…`: runs a command for which the kernel has no IPv6, as with ipv6.disable=1.

A seccomp filter answers socket(AF_INET6, …) as such a kernel does. It must never touch any other call.
"""

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

# linux/filter.h, linux/seccomp.h, linux/prctl.h
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
PR_SET_SECCOMP, FILTER_MODE = 22, 2
SOCKET_CALL = {"x86_64": 41, "aarch64": 198}  # asm/unistd.h
PROGRAM = (
    (LOAD, 0, 0, 0),  # the number of the call (struct seccomp_data)
    (EQUAL, 0, 3, SOCKET_CALL[platform.machine()]),
    (LOAD, 0, 0, 16),  # its first argument
    (EQUAL, 0, 1, socket.AF_INET6),
    (RETURN, 0, 0, REFUSE | errno.EAFNOSUPPORT),
    (RETURN, 0, 0, ALLOW),
)


def main(command: list[str]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in PROGRAM))
    whole = struct.pack("=H6xQ", len(PROGRAM), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(FILTER_MODE), whole, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
