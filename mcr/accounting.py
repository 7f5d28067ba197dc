"""Where every packet went: the arithmetic of what is unaccounted for, and what settles it.

Whenever traffic is stopped, received = relayed + dropped for a rule, and relayed = sent + dropped for an
output. Two losses have no witness and are settled here, by what is left of the sum: the packets in the hands
of a worker that died, and those that the kernel left out of a fan-out without a word, as a device was down.
This module must never settle what may still be under way, and never anything else: whatever is left then is a
defect, which `mcr stats --check` shows.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from mcr.limits import scaled

if TYPE_CHECKING:
    from mcr.maps import Maps, OutputCounts

SOFTIRQ_S = (
    0.02  # longer than the kernel takes to leave a poll that began before an entry of `xsks` was deleted
)
ROUNDS = 50
WATCHED_AT_ONCE = 200
QUIET_ROUNDS = 5
ASKED_ROUNDS = 5  # of what `mcr stats --check` asks for; it asks again while it waits

Counts = TypeVar("Counts")


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

    def watch(self, output_ids: Iterable[int], rounds: int | None = None) -> None:
        """Outputs of a fan-out: what is left of them was left out by the kernel.

        rounds: after which they are not watched any longer, at rest or not; None for no end.
        """
        for output_id in output_ids:
            watched = self._fan_outs.setdefault(output_id, _Watched(rounds_left=rounds))
            if watched.rounds_left is not None:
                watched.rounds_left = rounds

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

    async def settle(self) -> None:
        """One round. What is found at rest is settled before the loop goes on: then it may move again."""
        for ids in _shares(self._rules):
            self._settle_rules(ids)
            await asyncio.sleep(0)
        for ids in _shares(self._outputs):
            self._settle_outputs(ids)
            await asyncio.sleep(0)
        for ids in _shares(self._fan_outs):
            self._settle_fan_outs(ids)
            await asyncio.sleep(0)

    def _settle_rules(self, ids: Sequence[int]) -> None:
        maps, rounds = self._maps, round(scaled(QUIET_ROUNDS))
        for rule_id, _ in _at_rest(self._rules, ids, maps.all_rule_counts(ids), rounds):
            if (packets := maps.rule_in_workers(rule_id)) > 0:
                maps.settle_rule(rule_id, packets)

    def _settle_outputs(self, ids: Sequence[int]) -> None:
        maps, rounds = self._maps, round(scaled(QUIET_ROUNDS))
        for output_id, _ in _at_rest(self._outputs, ids, maps.all_output_counts(ids), rounds):
            if (packets := maps.output_in_workers(output_id)) > 0:
                maps.settle_output(output_id, packets, "worker_died")

    def _settle_fan_outs(self, ids: Sequence[int]) -> None:
        maps = self._maps
        for output_id, counts in _at_rest(self._fan_outs, ids, maps.all_output_counts(ids), 1):
            packets = left_over(counts) - max(0, maps.output_in_workers(output_id))  # no worker has any
            if packets > 0:
                maps.settle_output(output_id, packets, "link_down")


@dataclass(slots=True)
class _Watched:
    counts: object = None
    quiet_rounds: int = 0
    rounds_left: int | None = None


def _shares(watched: dict[int, _Watched]) -> Iterator[list[int]]:
    """Their numbers, not too many at once."""
    numbers = iter(list(watched))
    while share := list(islice(numbers, WATCHED_AT_ONCE)):
        yield [number for number in share if number in watched]


def _at_rest(
    watched: dict[int, _Watched], numbers: Sequence[int], counts: Sequence[Counts], rounds: int
) -> Iterator[tuple[int, Counts]]:
    """Those that have not moved for so many rounds, with their counts; they are not watched any longer."""
    for number, now in zip(numbers, counts, strict=True):
        each = watched[number]
        each.quiet_rounds = each.quiet_rounds + 1 if now == each.counts else 0
        each.counts = now
        if each.rounds_left is not None:
            each.rounds_left -= 1
        if each.quiet_rounds >= rounds:
            del watched[number]
            yield number, now
        elif each.rounds_left == 0:
            del watched[number]
