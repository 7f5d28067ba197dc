"""A run's results as Markdown, and the part of docs/PERFORMANCE.md that is made from them.

Pure but for `update_document`. Every number is from the results; this module must never measure, and never
round a refused figure into one.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.lanes import Setting
from bench.results import LATENCY_SHARES, PEER_METRIC, Record, Results
from bench.targets import GROWTH_TARGETS, TARGETS, Target

BEGIN, END = "<!-- bench: made by `python -m bench report` -->", "<!-- bench: end -->"


@dataclass(frozen=True, slots=True)
class Column:
    """A metric in a table: its heading, its name, how a number is written."""

    heading: str
    metric: str
    write: Callable[[float], str]


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _tenths(value: float) -> str:
    return f"{value:,.1f}"


LATENCY_COLUMNS = (
    Column("p50 µs", "p50_us", _tenths),
    Column("p99 µs", "p99_us", _tenths),
    Column("p99.9 µs", "p999_us", _tenths),
    Column("max µs", "max_us", _tenths),
    Column("burst", "burst", _whole),
)
SOCKETS = (
    Column("p50 µs", "socket_p50_us", _tenths),
    Column("p99 µs", "socket_p99_us", _tenths),
    Column("max µs", "socket_max_us", _tenths),
    Column("lost", "socket_lost", _whole),
    Column("duplicates", "socket_duplicates", _whole),
    Column("corrupt", "socket_corrupt", _whole),
)
RELAY_LATENCY = (
    Column("p50 µs, best", "relay_latency_p50_best_us", _tenths),
    Column("p99 µs, best", "relay_latency_p99_best_us", _tenths),
    Column("p99 µs, median", "relay_latency_p99_us", _tenths),
)
DELAYS = (
    Column("attach s", "attach_s", "{:.2f}".format),
    Column("join ms", "join_ms", _tenths),
    Column("join report ms", "join_report_ms", _tenths),
    Column("leave ms", "leave_ms", _tenths),
    Column("leave report ms", "leave_report_ms", _tenths),
)


def markdown(results: Results, plots: Iterable[Path] = ()) -> str:
    """Everything: targets, growth, a table for each setting, latency, delays, plots."""
    sections = [
        _conditions(results),
        "### Targets\n\n" + target_table(results, TARGETS),
        "### Growth\n\n" + target_table(results, GROWTH_TARGETS),
        "### Throughput\n\n" + _throughput_legend() + "\n\n" + "\n\n".join(_setting_tables(results)),
        latency_table(results),
        _metric_section(
            "Relay latency: XDP hook to completed send, 50,000 packets/s", results, RELAY_LATENCY
        ),
        _metric_section("Socket to socket, 20,000 packets/s", results, SOCKETS),
        _metric_section("Delays", results, DELAYS),
        "\n".join(f"![{path.stem}](plots/{path.name})" for path in plots),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _conditions(results: Results) -> str:
    machine, method = results.machine, results.method
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("smcroute", "socat", "python3-bpfcc") if machine.get(name)
    )
    stolen = sum(sum(record.trials.get("stolen_ms", [])) for record in results)
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, {versions}; MCR"
        f" {machine['mcr']}.\n{method['rounds']} rounds, {method['seconds']:g} s for each trial. Load before"
        f" the run {machine['load']:.2f}; the host took {stolen:,.0f} ms of CPU from overload trials."
    )


def target_table(results: Results, targets: Iterable[Target]) -> str:
    """Each target with the figure beside it."""
    lines = ["| what | target | figure | |", "|---|--:|--:|---|"]
    for target in targets:
        figure = target.figure(results)
        told = "not measured" if figure is None else f"{_number(figure)} {target.unit}"
        verdict = "" if figure is None else "reached" if target.met(figure) else "**missed**"
        lines.append(
            f"| {target.what} | {target.direction} {_number(target.value)} {target.unit}"
            f" | {told} | {verdict} |"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.2f}"


def _throughput_legend() -> str:
    return (
        "Packets/s at the inputs; every output sends as many. Medians of the rounds, ratios too. Spread:"
        " from the least to the most of\nthe rounds. CPU: nanoseconds of the whole machine for each packet at"
        " 80 % of the throughput, generator and sink included."
    )


def _setting_tables(results: Results) -> list[str]:
    settings = dict.fromkeys(record.setting for record in results if _has_throughput(record))
    return [setting_table(results, setting) for setting in settings]


def _has_throughput(record: Record) -> bool:
    return "overload_offered_pps" in record.metrics or "throughput_pps" in record.refused


def setting_table(results: Results, setting: Setting) -> str:
    """Every relay in one setting, next to smcroute."""
    lines = [
        f"| {setting.title} | throughput | of smcroute | spread | delivered at overload | of smcroute"
        " | lost at overload | CPU ns | MB, supervisor / worker |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for record in results:
        if record.setting == setting and _has_throughput(record):
            lines.append(f"| {record.relay} | " + " | ".join(_throughput_cells(results, record)) + " |")
    return "\n".join(lines)


def _throughput_cells(results: Results, record: Record) -> list[str]:
    spread, loss = record.spread("throughput_pps"), record.metrics.get("overload_loss_share")
    return [
        _cell(record, "throughput_pps", _whole),
        _of_smcroute(results, record, "throughput_pps"),
        "" if spread is None else f"{spread:.0%}",
        _cell(record, "overload_delivered_pps", _whole),
        _of_smcroute(results, record, "overload_delivered_pps"),
        "" if loss is None else f"{loss:.1%}",
        _cell(record, "cpu_ns_per_packet", _whole),
        " / ".join(_cell(record, name, _tenths) or "-" for name in ("supervisor_mb", "worker_mb")),
    ]


def _cell(record: Record, metric: str, write: Callable[[float], str]) -> str:
    if metric in record.refused:
        return f"refused: {record.refused[metric]}"
    return write(record.metrics[metric]) if metric in record.metrics else ""


def _of_smcroute(results: Results, record: Record, metric: str) -> str:
    ratio = results.share(record.relay, record.setting, metric, PEER_METRIC)
    return f"{ratio:.2f}" if ratio else ""


def latency_table(results: Results) -> str:
    """From generator to sink, a row for each relay and share of its throughput; empty if not measured."""
    lines = []
    for record in results:
        for share in LATENCY_SHARES:
            row = f"| {record.relay}, {share} % | "
            if reason := record.refused.get(f"latency_{share}_p50_us"):
                lines.append(row + f"refused: {reason} |" + " |" * (len(LATENCY_COLUMNS) - 1))
            elif f"latency_{share}_p50_us" in record.metrics:
                cells = (
                    each.write(record.metrics[f"latency_{share}_{each.metric}"]) for each in LATENCY_COLUMNS
                )
                lines.append(row + " | ".join(cells) + " |")
    heading = "| share of throughput | " + " | ".join(column.heading for column in LATENCY_COLUMNS) + " |"
    head = [
        "### Latency from generator to sink, at shares of the throughput\n",
        "Burst: packets that the generator hands over at once, and that wait for each other until then; one"
        " where it can.\n",
        heading,
        "|---|" + "--:|" * len(LATENCY_COLUMNS),
    ]
    return "\n".join(head + lines) if lines else ""


def _metric_section(title: str, results: Results, columns: tuple[Column, ...]) -> str:
    """A table of the records that have one of the metrics, which all have the usual setting."""
    rows = [
        record
        for record in results
        if any(each.metric in record.metrics or each.metric in record.refused for each in columns)
    ]
    if not rows:
        return ""
    lines = [
        f"### {title}\n",
        "| | " + " | ".join(column.heading for column in columns) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    for record in rows:
        cells = (_cell(record, column.metric, column.write) for column in columns)
        lines.append(f"| {record.relay} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def update_document(path: Path, text: str) -> None:
    """Puts the text between the two marks of a document, which must be there."""
    whole = path.read_text()
    if BEGIN not in whole or END not in whole:
        raise ValueError(f"{path} has no place for the figures: {BEGIN} … {END}")
    made = f"{BEGIN}\n\n{text}\n{END}"
    path.write_text(re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: made, whole, flags=re.S))
