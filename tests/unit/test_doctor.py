"""`mcr doctor` finds what would stop a start: with the real compiler and verifier, and sources with a fault.

As in test_loader.py, whatever is started in the tree of `spoil` takes MCR and the spoiled bpf/ from there.
"""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mcr._bpf import lib

from mcr import loader
from mcr.errors import McrError
from tests.conftest import require
from tests.unit.conftest import SpoilSource

DOCTOR = (sys.executable, "-m", "mcr.cli.main", "--instance", "none", "doctor")
LOADS, TRACE_LOADS = "BPF programs load", "trace programs load"


@pytest.fixture(autouse=True)
def _no_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("root", os.geteuid() == 0, f"effective user id is {os.geteuid()}")
    monkeypatch.setenv("MCR_RUNTIME_DIR", str(tmp_path))


def doctor(*prefix: str, **options: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status and what is said of the machine, by check."""
    asked = subprocess.run([*prefix, *DOCTOR, "-j"], capture_output=True, text=True, timeout=300, **options)
    assert asked.stderr == ""
    return asked.returncode, {row["check"]: row for row in json.loads(asked.stdout) if not row["interface"]}


def test_the_real_programs_are_loaded_and_nothing_is_pinned() -> None:
    pins = 'find /sys/fs/bpf -type f ! -name "*.debug" >&2'  # those two are in every bpffs
    own_bpffs = f'mount -t bpf bpf /sys/fs/bpf && "$@"; status=$?; {pins}; exit $status'
    status, found = doctor("unshare", "--mount", "--propagation", "private", "sh", "-c", own_bpffs, "sh")
    assert status == 0
    for check in (LOADS, TRACE_LOADS):
        assert found[check]["answer"] == "yes"
        assert found[check]["evidence"].startswith("MCR's own were compiled and loaded in ")
    assert (found["/proc"]["answer"], found["/proc"]["evidence"]) == ("yes", "mounted")


def test_what_the_verifier_refuses_is_missing_in_its_words(spoil: SpoilSource) -> None:
    spoil("relay_parse.h", "if ((void *)(cursor + 2) > data_end)\n\t\treturn MCR_PARSED_OTHER;\n", "")
    asked = subprocess.run(DOCTOR, capture_output=True, text=True, timeout=300)
    assert asked.returncode == 1
    lines = asked.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith(LOADS)]
    assert "the kernel refused mcr_relay: Permission denied: R" in lines[at]
    assert lines[at].endswith(" offset is outside of the packet")
    assert lines[at + 1] == (
        "  remedy: try another kernel or BPF compiler, and report it with all that this prints: "
        f"{sys.executable} -m mcr.loader --try"
    )
    assert f"MCR needs: {LOADS}" in lines
    assert "as far as can be told" not in asked.stdout
    assert not [line for line in lines if line.startswith(TRACE_LOADS)]


def test_the_command_of_the_remedy_prints_versions_and_the_whole_log(spoil: SpoilSource) -> None:
    spoil("relay_parse.h", "if ((void *)(cursor + 2) > data_end)\n\t\treturn MCR_PARSED_OTHER;\n", "")
    tried = subprocess.run(loader.TRY_BY_HAND.split(), capture_output=True, text=True, timeout=300)
    assert tried.returncode == 1
    log = tried.stderr.splitlines()
    assert log[0].startswith(f"Linux {platform.release()} {platform.machine()}, bcc ")
    assert any(line.startswith("0: R1=ctx(") for line in log)  # the program's first instruction
    assert any(line.endswith(" offset is outside of the packet") for line in log)
    assert json.loads(tried.stdout)["cause"].startswith("the kernel refused mcr_relay: Permission denied: ")


def test_only_traces_suffer_from_what_only_they_need(spoil: SpoilSource) -> None:
    spoil(
        "relay_kern.c",
        "rule_id = rule ? rule->rule_id : 0;\n\t\ttold->event.queue",
        "rule_id = rule->rule_id;\n\t\ttold->event.queue",
    )
    status, found = doctor()
    assert (status, found[LOADS]["answer"], found[TRACE_LOADS]["answer"]) == (0, "yes", "no")
    assert "the kernel refused mcr_trace_begin: Permission denied: R" in found[TRACE_LOADS]["evidence"]
    assert not found[TRACE_LOADS]["needed"]


def test_what_does_not_compile_is_missing_in_the_compilers_words(spoil: SpoilSource) -> None:
    spoil("relay_kern.c", "u32 rule_id, frame_length;", "u32 rule_id; no_such_type frame_length;")
    status, found = doctor()
    assert (status, found[LOADS]["answer"], found[LOADS]["needed"]) == (1, "no", True)
    assert found[LOADS]["evidence"].startswith("relay_kern.c does not compile: ")
    assert "error: use of undeclared identifier 'no_such_type'" in found[LOADS]["evidence"]
    assert found[LOADS]["remedy"] == f"see it whole: {loader.TRY_BY_HAND}"


@pytest.mark.parametrize(
    ("files", "evidence"),
    [
        (12, "cannot make the BPF maps: Too many open files"),
        (24, "cannot make the BPF maps: Too many open files"),
    ],
)
def test_too_few_open_files_are_named_with_the_limit_to_raise(files: int, evidence: str) -> None:
    assert files < lib.MCR_MAX_OUTPUTS

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    status, found = doctor(preexec_fn=limit)
    assert (status, found[LOADS]["evidence"]) == (1, evidence)
    assert found[LOADS]["remedy"] == "raise the limit of open files (ulimit -n, LimitNOFILE=)"


def test_without_proc_a_start_and_doctor_say_what_to_mount() -> None:
    hide = ["unshare", "--mount", "--propagation", "private"]
    hide += ["sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    asked = subprocess.run([*hide, *DOCTOR], capture_output=True, text=True, timeout=300)
    assert (asked.returncode, asked.stderr) == (1, "")
    assert "MCR needs: /proc\n" in asked.stdout
    run = [*hide, sys.executable, "-m", "mcr.cli.main", "--instance", "none", "run"]
    started = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert started.returncode == 1
    assert started.stderr == (
        "mcr: /proc cannot be read: No such file or directory\n  remedy: mount -t proc proc /proc\n"
    )


@pytest.mark.parametrize("release", ["5.15.0-91-generic", "6.0.9", "4.19.0"])
def test_an_older_kernel_is_the_remedy_whatever_failed(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    assert loader._remedy(22) == f"use Linux 6.1 or later; this is {release}"


def test_a_start_that_the_verifier_refuses_says_the_same(spoil: SpoilSource) -> None:
    spoil("relay_parse.h", "if ((void *)(cursor + 2) > data_end)\n\t\treturn MCR_PARSED_OTHER;\n", "")
    with pytest.raises(McrError) as caught:
        loader.try_loading(traced=False)
    assert caught.value.remedy.endswith(f": {loader.TRY_BY_HAND}")
