"""Messages of a WebSocket: the one that arrives, and the frame of one that is sent."""

from __future__ import annotations

import struct
from typing import Any

from wsproto.events import Message, TextMessage


class MessageBuffer:
    """The message that is arriving.

    Beyond ``kept`` bytes only the size is counted, so the application gets the beginning of a
    message that it refuses in any case. Beyond ``bound`` bytes ``add`` returns False.
    """

    def __init__(self, kept: int, bound: int) -> None:
        self._kept = kept
        self._bound = bound
        self._text = False
        self._pieces = bytearray()
        self.size = 0
        self.empty = True

    def add(self, event: Message[Any]) -> bool:
        """Take a piece; False if the message is too big."""
        self._text, self.empty = isinstance(event, TextMessage), False
        data: bytes = event.data.encode() if self._text else event.data
        self.size += len(data)
        if len(self._pieces) <= self._kept:
            self._pieces += data
        return self.size <= self._bound

    def take(self) -> dict[str, Any]:
        """Return the message for the application, and forget it."""
        data, text = self._pieces, self._text
        self.clear()
        return received(data.decode(errors="ignore") if text else bytes(data))

    def clear(self) -> None:
        """Forget the message."""
        self._pieces, self.size, self.empty = bytearray(), 0, True


def received(data: str | bytes) -> dict[str, Any]:
    """Return the ASGI event of a message."""
    text = isinstance(data, str)
    return {
        "type": "websocket.receive",
        "bytes": None if text else data,
        "text": data if text else None,
    }


def websocket_frame(message: str | bytes) -> bytes:
    """Return a whole message of a server, unmasked, as one frame."""
    first, payload = (0x81, message.encode()) if isinstance(message, str) else (0x82, message)
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65_536:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload
