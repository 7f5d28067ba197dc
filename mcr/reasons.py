"""What each drop reason and each error of a send means, and what to do about it: one line each.

The one copy of these words; docs/OPERATIONS.md has the same tables for people. This module must never decide
whether something has happened.
"""

import errno
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that keeps packets from being relayed. about: a word for it, or the text of its output."""

    about: str
    cause: str
    remedy: str


# What limits joins, and the kernel's defaults; of each socket, so that a limit below 1 refuses every join.
JOIN_LIMITS = {
    "net.ipv4.igmp_max_memberships": 20,
    "net.ipv4.igmp_max_msf": 10,
    "net.ipv6.mld_max_msf": 64,
}

# By the names of enum mcr_drop_reason: (meaning, remedy).
RULE_DROPS: dict[str, tuple[str, str]] = {
    "fragment": (
        "the worker path relays no fragments of a datagram",
        "let the sender send datagrams that fit its MTU, or use the kernel path",
    ),
    "truncated": ("the IP packet is longer than its frame", "look for what cuts frames on the way"),
    "bad_length": ("the UDP length contradicts the IP length", "look at the sender"),
    "oversize": (
        "longer than the MTU and the frame pool allow, or merged by GRO",
        "raise the MTU; or --ingress packet; or ethtool -K IFACE rx-udp-gro-forwarding off rx-gro-list off",
    ),
    "no_worker": (
        "no worker drains the receive queue",
        "see mcr status; a worker is replaced by itself, and new receive queues are followed",
    ),
    "no_metadata": (
        "the driver has no XDP metadata, by which clones are told apart, or no room in front of the frame",
        "none is needed if it does not grow: its rules of several outputs take the worker path; "
        "else attach with --mode generic",
    ),
    "unknown_rule": ("the worker did not know the rule (any more)", "none is needed if it does not grow"),
    "no_output": ("no output was in place", "bring up the egress interfaces: mcr rule show NAME"),
    "bad_checksum": (
        "damaged on its way: the IPv4 header's checksum is wrong, or on the worker path UDP's",
        "look for the link or device that damages packets, or for a sender that writes wrong checksums",
    ),
    "receive_ring_full": ("the worker was behind", "give it more of a CPU, or attach with more workers"),
    "fill_ring_empty": (
        "no frame was free: the worker was behind, or its sends did not complete",
        "give the worker more of a CPU, or attach with more workers",
    ),
    "redirect_failed": ("the kernel refused the redirect", "attach again: mcr detach, then mcr attach"),
    "worker_died": ("a worker died with it in its hands", "see the log for why it ended"),
    "ttl_expired": ("it arrived with TTL 0", "let the sender use a greater TTL, or look for a loop"),
}

# By the names of enum mcr_output_drop_reason.
OUTPUT_DROPS: dict[str, tuple[str, str]] = {
    "socket_full": (
        "the socket's buffer was full",
        "the egress interface is slower than the stream: use a faster one, or shape the sender",
    ),
    "unreachable": ("there was no way to it", "see: ip route get ADDRESS, and ip neigh"),
    "link_down": ("the egress interface was down or gone", "ip link set dev IFACE up"),
    "ttl_expired": (
        "ttl=decrement, and the packets came with TTL 1",
        "name a TTL in the output, as in ttl=8, or let the sender use a greater one",
    ),
    "too_large": (
        "the datagrams do not fit the MTU",
        "raise the MTU of the egress interface, or choose --path worker, which fragments",
    ),
    "denied": (
        "the firewall of this host or a policy refused it",
        "let UDP to it pass; see the output rules: nft list ruleset, iptables -S OUTPUT",
    ),
    "send_error": ("the send failed", "see the last error"),
    "pipe_full": (
        "the pipe to the output's egress thread was full",
        "attach with more egress threads, or use a faster egress interface",
    ),
    "worker_died": ("a worker died before the send had completed", "see the log for why it ended"),
    "device_full": (
        "the queue of the egress interface was full",
        "use a faster egress interface, or shape the sender; compare the MTU of a veth's peer",
    ),
}

# What a send can fail with (udp(7), ip(7), ipv6(7)), where it says more than the drop reason.
SEND_ERRORS: dict[int, str] = {
    errno.EPERM: "the firewall dropped it",
    errno.EACCES: "a policy or a prohibiting route refused it, or it is a broadcast address",
    errno.ENETUNREACH: "no route leads there",
    errno.EHOSTUNREACH: "its host does not answer, or an unreachable route leads there",
    errno.EADDRNOTAVAIL: "there is no address to send from",
    errno.ENETDOWN: "the interface is down",
    errno.ENODEV: "the interface has gone",
    errno.ENXIO: "the interface has gone",
    errno.EMSGSIZE: "it does not fit, even in fragments",
    errno.EAGAIN: "the socket's buffer was full",
    errno.ENOBUFS: "the interface's queue was full",
    errno.EINVAL: "a blackhole route leads there, or the kernel refuses the combination of options",
}


def error_words(code: int) -> str:
    """`EPERM, the firewall dropped it`."""
    name = errno.errorcode.get(code, str(code))
    return f"{name}, {SEND_ERRORS[code]}" if code in SEND_ERRORS else name
