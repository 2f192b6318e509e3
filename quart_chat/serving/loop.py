"""The event loop, and the interpreter's own work beside it."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable

GC_THRESHOLDS = (20_000, 20, 50)
SWITCH_SECONDS = 0.0005


def settle_down() -> None:
    """Keep the interpreter's own work out of the way of tokens, once everything is loaded.

    What was loaded is never garbage, so collections need not look at it again and again. And the
    loop and the database's thread wait half a millisecond for each other's turn to end, not five.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(SWITCH_SECONDS)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop, or None for asyncio's own."""
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
