"""Which settings and relays the parts of a benchmark need, each only once.

Pure but for making the relays' objects, which start nothing. This module must never measure.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.lanes import Setting
from bench.measure import Job
from bench.relays import Mcr, McrPath, Relay, Smcroute, Socat

PARTS = {
    "targets": "1 hop with 1 and 4 outputs, and a chain of 3",
    "outputs": "1 input to 1, 3, 4, 10 and 50 outputs",
    "inputs": "3 inputs converging on 1 output",
    "streams": "1 to 1,000 streams at once",
    "rules": "1 to 1,000 rules installed, 1 stream",
    "sizes": "payloads of 64, 512, 1316 and 1472 bytes",
    "latency": "at 10, 50 and 90 % of throughput",
    "relay-latency": "inside MCR at 50,000 packets/s",
    "sockets": "socket to socket at 20,000 packets/s, with integrity",
    "attach": "mcr attach to first relayed packet",
    "joins": "group join and leave delay",
}
QUICK_PARTS = ("targets", "relay-latency", "attach")
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "targets": (Setting(), Setting(outputs=4), Setting(hops=3)),
    "outputs": tuple(Setting(outputs=count) for count in (1, 3, 4, 10, 50)),
    "inputs": (Setting(inputs=3, streams=3, rules=3),),
    "streams": tuple(Setting(streams=count, rules=count) for count in (1, 10, 100, 1000)),
    "rules": tuple(Setting(rules=count) for count in (1, 10, 100, 1000)),
    "sizes": tuple(Setting(payload_bytes=size) for size in (64, 512, 1316, 1472)),
    "latency": (Setting(),),
}
GROWING = {*SETTINGS["streams"], *SETTINGS["rules"]} - {Setting()}


@dataclass(frozen=True, slots=True)
class Plan:
    """jobs: throughput and what goes with it, setting by setting. parts: all that were asked for."""

    parts: tuple[str, ...]
    jobs: tuple[Job, ...]


def plan(parts: Iterable[str], paths: Iterable[McrPath]) -> Plan:
    """The jobs that these parts need."""
    parts, paths = tuple(parts), tuple(paths)
    settings = dict.fromkeys(setting for part in parts for setting in SETTINGS.get(part, ()))
    jobs = tuple(
        Job(
            setting,
            relays_for(setting, paths),
            latency="latency" in parts and setting == Setting(),
            usual=tuple(Mcr(path) for path in paths) if setting in GROWING else (),
        )
        for setting in settings
    )
    return Plan(parts, jobs)


def relays_for(setting: Setting, paths: tuple[McrPath, ...]) -> tuple[Relay, ...]:
    """smcroute, every path, and socat where it can do it; the AF_PACKET ingress only with one hop."""
    relays: list[Relay] = [Smcroute()]
    relays += [Mcr(path) for path in paths if path != "packet" or setting.hops == 1]
    if setting == Setting(payload_bytes=setting.payload_bytes):
        relays.append(Socat())
    return tuple(relays)
