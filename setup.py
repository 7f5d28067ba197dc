"""The two parts of the build that pyproject.toml cannot express: the cffi modules and the BPF sources.

The metadata is in pyproject.toml. This file must never hold anything that could be said there.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BPF_SUFFIXES = {".c", ".h"}


class BuildPy(build_py):
    """Puts the BPF sources, which are compiled when they are loaded, beside the package as `mcr/bpf`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # the loader finds them in the tree
        for source in sorted(Path("bpf").rglob("*")):
            if source.suffix in BPF_SUFFIXES:
                target = Path(self.build_lib) / "mcr" / source
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(
    cmdclass={"build_py": BuildPy},
    cffi_modules=[
        "mcr/bpf_build.py:ffibuilder",
        "mcr/traffic/build.py:ffibuilder",
        "mcr/uring_egress/build.py:ffibuilder",
    ],
)
