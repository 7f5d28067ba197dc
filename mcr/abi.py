"""Turns bpf/relay_abi.h into what cffi understands, for the two modules that are built from it.

Only a build step: nothing imports this at run time.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BPF_DIR = ROOT / "bpf"

_INTEGERS = """
typedef unsigned char __u8; typedef unsigned short __u16;
typedef unsigned int __u32; typedef unsigned long long __u64;
typedef signed char __s8; typedef short __s16; typedef int __s32; typedef long long __s64;
"""


def without_preprocessor(text: str) -> str:
    """A C header without its preprocessor lines, comments and assertions."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"^_Static_assert\(.*?\);$", "", text, flags=re.MULTILINE | re.DOTALL)


def abi_cdef() -> str:
    """The declarations of relay_abi.h."""
    return _INTEGERS + without_preprocessor((BPF_DIR / "relay_abi.h").read_text())
