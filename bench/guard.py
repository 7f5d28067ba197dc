"""The regression guard: this run's ratios against those recorded in recorded.json.

Only ratios of relays that took turns in one run are compared, never absolute figures, because those say
nothing from one run or machine to the next. Pure but for reading and writing one file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.results import Results
from bench.targets import TARGETS
from mcr.errors import McrError

RECORDED = Path(__file__).with_name("recorded.json")
TOLERANCE = 0.2
GUARDED = {target.name: target for target in TARGETS if target.unit == "x"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One ratio, then and now; now is None if this run has no figure."""

    name: str
    recorded: float
    now: float | None

    @property
    def change(self) -> float:
        """As a share of what was recorded; -1 if there is no figure."""
        return (self.now or 0.0) / self.recorded - 1

    @property
    def fallen(self) -> bool:
        return self.change < -TOLERANCE

    def __str__(self) -> str:
        what = GUARDED[self.name].what if self.name in GUARDED else self.name
        now = "no figure" if self.now is None else f"{self.now:.2f} x, {self.change:+.0%}"
        return f"{'FALLEN' if self.fallen else 'ok':6} {what}: recorded {self.recorded:.2f} x, now {now}"


def ratios(results: Results) -> dict[str, float]:
    """The ratios that are guarded, of those that this run has."""
    figures = {name: target.figure(results) for name, target in GUARDED.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def compare(recorded: Mapping[str, float], now: Mapping[str, float]) -> list[Verdict]:
    """Every recorded ratio with what it is now. A recorded one that has no figure now has fallen."""
    return [Verdict(name, value, now.get(name)) for name, value in recorded.items()]


def write(path: Path, results: Results) -> None:
    """Records the ratios of a run. Raises McrError if one is missing."""
    found = ratios(results)
    if missing := sorted(GUARDED.keys() - found.keys()):
        raise McrError(
            f"the run has no figure for {', '.join(missing)}", "measure the targets on a quiet machine"
        )
    content = {"machine": results.machine, "ratios": {name: round(each, 3) for name, each in found.items()}}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> dict[str, float]:
    """The recorded ratios. Raises McrError."""
    try:
        recorded = json.loads(path.read_text())["ratios"]
        if not recorded or not all(float(value) > 0 for value in recorded.values()):
            raise ValueError("no ratios above 0")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise McrError(f"cannot read {path}: {error}", "record a run: python -m bench record") from error
    return {str(name): float(value) for name, value in recorded.items()}
