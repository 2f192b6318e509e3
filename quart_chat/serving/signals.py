"""Signals that end the process, and a deadline that no code of the process can hold up."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import itertools
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("quart_chat.serving")

LOG_SECONDS = 0.2
TICK_SECONDS = 0.05

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Deadline:
    """Deadline that ends the process, even while the event loop is blocked.

    Its thread is started without the locks of ``threading`` and of ``logging``, because a signal
    handler runs between any two instructions of whoever may hold them.
    """

    def __init__(self) -> None:
        # One step each, because a handler may be interrupted by another between any two.
        self._ends: list[tuple[float, int]] = []
        self._calls = itertools.count()

    def end_within(self, seconds: float, code: int = 1) -> None:
        """End the process after so long, or earlier if that was asked for before."""
        self._ends.append((time.monotonic() + seconds, code))
        if next(self._calls) == 0:
            _thread.start_new_thread(self._watch, ())

    def _watch(self) -> None:
        while time.monotonic() < min(self._ends)[0]:
            time.sleep(TICK_SECONDS)
        code = min(self._ends)[1]
        if code:
            _thread.start_new_thread(_log_end, ())
            time.sleep(LOG_SECONDS)
        os._exit(code)


def _log_end() -> None:
    logger.error("Something did not end in time; the process is ended. See CHAT_DRAIN_TIMEOUT.")


class EndSignals:
    """SIGINT, SIGTERM and SIGHUP: the first asks for an end, the second for an end at once.

    Python runs signal handlers in the main thread, when it gets to it: not while a tool blocks it,
    and not if the kernel gave the signal to another thread. The wake-up descriptor is written at
    once, by the C handler; a thread reads it.
    """

    def __init__(self, deadline: Deadline, first_seconds: float, second_seconds: float) -> None:
        self._deadline = deadline
        self._seconds = (first_seconds, second_seconds)
        self._count = 0
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def listen(self, on_first: Callable[[], None]) -> None:
        """Handle signals from now on; the function is called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._on_first = on_first
        self._numbers: set[int] = set()
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is None or (
                name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN  # nohup
            ):
                continue
            signal.signal(number, _ignore)
            self._numbers.add(int(number))
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        _thread.start_new_thread(self._read, (reading,))

    def _read(self, descriptor: int) -> None:
        while numbers := os.read(descriptor, 64):
            for number in numbers:
                if number in self._numbers:
                    self._handle()

    def _handle(self) -> None:
        if self._count < len(self._seconds):
            self._deadline.end_within(self._seconds[self._count])
        self._count += 1
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._handled, self._count)

    def _handled(self, count: int) -> None:
        if not self.first.is_set():
            self.first.set()
            self._on_first()
        if count > 1:
            self.second.set()


def _ignore(number: int, frame: Any) -> None:
    """Let the C handler write to the wake-up descriptor, and do nothing more."""
