"""Builds mcr._bpf: the structs of relay_abi.h and the few libbpf calls that MCR needs, through cffi.

Only a build step.
"""

import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mcr.abi import BPF_DIR, abi_cdef, abi_flags, without_preprocessor  # noqa: E402

LIBBPF_CALLS = """
int bpf_obj_get(const char *path);
int bpf_obj_pin(int fd, const char *path);
int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_delete_elem(int fd, const void *key);
int bpf_map_update_batch(int fd, const void *keys, const void *values, uint32_t *count, const void *options);
int bpf_map_get_next_key(int fd, const void *key, void *next_key);
int bpf_raw_tracepoint_open(const char *name, int prog_fd);
int libbpf_num_possible_cpus(void);
struct bpf_devmap_val { uint32_t ifindex; union { int fd; uint32_t id; } bpf_prog; };
"""

ffibuilder = FFI()
ffibuilder.cdef(abi_cdef())
ffibuilder.cdef(LIBBPF_CALLS)
ffibuilder.cdef(without_preprocessor((HERE / "bpf_calls.h").read_text()))
ffibuilder.set_source(
    "mcr._bpf",
    """
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include "bpf_calls.h"
#include "relay_abi.h"
""",
    sources=["mcr/bpf_calls.c", "mcr/tap_ring.c"],
    libraries=["bpf"],
    include_dirs=[str(BPF_DIR), str(HERE)],
    extra_compile_args=[
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-missing-field-initializers",
        *abi_flags(),
    ],
    depends=[str(BPF_DIR / "relay_abi.h"), str(BPF_DIR / "relay_kern.c"), str(HERE / "bpf_calls.h")],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(HERE.parent))
