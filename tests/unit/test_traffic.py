"""The test source and sink over local socket pairs: what arrives is known, so the account must be exact."""

import hashlib
import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mcr.cli import listen as listen_cli
from mcr.cli import send as send_cli
from mcr.errors import ExitStatus, McrError
from mcr.stream import parse_output, parse_stream
from mcr.traffic.sink import ListenReport, Sink
from mcr.traffic.sockets import open_sink_socket, open_source_socket
from mcr.traffic.source import Load, SendReport, payload, transmit

STREAM = parse_stream("239.1.1.1%eth0:5000")
WINDOW = 4194304
SECOND_NS = 10**9


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A sending and a receiving end; the latter with the receive timeout that a sink needs."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 50_000))
    return near, far


def received(payloads: Sequence[bytes], *, expect: int | None = None, digest: bool = False) -> ListenReport:
    """The report of a sink that got exactly these payloads."""
    near, far = socket_pair()
    with near, Sink(STREAM, sock=far, digest=digest) as sink:
        sender = threading.Thread(target=lambda: [near.send(item) for item in payloads])
        sender.start()
        report = sink.run(expect=len(payloads), timeout_s=10, grace_s=0)
        sender.join()
        return report if expect is None else sink.run(expect=expect, timeout_s=0.01)


def numbered(sequences: Iterable[int], size: int = 64) -> list[bytes]:
    return [payload(sequence, time.time_ns(), size) for sequence in sequences]


def transmitted(load: Load) -> tuple[SendReport, list[bytes]]:
    """What a source reports, and what it sent."""
    near, far = socket_pair()
    taken: list[bytes] = []

    with near, far:
        far.settimeout(10)
        receiver = threading.Thread(target=lambda: taken.extend(_until_end(far)))
        receiver.start()
        report = transmit(near, "test", load)
        near.send(b"end")
        receiver.join()
    return report, taken


def _until_end(sock: socket.socket) -> list[bytes]:
    return list(iter(lambda: sock.recv(65536), b"end"))


def test_payload_is_sequence_then_time_then_fill() -> None:
    whole = payload(0x0102, 0x0304, 40)
    assert whole[:16] == struct.pack(">QQ", 0x0102, 0x0304)
    assert whole[16:24] == struct.pack("<Q", 0x0103 * 0x9E3779B97F4A7C15 % 2**64)
    assert [payload(0x0102, 0x0304, size) for size in range(41)] == [whole[:size] for size in range(41)]


def test_fill_differs_from_packet_to_packet() -> None:
    assert len({payload(sequence, 0, 64)[16:] for sequence in range(10_000)}) == 10_000


def test_everything_in_order_is_complete() -> None:
    report = received(numbered(range(1000)), expect=1000)
    assert report.complete
    assert (report.packets, report.bytes, report.lost, report.duplicates, report.reordered) == (
        1000,
        64_000,
        0,
        0,
        0,
    )


def test_first_sequence_number_need_not_be_zero() -> None:
    assert received(numbered(range(500, 600))).lost == 0


def test_a_gap_is_lost() -> None:
    report = received(numbered([0, 1, 2, 6, 7]))
    assert (report.lost, report.duplicates, report.reordered) == (3, 0, 0)
    assert not report.complete


def test_missing_packets_at_the_end_are_lost() -> None:
    report = received(numbered(range(7)), expect=10)
    assert (report.packets, report.lost, report.complete) == (7, 3, False)


def test_a_duplicate_does_not_stand_in_for_a_lost_packet() -> None:
    report = received(numbered([0, 1, 1, 3]), expect=4)
    assert (report.packets, report.duplicates, report.lost, report.complete) == (4, 1, 1, False)


def test_a_packet_too_many_is_not_complete() -> None:
    near, far = socket_pair()
    with near, Sink(STREAM, sock=far) as sink:
        for item in numbered([0, 1, 2]):
            near.send(item)
        report = sink.run(expect=2, timeout_s=10)
    assert (report.packets, report.lost, report.complete) == (3, 0, False)


def test_late_packet_is_reordered_not_lost() -> None:
    report = received(numbered([0, 2, 3, 1, 4]))
    assert (report.lost, report.duplicates, report.reordered) == (0, 0, 1)
    assert report.complete


def test_late_duplicate_is_a_duplicate_not_reordered() -> None:
    report = received(numbered([0, 1, 2, 0]))
    assert (report.duplicates, report.reordered) == (1, 0)


