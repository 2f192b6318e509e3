"""The listening socket."""

from __future__ import annotations

import socket

from ..errors import ConfigurationError

DEAD_PEER_SECONDS = 40
"""Unacknowledged for so long, a connection is dropped; with the pings, within a minute."""

SEND_BUFFER = 64 * 1024
"""Bytes that the kernel may keep for a client (it doubles them, for its own accounts)."""


def bind(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 takes a free one.

    Raises:
        ConfigurationError: The address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"--host {host} --port {port}: the address cannot be used ({error.strerror})."
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = DEAD_PEER_SECONDS * 1000
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    return listener
