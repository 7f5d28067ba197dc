"""Time limits: the factor from the environment, what it lengthens, and what is said of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcr import limits, loader
from mcr.control import ControlClient
from mcr.errors import McrError
from tests.unit.test_control import impostor


@pytest.mark.parametrize(
    ("text", "scale"), [(None, 1.0), ("", 1.0), ("1", 1.0), ("2.5", 2.5), (" 17 ", 17.0), ("1e3", 1000.0)]
)
def test_a_limit_is_multiplied_by_the_factor(
    monkeypatch: pytest.MonkeyPatch, text: str | None, scale: float
) -> None:
    monkeypatch.delenv(limits.VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(limits.VARIABLE, text)
    assert limits.scaled(3.0) == 3.0 * scale


@pytest.mark.parametrize("text", ["0", "0.99", "-1", "nan", "inf", "1001", "fast", "2x"])
def test_what_is_no_factor_is_two_lines_before_anything_is_done(text: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "mcr.cli.main", "status"],
        env=os.environ | {limits.VARIABLE: text},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert not ended.stdout
    assert ended.stderr == (
        f"mcr: MCR_TIME_SCALE={text} is not a factor for time limits\n"
        "  remedy: set it to a number from 1 to 1000, or unset it\n"
    )


def test_an_error_names_the_limit_as_it_was_and_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(limits.VARIABLE, "3")
    path = tmp_path / "a.sock"
    with (
        impostor(path, None),
        ControlClient(path, timeout_s=0.1) as client,
        pytest.raises(McrError, match=r"did not answer within 0\.3 s") as failed,
    ):
        client.call("echo")
    assert failed.value.remedy.endswith("; on a slow machine set MCR_TIME_SCALE=6")


def test_a_compiler_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "COMPILE_TIMEOUT_S", 0.01)  # before Python has started
    monkeypatch.setenv(limits.VARIABLE, "2")
    with pytest.raises(McrError, match=r"compiling took more than 0\.02 s") as failed:
        loader._in_child(tmp_path)
    assert "MCR_TIME_SCALE=4" in failed.value.remedy
