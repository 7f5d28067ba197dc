"""Typed views of one instance's pinned maps.

Thin: every method is one access. The worker's counters are mapped memory, so that reading them never
touches a worker. This module must never decide what belongs in a map.
"""

import errno
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Self

from mcr import loader
from mcr._bpf import ffi, lib
from mcr.errors import McrError
from mcr.latency import Latency
from mcr.stream import Address, Stream

MAX_RULES: int = lib.MCR_MAX_RULES
MAX_OUTPUTS: int = lib.MCR_MAX_OUTPUTS
FAN_OUT_SLOTS: int = lib.MCR_FAN_OUT_SLOTS
MAX_EGRESS: int = lib.MCR_MAX_EGRESS
MAX_FAN_OUTS: int = lib.MCR_MAX_FAN_OUTS
MAX_INTERFACES: int = lib.MCR_MAX_INTERFACES
MAX_WORKERS: int = lib.MCR_MAX_WORKERS
MAX_QUEUES: int = lib.MCR_MAX_QUEUES
SETS_AT_ONCE = 256  # device maps that are open side by side
NO_DEVICE = (-errno.EINVAL, -errno.ENODEV)  # of a device map: there is no such interface (any more)


def _reason_names(enum: str, prefix: str) -> tuple[str, ...]:
    """`MCR_DROP_BAD_LENGTH` -> `bad_length`, in the order of the values; the last one is only their count."""
    elements: dict[int, str] = ffi.typeof(f"enum {enum}").elements
    return tuple(elements[value].removeprefix(prefix).lower() for value in sorted(elements)[:-1])


DROP_REASONS = _reason_names("mcr_drop_reason", "MCR_DROP_")
OUTPUT_DROP_REASONS = _reason_names("mcr_output_drop_reason", "MCR_OUTPUT_DROP_")
RULE_COLUMNS = int(ffi.sizeof("struct mcr_rule_counters")) // 8
OUTPUT_COLUMNS = int(ffi.sizeof("struct mcr_output_counters")) // 8
OCTAVE_COLUMNS: int = lib.MCR_OCTAVE_COLUMNS
OCTAVE_BOUNDS_NS = tuple(1 << (lib.MCR_OCTAVE_FIRST_BITS + octave) for octave in range(lib.MCR_OCTAVES))


@dataclass(frozen=True, slots=True)
class RuleCounts:
    """A rule's packets: received = relayed + dropped (by reason) whenever traffic is stopped.

    last_seen_ns is CLOCK_MONOTONIC, 0 for never.
    """

    received_packets: int
    received_bytes: int
    last_seen_ns: int
    relayed_packets: int
    relayed_bytes: int
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class OutputCounts:
    """An output's packets: relayed = sent + dropped (by reason) whenever traffic is stopped."""

    relayed_packets: int
    sent_packets: int
    sent_bytes: int
    dropped: dict[str, int]
    last_error: int


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """A worker's frames by state, and what its sockets lost before it saw them."""

    frames_fill: int
    frames_receive: int
    frames_in_flight: int
    frames_free: int
    batches: int
    packets: int
    waits: int
    receive_ring_full: int
    fill_ring_empty: int
    socket_dropped: int
    pipe_bytes: int


def address_bytes(address: Address) -> bytes:
    """16 bytes; IPv4 as v4-mapped IPv6 (RFC 4291 section 2.5.5.2)."""
    if isinstance(address, IPv4Address):
        return bytes(10) + b"\xff\xff" + address.packed
    return address.packed


def rule_key(stream: Stream, ifindex: int) -> Any:
    """The `struct mcr_rule_key` of an input stream."""
    key = ffi.new("struct mcr_rule_key *")
    key.ifindex, key.vlan, key.vlan_outer = ifindex, stream.vlan, stream.vlan_outer
    key.dport = stream.port or 0
    ffi.memmove(key.daddr, address_bytes(stream.address), 16)
    if stream.source is not None:
        ffi.memmove(key.saddr, address_bytes(stream.source), 16)
    return key


