"""Limits per user: rates of messages and calls, simultaneous connections and calls."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from ..config import Settings
from ..errors import ChatError, RateLimited

MAX_RATES = 100_000
SECONDS = {"second": 1, "minute": 60, "hour": 3600}


class TooManyConnections(ChatError):
    """As many connections as are allowed are open; close 1013."""

    code = "rate_limited"
    status = 429
    default_message = "Too many connections are open. Close one, or try again later."


class TooManyRequests(ChatError):
    """As many requests as are allowed are being answered."""

    code = "rate_limited"
    status = 429
    default_message = "Too many requests at once. Wait for an answer before you send the next one."


class RateLimiter:
    """Rate limiter (GCRA), in memory: ``count`` messages a period, evenly refilled."""

    def __init__(self, limit: str, message: str | None = None) -> None:
        count, _, period = limit.partition("/")
        self._period = float(SECONDS[period])
        self._interval = self._period / int(count)
        self._message = message
        self._arrivals: OrderedDict[str, float] = OrderedDict()

    def take(self, user: str) -> None:
        """Count a message. Raises RateLimited with the seconds until the next one is allowed."""
        now = time.monotonic()
        arrival = max(self._arrivals.get(user, now), now)
        wait = arrival - now - (self._period - self._interval)
        if wait > 1e-9:
            raise RateLimited(self._message, retry_after=round(wait + 0.0005, 3))
        self._arrivals[user] = arrival + self._interval
        self._arrivals.move_to_end(user)
        if len(self._arrivals) > MAX_RATES:
            self._arrivals.popitem(last=False)


class ConnectionSlot:
    """Slot of a counted connection, which ``release`` frees once."""

    __slots__ = ("_slots", "_user")

    def __init__(self, slots: ConnectionSlots, user: str) -> None:
        self._slots: ConnectionSlots | None = slots
        self._user = user

    def release(self) -> None:
        """Count the connection no longer."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.leave(self._user)


class ConnectionSlots:
    """The connections of every user, with their total."""

    def __init__(self, bound: int, bound_per_user: int | None, refusal: type[ChatError]) -> None:
        self._bound = bound
        self._bound_per_user = bound_per_user
        self._refusal = refusal
        self._per_user: Counter[str] = Counter()
        self.total = 0

    def take(self, user: str) -> ConnectionSlot:
        """Count one more. Raises the refusal if a bound is reached."""
        per_user = self._bound_per_user
        if self.total >= self._bound or (per_user is not None and self._per_user[user] >= per_user):
            raise self._refusal(retry_after=1)
        self._per_user[user] += 1
        self.total += 1
        return ConnectionSlot(self, user)

    def leave(self, user: str) -> None:
        """Count one less."""
        self.total -= 1
        self._per_user[user] -= 1
        if not self._per_user[user]:
            del self._per_user[user]


class Limits:
    """Limits of one application."""

    def __init__(self, settings: Settings) -> None:
        self._messages = RateLimiter(settings.rate_limit) if settings.rate_limit else None
        self._requests = (
            RateLimiter(
                settings.request_rate_limit, "Too many requests. Wait a little and try again."
            )
            if settings.request_rate_limit
            else None
        )
        bounds = settings.max_connections, settings.max_connections_per_user
        self._connections = ConnectionSlots(*bounds, TooManyConnections)
        self._calls = ConnectionSlots(*bounds, TooManyRequests)

    def take_message(self, user: str) -> None:
        """Count a message. Raises RateLimited."""
        if self._messages is not None:
            self._messages.take(user)

    def take_request(self, user: str) -> None:
        """Count a JSON call or a refusal. Raises RateLimited."""
        if self._requests is not None:
            self._requests.take(user)

    def take_place(self, user: str) -> ConnectionSlot:
        """Count a socket or stream until it is released. Raises TooManyConnections."""
        return self._connections.take(user)

    @contextmanager
    def request(self, user: str) -> Iterator[None]:
        """Count a request while it is answered. Raises TooManyRequests.

        As many are allowed at once as connections, and counted apart from them.
        """
        slot = self._calls.take(user)
        try:
            yield
        finally:
            slot.release()
