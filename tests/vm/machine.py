"""Virtual machines for the tests: a Debian with its own kernel and the project built in it, in QEMU.

Everything is made below build/ and nothing is mounted on this machine; QEMU ends with the process that
started it, whatever becomes of that. It must never touch a disk, an interface or a process that it did not
make.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcr.errors import McrError
from tests.vm.network import LANES, Lane

TREE = Path(__file__).parents[2]
BUILD = TREE / "build/vm"
INIT = "/root/mcr/tests/vm/init"
PACKAGES = ("initramfs-tools", "kmod", "linux-image-amd64", "zstd")
# What the initial RAM disk needs to mount the image; the drivers under test are in the image.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")
# Debian 13's, which has igb, on a release that has an older one too: it runs out of a root of its own.
QEMU_ROOT = TREE / "build/roots/qemu"
QEMU = ("scripts/in-root", "--with", str(TREE), str(QEMU_ROOT), "qemu-system-x86_64")
MEMORY_MIB = 3072
PROBE_S = 30.0
BOOT_S, BOOTS = 120.0, 4
BOOTED = b"mcr: booted"  # what tests/vm/init says on the console
IMAGE_BYTES = 4 << 30
LANGUAGE = {"LC_ALL": "C.UTF-8"}
TCG = ("-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max")
KVM = ("-accel", "kvm", "-cpu", "host")


@dataclass(frozen=True, slots=True)
class Image:
    """What a machine boots. release: its kernel's name."""

    suite: str
    release: str
    kernel: Path
    initrd: Path
    disk: Path


def _run(*argv: str | Path) -> None:
    words = [str(word) for word in argv]
    try:
        subprocess.run(words, check=True, cwd=TREE, stdin=subprocess.DEVNULL, env=os.environ | LANGUAGE)
    except (OSError, subprocess.CalledProcessError) as error:
        raise McrError(f"{' '.join(words)}: {error}", "see the message above") from error


def make_image(suite: str) -> Image:
    """The root of a Debian release with the project built in it, as a disk. Takes minutes the first time."""
    _run("scripts/debian-root", "trixie", QEMU_ROOT, "qemu-system-x86")
    root = TREE / "build/roots" / suite
    _run("scripts/debian-root", suite, root)
    settings = root / "etc/initramfs-tools"
    (settings / "conf.d").mkdir(parents=True, exist_ok=True)
    (settings / "conf.d/mcr").write_text("MODULES=list\n")
    (settings / "modules").write_text("\n".join(BOOT_MODULES) + "\n")
    _run("scripts/debian-root", suite, root, *PACKAGES)
    _run("scripts/build-in-root", root)
    BUILD.mkdir(parents=True, exist_ok=True)
    disk = BUILD / f"{suite}.ext4"
    disk.unlink(missing_ok=True)
    with disk.open("wb") as sparse:
        sparse.truncate(IMAGE_BYTES)
    _run(
        "mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-d", root, disk
    )
    kernel = max((root / "boot").glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    release = kernel.name.removeprefix("vmlinuz-")
    return Image(suite, release, kernel, kernel.with_name(f"initrd.img-{release}"), disk)


def qemu_version() -> str:
    """QEMU's own word, shortened: QEMU 10.0.13."""
    argv = [*QEMU, "--version"]
    words = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=TREE).stdout.split()
    return f"QEMU {words[3]}"


def nic_arguments() -> list[str]:
    """Both ends of every cable of every lane with NICs, joined by a hub each."""
    return [
        word
        for lane in LANES
        if lane.model
        for cable in range(3)
        for end in range(2)
        for word in _nic(lane, cable, end)
    ]


def _nic(lane: Lane, cable: int, end: int) -> Iterator[str]:
    hub = lane.number * 16 + cable
    name = f"n{hub}e{end}"
    yield from ("-netdev", f"hubport,id={name},hubid={hub}")
    bus = ""
    if lane.model == "igb":  # its virtual functions need a bus to themselves
        yield from ("-device", f"pcie-root-port,id=p{name},chassis={2 * hub + end}")
        bus = f",bus=p{name}"
    yield from ("-device", f"{lane.model},netdev={name},mac={lane.mac(cable, end)}{bus}")


@contextlib.contextmanager
def running(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU with these arguments, at low priority; it is killed at the end, and also if this process dies."""
    argv = ["nice", "-n", "10", "setpriv", "--pdeathsig", "KILL", *QEMU]
    # Without an HPET: one in some twenty kernels waited for its interrupt for ever.
    argv += ["-machine", "q35,hpet=off", "-nodefaults", "-display", "none", "-no-reboot", *arguments]
    log = (BUILD / "qemu.log").open("wb")
    with (
        log,
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log, cwd=TREE) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def booted(arguments: Sequence[str], console: Path) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU with these arguments, once its init runs; an emulated machine that hangs before is started again.

    Raises McrError if it never comes so far.
    """
    for attempt in range(1, BOOTS + 1):
        console.write_bytes(b"")
        with running(arguments) as process:
            deadline = time.monotonic() + BOOT_S
            while time.monotonic() < deadline and process.poll() is None:
                if BOOTED in console.read_bytes():
                    yield process
                    return
                time.sleep(0.2)
        print(f"  the machine did not boot within {BOOT_S:.0f} s, attempt {attempt} of {BOOTS}", flush=True)
    raise McrError(f"the machine did not boot in {BOOTS} attempts", f"see {console}")


def accelerator(image: Image) -> tuple[str, ...]:
    """KVM if a kernel starts in it, else TCG: /dev/kvm may be there and hang."""
    return KVM if os.access("/dev/kvm", os.R_OK | os.W_OK) and starts(image, KVM) else TCG


def starts(image: Image, accel: Sequence[str]) -> bool:
    """Whether the kernel comes as far as to miss its root file system within PROBE_S."""
    console = BUILD / "probe.console"
    console.write_bytes(b"")
    arguments = [*accel, "-m", "512", "-kernel", str(image.kernel), "-append", "console=ttyS0 panic=-1"]
    with running([*arguments, "-serial", f"file:{console}"]) as process:
        deadline = time.monotonic() + PROBE_S
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
    return b"Unable to mount root fs" in console.read_bytes()


def boot_arguments(image: Image, accel: Sequence[str], console: Path, cells: Path, extra: str) -> list[str]:
    """The whole machine. extra: more words for the kernel's command line."""
    words = f"console=ttyS0 root=/dev/vda rw init={INIT} net.ifnames=0 panic=-1 mitigations=off {extra}"
    cpus = str(min(4, os.cpu_count() or 1))
    return [
        *accel, "-smp", cpus, "-m", str(MEMORY_MIB),
        "-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", words,
        "-drive", f"file={image.disk},if=virtio,format=raw,cache=unsafe,snapshot=on",
        "-device", "virtio-rng-pci",
        "-serial", f"file:{console}", "-serial", f"file:{cells}",
        *nic_arguments(),
    ]  # fmt: skip
