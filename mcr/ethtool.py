"""What a driver says of its device: its name and its offloads (linux/ethtool.h).

It only reads. Both answer with nothing where the driver, or a kernel without ethtool, does not tell.
"""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct

from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool

SIOCETHTOOL = 0x8946  # linux/sockios.h
ETHTOOL_GDRVINFO = 3
DRIVER_INFO_BYTES = 196  # struct ethtool_drvinfo, whose name of 32 bytes comes after the command

MERGES = ("rx-udp-gro-forwarding", "rx-gro-list")


def driver(name: str) -> str:
    """The name of an interface's driver, empty if it is not told."""
    info = ctypes.create_string_buffer(struct.pack("=I", ETHTOOL_GDRVINFO), DRIVER_INFO_BYTES)
    request = struct.pack("16sP16x", os.fsencode(name), ctypes.addressof(info))
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCETHTOOL, request)
        return info.raw[4:36].partition(b"\0")[0].decode(errors="replace")
    return ""


def features(name: str) -> dict[str, bool]:
    """Which offloads are on now, by the kernel's names; empty if they are not told."""
    with contextlib.suppress(EthtoolError, OSError), contextlib.closing(IoctlEthtool(name)) as ethtool:
        return {feature: bool(active) for feature, active, *_ in ethtool.get_features()}
    return {}
