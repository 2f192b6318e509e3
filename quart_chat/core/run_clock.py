"""Clock of a run: asks for its end when its time is over. Waiting for people does not count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class RunClock:
    """Counts ``seconds`` down and then calls ``expired``; one timer for a run."""

    def __init__(self, seconds: float, expired: Callable[[], None]) -> None:
        self._left = seconds
        self._expired = expired
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def resume(self) -> None:
        """Count on."""
        if self._timer is None and not self._stopped:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._left, self._expired)

    def pause(self) -> None:
        """Stop counting for a while."""
        if self._timer is not None:
            self._left = max(0.0, self._timer.when() - asyncio.get_running_loop().time())
            self._timer.cancel()
            self._timer = None

    def stop(self) -> None:
        """Stop counting for good."""
        self.pause()
        self._stopped = True
