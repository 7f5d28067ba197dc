"""Builds mcr.traffic._traffic, the C core of the test source and sink, through cffi.

Only a build step: run as a script it compiles in place; setuptools calls `ffibuilder` from the root of the
source tree, to which every path here is relative.
"""

from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent.parent
HEADER = "mcr/traffic/traffic.h"


def declarations() -> str:
    """traffic.h without its preprocessor lines, which cffi does not know."""
    lines = (ROOT / HEADER).read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "mcr.traffic._traffic",
    '#include "traffic.h"',
    sources=["mcr/traffic/traffic.c"],
    include_dirs=["mcr/traffic"],
    depends=[HEADER],
    # cffi's own part of the module does not compile under -Wextra without the last two.
    extra_compile_args=[
        *("-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-UNDEBUG"),
        *("-Wno-unused-parameter", "-Wno-missing-field-initializers"),
    ],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(ROOT))
