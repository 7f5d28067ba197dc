"""What leaves an interface for one output, as the stack hands it to the device, for captures.

An AF_PACKET socket (packet(7)) whose filter takes outgoing packets to the output's destination alone. It must
never delay a packet: what it does not read in time, the kernel drops from the socket and counts.
"""

import errno
import socket
import struct
import time
from ipaddress import IPv4Address

from mcr.errors import McrError
from mcr.rule import InterfaceFacts
from mcr.sockets import ETH_P_ALL, PACKET_VNET_HDR, SOL_PACKET
from mcr.stream import Output
from mcr.tap_events import encode_sent

PACKET_STATISTICS = 6  # linux/if_packet.h
PACKET_OUTGOING = 4
SO_ATTACH_FILTER = 26  # asm-generic/socket.h, as are the two below
SO_TIMESTAMPNS = SCM_TIMESTAMPNS = 35
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER_BYTES = 16 << 20
LARGEST_FRAME = (1 << 16) + 64  # a super-packet and its Ethernet header
READS = 256  # in one turn of the supervisor
VIRTIO_HEADER = struct.Struct("=BBHHHH")  # struct virtio_net_hdr: flags, GSO type, header, segment, checksum
NEEDS_CHECKSUM, GSO_UDP_L4 = 1, 5
TIMESPEC = struct.Struct("=qq")

# Classic BPF (linux/filter.h, linux/bpf_common.h).
LOAD_WORD, LOAD_HALF, LOAD_BYTE, LOAD_HALF_AT_X, LOAD_X_HEADER = 0x20, 0x28, 0x30, 0x48, 0xB1
JUMP_EQUAL, JUMP_SET, RETURN = 0x15, 0x45, 0x06
NETWORK, ANCILLARY = -0x100000, -0x1000  # SKF_NET_OFF, SKF_AD_OFF
PROTOCOL, PACKET_TYPE = ANCILLARY, ANCILLARY + 4
ETHERTYPE_IPV4, ETHERTYPE_IPV6, UDP, FRAGMENT = 0x0800, 0x86DD, 17, 44
TAKE, LEAVE = "take", "leave"

_Step = tuple[int, int, str, str]  # code, operand, where to go if true and if false; empty is the next one


def _compare(code: int, where: int, value: int) -> list[_Step]:
    """Loads from a place; another value than this one leaves the packet."""
    return [(code, where & 0xFFFFFFFF, "", ""), (JUMP_EQUAL, value, "", LEAVE)]


def output_filter(output: Output) -> bytes:
    """The filter program: outgoing datagrams to the output, and later fragments to its address."""
    steps = _compare(LOAD_BYTE, PACKET_TYPE, PACKET_OUTGOING)
    words = struct.unpack(f"!{len(output.address.packed) // 4}I", output.address.packed)
    if isinstance(output.address, IPv4Address):
        steps += _compare(LOAD_HALF, PROTOCOL, ETHERTYPE_IPV4) + _compare(LOAD_BYTE, NETWORK + 9, UDP)
        steps += _compare(LOAD_WORD, NETWORK + 16, words[0])
        steps += [(LOAD_HALF, NETWORK + 6 & 0xFFFFFFFF, "", ""), (JUMP_SET, 0x1FFF, TAKE, "")]
        steps += [(LOAD_X_HEADER, NETWORK & 0xFFFFFFFF, "", "")]
        port_at = (LOAD_HALF_AT_X, NETWORK + 2 & 0xFFFFFFFF)
    else:
        steps += _compare(LOAD_HALF, PROTOCOL, ETHERTYPE_IPV6)
        for index, word in enumerate(words):
            steps += _compare(LOAD_WORD, NETWORK + 24 + 4 * index, word)
        steps += [(LOAD_BYTE, NETWORK + 6 & 0xFFFFFFFF, "", ""), (JUMP_EQUAL, FRAGMENT, TAKE, "")]
        steps += [(JUMP_EQUAL, UDP, "", LEAVE)]
        port_at = (LOAD_HALF, NETWORK + 42 & 0xFFFFFFFF)
    if output.port is not None:
        steps += [(*port_at, "", ""), (JUMP_EQUAL, output.port, "", LEAVE)]
    return _assemble(steps)


