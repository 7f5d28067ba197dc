"""`python -m bench.throughput`: throughput of MCR's paths against its peers, in one run, as a Markdown table.

It must run as root, in a source tree, and leaves nothing behind.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import click

from bench.measure import FULL, QUICK, Bench, Measured, Method
from bench.relays import Mcr, McrPath, Relay, Smcroute, Socat
from bench.traffic import Streams, before_other_sessions
from mcr.errors import McrError
from tests.netns.lab import Lab

PREFIX = "mcr-bench"
MAX_OUTPUTS = 30  # VIFs of the kernel's multicast routing: 32, one for the input


class _Words(click.ParamType[tuple[str, ...]]):
    """Words or numbers with commas between them."""

    name = "LIST"

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(str(value).split(",")))
        for word in words:
            if word not in self.choices:
                self.fail(f"{word!r} is not among {', '.join(self.choices)}", param, ctx)
        return words


@click.command()
@click.option("--paths", type=_Words(get_args(McrPath)), default="kernel,xsk,packet", show_default=True)
@click.option(
    "--outputs", type=_Words(tuple(map(str, range(1, MAX_OUTPUTS + 1)))), default="1,4", show_default=True
)
@click.option("--streams", type=click.IntRange(1, 4000), default=1, show_default=True)
@click.option("--by-group", is_flag=True, help="Streams differ in group instead of port.")
@click.option("--payload", type=click.IntRange(8, 1472), default=1316, show_default=True, help="Bytes.")
@click.option("--trials", type=click.IntRange(1), help="Rounds in which every relay is measured once.")
@click.option("--quick", is_flag=True, help="Short trials, a coarse search: under a minute.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every trial there.")
def main(
    paths: tuple[McrPath, ...],
    outputs: tuple[str, ...],
    streams: int,
    by_group: bool,
    payload: int,
    trials: int | None,
    quick: bool,
    json_path: Path | None,
) -> None:
    """Measures throughput and what is delivered at overload, with ratios to smcroute."""
    method = QUICK if quick else FULL
    if trials is not None:
        method = replace(method, trials=trials)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _check_machine()
        wanted = Streams("239.1.0.1", 5000, streams, payload, by_group)
        results = _run(paths, tuple(map(int, outputs)), wanted, method)
    except McrError as error:
        print(f"error: {error}\n  remedy: {error.remedy}", file=sys.stderr)
        sys.exit(int(error.status))
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1) + "\n")


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise McrError("the benchmark makes network namespaces and loads BPF", "run it as root")
    if len(os.sched_getaffinity(0)) < 2:
        raise McrError("fewer than 2 CPUs", "generator and relay need one each")


def _relays(paths: tuple[McrPath, ...], outputs: int, streams: Streams) -> list[Relay]:
    relays: list[Relay] = [Smcroute(), *map(Mcr, paths)]
    if "packet" in paths and outputs == streams.count == 1:
        relays.append(Socat())
    return relays


def _run(
    paths: tuple[McrPath, ...], outputs: tuple[int, ...], streams: Streams, method: Method
) -> dict[str, Any]:
    """Measures, prints the table, and returns everything for the JSON file."""
    started = time.monotonic()
    print(_title(streams, method), flush=True)
    measured: list[Measured] = []
    with (
        tempfile.TemporaryDirectory(prefix="mcr-bench-", dir="/tmp") as directory,
        Lab(f"{PREFIX}{os.getpid()}", Path(directory)) as lab,
        before_other_sessions(),
    ):
        bench = Bench(lab, streams, method, lambda text: _progress(started, text))
        bench.calibrate()
        for count in outputs:
            rows = bench.compare(_relays(paths, count, streams), count)
            measured += rows
            print("\n" + _table(rows, count) + "\n", flush=True)
    return {
        "machine": _machine(),
        "streams": asdict(streams),
        "method": asdict(method),
        "generator_limit_pps": bench.limit_pps,
        "results": [asdict(row) for row in measured],
    }


def _progress(started: float, text: str) -> None:
    print(f"[{time.monotonic() - started:5.1f} s] {text}", file=sys.stderr, flush=True)


def _title(streams: Streams, method: Method) -> str:
    machine = _machine()
    kind = "groups" if streams.by_group else "ports"
    return (
        f"{streams.count} stream(s) by {kind}, payload {streams.payload_bytes} bytes, {method.trials} rounds,"
        f" {method.seconds:g} s per trial\n"
        f"{machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, smcroute {machine['smcroute']}"
    )


def _machine() -> dict[str, Any]:
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "smcroute": _package_version("smcroute"),
        "socat": _package_version("socat"),
    }


def _package_version(package: str) -> str:
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else "absent"


def _table(rows: list[Measured], outputs: int) -> str:
    """Rates in packets/s at the input, which is what each output then sends; ratios to smcroute."""
    base = next(row for row in rows if row.relay == Smcroute.label)
    lines = [
        f"| {outputs} output(s) | throughput | spread | of smcroute | delivered at overload | of smcroute |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.refusal:
            lines.append(f"| {row.relay} | refused: {row.refusal} | | | | |")
            continue
        lines.append(
            f"| {row.relay} | {row.throughput_pps:,.0f} | {row.spread:.0%}"
            f" | {_ratio(row.throughput_pps, base, base.throughput_pps)}"
            f" | {row.delivered_pps:,.0f} | {_ratio(row.delivered_pps, base, base.delivered_pps)} |"
        )
    return "\n".join(lines)


def _ratio(rate: float, base: Measured, base_rate: float) -> str:
    return "-" if base.refusal or not base_rate else f"{rate / base_rate:.2f}"


if __name__ == "__main__":
    main()
