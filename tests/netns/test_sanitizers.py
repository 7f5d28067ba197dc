"""The worker under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: no report from any.

It is the real core in a C program (tests/c/worker.c), on real interfaces, without the system call filter,
which the sanitizers' runtimes would not survive.
"""

import asyncio
import logging
import subprocess
from pathlib import Path
from typing import Literal

import pytest

from mcr.abi import BPF_DIR, ROOT, abi_flags
from mcr.maps import Maps
from mcr.uring_egress.build import SOURCES
from mcr.worker import HELLO
from tests.netns.driven import Driven, driven, loaded
from tests.netns.flows import GROUP_HEARD, GROUP_IN, GROUP_SENT, assert_whole, listen, report, spawn_send
from tests.netns.lab import Lab, RelayTopology

CORE = ROOT / "mcr" / "uring_egress"
OPTIONS = "halt_on_error=1:abort_on_error=0:exitcode=99"
THREAD_OPTIONS = f"{OPTIONS}:atexit_sleep_ms=0"  # else it waits a second for races at the very end
PACKETS = 1500
Ingress = Literal["xsk", "packet"]


def build_worker(sanitizers: str, directory: Path) -> Path:
    """Compiles the core, its files side by side, with these sanitizers."""
    flags = ["-g", "-O1", "-D_GNU_SOURCE", "-DMCR_NO_SYSTEM_CALL_FILTER", f"-fsanitize={sanitizers}"]
    flags += ["-fno-sanitize-recover=all", f"-I{CORE}", f"-I{BPF_DIR}", "-pthread", *abi_flags()]
    sources = [ROOT / "tests/c/worker.c", *(CORE / f"{name}.c" for name in SOURCES)]
    objects = [directory / f"{source.parent.name}-{source.stem}.o" for source in sources]
    compilers = [
        subprocess.Popen(["gcc", *flags, "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(sources)
    binary = directory / "worker"
    subprocess.run(["gcc", *flags, *objects, "-luring", "-lxdp", "-lbpf", "-o", binary], check=True)
    return binary


async def relay_under_commands(lab: Lab, topology: RelayTopology, worker: Driven) -> None:
    """A stream to three outputs while another rule and its output come and go."""
    outputs = ["239.2.2.2%out0:6000,ttl=8", "10.2.0.2:6001,ttl=decrement", "[fd02::2]:6002,source=interface"]
    heard_at = [GROUP_HEARD, "10.2.0.2%eth0:6001", "[fd02::2]%eth0:6002"]
    for output_id, output in enumerate(outputs, 1):
        await worker.add_output(output_id, output)
    await worker.set_rule(1, GROUP_IN, [1, 2, 3])
    sinks = [
        listen(lab, topology.dst, stream, "--expect", str(PACKETS), "--idle", "8", "--digest")
        for stream in heard_at
    ]
    options = ("--rate", "5000", "--count", str(PACKETS), "--size", "1316,1316,1316,100,0", "--digest")
    source = spawn_send(lab, topology.src, f"{GROUP_SENT},ttl=5", *options)
    while source.child.poll() is None:
        await worker.add_output(4, "10.2.0.2:6003,source=preserve,dscp=preserve")
        await worker.set_rule(2, "239.1.1.9%in0:*", [1, 4])
        await worker.worker.ping()
        await worker.set_rule(1, GROUP_IN, [1, 2, 3])
        await worker.delete_rule(2, "239.1.1.9%in0:*")
        await worker.worker.delete_output(4)
    sent = report(source)
    for sink in sinks:
        assert_whole(report(sink), sent)


async def check(
    lab: Lab, topology: RelayTopology, maps: Maps, ingress: Ingress, threads: int, command: list[str]
) -> None:
    for id_ in (1, 2, 3, 4):
        maps.clear_rule(id_)
        maps.clear_output(id_)
    async with driven(maps, ingress, egress_threads=threads, command=command) as worker:
        await relay_under_commands(lab, topology, worker)
    counts = maps.rule_counts(1)
    assert (counts.received_packets, counts.relayed_packets) == (PACKETS, PACKETS)
    for output_id in (1, 2, 3):
        output = maps.output_counts(output_id)
        assert (output.relayed_packets, output.sent_packets) == (PACKETS, PACKETS), output
    assert maps.rule_latency(1).count == 3 * PACKETS


EVERY_WAY: list[tuple[Ingress, int]] = [("xsk", 0), ("xsk", 2), ("packet", 0), ("packet", 2)]


@pytest.mark.parametrize(
    ("sanitizers", "ways"),
    [
        ("address,undefined", [("xsk", 2), ("packet", 0)]),
        ("thread", [("xsk", 2)]),
        pytest.param("address,undefined", EVERY_WAY, marks=pytest.mark.soak),
        pytest.param("thread", EVERY_WAY, marks=pytest.mark.soak),
    ],
    ids=["address", "thread", "address-every-way", "thread-every-way"],
)
def test_no_sanitizer_finds_fault_with_the_worker(
    lab: Lab,
    tmp_path: Path,
    sanitizers: str,
    ways: list[tuple[Ingress, int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("ASAN_OPTIONS", OPTIONS)
    monkeypatch.setenv("UBSAN_OPTIONS", OPTIONS)
    monkeypatch.setenv("TSAN_OPTIONS", THREAD_OPTIONS)
    binary = build_worker(sanitizers, tmp_path)
    # Without a random layout of the memory: ThreadSanitizer cannot cope with every one.
    command = ["setarch", "-R", str(binary), HELLO]
    topology = lab.topology_relay()
    with loaded(lab, topology.relay) as maps:
        for ingress, threads in ways:
            asyncio.run(check(lab, topology, maps, ingress, threads, command))
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