def lookups_needed(streams: list[Stream]) -> int:
    """The settings word: which kinds of lookup some rule needs."""
    names = {
        (True, True): lib.MCR_HAS_SOURCE_PORT,
        (False, True): lib.MCR_HAS_ANY_PORT,
        (True, False): lib.MCR_HAS_SOURCE_STAR,
        (False, False): lib.MCR_HAS_ANY_STAR,
    }
    word = 0
    for stream in streams:
        word |= names[stream.source is not None, stream.port is not None]
    return word


class _Counters:
    """A BPF_F_MMAPABLE array map, mapped: `view[index]` is a struct in shared memory."""

    def __init__(self, fd: int, struct: str, entries: int) -> None:
        self._size = int(ffi.sizeof(f"struct {struct}"))
        length = -(-self._size * entries // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._memory = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise McrError(
                f"cannot map a map of counters: {error.strerror}",
                "free memory, or raise the limit of open files (ulimit -n, LimitNOFILE=)",
            ) from error
        self.view = ffi.cast(f"struct {struct} *", ffi.from_buffer(self._memory))
        self._entries = entries

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._entries:
            raise IndexError(index)
        return self.view[index]

    def clear(self, index: int) -> None:
        self._memory[index * self._size : (index + 1) * self._size] = bytes(self._size)


def _check(status: int, what: str) -> None:
    if status < 0:
        raise McrError(f"cannot {what}: {os.strerror(-status)}", "see the kernel's log, and restart MCR")


def _by_interface(outputs: Sequence[tuple[int, int]]) -> list[int]:
    """(output_id, ifindex) pairs in the slots of a `struct mcr_fan_out`."""
    slots = [0] * FAN_OUT_SLOTS
    for output_id, ifindex in outputs:
        slot = ifindex % FAN_OUT_SLOTS
        while slots[slot]:
            slot = (slot + 1) % FAN_OUT_SLOTS
        slots[slot] = output_id
    return slots


def _split(numbers: Sequence[int], columns: int) -> Iterator[Sequence[int]]:
    return (numbers[first : first + columns] for first in range(0, len(numbers), columns))


def _numbers(array: Any, count: int) -> list[int]:
    """An array of structs of __u64, flat."""
    numbers: list[int] = ffi.unpack(ffi.cast("uint64_t *", array), count)
    return numbers


