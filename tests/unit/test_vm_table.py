"""The table of `make test-vm`: what fails a run, and what it looks like."""

from pathlib import Path

import pytest

from tests.vm import cells
from tests.vm.cells import Cell, Limit, Machine, faults, load, save, table, wanted
from tests.vm.network import VETH

MACHINE = Machine("trixie", "6.12.118+deb13-amd64", "TCG", "QEMU 7.2.22")
OLDER = Machine("bookworm", "6.1.0-57-amd64", "TCG", "QEMU 7.2.22")
OLD = Limit("too old", ("kernel",), holds=lambda machine: machine.version < (6, 3))


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One limit, for old kernels, instead of those of the day."""
    monkeypatch.setattr(cells, "LIMITS", (OLD,))


def _cells(**no: str) -> list[Cell]:
    return [
        Cell(feature, lane, feature not in no, no.get(feature, "native")) for feature, lane in wanted([VETH])
    ]


def test_a_run_without_a_no_has_no_fault() -> None:
    assert faults(MACHINE, _cells(), [VETH]) == []


def test_a_no_without_a_limit_and_a_missing_cell_are_faults() -> None:
    found = faults(MACHINE, _cells(worker="0 of 200")[1:], [VETH])
    assert found == ["relay, doctor: no answer", "veth, worker: 0 of 200"]


def test_a_limit_excuses_a_no_on_its_kernels_and_no_yes() -> None:
    refused = _cells(kernel="worker path")
    assert faults(OLDER, refused, [VETH]) == []
    assert faults(MACHINE, refused, [VETH]) == ["veth, kernel: worker path"]
    assert faults(OLDER, _cells(), [VETH]) == ["veth, kernel: works, so this limit is to be removed: too old"]


def test_the_table_names_the_reason_of_each_no_once() -> None:
    text = table(OLDER, _cells(kernel="worker path", worker="0 of 200", vlan="0 of 200"))
    assert "| attach, mode `auto` | yes (native) |" in text
    assert "| kernel path, 1 output | no [1] |" in text
    assert text.endswith("- [1] too old\n- [2] **fault**: 0 of 200\n")


def test_a_run_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save(path, MACHINE, _cells())
    assert load(path) == (MACHINE, _cells())
