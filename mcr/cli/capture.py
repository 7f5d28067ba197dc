"""`mcr capture`: a rule's packets, as they arrive and as they leave, into a pcapng file.

The file is this command's, with the rights of who calls it. It must never hold up the relay: what comes
faster than it is written is counted as lost.
"""

import errno
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import click

from mcr.cli.common import Settings
from mcr.cli.tapping import Tapping
from mcr.datagrams import on_wire
from mcr.errors import ExitStatus, McrError
from mcr.pcapng import INBOUND, OUTBOUND, PcapngWriter
from mcr.tap_events import LARGEST_SNAPLEN, Event

FILE_MODE = 0o600


class Recorder:
    """Writes events as packets: at most `limit` as they arrive, and as many for each output."""

    def __init__(self, tapping: Tapping, writer: PcapngWriter, snaplen: int, limit: int | None) -> None:
        self._tapping = tapping
        self._writer = writer
        self._snaplen = snaplen
        self._limit = limit
        self.counts: dict[int, int] = {}  # by output_id; 0 is before

    def write(self, event: Event) -> None:
        """One event; those without a packet are passed over."""
        if not event.data:
            return
        row = self._tapping.interfaces.get(event.ifindex, {"ethernet": True})
        interface = self._writer.interface(self._tapping.interface(event.ifindex), row["ethernet"])
        comment = self._comment(event)
        time_ns = (event.done_ns if event.output_id else event.time_ns) + self._tapping.to_real_time_ns
        unfinished = event.segment or event.checksum_offset
        whole = unfinished and len(event.data) == event.length
        frames = (
            on_wire(event.data, event.segment, event.checksum_offset, row["ethernet"])
            if whole
            else (event.data,)
        )
        for frame in frames:
            if self._is_enough(event.output_id):
                return
            self._writer.packet(
                interface,
                time_ns,
                frame[: self._snaplen],
                len(frame) if whole else event.length,
                OUTBOUND if event.output_id else INBOUND,
                comment,
            )

    def _is_enough(self, output_id: int) -> bool:
        count = self.counts.get(output_id, 0)
        if self._limit is not None and count >= self._limit:
            return True
        self.counts[output_id] = count + 1
        return False

    def _comment(self, event: Event) -> str:
        rows = self._tapping.rules.get(event.rule_id)
        rule = f"rule {rows[0]['rule']}" if rows else f"rule_id {event.rule_id}"
        if not event.output_id:
            return f"{rule}, before"
        row = self._tapping.outputs.get(event.output_id)
        return f"{rule}, output {row['to'] if row else event.output_id}, after"


def _open(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE), "wb")


def _disk_error(path: Path, error: OSError) -> McrError:
    remedies = {
        errno.ENOSPC: "make room, or write to another disk",
        errno.EDQUOT: "make room, or write to another disk",
        errno.EACCES: "choose a file that you may write",
        errno.EPERM: "choose a file that you may write",
        errno.ENOENT: "make its directory first",
        errno.EISDIR: "name a file in it",
        errno.EROFS: "choose a file on another disk",
    }
    return McrError(
        f"cannot write {path}: {error.strerror}", remedies.get(error.errno or 0, "see the kernel's log")
    )


@click.command(name="capture")
@click.argument("rule")
@click.option(
    "-w",
    "--write",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The pcapng file.",
)
@click.option("-c", "--count", type=click.IntRange(min=1), metavar="N", help="End after this many packets.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.01, max=3600), default=10, show_default=True, metavar="S",
    help="End after this many seconds in any case.",
)  # fmt: skip
@click.option(
    "--snaplen", type=click.IntRange(1, LARGEST_SNAPLEN), default=LARGEST_SNAPLEN, show_default=True,
    metavar="N", help="Bytes to keep of each packet.",
)  # fmt: skip
@click.option("--what", type=click.Choice(["before", "after", "both"]), default="both", show_default=True)
@click.pass_obj
def command(
    settings: Settings, rule: str, path: Path, count: int | None, timeout: float, snaplen: int, what: str
) -> None:
    """Write the packets of RULE to a pcapng file: as they arrive, and as each output sends them.

    Ends with --count, --timeout or Ctrl-C, with the file whole.
    """
    asked = {"rule": rule, "count": count, "timeout_s": timeout, "snaplen": snaplen, "what": what}
    with Tapping(settings, "capture.start", **asked) as tapping:
        click.echo(f"capturing rule {rule}", err=True)
        try:
            with _open(path) as stream:
                writer = PcapngWriter(stream, f"mcr {version('mcr')}", snaplen)
                recorder = Recorder(tapping, writer, snaplen, count)
                _record(tapping, recorder)
        except OSError as error:
            raise _disk_error(path, error) from error
    before, after = recorder.counts.get(0, 0), sum(n for output_id, n in recorder.counts.items() if output_id)
    print(f"{path}: {before} packets before, {after} after", file=sys.stderr)
    if tapping.lost:
        print(f"{tapping.lost} more are missing: they came faster than they could be read", file=sys.stderr)
    if not before + after:
        raise McrError(
            f"no packet of rule {rule} within {timeout:g} s",
            f"see what arrives: mcr trace STREAM, mcr stats {rule}",
            status=ExitStatus.FAILED,
        )


def _record(tapping: Tapping, recorder: Recorder) -> None:
    try:
        for events in tapping.events():
            for event in sorted(
                events, key=lambda event: event.done_ns if event.output_id else event.time_ns
            ):
                recorder.write(event)
    except KeyboardInterrupt:
        pass