class Maps:
    """The maps and the program of a loaded instance, open."""

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._settings = b""
        self._fds: dict[str, int] = {}
        try:
            self._open(instance)
        except BaseException:
            self.close()
            raise

    def _open(self, instance: str) -> None:
        for name in (*loader.MAP_NAMES, *loader.PROGRAMS):
            self._fds[name] = loader.open_pin(instance, name)
        self._lookups = 0
        self._tracing = False
        self._cpus = int(lib.libbpf_num_possible_cpus())
        self._rule_counters = _Counters(self._fds["rule_counters"], "mcr_rule_counters", MAX_RULES)
        self._output_counters = _Counters(self._fds["output_counters"], "mcr_output_counters", MAX_OUTPUTS)
        self._worker_counters = _Counters(self._fds["worker_counters"], "mcr_worker_counters", MAX_WORKERS)
        self._settled_rules = _Counters(self._fds["settled_rules"], "mcr_rule_counters", MAX_RULES)
        self._settled_outputs = _Counters(self._fds["settled_outputs"], "mcr_output_counters", MAX_OUTPUTS)
        self._program_id = int(lib.mcr_program_id(self.program_fd))
        _check(self._program_id, "read the program's id")
        self._folding = threading.Lock()  # metrics are read in a thread of their own
        self._fan_outs_of: dict[int, tuple[int, ...]] = {}  # by output_id
        for rule in self.rules().values():
            if rule["fan_out"]:
                self._list_fan_out(rule["fan_out"], self.outputs_of(rule["fan_out"]))
        self._latency = _Counters(self._fds["rule_latency"], "mcr_latency", MAX_RULES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    @property
    def program_fd(self) -> int:
        return self._fds[loader.PROGRAM_NAME]

    @property
    def helper_fd(self) -> int:
        """Of the program that passes everything."""
        return self._fds[loader.HELPER_NAME]

    @property
    def counter_fds(self) -> tuple[int, ...]:
        """What a worker maps: rule, output and worker counters, latency, and its reports for traces."""
        names = ("rule_counters", "output_counters", "worker_counters", "rule_latency", "tap_reports")
        return tuple(self._fds[name] for name in names)

    def _update(self, name: str, key: Any, value: Any) -> None:
        _check(lib.bpf_map_update_elem(self._fds[name], key, value, 0), f"write the map {name}")

    def set_lookups(self, word: int) -> None:
        self._lookups = word
        if self._tracing:
            word |= lib.MCR_TRACING
        fields = {"abi_version": lib.MCR_ABI_VERSION, "lookups": word, "program_id": self._program_id}
        value = ffi.new("struct mcr_settings *", fields)
        self._settings = bytes(ffi.buffer(value))
        self._update("settings", ffi.new("__u32 *", 0), value)

    def restore_settings(self) -> None:
        self.set_lookups(self._lookups)

    @property
    def program_id(self) -> int:
        """Of mcr_relay."""
        return self._program_id

    def has_settings(self) -> bool:
        """Whether they are as they were last set."""
        value = ffi.new("struct mcr_settings *")
        status = lib.bpf_map_lookup_elem(self._fds["settings"], ffi.new("__u32 *", 0), value)
        _check(status, "read the map settings")
        return bytes(ffi.buffer(value)) == self._settings

    def pin_again(self, links: Mapping[str, int]) -> list[str]:
        """Pins what has lost its pin, of the links, by name, as well. Returns the names."""
        return loader.pin_missing(self._instance, {**self._fds, **links})

    def tracepoint_fd(self, program: str) -> int:
        """program: one of `loader.TRACEPOINTS`."""
        return self._fds[program]

    def set_tracing(self, tracing: bool) -> None:
        """Whether the traced programs do the work, which must have been loaded."""
        self._tracing = tracing
        self.set_lookups(self._lookups)

    def set_tap(self, key: Any, **fields: int) -> None:
        """Which packets a trace or capture wants; fields: of `struct mcr_tap`. It begins to count anew."""
        value = ffi.new("struct mcr_tap *", fields)
        ffi.memmove(ffi.addressof(value, "key"), key, ffi.sizeof("struct mcr_rule_key"))
        self._update("tap", ffi.new("__u32 *", 0), value)

    def tap_counts(self) -> tuple[int, int]:
        """Packets that a trace or capture took, and events that found its ring full."""
        value = ffi.new("struct mcr_tap *")
        _check(lib.bpf_map_lookup_elem(self._fds["tap"], ffi.new("__u32 *", 0), value), "read the map tap")
        return int(value.taken), int(value.lost)

    def descriptor(self, name: str) -> int:
        """Of an open map or program; it stays this object's."""
        return self._fds[name]

    def set_rule(self, key: Any, fields: dict[str, int]) -> None:
        """fields: those of `struct mcr_rule_value`."""
        self._update("rules", key, ffi.new("struct mcr_rule_value *", fields))

    # --- the kernel path

    def set_kernel_output(self, output_id: int, fields: dict[str, Any]) -> None:
        """fields: those of `struct mcr_kernel_output`, byte strings for its arrays."""
        self._update(
            "kernel_outputs", ffi.new("__u32 *", output_id), ffi.new("struct mcr_kernel_output *", fields)
        )

    def has_kernel_output(self, output_id: int, fields: dict[str, Any]) -> bool:
        """Whether it is there with these fields."""
        value, wanted = ffi.new("struct mcr_kernel_output *"), ffi.new("struct mcr_kernel_output *", fields)
        status = lib.bpf_map_lookup_elem(self._fds["kernel_outputs"], ffi.new("__u32 *", output_id), value)
        _check(status, "read the map kernel_outputs")
        return bool(bytes(ffi.buffer(value)) == bytes(ffi.buffer(wanted)))

    def has_device_set(self, number: int) -> bool:
        found = ffi.new("__u32 *")
        return bool(lib.bpf_map_lookup_elem(self._fds["device_sets"], ffi.new("__u32 *", number), found) == 0)

    def set_device(self, bulk: int, ifindex: int, *, asks: bool) -> None:
        """Puts an interface into its slot of `devices`; asks: frames that go there ask for mcr_egress.

        An interface that has just gone is no error: its slot stays empty.
        """
        value = self._device(ifindex, asks)
        status = lib.bpf_map_update_elem(self._fds["devices"], ffi.new("__u32 *", bulk), value, 0)
        if status not in NO_DEVICE:
            _check(status, f"put interface {ifindex} into the map devices")

    def device_program(self, bulk: int) -> int | None:
        """The id of the program that frames to a slot of `devices` ask for, 0 for none; None: it is empty."""
        value = ffi.new("struct bpf_devmap_val *")
        if lib.bpf_map_lookup_elem(self._fds["devices"], ffi.new("__u32 *", bulk), value) < 0:
            return None
        return int(value.bpf_prog.id)

    def _device(self, ifindex: int, asks: bool) -> Any:
        value = ffi.new("struct bpf_devmap_val *")
        value.ifindex, value.bpf_prog.fd = ifindex, self._fds["mcr_egress"] if asks else 0
        return value

    def put_device_sets(self, sets: Mapping[int, Sequence[int]]) -> None:
        """Puts device maps of these interfaces, by ifindex, under these numbers, in place of what is there.

        When it returns, no packet is on its way any more that met any map as it was before: for this kind
        of map the kernel waits for all running programs (kernel/bpf/syscall.c, maybe_wait_bpf_programs), from
        Linux 6.8 on once for a whole batch.
        """
        numbers = list(sets)
        for first in range(0, len(numbers), SETS_AT_ONCE):
            self._put_device_sets({number: sets[number] for number in numbers[first : first + SETS_AT_ONCE]})

    def _put_device_sets(self, sets: Mapping[int, Sequence[int]]) -> None:
        fds: list[int] = []
        try:
            for interfaces in sets.values():
                fds.append(self._create_device_set(interfaces))
            count = ffi.new("uint32_t *", len(sets))
            keys, values = ffi.new("__u32[]", list(sets)), ffi.new("int[]", fds)
            status = lib.bpf_map_update_batch(self._fds["device_sets"], keys, values, count, ffi.NULL)
            _check(status, "write the map device_sets")
        finally:
            for fd in fds:
                os.close(fd)

    def _create_device_set(self, interfaces: Sequence[int]) -> int:
        """No slot too many: the kernel walks along all of them for each packet."""
        devices = int(lib.mcr_create_device_set(max(1, len(interfaces))))
        _check(devices, "create a device map")
        for slot, ifindex in enumerate(interfaces):
            value = self._device(ifindex, True)
            status = lib.bpf_map_update_elem(devices, ffi.new("__u32 *", slot), value, 0)
            if status < 0 and status not in NO_DEVICE:
                os.close(devices)
                _check(status, f"put interface {ifindex} into a device map")
        return devices

    def put_fan_out(self, fan_out: int, outputs: Sequence[tuple[int, int]]) -> None:
        """Makes a fan-out that is not in use, for (output_id, ifindex) pairs."""
        key = ffi.new("__u32 *", fan_out)
        self._update("fan_out_outputs", key, ffi.new("struct mcr_fan_out *", [_by_interface(outputs)]))
        self._update("fan_out_relayed", key, ffi.new("__u64[]", self._cpus))
        self._list_fan_out(fan_out, [output_id for output_id, _ in outputs])

    def restore_fan_out(self, fan_out: int, outputs: Sequence[tuple[int, int]]) -> None:
        """Writes the outputs of one that is in use again, as they were."""
        value = ffi.new("struct mcr_fan_out *", [_by_interface(outputs)])
        self._update("fan_out_outputs", ffi.new("__u32 *", fan_out), value)

    def retire_fan_out(self, fan_out: int) -> None:
        """Takes away a fan-out that no packet can use any more; what it relayed goes to its outputs."""
        output_ids = self.outputs_of(fan_out)
        with self._folding:
            relayed = self._relayed_by(fan_out)
            for output_id in output_ids:
                self._settled_outputs[output_id].relayed_packets += relayed
                left = tuple(other for other in self._fan_outs_of.get(output_id, ()) if other != fan_out)
                self._fan_outs_of[output_id] = left
            self._update("fan_out_outputs", ffi.new("__u32 *", fan_out), ffi.new("struct mcr_fan_out *"))

    def fan_out(self, fan_out: int) -> tuple[tuple[int, int], ...]:
        """The output_id and ifindex of each of its outputs."""
        outputs = ffi.new("struct mcr_kernel_output *")
        pairs = []
        for output_id in self.outputs_of(fan_out):
            status = lib.bpf_map_lookup_elem(
                self._fds["kernel_outputs"], ffi.new("__u32 *", output_id), outputs
            )
            _check(status, "read the map kernel_outputs")
            pairs.append((output_id, int(outputs.ifindex)))
        return tuple(pairs)

    def outputs_of(self, fan_out: int) -> list[int]:
        """The output_ids of a fan-out, in order."""
        value = ffi.new("struct mcr_fan_out *")
        status = lib.bpf_map_lookup_elem(self._fds["fan_out_outputs"], ffi.new("__u32 *", fan_out), value)
        _check(status, "read the map fan_out_outputs")
        return sorted(int(output_id) for output_id in value.output_ids if output_id)

    def _relayed_by(self, fan_out: int) -> int:
        per_cpu = ffi.new("__u64[]", self._cpus)
        status = lib.bpf_map_lookup_elem(self._fds["fan_out_relayed"], ffi.new("__u32 *", fan_out), per_cpu)
        _check(status, "read the map fan_out_relayed")
        return sum(per_cpu)

    def _list_fan_out(self, fan_out: int, output_ids: Sequence[int]) -> None:
        with self._folding:
            for output_id in output_ids:
                self._fan_outs_of[output_id] = (*self._fan_outs_of.get(output_id, ()), fan_out)

    def set_egress_device(self, ifindex: int, bulk: int) -> None:
        """Begins to account for what is redirected to an interface; bulk is its own, from 1 on."""
        fields = ffi.new("struct mcr_egress_device *", {"bulk": bulk})
        self._update("egress_devices", ffi.new("__u32 *", ifindex), fields)

    def delete_egress_device(self, ifindex: int) -> None:
        lib.bpf_map_delete_elem(self._fds["egress_devices"], ffi.new("__u32 *", ifindex))

    def egress_devices(self) -> dict[int, tuple[int, int]]:
        """By ifindex: the bulk, and how many packets the device did not take."""
        devices = {}
        value = ffi.new("struct mcr_egress_device *")
        for key in self._keys("egress_devices", "__u32"):
            if lib.bpf_map_lookup_elem(self._fds["egress_devices"], ffi.from_buffer(key), value) == 0:
                devices[int.from_bytes(key, sys.byteorder)] = (int(value.bulk), int(value.lost))
        return devices

    def no_metadata(self) -> frozenset[int]:
        """The interfaces, by ifindex, whose packets have shown that their driver has no XDP metadata."""
        return frozenset(int.from_bytes(key, sys.byteorder) for key in self._keys("no_metadata", "__u32"))

    def forget_metadata(self, ifindex: int) -> None:
        """Its packets shall show it anew: the program is attached in another way."""
        lib.bpf_map_delete_elem(self._fds["no_metadata"], ffi.new("__u32 *", ifindex))

    def delete_rule(self, key: Any) -> None:
        """Deletes a rule; one that is not there is no error."""
        lib.bpf_map_delete_elem(self._fds["rules"], key)

    def rules(self) -> dict[bytes, dict[str, int]]:
        """Every rule in the map: the fields of its `struct mcr_rule_value`, by its key."""
        rules = {}
        value = ffi.new("struct mcr_rule_value *")
        names = [name for name, _ in ffi.typeof("struct mcr_rule_value").fields]
        for key in self._keys("rules", "struct mcr_rule_key"):
            if lib.bpf_map_lookup_elem(self._fds["rules"], ffi.from_buffer(key), value) == 0:
                rules[key] = {name: int(getattr(value, name)) for name in names}
        return rules

    def _keys(self, name: str, struct: str) -> list[bytes]:
        keys: list[bytes] = []
        key, following = ffi.NULL, ffi.new(f"{struct} *")
        while lib.bpf_map_get_next_key(self._fds[name], key, following) == 0:
            keys.append(bytes(ffi.buffer(following)))
            key, following = following, ffi.new(f"{struct} *")
        return keys

    def set_xsk(self, index: int, socket_fd: int) -> None:
        self._update("xsks", ffi.new("__u32 *", index), ffi.new("int *", socket_fd))

    def delete_xsk(self, index: int) -> None:
        lib.bpf_map_delete_elem(self._fds["xsks"], ffi.new("__u32 *", index))

    def clear_rule(self, rule_id: int) -> None:
        """Zeroes the counters of a rule_id that is about to be used again."""
        self._update(
            "rule_stats", ffi.new("__u32 *", rule_id), ffi.new("struct mcr_rule_stats[]", self._cpus)
        )
        self._rule_counters.clear(rule_id)
        self._settled_rules.clear(rule_id)
        self._latency.clear(rule_id)

    def clear_output(self, output_id: int) -> None:
        """Zeroes the counters of an output_id that is about to be used again."""
        zeroes = ffi.new("struct mcr_output_stats[]", self._cpus)
        self._update("output_stats", ffi.new("__u32 *", output_id), zeroes)
        self._output_counters.clear(output_id)
        self._settled_outputs.clear(output_id)

    def clear_worker(self, slot: int) -> None:
        self._worker_counters.clear(slot)

    def _rule_stats(self, rule_id: int) -> Any:
        per_cpu = ffi.new("struct mcr_rule_stats[]", self._cpus)
        status = lib.bpf_map_lookup_elem(self._fds["rule_stats"], ffi.new("__u32 *", rule_id), per_cpu)
        _check(status, "read the map rule_stats")
        return per_cpu

    def rule_counts(self, rule_id: int) -> RuleCounts:
        """What XDP counted on every CPU, what the workers counted, and what was settled for dead ones."""
        return self.all_rule_counts([rule_id])[0]

    def all_rule_counts(self, rule_ids: Sequence[int]) -> list[RuleCounts]:
        """The same of many rules at once."""
        return [
            RuleCounts(
                *(received, received_bytes, seen, relayed, relayed_bytes),
                dict(zip(DROP_REASONS, dropped, strict=True)),
            )
            for received, received_bytes, seen, relayed, relayed_bytes, *dropped in _split(
                self.rule_totals(rule_ids), RULE_COLUMNS
            )
        ]

    def rule_latency(self, rule_id: int) -> Latency:
        """How long the worker path took with the rule's packets; the kernel path is not measured."""
        measured = self._latency[rule_id]
        return Latency(
            int(measured.count), int(measured.sum_ns), int(measured.max_ns), tuple(measured.buckets)
        )

    def rule_totals(self, rule_ids: Sequence[int]) -> list[int]:
        """The counts of many rules at once: RULE_COLUMNS numbers for each, in the order of RuleCounts, a
        number for each of DROP_REASONS at their end."""
        ids, totals = ffi.new("uint32_t[]", rule_ids), ffi.new("struct mcr_rule_counters[]", len(rule_ids))
        fd, workers, settled = self._fds["rule_stats"], self._rule_counters.view, self._settled_rules.view
        status = lib.mcr_rule_totals(fd, workers, settled, ids, len(rule_ids), totals)
        _check(status, "read the map rule_stats")
        return _numbers(totals, RULE_COLUMNS * len(rule_ids))

    def output_totals(self, output_ids: Sequence[int]) -> list[int]:
        """The same of outputs: OUTPUT_COLUMNS numbers for each, the last of them the errno."""
        ids, totals = (
            ffi.new("uint32_t[]", output_ids),
            ffi.new("struct mcr_output_counters[]", len(output_ids)),
        )
        fd, workers = self._fds["output_stats"], self._output_counters.view
        with self._folding:
            relayed = {fan_out: 0 for each in output_ids for fan_out in self._fan_outs_of.get(each, ())}
            relayed = {fan_out: self._relayed_by(fan_out) for fan_out in relayed}
            settled = self._settled_outputs.view
            status = lib.mcr_output_totals(fd, workers, settled, ids, len(output_ids), totals)
            for total, output_id in zip(totals, output_ids, strict=True):
                for fan_out in self._fan_outs_of.get(output_id, ()):
                    total.relayed_packets += relayed[fan_out]
        _check(status, "read the map output_stats")
        return _numbers(totals, OUTPUT_COLUMNS * len(output_ids))

    def no_worker_drops(self, rule_ids: Sequence[int]) -> int:
        """Packets of these rules that found no AF_XDP socket."""
        totals = self.rule_totals(rule_ids)
        first = RULE_COLUMNS - len(DROP_REASONS) + DROP_REASONS.index("no_worker")
        return sum(totals[first::RULE_COLUMNS])

    def latency_octaves(self, rule_ids: Sequence[int]) -> list[int]:
        """The latency of many rules at once, OCTAVE_COLUMNS numbers for each: the packets below each of
        OCTAVE_BOUNDS_NS, all of them, and the sum of their times in ns."""
        octaves = ffi.new("uint64_t[]", OCTAVE_COLUMNS * len(rule_ids))
        ids = ffi.new("uint32_t[]", rule_ids)
        lib.mcr_latency_octaves(self._latency.view, ids, len(rule_ids), octaves)
        return _numbers(octaves, OCTAVE_COLUMNS * len(rule_ids))

    def output_counts(self, output_id: int) -> OutputCounts:
        """What the kernel path counted on every CPU, what the workers counted, and what was settled."""
        return self.all_output_counts([output_id])[0]

    def all_output_counts(self, output_ids: Sequence[int]) -> list[OutputCounts]:
        """The same of many outputs at once."""
        return [
            OutputCounts(
                relayed, sent, sent_bytes, dict(zip(OUTPUT_DROP_REASONS, dropped, strict=True)), error
            )
            for relayed, sent, sent_bytes, *dropped, error in _split(
                self.output_totals(output_ids), OUTPUT_COLUMNS
            )
        ]

    # --- what has to be settled: see accounting.py

    def rule_in_workers(self, rule_id: int) -> int:
        """A rule's packets that workers have received and not accounted for."""
        worker, settled = self._rule_counters[rule_id], self._settled_rules[rule_id]
        received = worker.received_packets + sum(cpu.redirected_packets for cpu in self._rule_stats(rule_id))
        accounted = worker.relayed_packets + sum(worker.dropped) + settled.dropped[lib.MCR_DROP_WORKER_DIED]
        return int(received - accounted)

    def output_in_workers(self, output_id: int) -> int:
        """An output's packets that workers have handed to it and not seen sent or dropped."""
        worker, settled = self._output_counters[output_id], self._settled_outputs[output_id]
        accounted = worker.sent_packets + sum(worker.dropped)
        return int(worker.relayed_packets - accounted - settled.dropped[lib.MCR_OUTPUT_DROP_WORKER_DIED])

    def settle_rule(self, rule_id: int, packets: int) -> None:
        """Gives up packets that a worker had in hand when it died."""
        self._settled_rules[rule_id].dropped[lib.MCR_DROP_WORKER_DIED] += packets

    def settle_output(self, output_id: int, packets: int, reason: str) -> None:
        """Gives up an output's packets; reason: one of OUTPUT_DROP_REASONS."""
        self._settled_outputs[output_id].dropped[OUTPUT_DROP_REASONS.index(reason)] += packets

    def worker_counts(self, slot: int) -> WorkerCounts:
        counters = self._worker_counters[slot]
        return WorkerCounts(*(int(getattr(counters, name)) for name in WorkerCounts.__slots__))
