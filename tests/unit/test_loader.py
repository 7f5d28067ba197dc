"""The loader with the real compiler, verifier, bpffs and interfaces.

Broken sources are compiled by the real child process: it takes MCR from its working directory, a tree that
has the package and a spoiled copy of bpf/.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import if_nametoindex
from typing import Any, Literal

import pytest
from mcr._bpf import ffi, lib

import mcr
from mcr import loader
from mcr.errors import ExitStatus, McrError
from mcr.loader import MAP_NAMES, PROGRAM_NAME, PROGRAMS, TRACED_PROGRAMS, pin_dir
from mcr.maps import Maps, rule_key
from mcr.netlink import xdp_program
from mcr.stream import parse_stream
from tests.netns.lab import Lab
from tests.unit.conftest import SpoilSource

PINS = {*MAP_NAMES, *PROGRAMS}
NOBODY = 65534
Mode = Literal["native", "generic"]


@pytest.fixture
def instance(lab: Lab) -> Iterator[str]:
    """The name of an instance that is not loaded yet; whatever is loaded under it goes away."""
    name = lab.namespace("a").name
    yield name
    loader.unload(name)


def bpftool(*arguments: str | Path) -> Any:
    done = subprocess.run(["bpftool", "-j", *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def program_id(instance: str) -> int:
    shown: int = bpftool("prog", "show", "pinned", pin_dir(instance) / PROGRAM_NAME)["id"]
    return shown


def pins(instance: str) -> set[str]:
    return {path.name for path in pin_dir(instance).iterdir()}


def pin_directories(instance: str) -> list[str]:
    """Of the instance, under its own name and any that begins with it."""
    return sorted(path.name for path in pin_dir(instance).parent.glob(f"{instance}*"))


# Loading and unloading


def test_every_map_and_the_program_are_pinned_until_unloaded(instance: str) -> None:
    loader.load(instance)
    assert pins(instance) == PINS
    assert pin_directories(instance) == [instance]
    loader.unload(instance)
    assert pin_directories(instance) == []


def test_unloading_one_instance_leaves_another_alone(lab: Lab, instance: str) -> None:
    other = lab.namespace("b").name
    loader.load(instance)
    loader.load(other)
    loader.unload(instance)
    assert pins(other) == PINS
    with Maps(other) as maps:
        assert maps.rule_counts(1).received_packets == 0
    loader.unload(other)


def test_unloading_what_is_not_loaded_is_no_error(instance: str) -> None:
    loader.unload(instance)
    assert pin_directories(instance) == []


def test_stale_pins_are_replaced(instance: str) -> None:
    loader.load(instance)
    stale = program_id(instance)
    with Maps(instance) as maps:
        maps.set_rule(
            rule_key(parse_stream("239.1.1.1%in0:5000"), 9),
            {"rule_id": 1, "xsk_base": 0, "frame_limit": 1522},
        )
    loader.load(instance)
    assert pins(instance) == PINS
    assert program_id(instance) != stale
    assert bpftool("map", "dump", "pinned", pin_dir(instance) / "rules") == []


def test_what_a_loader_that_died_had_staged_is_removed(instance: str) -> None:
    loader.ensure_bpffs()
    staged = pin_dir(f"{instance}~new")
    staged.mkdir(parents=True)
    create = f"bpftool map create {staged / 'rules'} type array key 4 value 4 entries 1 name stale"
    subprocess.run(create.split(), check=True)
    loader.load(instance)
    assert pins(instance) == PINS
    assert pin_directories(instance) == [instance]


def test_bpffs_is_mounted_where_it_is_missing(lab: Lab) -> None:
    program = (
        "from mcr import loader, _bpf\n"
        "assert _bpf.lib.mcr_is_bpffs(b'/sys/fs/bpf') == 0\n"
        "loader.ensure_bpffs()\n"
        "assert _bpf.lib.mcr_is_bpffs(b'/sys/fs/bpf') == 1\n"
        "loader.ensure_bpffs()\n"
    )
    hide = 'mount -t tmpfs none /sys/fs/bpf && exec "$@"'
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh"]
    subprocess.run([*unshare, sys.executable, "-c", program], check=True, cwd=Path(mcr.__file__).parents[1])


def test_the_pins_of_an_instance_that_is_not_loaded_are_an_error_that_names_them(instance: str) -> None:
    with pytest.raises(McrError) as caught:
        loader.open_pin(instance, "rules")
    assert str(pin_dir(instance) / "rules") in caught.value.cause
    assert "No such file or directory" in caught.value.cause


def test_descriptors_of_pins_are_not_inherited(instance: str) -> None:
    loader.load(instance)
    fd = loader.open_pin(instance, PROGRAM_NAME)
    assert not os.get_inheritable(fd)
    os.close(fd)


# What the compiler and the verifier say


def test_a_compile_error_comes_back_with_the_compilers_words(instance: str, spoil: SpoilSource) -> None:
    spoil("relay_kern.c", "u32 rule_id, frame_length;", "u32 rule_id; no_such_type frame_length;")
    with pytest.raises(McrError) as caught:
        loader.load(instance)
    assert caught.value.cause.startswith("relay_kern.c does not compile: ")
    assert "error: use of undeclared identifier 'no_such_type'" in caught.value.cause
    assert "\n" not in caught.value.cause
    assert pin_directories(instance) == []


def test_a_verifier_error_comes_back_with_the_verifiers_words(instance: str, spoil: SpoilSource) -> None:
    spoil("relay_parse.h", "if ((void *)(cursor + 2) > data_end)\n\t\treturn MCR_PARSED_OTHER;\n", "")
    with pytest.raises(McrError) as caught:
        loader.load(instance)
    words = r"the kernel refused mcr_relay: Permission denied: R\d offset is outside of the packet"
    assert re.fullmatch(words, caught.value.cause)
    assert caught.value.status is ExitStatus.FAILED
    assert pin_directories(instance) == []


def test_compiling_by_hand_prints_what_the_verifier_had_to_do_for_each_program(instance: str) -> None:
    loader.ensure_bpffs()
    pin_dir(instance).mkdir(parents=True)
    for options, programs in ([], [*PROGRAMS]), (["--traced"], [name for name, *_ in TRACED_PROGRAMS]):
        command = [sys.executable, "-m", "mcr.loader", str(pin_dir(instance)), *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert re.findall(r"^(\w+): processed [1-9]\d* insns ", done.stdout, re.MULTILINE) == programs


def test_a_load_that_fails_leaves_the_pins_of_before(instance: str, spoil: SpoilSource) -> None:
    loader.load(instance)
    before = program_id(instance)
    spoil("relay_kern.c", "int mcr_relay(struct xdp_md *ctx)", "int mcr_relay(")
    with pytest.raises(McrError):
        loader.load(instance)
    assert program_id(instance) == before
    assert pin_directories(instance) == [instance]


@pytest.mark.parametrize(
    "without",
    [
        [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"],
        ["--bounding-set=-all", "--inh-caps=-all"],
    ],
    ids=["nobody", "root_without_capabilities"],
)
def test_without_privileges_the_error_is_that_it_is_not_permitted(instance: str, without: list[str]) -> None:
    program = (
        "from mcr import errors, loader\n"
        "try:\n"
        f"    loader.load({instance!r})\n"
        "except errors.McrError as error:\n"
        "    print(error.status.name, error.cause)\n"
    )
    loader.ensure_bpffs()
    done = subprocess.run(
        ["setpriv", *without, sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(mcr.__file__).parents[1],
    )
    assert pin_directories(instance) == []
    assert done.stdout.startswith("NOT_PERMITTED ")
    assert "does not compile" not in done.stdout


# What bpftool shows


def test_bpftool_prints_rules_by_the_names_of_their_fields(instance: str) -> None:
    loader.load(instance)
    with Maps(instance) as maps:
        stream = parse_stream("10.0.0.7@239.1.1.1%in0:5000,vlan=200.100")
        maps.set_rule(rule_key(stream, 9), {"rule_id": 3, "xsk_base": 64, "frame_limit": 1522})
    rules = pin_dir(instance) / "rules"
    (entry,) = bpftool("map", "dump", "pinned", rules)
    mapped = [0] * 10 + [255, 255]
    assert entry["formatted"] == {
        "key": {
            "ifindex": 9,
            "vlan": 100,
            "vlan_outer": 200,
            "dport": 5000,
            "reserved": 0,
            "daddr": [*mapped, 239, 1, 1, 1],
            "saddr": [*mapped, 10, 0, 0, 7],
        },
        "value": {
            "rule_id": 3,
            "xsk_base": 64,
            "frame_limit": 1522,
            "flags": 0,
            "output_id": 0,
            "smallest_mtu": 0,
            "partial_seen": 0,
            "fan_out": 0,
            "device_set": 0,
        },
    }
    plain = subprocess.run(
        ["bpftool", "map", "dump", "pinned", rules], check=True, capture_output=True, text=True
    )
    assert '"dport": 5000' in plain.stdout


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("settings", {"abi_version", "lookups"}),
        ("rule_counters", {"received_packets", "relayed_packets", "dropped", "last_seen_ns"}),
        ("output_counters", {"sent_packets", "sent_bytes", "dropped", "last_error"}),
        ("worker_counters", {"frames_free", "batches", "receive_ring_full", "socket_dropped"}),
    ],
)
def test_bpftool_prints_counters_by_the_names_of_their_fields(
    instance: str, name: str, fields: set[str]
) -> None:
    loader.load(instance)
    entry = bpftool("map", "lookup", "pinned", pin_dir(instance) / name, "key", "0", "0", "0", "0")
    assert fields <= entry["formatted"]["value"].keys()


def test_bpftool_names_the_program_and_its_maps(instance: str) -> None:
    loader.load(instance)
    program = bpftool("prog", "show", "pinned", pin_dir(instance) / PROGRAM_NAME)
    assert (program["name"], program["type"]) == ("mcr_relay", "xdp")
    used = {bpftool("map", "show", "id", str(number))["name"] for number in program["map_ids"]}
    both = {"rules", "settings", "rule_stats", "fragments", "traced", "no_metadata"}
    kernel_path = {"kernel_outputs", "output_stats", "bulks", "scratch"}
    fan_outs = {"devices", "device_sets", "fan_out_outputs", "fan_out_relayed"}
    assert used == {*both, *kernel_path, *fan_outs, "xsks", "hands"}


# Attaching


@contextmanager
def attached(maps: Maps, interface: str, mode: Literal["auto", "native", "generic"]) -> Iterator[Mode]:
    link = loader.attach(maps.program_fd, interface, if_nametoindex(interface), mode)
    try:
        yield link.mode
    finally:
        link.close()


@pytest.fixture
def two_instances(lab: Lab) -> Iterator[tuple[Maps, Maps, int]]:
    """Two loaded instances, the program id of the first, and the thread in a namespace with a veth in0."""
    first, second = lab.namespace("a"), lab.namespace("b")
    lab.veth(first, "in0", first, "other0")
    try:
        with lab.inside(first):
            loader.load(first.name)
            loader.load(second.name)
            with Maps(first.name) as maps, Maps(second.name) as other:
                yield maps, other, program_id(first.name)
    finally:
        loader.unload(first.name)
        loader.unload(second.name)


@pytest.mark.parametrize("mode", ["auto", "native", "generic"])
def test_the_mode_obtained_is_the_one_the_kernel_reports(
    two_instances: tuple[Maps, Maps, int], mode: Literal["auto", "native", "generic"]
) -> None:
    maps, _, number = two_instances
    with attached(maps, "in0", mode) as obtained:
        assert obtained == ("generic" if mode == "generic" else "native")
        program = xdp_program("in0")
        assert program is not None
        assert (program.program_id, program.mode) == (number, obtained)
    assert xdp_program("in0") is None


def test_where_the_driver_has_no_xdp_auto_is_generic_and_native_an_error(
    two_instances: tuple[Maps, Maps, int],
) -> None:
    maps, _, _ = two_instances
    with attached(maps, "lo", "auto") as obtained:
        assert obtained == "generic"
    with pytest.raises(McrError) as caught, attached(maps, "lo", "native"):
        pass
    assert "lo cannot run XDP in native mode" in caught.value.cause
    assert caught.value.remedy == "choose --mode generic"


@pytest.mark.parametrize("held", ["native", "generic"])
@pytest.mark.parametrize("wanted", ["auto", "native", "generic"])
def test_another_program_on_the_interface_is_named(
    two_instances: tuple[Maps, Maps, int], held: Mode, wanted: Literal["auto", "native", "generic"]
) -> None:
    maps, other, number = two_instances
    with attached(maps, "in0", held):
        with pytest.raises(McrError) as caught, attached(other, "in0", wanted):
            pass
        program = xdp_program("in0")
        assert program is not None
        assert program.program_id == number
    expected = f"another XDP program is attached to in0: mcr_relay (id {number}, {held})"
    assert caught.value.cause == expected
    assert "ip link set dev in0 xdp off" in caught.value.remedy
    with attached(other, "in0", wanted):
        assert xdp_program("in0") is not None


def test_a_program_that_has_gone_has_no_name() -> None:
    assert loader.program_name(0xFFFFFFF0) == "already gone"
    assert lib.mcr_program_name(0xFFFFFFF0, ffi.new("char[16]")) < 0
