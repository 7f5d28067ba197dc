"""Builds mcr.uring_egress._core: the worker's C core, through cffi.

Only a build step.
"""

import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from mcr.abi import BPF_DIR, abi_cdef, abi_flags, without_preprocessor  # noqa: E402

SOURCES = (
    "worker",
    "reactor",
    "setup",
    "confine",
    "frames",
    "rules",
    "commands",
    "egress",
    "checksum",
    "latency",
    "pipes",
    "threads",
    "ingress_xsk",
    "ingress_packet",
    "tap",
)

PARSED_PACKET = """
struct mcr_packet {
    struct mcr_rule_key key;
    int32_t drop_reason;
    uint16_t ip_offset;
    uint16_t payload_offset;
    uint16_t payload_length;
    uint8_t ttl;
    uint8_t tos;
    ...;
};
"""

ffibuilder = FFI()
ffibuilder.cdef(abi_cdef())
ffibuilder.cdef(PARSED_PACKET)
ffibuilder.cdef(without_preprocessor((HERE / "api.h").read_text()))
ffibuilder.set_source(
    "mcr.uring_egress._core",
    '#include "api.h"',
    sources=[f"mcr/uring_egress/{name}.c" for name in SOURCES],
    libraries=["uring", "xdp", "bpf"],
    include_dirs=[str(BPF_DIR), str(HERE)],
    extra_compile_args=[
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-D_GNU_SOURCE",
        "-Wno-missing-field-initializers",
        *abi_flags(),
    ],
    depends=[
        str(BPF_DIR / "relay_abi.h"),
        str(BPF_DIR / "relay_kern.c"),
        str(BPF_DIR / "relay_parse.h"),
        str(HERE / "core.h"),
        str(HERE / "threads.h"),
        str(HERE / "api.h"),
    ],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(HERE.parent.parent))
