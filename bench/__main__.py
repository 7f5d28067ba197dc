"""`python -m bench`: measures MCR and its peers, writes the results, compares them with recorded ones.

It must run as root, in a source tree, and leaves nothing behind but what it is asked to write.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import click

from bench import guard, machine, plots, report
from bench.delays import measure_attach, measure_joins
from bench.lanes import Setting
from bench.latency import measure_relay_latency, measure_sockets
from bench.measure import Bench
from bench.plan import PARTS, QUICK_PARTS, Plan, plan, relays_for
from bench.relays import McrPath
from bench.results import Results
from bench.search import FULL, QUICK, Method
from bench.targets import GROWTH_TARGETS, TARGETS
from bench.traffic import Programs
from mcr.errors import McrError
from tests.netns.lab import Lab, LabError

PREFIX = "mcr-bench"
ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "bench"
DOCUMENT = ROOT / "docs" / "PERFORMANCE.md"
RESULTS_NAME = "results.json"


class _Words(click.ParamType[tuple[str, ...]]):
    """Words with commas between them."""

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


@click.group()
def main() -> None:
    """Measure MCR against kernel multicast routing (smcroute) and socat, in one run on this machine."""


@main.command()
@click.option("--quick", is_flag=True, help="Only the targets, short trials: under 3 minutes.")
@click.option(
    "--parts", type=_Words(tuple(PARTS)),
    help="Only these: " + "; ".join(f"{name}: {what}" for name, what in PARTS.items()) + ".",
)  # fmt: skip
@click.option("--paths", type=_Words(get_args(McrPath)), default="kernel,xsk,packet", show_default=True)
@click.option("--rounds", type=click.IntRange(1), help="In each, every relay is measured once.")
@click.option("--seconds", type=click.FloatRange(0.02), help="Of one trial at one rate.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=OUTPUT, show_default="build/bench",
    help="Directory for results.json, results.md and plots.",
)  # fmt: skip
def run(
    quick: bool,
    parts: tuple[str, ...] | None,
    paths: tuple[McrPath, ...],
    rounds: int | None,
    seconds: float | None,
    out: Path,
) -> None:
    """Measure, and write results.json, results.md and plots."""
    plots.require()
    method = QUICK if quick else FULL
    method = replace(method, rounds=rounds or method.rounds, seconds=seconds or method.seconds)
    wanted = plan(parts or (QUICK_PARTS if quick else tuple(PARTS)), paths)
    results = _measure(wanted, paths, method)
    out.mkdir(parents=True, exist_ok=True)
    results.write(out / RESULTS_NAME)
    text = report.markdown(results, plots.draw(results, out / "plots"))
    (out / "results.md").write_text(text)
    print(text)
    print(f"written: {out / RESULTS_NAME}, {out / 'results.md'}, {out / 'plots'}")


@main.command()
@click.argument("results", type=click.Path(path_type=Path), required=False)
def check(results: Path | None) -> None:
    """Compare ratios with the recorded ones: of RESULTS, or of a quick run of the targets made now."""
    recorded = guard.read(guard.RECORDED)
    paths: tuple[McrPath, ...] = get_args(McrPath)
    measured = Results.read(results) if results else _measure(plan(("targets",), paths), paths, QUICK)
    verdicts = guard.compare(recorded, guard.ratios(measured))
    print("\n".join(map(str, verdicts)))
    if fallen := [verdict.name for verdict in verdicts if verdict.fallen]:
        raise McrError(
            f"more than {guard.TOLERANCE:.0%} below the recorded ratio: {', '.join(fallen)}",
            "find the change that did it; on a busy machine, measure again first",
        )


@main.command()
@click.argument("results", type=click.Path(path_type=Path), default=OUTPUT / RESULTS_NAME)
def record(results: Path) -> None:
    """Make the ratios of RESULTS those that `check` compares with."""
    guard.write(guard.RECORDED, Results.read(results))
    print(f"recorded in {guard.RECORDED}")


@main.command(name="report")
@click.argument("results", type=click.Path(path_type=Path), default=OUTPUT / RESULTS_NAME)
def make_report(results: Path) -> None:
    """Put RESULTS into docs/PERFORMANCE.md, with plots in docs/plots."""
    read = Results.read(results)
    drawn = plots.draw(read, DOCUMENT.parent / "plots")
    report.update_document(DOCUMENT, report.markdown(read, drawn))
    print(f"updated {DOCUMENT}")


def _measure(wanted: Plan, paths: tuple[McrPath, ...], method: Method) -> Results:
    """Everything of the plan, with progress on stderr."""
    machine.check()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", file=sys.stderr, flush=True)

    results = Results({**machine.described(), "mcr": _revision()}, asdict(method))
    with (
        tempfile.TemporaryDirectory(prefix="mcr-bench-", dir="/tmp") as directory,
        machine.before_other_work(),
        Programs() as programs,
    ):
        new_lab = _labs(Path(directory))
        bench = Bench(new_lab, programs, method, progress)
        for number, job in enumerate(wanted.jobs, 1):
            progress(f"setting {number} of {len(wanted.jobs)}: {job.setting.title}")
            bench.measure(job, results)
        if "relay-latency" in wanted.parts:
            for busy_poll in (True, False):
                measure_relay_latency(bench, busy_poll, results)
        if "sockets" in wanted.parts:
            measure_sockets(new_lab, relays_for(Setting(), paths), method, results, progress)
        if "attach" in wanted.parts:
            for path in ("kernel", "xsk"):
                measure_attach(bench, path, method.trials, results)
        if "joins" in wanted.parts:
            measure_joins(bench, method.trials, results)
    for target in (*TARGETS, *GROWTH_TARGETS):
        if (figure := target.figure(results)) is not None and not target.met(figure):
            progress(f"missed: {target.what}: {figure:.2f} {target.unit}, {target.direction} {target.value}")
    return results


def _labs(directory: Path) -> Callable[[], Lab]:
    """A new laboratory, for one job, with every call."""
    made: list[Lab] = []

    def new_lab() -> Lab:
        place = directory / str(len(made))
        place.mkdir()
        made.append(Lab(f"{PREFIX}{os.getpid()}-{len(made)}", place))
        return made[-1]

    return new_lab


def _revision() -> str:
    """The commit that is measured, or nothing outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _reported() -> int:
    """Runs the command; an error is one line of cause and one of remedy."""
    try:
        main()
    except McrError as error:
        print(f"error: {error}\n  remedy: {error.remedy}", file=sys.stderr)
        return int(error.status)
    except LabError as error:
        print(f"error: {error}\n  remedy: see the message; this is a bug of bench", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_reported())
