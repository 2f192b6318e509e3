"""Server process: the socket, Hypercorn, the signals, and the drain before the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from socket import socket
from typing import Any

from quart import Quart

from .listener import bind
from .loop import loop_factory
from .process import Process
from .signals import Deadline

__all__ = ["bind", "serve"]


def serve(app: Quart, listener: socket, ready: Callable[[], None]) -> None:
    """Serve until a signal, then drain; a second signal ends at once.

    After a signal the process ends within ``CHAT_DRAIN_TIMEOUT`` + 5 s, also if something keeps
    this function from returning.

    Raises:
        ConfigurationError: An adapter cannot be opened.
    """
    deadline = Deadline()
    with listener, asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.get_loop().set_exception_handler(_quiet_about_cancelled)
        runner.run(Process(app, listener, ready, deadline).run())


def _quiet_about_cancelled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Hide asyncio's reports of connections that are cancelled at the end."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)
