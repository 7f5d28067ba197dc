"""The maps of a relay as text, for the model test: every entry, and all that it leads to.

Contents are compared, not numbers: what ids stand for is resolved here. This module must never write into a
map but where a step of the test is somebody's hand.
"""

import ctypes
import os
import struct
from collections.abc import Iterator, Mapping
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from mcr._bpf import ffi, lib

from tests.netns.model_reference import State, bracketed, describe_kernel_output

FAN_OUT_BYTES = int(ffi.sizeof("struct mcr_fan_out"))
LIBBPF = ctypes.CDLL("libbpf.so.1")


class PinnedMaps:
    """The maps of one instance, open for reading."""

    def __init__(self, directory: Path) -> None:
        names = (
            "rules",
            "settings",
            "kernel_outputs",
            "fan_out_outputs",
            "device_sets",
            "devices",
            "egress_devices",
        )
        self._fds = {name: int(lib.bpf_obj_get(str(directory / name).encode())) for name in names}
        assert min(self._fds.values()) >= 0, self._fds

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def _read(self, name: str, key: Any, struct_name: str) -> Any:
        value = ffi.new(f"struct {struct_name} *")
        return value if lib.bpf_map_lookup_elem(self._fds[name], key, value) == 0 else None

    def _settings(self) -> Any:
        return self._read("settings", ffi.new("__u32 *", 0), "mcr_settings")

    def program_id(self) -> int:
        return int(self._settings().program_id)

    def lookups(self) -> str:
        words = {
            lib.MCR_HAS_SOURCE_PORT: "source port",
            lib.MCR_HAS_ANY_PORT: "any port",
            lib.MCR_HAS_SOURCE_STAR: "source star",
            lib.MCR_HAS_ANY_STAR: "any star",
        }
        word = int(self._settings().lookups)
        return ", ".join(sorted(name for bit, name in words.items() if word & bit)) or "none"

    def rules(self, names: Mapping[int, str], interfaces: Mapping[int, str]) -> State:
        """Every entry, with all that it leads to; and every fan-out that no entry leads to."""
        state: State = {}
        bases: dict[int, set[int]] = {}
        fan_outs = self._fan_outs()
        for key in self._keys():
            value = self._read("rules", key, "mcr_rule_value")
            if value is None:
                continue
            line = f"map {_input(key, interfaces)}"
            bases.setdefault(value.xsk_base, set()).add(key.ifindex)
            path = "kernel" if value.flags & lib.MCR_RULE_KERNEL else "worker"
            text = f"{names.get(value.rule_id, 'no rule')}, {path}, frames up to {value.frame_limit}"
            if path == "kernel":
                text += f", smallest MTU {value.smallest_mtu}"
            text += ", generic" if value.flags & lib.MCR_RULE_GENERIC else ""
            state[line] = text + (", between two ways" if value.fan_out and value.output_id else "")
            outputs = (
                fan_outs.pop(value.fan_out, [])
                if value.fan_out
                else [value.output_id]
                if value.output_id
                else []
            )
            state |= self._outputs(line, outputs, interfaces)
            if value.fan_out and (wrong := self._wrong_devices(value.device_set, outputs)):
                state[f"{line} devices"] = wrong
        state |= {
            f"fan-out {number}": f"of no rule: outputs {outputs}" for number, outputs in fan_outs.items()
        }
        state |= {f"xsk_base {base}": f"of several: {of}" for base, of in bases.items() if len(of) > 1}
        return state

    def delete_entry(self, position: int) -> None:
        keys = list(self._keys())
        if keys:
            lib.bpf_map_delete_elem(self._fds["rules"], keys[position % len(keys)])

    def _keys(self) -> Iterator[Any]:
        key, following = ffi.NULL, ffi.new("struct mcr_rule_key *")
        while lib.bpf_map_get_next_key(self._fds["rules"], key, following) == 0:
            yield following
            key, following = following, ffi.new("struct mcr_rule_key *")

    def _outputs(self, line: str, output_ids: list[int], interfaces: Mapping[int, str]) -> State:
        state: State = {}
        for output_id in output_ids:
            found = self._read("kernel_outputs", ffi.new("__u32 *", output_id), "mcr_kernel_output")
            device = self._read("egress_devices", ffi.new("__u32 *", found.ifindex), "mcr_egress_device")
            name = interfaces.get(found.ifindex, f"index {found.ifindex}")
            text = _kernel_output(found)
            if device is None or device.bulk != found.bulk or not found.bulk:
                text += ", whose bulk is not its interface's"
            slot = self._device("devices", found.bulk)
            text += "" if slot == found.ifindex else f", whose slot of devices leads to index {slot}"
            state[f"{line} -> {_address(found.daddr)}%{name}"] = text
        return state

    def _fan_outs(self) -> dict[int, list[int]]:
        """The output_ids of every fan-out that has some."""
        count = ctypes.c_uint32(lib.MCR_MAX_FAN_OUTS)
        keys = (ctypes.c_uint32 * lib.MCR_MAX_FAN_OUTS)()
        values = ctypes.create_string_buffer(FAN_OUT_BYTES * lib.MCR_MAX_FAN_OUTS)
        cursor = ctypes.c_uint32()
        LIBBPF.bpf_map_lookup_batch(
            self._fds["fan_out_outputs"], None, ctypes.byref(cursor), keys, values, ctypes.byref(count), None
        )
        nothing, data = bytes(FAN_OUT_BYTES), values.raw
        found = {}
        for number in range(count.value):
            outputs = data[number * FAN_OUT_BYTES : (number + 1) * FAN_OUT_BYTES]
            if outputs != nothing:
                ids = struct.unpack(f"={lib.MCR_FAN_OUT_SLOTS}I", outputs)
                found[number] = [output_id for output_id in ids if output_id]
        return found

    def _device(self, name: str, slot: int, fd: int = -1) -> int:
        """The ifindex in a slot of a device map, 0 if it is empty."""
        value = ffi.new("struct bpf_devmap_val *")
        fd = self._fds[name] if name else fd
        return int(value.ifindex) if lib.bpf_map_lookup_elem(fd, ffi.new("__u32 *", slot), value) == 0 else 0

    def _wrong_devices(self, device_set: int, output_ids: list[int]) -> str:
        """What is wrong with the device map of these outputs; empty if nothing is."""
        map_id = ffi.new("__u32 *")
        if lib.bpf_map_lookup_elem(self._fds["device_sets"], ffi.new("__u32 *", device_set), map_id):
            return "missing"
        fd = LIBBPF.bpf_map_get_fd_by_id(ctypes.c_uint32(map_id[0]))
        slots = range(len(output_ids) + 1)
        found = sorted(filter(None, (self._device("", slot, fd) for slot in slots)))
        os.close(fd)
        outputs = (
            self._read("kernel_outputs", ffi.new("__u32 *", each), "mcr_kernel_output") for each in output_ids
        )
        wanted = sorted(int(output.ifindex) for output in outputs)
        return "" if found == wanted else f"{found} instead of {wanted}"


def _address(data: Any) -> str:
    address = IPv6Address(bytes(data))
    return str(address.ipv4_mapped or address)


def _input(key: Any, interfaces: Mapping[int, str]) -> str:
    """As a stream is written."""
    name = interfaces.get(key.ifindex, f"index {key.ifindex}")
    source = bracketed(_address(key.saddr)) + "@" if any(key.saddr) else ""
    vlan = f",vlan={key.vlan}" if key.vlan else ""
    return f"{source}{bracketed(_address(key.daddr))}%{name}:{key.dport or '*'}{vlan}"


def _kernel_output(found: Any) -> str:
    keeps_source = found.flags & lib.MCR_OUTPUT_PRESERVE_SOURCE
    return describe_kernel_output(
        0 if found.flags & lib.MCR_OUTPUT_KEEP_PORT else found.dport,
        0 if found.flags & lib.MCR_OUTPUT_DECREMENT_TTL else found.ttl,
        found.dscp,
        bool(found.flags & lib.MCR_OUTPUT_PRESERVE_DSCP),
        "the packet's" if keeps_source else _address(found.saddr),
        f"{bytes(found.mac_source).hex(':')} to {bytes(found.mac_destination).hex(':')}",
        found.mtu,
    )