def test_sequence_numbers_of_one_window_bit_are_told_apart() -> None:
    report = received(numbered([0, 1, WINDOW, WINDOW + 1, WINDOW + 1]))
    assert (report.duplicates, report.lost) == (1, WINDOW - 2)


def test_what_falls_out_of_the_window_is_stale() -> None:
    report = received(numbered([0, 2 * WINDOW, WINDOW, WINDOW + 1]))
    assert (report.stale, report.reordered, report.duplicates) == (1, 1, 0)
    assert not report.complete


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=100))
def test_counts_agree_with_a_plain_model(sequences: list[int]) -> None:
    seen: set[int] = set()
    duplicates = reordered = 0
    for sequence in sequences:
        duplicates += sequence in seen
        reordered += sequence not in seen and any(sequence < other for other in seen)
        seen.add(sequence)
    report = received(numbered(sequences))
    assert (report.duplicates, report.reordered) == (duplicates, reordered)
    assert report.lost == max(
        max(seen) - min(seen) + 1 - len(seen), len(sequences) - (len(sequences) - duplicates)
    )


@pytest.mark.parametrize("size", [17, 23, 24, 25, 1316, 65507])
def test_one_changed_bit_of_the_fill_is_corrupt(size: int) -> None:
    good = numbered(range(3), size)
    bad = bytearray(good[1])
    bad[-1] ^= 0x01
    report = received([good[0], bytes(bad), good[2]])
    assert (report.packets, report.corrupt, report.lost, report.complete) == (3, 1, 1, False)


def test_foreign_payload_is_corrupt_and_does_not_disturb_the_sequence() -> None:
    report = received(
        [*numbered([0, 1]), b"\xff" * 8, b"no payload of ours, but long enough", *numbered([2])]
    )
    assert (report.corrupt, report.lost, report.duplicates) == (2, 0, 0)


def test_short_payloads_are_counted_and_use_no_sequence_number() -> None:
    report = received([b"", b"\0", bytes(7), *numbered([0, 1], 8), *numbered([2], 15)])
    assert (report.packets, report.bytes, report.unsequenced, report.lost) == (6, 39, 3, 0)
    assert (report.size_min, report.size_max) == (0, 15)
    assert report.latency_min_ns is None


def test_latencies_are_those_of_the_timestamps() -> None:
    sent_ns = time.time_ns() - 1000 * SECOND_NS
    items = [payload(sequence, sent_ns, 64) for sequence in range(199)]
    report = received([*items, payload(199, sent_ns - 1000 * SECOND_NS, 64)])
    assert report.latency_min_ns is not None and report.latency_p50_ns is not None
    assert report.latency_p99_ns is not None and report.latency_max_ns is not None
    assert 1000 * SECOND_NS <= report.latency_min_ns <= report.latency_p50_ns <= report.latency_p99_ns
    assert report.latency_p99_ns < 1100 * SECOND_NS
    assert 2000 * SECOND_NS <= report.latency_max_ns < 2100 * SECOND_NS


def test_timestamp_from_the_future_is_told_and_has_no_latency() -> None:
    report = received([payload(0, time.time_ns() + 3600 * SECOND_NS, 64)])
    assert (report.latency_negative, report.latency_max_ns) == (1, None)


def test_digest_is_over_payloads_in_order_of_arrival() -> None:
    items = [*numbered([3, 1, 2], 1316), b"", b"x", *numbered([3], 65507)]
    assert received(items, digest=True).digest == hashlib.sha256(b"".join(items)).hexdigest()


def test_idle_ends_a_run_only_after_the_first_packet() -> None:
    near, far = socket_pair()
    with near, Sink(STREAM, sock=far) as sink:
        assert sink.run(idle_s=0.01, timeout_s=0.3).packets == 0
        near.send(numbered([0])[0])
        assert sink.run(idle_s=0.01).packets == 1


def test_stop_ends_a_sink_and_the_report_says_so() -> None:
    near, far = socket_pair()
    stop = threading.Event()
    stop.set()
    with near, Sink(STREAM, sock=far) as sink:
        report = sink.run(stop=stop)
    assert (report.interrupted, report.packets) == (True, 0)


@pytest.mark.parametrize("rate", [0, 5_000, 200_000])
@pytest.mark.parametrize("burst", [1, 32, 1024])
def test_source_sends_what_it_reports_in_sequence(rate: float, burst: int) -> None:
    report, taken = transmitted(Load(rate=rate, sizes=[100], count=1500, burst=burst, digest=True))
    assert (report.packets, report.bytes, report.interrupted) == (1500, 150_000, False)
    assert [int.from_bytes(item[:8], "big") for item in taken] == list(range(1500))
    assert taken == [
        payload(number, int.from_bytes(item[8:16], "big"), 100) for number, item in enumerate(taken)
    ]
    assert report.digest == hashlib.sha256(b"".join(taken)).hexdigest()


