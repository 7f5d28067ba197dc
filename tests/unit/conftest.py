"""What unit tests share: BPF sources with a fault in them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import mcr
from mcr import loader

SpoilSource = Callable[[str, str, str], None]


@pytest.fixture
def spoil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpoilSource:
    """Replaces a text, which must be there, in one file of the sources that the compiling child sees."""
    package = Path(mcr.__file__).parent
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "mcr").symlink_to(package)
    shutil.copytree(loader.bpf_source_dir(), tree / "bpf")

    def replace(file: str, good: str, bad: str) -> None:
        path = tree / "bpf" / file
        text = path.read_text()
        assert text.count(good) == 1
        path.write_text(text.replace(good, bad))
        monkeypatch.chdir(tree)

    return replace
