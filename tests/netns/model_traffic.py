"""Every stream of the model test, all the time: what is sent, what is heard, and whether that is right.

One thread sends a datagram of each stream in turn and takes what the far ends hear, so that neither gets
ahead of the other. All datagrams are numbered, and so is the border between what was sent before a moment
and after it. This module must never decide which streams a step may disturb; `test_model.py` does.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from mcr.limits import scaled
from tests.netns.model_reference import Heard, Sent
from tests.netns.model_world import World

PAUSE_S = 0.02
PATIENCE_S = 15.0

Expected = Mapping[Sent, Sequence[Heard]]


class Traffic:
    """A context manager; datagrams are sent for as long as it is open."""

    def __init__(self, world: World, streams: Sequence[Sent]) -> None:
        self.patience_s = PATIENCE_S  # for what has not been heard yet
        self._world, self._streams = world, streams
        self._sent: dict[int, Sent] = {}
        self._heard: list[tuple[int, Heard]] = []
        self._first = 1  # the number of the first datagram that has not been judged
        self._turn = threading.RLock()
        self._ended = threading.Event()
        self._executor = ThreadPoolExecutor(1, "model-traffic")

    def __enter__(self) -> "Traffic":
        self._running = self._executor.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._executor.shutdown()

    def _run(self) -> None:
        while not self._ended.wait(PAUSE_S):
            with self._turn:
                for stream in self._streams:
                    with contextlib.suppress(OSError):  # its interface has gone
                        self._sent |= self._world.send([stream])
                self._heard += self._world.hear(0, 0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While sockets are exchanged."""
        with self._turn:
            yield

    def border(self) -> int:
        """The number that the next datagram will have."""
        if self._running.done():
            self._running.result()  # which raises what ended it
        with self._turn:
            return self._world.next_number

    def judge(self, expected: Expected, until: int, ordered: set[Sent]) -> str:
        """What is wrong with what was sent since the last judgement and before a border, a line each.

        Only the streams of expected are looked at; those of ordered must keep their order as well.
        """
        first, self._first = self._first, until
        with self._turn:
            sent = {number: stream for number, stream in self._sent.items() if first <= number < until}
        want = Counter((number, each) for number, stream in sent.items() for each in expected.get(stream, ()))
        deadline = time.monotonic() + scaled(self.patience_s)
        while True:
            with self._turn:
                heard = [(n, each) for n, each in self._heard if n in sent and sent[n] in expected]
            if not want - Counter(heard) or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        wrong = _wrong("lost", want - Counter(heard), sent) + _wrong("too many", Counter(heard) - want, sent)
        wrong += _out_of_order([(sent[n], n, each) for n, each in heard if sent[n] in ordered])
        with self._turn:
            self._sent = {number: stream for number, stream in self._sent.items() if number >= until}
            self._heard = [(number, each) for number, each in self._heard if number >= until]
        return "\n".join(wrong)


def _wrong(what: str, packets: Counter[tuple[int, Heard]], sent: Mapping[int, Sent]) -> list[str]:
    streams = Counter[tuple[Sent, Heard]]()
    for (number, heard), count in packets.items():
        streams[sent[number], heard] += count
    return [f"  {what}: {count} of {stream} as {heard}" for (stream, heard), count in streams.items()]


def _out_of_order(packets: Sequence[tuple[Sent, int, Heard]]) -> list[str]:
    last: dict[tuple[Sent, Heard], int] = {}
    wrong = []
    for stream, number, heard in packets:
        if number < last.get((stream, heard), 0):
            wrong.append(f"  out of order: {number} of {stream} as {heard}")
        last[stream, heard] = number
    return wrong
