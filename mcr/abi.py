"""Turns bpf/relay_abi.h into what cffi understands, for the two modules that are built from it.

Only a build step: nothing imports this at run time.
"""

import hashlib
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


def abi_version() -> int:
    """What pinned maps and workers are known to be compatible by: a hash of 32 bits over every struct, limit
    and map definition, as the compiler sees them. Comments and spaces do not count."""
    header = without_preprocessor((BPF_DIR / "relay_abi.h").read_text())
    return _hash(header + _map_definitions((BPF_DIR / "relay_kern.c").read_text()))


def _map_definitions(source: str) -> str:
    """Of relay_kern.c: the maps, and the structs that only it knows."""
    plain = without_preprocessor(source)
    structs = re.findall(r"^struct \w+ \{.*?^\};$", plain, flags=re.MULTILINE | re.DOTALL)
    maps = re.findall(r"^BPF_[A-Z_]+\(.*?\);$", plain, flags=re.MULTILINE | re.DOTALL)
    return "".join((*structs, *maps))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256("".join(text.split()).encode()).digest()[:4], "big")


def abi_cdef() -> str:
    """The declarations of relay_abi.h, and MCR_ABI_VERSION."""
    header = without_preprocessor((BPF_DIR / "relay_abi.h").read_text())
    return f"{_INTEGERS}#define MCR_ABI_VERSION {abi_version():#010x}\n{header}"


def abi_flags() -> list[str]:
    """For the C compiler."""
    return [f"-DMCR_ABI_VERSION={abi_version():#010x}u"]
