"""A run's results as pictures: how throughput grows with outputs, streams, rules and size, and latency.

It needs matplotlib, which only `make bench` installs. This module must never compute a figure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lanes import Setting
from bench.results import DIRECT_LABEL, LATENCY_SHARES, Results
from mcr.errors import McrError

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 7.0, 4.2, 110


@dataclass(frozen=True, slots=True)
class Growth:
    """One picture: what its horizontal axis is, and which settings lie on it."""

    name: str
    axis: str
    position: Callable[[Setting], int]
    usual: Callable[[int], Setting]
    logarithmic: bool = True


GROWTHS = (
    Growth("outputs", "outputs", lambda setting: setting.outputs, lambda n: Setting(outputs=n)),
    Growth(
        "streams", "streams at once, a rule for each", lambda setting: setting.streams,
        lambda n: Setting(streams=n, rules=n),
    ),
    Growth("rules", "rules installed, 1 stream", lambda setting: setting.rules, lambda n: Setting(rules=n)),
    Growth(
        "sizes", "payload bytes", lambda setting: setting.payload_bytes,
        lambda n: Setting(payload_bytes=n), logarithmic=False,
    ),
)  # fmt: skip


def draw(results: Results, directory: Path) -> list[Path]:
    """Writes a PNG for each picture that has two points or more. Raises McrError without matplotlib."""
    pyplot = require()
    directory.mkdir(parents=True, exist_ok=True)
    paths = [path for growth in GROWTHS if (path := _draw_growth(pyplot, results, growth, directory))]
    if latency := _draw_latency(pyplot, results, directory):
        paths.append(latency)
    return paths


def require() -> Any:
    """What draws. Raises McrError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise McrError(f"cannot draw plots: {error}", "run: scripts/set-up bench") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _draw_growth(pyplot: Any, results: Results, growth: Growth, directory: Path) -> Path | None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in results:
        at = growth.position(record.setting)
        throughput = record.metrics.get("throughput_pps")
        if throughput and record.setting == growth.usual(at) and record.relay != DIRECT_LABEL:
            lines.setdefault(record.relay, []).append((at, throughput / 1e6))
    lines = {label: sorted(points) for label, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, HEIGHT_INCHES))
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    if growth.logarithmic:
        axes.set_xscale("log")
        positions = sorted({at for points in lines.values() for at, _ in points})
        axes.set_xticks(positions, labels=[f"{at:,}" for at in positions], minor=False)
        axes.minorticks_off()
    axes.set(xlabel=growth.axis, ylabel="throughput, million packets/s at the input")
    axes.set_ylim(bottom=0)
    return _finish(pyplot, figure, axes, directory / f"{growth.name}.png")


def _draw_latency(pyplot: Any, results: Results, directory: Path) -> Path | None:
    figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, HEIGHT_INCHES))
    for record in results:
        p50, p99 = (
            [record.metrics.get(f"latency_{share}_{name}_us") for share in LATENCY_SHARES]
            for name in ("p50", "p99")
        )
        if record.setting != Setting() or None in p50 or None in p99:
            continue
        (line,) = axes.plot(LATENCY_SHARES, p99, marker="o", label=f"{record.relay}, p99")
        axes.plot(LATENCY_SHARES, p50, marker=".", linestyle="--", color=line.get_color())
    if not axes.lines:
        pyplot.close(figure)
        return None
    axes.set(xlabel="% of the relay's own throughput", ylabel="latency, µs (dashed: p50)", yscale="log")
    return _finish(pyplot, figure, axes, directory / "latency.png")


def _finish(pyplot: Any, figure: Any, axes: Any, path: Path) -> Path:
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)
    return path
