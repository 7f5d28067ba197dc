"""Every pinned map is readable by `bpftool`, with names for what is in it."""

import json
import subprocess
from typing import Any

import pytest

from mcr.loader import MAP_NAMES, pin_dir
from mcr.stream import Stream
from tests.kernel.packets import GROUP, MORE_FRAGMENTS, PORT, datagram4
from tests.kernel.relay import Relay

FIELDS = {
    "rules": {"ifindex", "vlan", "dport", "daddr", "saddr", "rule_id", "xsk_base", "frame_limit", "flags"},
    "settings": {"abi_version", "lookups"},
    "rule_stats": {"packets", "bytes", "last_seen_ns", "relayed_packets", "dropped"},
    "rule_counters": {"received_packets", "relayed_packets", "dropped"},
    "output_counters": {"sent_packets", "sent_bytes", "dropped", "last_error"},
    "worker_counters": {"frames_fill", "frames_free", "batches", "packets", "waits"},
    "rule_latency": {"count", "sum_ns", "max_ns", "buckets"},
    "kernel_outputs": {"ifindex", "mtu", "ttl", "mac_destination", "saddr", "daddr"},
    "fan_out_outputs": {"output_ids"},
    "fan_out_relayed": {"key", "value"},
    "egress_devices": {"lost", "bulk"},
    "bulks": {"count", "frames"},
    "settled_rules": {"relayed_packets", "dropped"},
    "settled_outputs": {"sent_packets", "dropped"},
    "hands": {"rule_id", "output_id"},
    "output_stats": {"sent_packets", "sent_bytes", "dropped"},
    "fragments": {"identification", "saddr", "daddr"},
    "tap": {"deadline_ns", "limit", "taken", "lost", "rule_id", "key"},
    "tap_reports": {"number", "wanted", "event", "time_ns", "output_id", "verdict"},
}
WITHOUT_VALUES = {
    "xsks",
    "devices",
    "device_sets",
    "traced",
    "traced_egress",
    "tap_events",
    "no_metadata",
}
"""Maps of maps, sockets and programs, a ring, and a set: the kernel gives their ids or nothing."""


LONG = {"rule_latency", "output_stats", "rule_stats"}
"""Arrays whose dump takes seconds: of these one entry is looked up."""


def dump(relay: Relay, name: str) -> list[Any]:
    """What bpftool says of the entries of a pinned map."""
    path = str(pin_dir(relay.instance) / name)
    words = (
        ["lookup", "pinned", path, "key", "7", "0", "0", "0"] if name in LONG else ["dump", "pinned", path]
    )
    done = subprocess.run(["bpftool", "-j", "map", *words], capture_output=True, text=True, check=True)
    entries = json.loads(done.stdout)
    return [entries] if name in LONG else list(entries)


def names(value: Any) -> set[str]:
    """Every key of every object in a JSON value."""
    if isinstance(value, dict):
        return set(value) | {name for each in value.values() for name in names(each)}
    if isinstance(value, list):
        return {name for each in value[:4] for name in names(each)}
    return set()


def test_every_pinned_map_is_in_the_tables_here() -> None:
    assert FIELDS.keys() | WITHOUT_VALUES == set(MAP_NAMES)


@pytest.mark.parametrize("name", FIELDS)
def test_a_map_is_dumped_with_the_names_of_its_fields(relay: Relay, name: str) -> None:
    relay.add_rule(7, Stream(GROUP, PORT, "in0"))
    relay.run(datagram4(b"abc", fragment_field=MORE_FRAGMENTS))
    relay.maps.set_egress_device(relay.other_ifindex, 1)
    try:
        entries = dump(relay, name)
    finally:
        relay.maps.delete_egress_device(relay.other_ifindex)
    assert names([entry["formatted"] for entry in entries]) >= FIELDS[name]


def test_addresses_of_a_rule_end_in_what_people_write(relay: Relay) -> None:
    relay.add_rule(7, Stream(GROUP, PORT, "in0"))
    (entry,) = dump(relay, "rules")
    assert entry["formatted"]["key"]["daddr"][-4:] == [239, 1, 1, 1]
    assert entry["formatted"]["key"]["dport"] == PORT
