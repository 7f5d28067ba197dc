"""What pinned state and workers are known to be compatible by."""

import re
from pathlib import Path

import pytest
from mcr._bpf import lib

from mcr import abi


def test_the_modules_that_are_built_are_of_these_sources() -> None:
    assert f"{lib.MCR_ABI_VERSION:08x}" == f"{abi.abi_version():08x}", "make build"


def test_the_size_of_every_struct_is_asserted() -> None:
    header = (abi.BPF_DIR / "relay_abi.h").read_text()
    structs = set(re.findall(r"^struct (\w+) \{", header, flags=re.MULTILINE))
    asserted = set(re.findall(r"^_Static_assert\(sizeof\(struct (\w+)\) == \d+,", header, flags=re.MULTILINE))
    assert structs == asserted
    assert len(structs) > 20


CHANGES = {
    "a field": ("relay_abi.h", "__u32 xsk_base;", "__u32 base;"),
    "a type": ("relay_abi.h", "__u32 smallest_mtu;", "__s32 smallest_mtu;"),
    "a limit": ("relay_abi.h", "MCR_MAX_EGRESS = 1024", "MCR_MAX_EGRESS = 2048"),
    "the size of a map": ("relay_kern.c", "tap_reports, MCR_TAP_REPORTS", "tap_reports, MCR_MAX_RULES"),
    "the kind of a map": (
        "relay_kern.c",
        '"lru_hash", struct mcr_fragment_key',
        '"hash", struct mcr_fragment_key',
    ),
    "a struct of a map": ("relay_kern.c", "u32 open; /*", "u64 open; /*"),
}


def version_with(name: str, old: str, new: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the sources, one of them with another text in place of one that it has once."""
    with monkeypatch.context() as patched:
        for file in ("relay_abi.h", "relay_kern.c"):
            text = (abi.BPF_DIR / file).read_text()
            if file == name:
                assert text.count(old) == 1
                text = text.replace(old, new)
            (directory / file).write_text(text)
        patched.setattr(abi, "BPF_DIR", directory)
        return abi.abi_version()


@pytest.mark.parametrize("change", CHANGES)
def test_another_layout_has_another_version(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = abi.abi_version()
    assert version_with(*CHANGES[change], tmp_path, monkeypatch) != own


def test_other_words_and_other_code_have_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = abi.abi_version()
    for name, old, new in (
        ("relay_abi.h", "/* The key of an input stream.", "/*  What an input\n * stream is found by."),
        ("relay_kern.c", "return XDP_PASS; /* never so: a rule_id", "return XDP_DROP; /* a rule_id"),
    ):
        assert version_with(name, old, new, tmp_path, monkeypatch) == own
