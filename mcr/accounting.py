"""Where every packet went: the arithmetic of what is unaccounted for, and what settles it.

Whenever traffic is stopped, received = relayed + dropped for a rule, and relayed = sent + dropped for an
output. Two losses have no witness and are settled here, by what is left of the sum: the packets in the hands
of a worker that died, and those that the kernel left out of a fan-out without a word, as a device was down.
This module must never settle what may still be under way, and never anything else: whatever is left then is a
defect, which `mcr stats --check` shows.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcr.limits import scaled

if TYPE_CHECKING:
    from mcr.maps import Maps, OutputCounts

SOFTIRQ_S = (
    0.02  # longer than the kernel takes to leave a poll that began before an entry of `xsks` was deleted
)
ROUNDS = 50
QUIET_ROUNDS = 5


def dropped(row: Mapping[str, Any]) -> int:
    """All drops of a row of `mcr stats -j`."""
    return sum(value for key, value in row.items() if key.startswith("dropped_"))


def unaccounted(row: Mapping[str, Any]) -> int:
    """What a row of `mcr stats -j` does not account for: 0 at rest; under way, or a defect, if not."""
    if row["object"] == "rule":
        return int(row["received_packets"] - row["relayed_packets"] - dropped(row))
    return int(row["relayed_packets"] - row["sent_packets"] - dropped(row))


def left_over(counts: "OutputCounts") -> int:
    """An output's packets that were neither sent nor dropped."""
    return counts.relayed_packets - counts.sent_packets - sum(counts.dropped.values())


async def settle_worker(maps: "Maps", rules: Iterable[int], outputs: Iterable[int]) -> None:
    """Gives up what a worker that has ended had in hand of these rules and outputs: worker_died.

    Its entries of `xsks` are deleted, and nobody but that worker may count for these rules and outputs. So
    nothing is written once no poll is left that found its sockets, which two equal readings confirm.
    """
    rules, outputs = tuple(rules), tuple(outputs)
    found: tuple[list[int], list[int]] | None = None
    for _ in range(ROUNDS if rules or outputs else 0):
        await asyncio.sleep(SOFTIRQ_S)
        before = found
        found = (
            [maps.rule_in_workers(rule_id) for rule_id in rules],
            [maps.output_in_workers(output_id) for output_id in outputs],
        )
        if found == before:
            break
    if found is None:
        return
    for rule_id, packets in zip(rules, found[0], strict=True):
        if packets > 0:
            maps.settle_rule(rule_id, packets)
    for output_id, packets in zip(outputs, found[1], strict=True):
        if packets > 0:
            maps.settle_output(output_id, packets, "worker_died")


class Resting:
    """Rules and outputs that may have lost packets without a witness, until they have been at rest.

    Traffic that goes on hides such a loss among what is under way. What has not moved for QUIET_ROUNDS rounds
    of about a second is at rest: a worker that still had any of it would have sent it, or, as a silent one,
    have been killed by then (worker.REPLY_TIMEOUT_S).
    """

    def __init__(self, maps: "Maps") -> None:
        self._maps = maps
        self._fan_outs: dict[int, _Watched] = {}
        self._rules: dict[int, _Watched] = {}
        self._outputs: dict[int, _Watched] = {}

    def watch(self, output_ids: Iterable[int]) -> None:
        """Outputs of a fan-out: what is left of them was left out by the kernel."""
        for output_id in output_ids:
            self._fan_outs.setdefault(output_id, _Watched())

    def watch_workers(self, rule_ids: Iterable[int], output_ids: Iterable[int]) -> None:
        """Rules and outputs of a worker that has ended, while others go on with them."""
        self._rules |= {rule_id: _Watched() for rule_id in rule_ids}
        self._outputs |= {output_id: _Watched() for output_id in output_ids}

    def forget(self, rule_ids: Iterable[int], output_ids: Iterable[int]) -> None:
        """Before an id is given out anew."""
        for rule_id in rule_ids:
            self._rules.pop(rule_id, None)
        for output_id in output_ids:
            self._fan_outs.pop(output_id, None)
            self._outputs.pop(output_id, None)

    def settle(self) -> None:
        """One round."""
        maps, rounds = self._maps, round(scaled(QUIET_ROUNDS))
        for rule_id in _at_rest(self._rules, maps.rule_counts, rounds):
            if (packets := maps.rule_in_workers(rule_id)) > 0:
                maps.settle_rule(rule_id, packets)
        for output_id in _at_rest(self._outputs, maps.output_counts, rounds):
            if (packets := maps.output_in_workers(output_id)) > 0:
                maps.settle_output(output_id, packets, "worker_died")
        for output_id in _at_rest(self._fan_outs, maps.output_counts, 1):  # no worker has any of these
            packets = left_over(maps.output_counts(output_id)) - max(0, maps.output_in_workers(output_id))
            if packets > 0:
                maps.settle_output(output_id, packets, "link_down")


@dataclass(slots=True)
class _Watched:
    counts: object = None
    quiet_rounds: int = 0


def _at_rest(watched: dict[int, _Watched], read: Callable[[int], object], rounds: int) -> list[int]:
    """Those that have not moved for so many rounds, which are not watched any longer."""
    for number, each in watched.items():
        now = read(number)
        each.quiet_rounds = each.quiet_rounds + 1 if now == each.counts else 0
        each.counts = now
    rested = [number for number, each in watched.items() if each.quiet_rounds >= rounds]
    for number in rested:
        del watched[number]
    return rested
