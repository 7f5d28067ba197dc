"""`python -m tests.vm [SUITE...]`: boots each Debian, runs tests/vm/guest.py in it, and keeps the table.

`python -m tests.vm table` writes the tables of the last runs into docs/KERNEL-SUPPORT.md. Exit status 1 if
a cell is `no` without a named limit, if one is missing, or if a limit no longer holds. VM_OPTIONS adds words
to the kernel's command line; mcr.phases=begin,keep runs these phases alone.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence

from mcr.errors import McrError
from tests.vm.cells import Cell, Machine, faults, load, save, table
from tests.vm.machine import (
    BUILD,
    KVM,
    TREE,
    Image,
    accelerator,
    boot_arguments,
    booted,
    make_image,
    qemu_version,
)
from tests.vm.network import LANES

SUITES = ("bookworm", "trixie")
LIMIT_S = {"KVM": 600.0, "TCG": 1800.0}
SILENCE_S = 600.0  # without a cell: the longest phase takes half of it without KVM
DOCUMENT = TREE / "docs/KERNEL-SUPPORT.md"
BEGIN, END = "<!-- make vm-table: begin -->\n", "<!-- make vm-table: end -->\n"


def run(suite: str) -> bool:
    """One Debian. Returns whether every cell is as it must be."""
    begun = time.monotonic()
    image = make_image(suite)
    accel = accelerator(image)
    name = "KVM" if accel == KVM else "TCG"
    machine = Machine(suite, image.release, name, qemu_version())
    took_s = time.monotonic() - begun
    print(f"{suite}: Linux {image.release} in {machine.qemu}, {name}, image after {took_s:.0f} s", flush=True)
    cells = list(_cells(image, accel, LIMIT_S[name]))
    (BUILD / f"{suite}.md").write_text(table(machine, cells))
    save(BUILD / f"{suite}.json", machine, cells)
    wrong = faults(machine, cells, LANES)
    print("", table(machine, cells), *(f"fault: {words}" for words in wrong), sep="\n")
    print(f"{suite}: {len(cells)} cells, {len(wrong)} faults, {time.monotonic() - begun:.0f} s")
    return not wrong


def _cells(image: Image, accel: Sequence[str], limit_s: float) -> Iterator[Cell]:
    """Boots the image and yields what it says until it switches itself off or time is up."""
    console, lines = BUILD / f"{image.suite}.console", BUILD / f"{image.suite}.cells"
    for path in (console, lines):
        path.write_bytes(b"")
    extra = os.environ.get("VM_OPTIONS", "")
    arguments = boot_arguments(image, accel, console, lines, extra)
    with booted(arguments, console) as process, lines.open() as stream:
        deadline = time.monotonic() + limit_s
        silent_until = time.monotonic() + SILENCE_S
        text = ""
        ended = False
        while not ended and time.monotonic() < min(deadline, silent_until):
            ended = process.poll() is not None  # before reading, so that the last words are read
            text += stream.read()
            *whole, text = text.split("\n")
            for line in filter(str.strip, whole):
                cell = Cell(**json.loads(line))
                print(
                    f"  {cell.lane}, {cell.feature}: {'yes' if cell.ok else 'no'} {cell.evidence}", flush=True
                )
                silent_until = time.monotonic() + SILENCE_S
                yield cell
            time.sleep(0 if ended else 0.5)
    if process.returncode and ended:
        raise McrError(f"QEMU ended with status {process.returncode}", f"see {BUILD / 'qemu.log'}")
    if not ended:
        raise McrError(
            f"{image.suite} did not end within {limit_s:.0f} s, or said nothing for {SILENCE_S:.0f} s",
            f"see {console}",
        )


def write_table() -> None:
    """Puts the tables of the last runs between the marks of the document."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest.split(END)[1]
    kept = [BUILD / f"{suite}.json" for suite in SUITES if (BUILD / f"{suite}.json").exists()]
    if not kept:
        raise McrError("there is no run to take a table from", "make test-vm")
    tables = "\n".join(table(*load(path)) for path in kept)
    DOCUMENT.write_text(f"{before}{BEGIN}{tables}{END}{after}")


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    unknown = [word for word in arguments if word not in (*SUITES, "table")]
    try:
        if unknown:
            raise McrError(f"there is no machine {unknown[0]}", f"choose from {', '.join(SUITES)}")
        if "table" in arguments:
            write_table()
            return 0
        return 0 if sum(not run(suite) for suite in arguments or SUITES) == 0 else 1
    except McrError as error:
        print(f"error: {error.cause}\n  remedy: {error.remedy}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
