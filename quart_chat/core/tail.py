"""The newest events of one run, in memory, and the followers that wait for more.

Every event log keeps a tail for each run that is alive: followers in the same process read from it
and never wait for a database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from .events import EVENT_WEIGHT, MERGED_CHARS, End, Event, Numbered, merge, weight_of


class Tail:
    """Events ``first`` to ``last`` of a run; older ones were trimmed and live elsewhere."""

    __slots__ = ("_events", "_waiting", "ended", "first", "size")

    def __init__(self) -> None:
        self.first = 1
        self.size = 0
        self.ended = False
        self._events: list[Event] = []
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def last(self) -> int:
        """The number of the newest event, 0 before the first."""
        return self.first + len(self._events) - 1

    def append(self, events: Sequence[Event]) -> int:
        """Number and keep the events, wake who waits, and return the newest number.

        Nothing comes after ``end``.
        """
        for event in events:
            if self.ended:
                break
            self._events.append(event)
            self.size += weight_of(event)
            if type(event) is End:
                self.ended = True
        self._wake()
        return self.first + len(self._events) - 1

    def after(self, seq: int) -> list[Numbered]:
        """What follows event ``seq``, merged, about 64 K characters at most."""
        start = seq + 1 - self.first
        events = self._events
        if start == len(events) - 1:
            return [(seq + 1, events[start])]
        return merge(self._page(max(start, 0)))

    def between(self, after: int, upto: int) -> list[Numbered]:
        """The events after ``after`` up to ``upto``, each by itself."""
        start = after + 1 - self.first
        return list(enumerate(self._events[start : upto + 1 - self.first], after + 1))

    def trim(self, upto: int, keep: int) -> None:
        """Forget the oldest events, none after ``upto``, until at most ``keep`` characters stay."""
        count = 0
        while self.size > keep and count < len(self._events) and self.first + count <= upto:
            self.size -= weight_of(self._events[count])
            count += 1
        if count:
            del self._events[:count]
            self.first += count

    async def more(self, seq: int) -> None:
        """Wait until there is an event after ``seq``, or until the tail is closed."""
        if self.last > seq or self.ended:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            raise

    def close(self) -> None:
        """Let nobody wait for events that will not come."""
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)

    def _page(self, start: int) -> Iterable[Numbered]:
        chars = 0
        for index in range(start, len(self._events)):
            event = self._events[index]
            yield self.first + index, event
            chars += weight_of(event) - EVENT_WEIGHT
            if chars >= MERGED_CHARS:
                return
