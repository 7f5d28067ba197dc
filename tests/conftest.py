"""What every test shares: the laboratory, the one way to skip, and the check that a session leaves nothing.

A test must never skip by itself: it calls `require` with the probe that says why it cannot run here, and
where nothing may be skipped (CI=true or MCR_FORBID_SKIPS=1) that is a failure.
"""

import itertools
import os
import re
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import pytest

from tests.netns.lab import Lab, leftovers

ALLOWED_SKIPS: frozenset[str] = frozenset(
    {
        "systemd-analyze",  # a machine without systemd has no use for the unit that it would check
        "x86_64",  # the confinement that stands in for systemd is written for one architecture
    }
)
"""Probes that may fail even where skips are forbidden, because no machine of that kind can pass them."""


def require(probe_name: str, ok: bool, evidence: str) -> None:
    """Skips the calling test unless the probe succeeded; the evidence is what the probe saw."""
    __tracebackhide__ = True
    if not ok:
        pytest.skip(f"probe {probe_name}: {evidence}")


def skip_objection(reason: str, environ: Mapping[str, str]) -> str:
    """Why a test must not be skipped for this reason in this environment; empty if it may be."""
    probe = re.search(r"probe (\S+): ", reason)
    if probe is None:
        return f"skipped without a probe, call require() instead: {reason}"
    forbidden = environ.get("CI") == "true" or environ.get("MCR_FORBID_SKIPS") == "1"
    if forbidden and probe[1] not in ALLOWED_SKIPS:
        return f"skips are forbidden here (CI=true or MCR_FORBID_SKIPS=1): {reason}"
    return ""


def _object_to_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if objection := skip_objection(reason, os.environ):
        report.outcome = "failed"
        report.longrepr = objection


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _object_to_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _object_to_skip(report)
    return report


@pytest.fixture(scope="session")
def lab_prefixes() -> Iterator[Iterator[str]]:
    """Names for the laboratories of this session; at its end nothing that bears one may remain."""
    session = f"mcr-t{os.getpid()}-"
    yield (f"{session}{number}" for number in itertools.count(1))
    assert leftovers(session) == []


@pytest.fixture
def lab(lab_prefixes: Iterator[str], tmp_path: Path) -> Iterator[Lab]:
    """An empty laboratory of the test's own. It needs root."""
    require("root", os.geteuid() == 0, f"effective user id is {os.geteuid()}")
    with Lab(next(lab_prefixes), tmp_path) as laboratory:
        yield laboratory