def test_sizes_are_used_in_turn_and_short_payloads_use_no_sequence_number() -> None:
    sizes = [0, 1, 8, 17, 65507]
    report, taken = transmitted(Load(rate=0, sizes=sizes, count=12, burst=4))
    assert [len(item) for item in taken] == [sizes[index % 5] for index in range(12)]
    assert [int.from_bytes(item[:8], "big") for item in taken if len(item) >= 8] == [0, 1, 2, 3, 4, 5]
    assert report.bytes == sum(len(item) for item in taken)


@pytest.mark.parametrize(("rate", "burst"), [(500.0, 32), (40_000.0, 32), (40_000.0, 1), (0.5, 32)])
def test_source_is_never_ahead_of_its_rate(rate: float, burst: int) -> None:
    count = max(1, round(rate / 4))
    report, taken = transmitted(Load(rate=rate, sizes=[64], count=count, burst=burst))
    assert len(taken) == count
    assert report.seconds >= (count - 1) / rate * 0.999


def test_duration_ends_a_source() -> None:
    report, taken = transmitted(Load(rate=1000, sizes=[64], duration_s=0.25))
    assert report.packets == len(taken)
    assert 1 <= report.packets <= 250


def test_stop_ends_a_source_and_the_report_says_so() -> None:
    near, far = socket_pair()
    stop = threading.Event()
    stop.set()
    with near, far:
        report = transmit(near, "test", Load(), stop)
    assert (report.packets, report.interrupted) == (0, True)


def test_source_whose_peer_is_gone_fails_with_the_number_sent() -> None:
    near, far = socket_pair()
    far.close()
    with near, pytest.raises(McrError, match="failed after 0 packets"):
        transmit(near, "test", Load(rate=0, count=1))


@pytest.mark.parametrize(
    "load",
    [
        Load(sizes=[]),
        Load(sizes=[65508]),
        Load(sizes=[-1]),
        Load(sizes=[1] * 65),
        Load(burst=0),
        Load(burst=1025),
        Load(rate=-1),
        Load(rate=float("nan")),
        Load(count=-1),
        Load(duration_s=0),
    ],
)
def test_source_refuses_what_it_cannot_do(load: Load) -> None:
    near, far = socket_pair()
    with near, far, pytest.raises(McrError) as caught:
        transmit(near, "test", load)
    assert caught.value.status == ExitStatus.USAGE


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("239.1.1.1%lo:*", "no port"),
        ("239.1.1.1%lo:5000,vlan=5", "VLAN"),
        ("239.1.1.1%lo:5000,ttl=decrement", "ttl=decrement"),
        ("239.1.1.1%lo:5000,source=preserve", "source=preserve"),
        ("239.1.1.1%mcr-absent:5000", "there is no interface mcr-absent"),
    ],
)
def test_output_that_no_source_can_send_to_is_an_error(text: str, cause: str) -> None:
    with pytest.raises(McrError, match=cause):
        open_source_socket(parse_output(text))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("239.1.1.1%lo:*", "no port"),
        ("239.1.1.1%lo:5000,vlan=5", "VLAN"),
        ("239.1.1.1%mcr-absent:5000", "there is no interface mcr-absent"),
    ],
)
def test_stream_that_no_sink_can_receive_is_an_error(text: str, cause: str) -> None:
    with pytest.raises(McrError, match=cause):
        open_sink_socket(parse_stream(text), 65536)


@pytest.mark.parametrize("sizes", ["", "a", "1,", "-1", "1.5"])
def test_malformed_sizes_are_wrong_usage(sizes: str) -> None:
    result = CliRunner().invoke(send_cli.command, ["239.1.1.1%lo:5000", "--size", sizes, "--count", "1"])
    assert result.exit_code == ExitStatus.USAGE


def test_reports_are_flat_and_name_every_oddity() -> None:
    report = received([*numbered([0]), payload(1, time.time_ns() + 3600 * SECOND_NS, 64)])
    flat = listen_cli.as_flat(report)
    assert not any(isinstance(value, dict) for value in flat.values())
    assert flat["complete"] is True
    assert "latency negative 1" in listen_cli.describe(report)
    assert "stale" not in listen_cli.describe(report)
