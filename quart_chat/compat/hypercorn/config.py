"""Hypercorn's configuration with the bounds of our connections."""

from __future__ import annotations

from typing import Protocol

from hypercorn.config import Config

BODY_SECONDS = 60.0
SEND_SECONDS = 30.0
KEPT_BYTES = 1024 * 1024


class Cuttable(Protocol):
    """An open connection."""

    def cut(self) -> None:
        """End the connection at once, whatever waits to be sent."""


class BoundedConfig(Config):
    """Hypercorn's settings, and those of ``BoundedTCPServer``.

    ``body_timeout``: seconds in which a request's head, and then its body, has to arrive.
    ``send_timeout``: seconds after which a client that takes nothing is dropped.
    ``websocket_kept_bytes``: bytes of a WebSocket message that are kept; see ``MessageBuffer``.
    """

    body_timeout: float = BODY_SECONDS
    send_timeout: float = SEND_SECONDS
    websocket_kept_bytes: int = KEPT_BYTES

    def __init__(self) -> None:
        self.open_connections: set[Cuttable] = set()

    def cut_connections(self) -> int:
        """End every open connection at once, and return their number."""
        connections = list(self.open_connections)
        for connection in connections:
            connection.cut()
        return len(connections)


def body_timeout(config: Config) -> float:
    """Return the seconds for a request's head or body; also for a host's plain configuration."""
    return getattr(config, "body_timeout", BODY_SECONDS)


def send_timeout(config: Config) -> float:
    """Return the seconds for a client that takes nothing; also for a plain configuration."""
    return getattr(config, "send_timeout", SEND_SECONDS)


def kept_bytes(config: Config) -> int:
    """Return the bytes of a message that are kept; a host's handlers get whole messages."""
    return getattr(config, "websocket_kept_bytes", config.websocket_max_message_size)