def _assemble(steps: list[_Step]) -> bytes:
    """`struct sock_filter` for each step, then the two endings."""
    endings = {TAKE: len(steps), LEAVE: len(steps) + 1}
    code = b""
    for at, (opcode, operand, if_true, if_false) in enumerate(steps):
        jumps = (endings.get(name, at + 1) - at - 1 for name in (if_true, if_false))
        code += struct.pack("=HBBI", opcode, *jumps, operand)
    return code + struct.pack("=HBBI", RETURN, 0, 0, 0xFFFFFFFF) + struct.pack("=HBBI", RETURN, 0, 0, 0)


class EgressTap:
    """The packets of one output from the moment that this exists."""

    def __init__(
        self, rule_id: int, output_id: int, output: Output, facts: InterfaceFacts, snaplen: int
    ) -> None:
        self._ids = rule_id, output_id
        self._facts = facts
        self._snaplen = snaplen
        kind = socket.SOCK_RAW if facts.ethernet else socket.SOCK_DGRAM
        self._socket = socket.socket(socket.AF_PACKET, kind | socket.SOCK_CLOEXEC, 0)
        try:
            self._open(output)
        except OSError as error:
            self._socket.close()
            raise McrError(
                f"cannot capture what leaves {facts.name}: {error.strerror}",
                f"see that it exists and is up: ip link show {facts.name}",
            ) from error

    def _open(self, output: Output) -> None:
        import ctypes

        self._socket.setblocking(False)
        code = output_filter(output)
        memory = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("@HP", len(code) // 8, ctypes.addressof(memory))  # struct sock_fprog
        self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._socket.bind((self._facts.name, ETH_P_ALL))

    def close(self) -> None:
        self._socket.close()

    def read(self, room: int) -> list[bytes]:
        """The events of what has left since the last time, as many as fit into so many bytes."""
        events = []
        to_monotonic_ns = time.monotonic_ns() - time.time_ns()
        for _ in range(READS):
            if room < LARGEST_FRAME:
                break
            try:
                packet, ancillary, _, _ = self._socket.recvmsg(
                    LARGEST_FRAME, socket.CMSG_SPACE(TIMESPEC.size)
                )
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.EINVAL:
                    continue  # before Linux 6.2 the kernel cannot describe a super-packet of UDP
                break  # the interface went down or away: nothing leaves it
            events.append(self._event(packet, ancillary, to_monotonic_ns))
            room -= len(events[-1])
        return events

    def _event(self, packet: bytes, ancillary: list[tuple[int, int, bytes]], to_monotonic_ns: int) -> bytes:
        flags, gso_type, _, segment, checksum_at, _ = VIRTIO_HEADER.unpack_from(packet)
        frame = packet[VIRTIO_HEADER.size :]
        sent_ns = time.time_ns()
        for _, kind, data in ancillary:
            if kind == SCM_TIMESTAMPNS:
                seconds, nanoseconds = TIMESPEC.unpack(data)
                sent_ns = seconds * 1_000_000_000 + nanoseconds
        several = gso_type & 0x7F == GSO_UDP_L4
        partial = checksum_at if flags & NEEDS_CHECKSUM else 0
        whole = several or partial  # they become what they will be on the wire only as a whole
        return encode_sent(
            *self._ids,
            self._facts.ifindex,
            sent_ns + to_monotonic_ns,
            len(frame),
            frame if whole else frame[: self._snaplen],
            segment=segment if several else 0,
            checksum_offset=partial,
        )

    def lost(self) -> int:
        """How many packets the socket had no room for since the last time."""
        _, drops = struct.unpack("=II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        return int(drops)
