"""`make test-compilers`: MCR built, loaded and tested in other releases of Debian, on the running kernel.

relay_kern.c is compiled where it runs, by the compiler that is there, and whether a kernel takes it depends
on what that compiler made of it. So each release's own compiler has its turn, in a root of that release, and
so have its Python and libraries. It must never install anything but in those roots, nor leave anything
mounted or pinned.
"""

import json
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mcr.errors import McrError
from tests.compilers.verdicts import TRACED, counts, judge

SUITES = ("bookworm", "trixie")
TREE = Path(__file__).parents[2]
ROOTS = TREE / "build" / "roots"
RECORDED = Path(__file__).parent / "recorded.json"
STEP_TIMEOUT_S = 1200
SHOWN_LINES = 60
# The root's bpffs is its own and goes with the mount namespace (scripts/in-root), pins and all.
LOAD = f"""
cd /root/mcr; mkdir /sys/fs/bpf/try
.venv/bin/python -m mcr.loader /sys/fs/bpf/try; echo {TRACED}
.venv/bin/python -m mcr.loader /sys/fs/bpf/try --traced"""
KERNEL_TESTS = "cd /root/mcr; MCR_FORBID_SKIPS=1 .venv/bin/python -m pytest tests/kernel"
DEMO = "make --no-print-directory -C /root/mcr demo"
VERSIONS = "libbpfcc", "libllvm*", "gcc", "python3", "libbpf1", "libxdp1", "liburing2"


class StepError(Exception):
    """A step that failed: what it printed, at the end of which it says why."""


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Prints the step and its seconds."""
    print(f"  {what:24}", end="", flush=True)
    started, outcome = time.monotonic(), " failed"
    try:
        yield
        outcome = ""
    finally:
        print(f"{time.monotonic() - started:7.1f} s {outcome}".rstrip(), flush=True)


def _run(*command: str | Path) -> str:
    """What the command printed, errors among it. Raises StepError."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=STEP_TIMEOUT_S, cwd=TREE,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        printed = (error.output or b"").decode(errors="replace")  # bytes, whatever text= says
        raise StepError(f"{printed}\nit took more than {STEP_TIMEOUT_S} s") from error
    if done.returncode:
        raise StepError(done.stdout)
    return done.stdout


def _in_root(root: Path, script: str) -> str:
    return _run("scripts/in-root", root, "sh", "-ec", script)


def _versions(root: Path) -> str:
    """Of what compiles and links there, in Debian's words without its own revisions."""
    shown = r"--showformat=${db:Status-Status} ${Package} ${Version}\n"
    listed = _run("scripts/in-root", root, "dpkg-query", "--show", shown, *VERSIONS)
    return ", ".join(map(" ".join, re.findall(r"^installed (\S+) (?:\d+:)?([\d.]*\d)", listed, re.MULTILINE)))


def _build(suite: str) -> Path:
    root = ROOTS / suite
    with _step("root"):
        _run("scripts/debian-root", suite, root)
    with _step("make build"):
        _run("scripts/build-in-root", root)
    print(f"  {_versions(root)}")
    return root


def _count(root: Path) -> dict[str, int]:
    with _step("compile and load"):
        return counts(_in_root(root, LOAD))


def _compare(counted: dict[str, int], recorded: dict[str, Any]) -> list[str]:
    """Prints every program's numbers; returns what is wrong with them, in one line at most."""
    verdicts = judge(counted, recorded.get("processed", {}))
    since = f"(recorded on Linux {recorded.get('linux', '?')})"
    print(f"  {'processed instructions':24} {'now':>9} {'recorded':>9}   {since}")
    for verdict in verdicts:
        print(f"  {verdict}  {verdict.fault}".rstrip())
    wrong = [verdict for verdict in verdicts if verdict.fault]
    return [f"{len(wrong)} of {len(verdicts)} programs, {wrong[0].program} {wrong[0].fault}"] if wrong else []


def _try(suite: str, recorded: dict[str, Any]) -> list[str]:
    """Everything in one release. Returns what is wrong, a line each."""
    root = _build(suite)
    faults = _compare(_count(root), recorded)
    with _step("tests/kernel"):
        printed = _in_root(root, KERNEL_TESTS)
    print(f"  {printed.splitlines()[-1]}")
    with _step("make demo"):
        printed = _in_root(root, DEMO)
    print(f"  {printed.splitlines()[-1]}")
    return faults


def _reason(printed: str) -> str:
    """The line that says why: the loader's own cause where that is what failed, else the last one."""
    lines = printed.strip().splitlines() or ["it printed nothing"]
    try:
        return str(json.loads(lines[-1])["cause"])
    except (ValueError, TypeError, KeyError):
        return lines[-1]


def _guarded(suite: str, recorded: dict[str, Any]) -> list[str]:
    print(f"Debian {suite}", flush=True)
    try:
        return _try(suite, recorded)
    except StepError as error:
        printed = str(error)
        print("\n".join(printed.splitlines()[-SHOWN_LINES:]), file=sys.stderr, flush=True)
        return [_reason(printed)]


def _record(suites: tuple[str, ...], recorded: dict[str, Any]) -> None:
    linux = ".".join(platform.release().split(".")[:2])
    for suite in suites:
        print(f"Debian {suite}", flush=True)
        recorded[suite] = {"linux": linux, "processed": _count(_build(suite))}
    RECORDED.write_text(json.dumps(recorded, indent=2) + "\n")
    print(f"recorded in {RECORDED.relative_to(TREE)}")


@click.command()
@click.argument("suites", nargs=-1, type=click.Choice(SUITES))
@click.option("--record", is_flag=True, help="Make these counts those that later ones are compared with.")
def main(suites: tuple[str, ...], record: bool) -> None:
    """Build, load and test MCR in SUITES, or in all of them."""
    suites = suites or SUITES
    recorded: dict[str, Any] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if record:
        _record(suites, recorded)
        return
    faults = [f"{suite}: {fault}" for suite in suites for fault in _guarded(suite, recorded.get(suite, {}))]
    if faults:
        raise McrError(
            "; ".join(faults),
            "see above; to accept new numbers: make test-compilers COMPILERS_OPTIONS=--record",
        )
    print(f"passed: {', '.join(suites)}")


def _reported() -> int:
    """Runs the command; an error is one line of cause and one of remedy."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without ending the step
    try:
        main()
    except McrError as error:
        print(f"error: {error}\n  remedy: {error.remedy}", file=sys.stderr)
        return int(error.status)
    except StepError as error:
        print(f"{error}\nerror: {_reason(str(error))}\n  remedy: see the output above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_reported())
