"""Small clients over raw sockets: a WebSocket, and server-sent events over chunked HTTP/1.1."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast

import msgpack

HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
POST = (
    "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    "Content-Length: {length}\r\n\r\n"
)
GET = "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
NO_MASK = bytes(4)
LAST_CHUNK = b"0\r\n\r\n"


@dataclass(eq=False)
class RunInput:
    """A message and what came back; ``times`` are those of the reads that brought text."""

    sent: float
    frames: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ended: bool = False


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, path: str, binary: bool) -> None:
        self.turns: list[RunInput] = []
        self.complaint: str | None = None
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._path = path
        self._binary = binary
        self._turn: RunInput | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(ended=False)
        if not self.opened.done():
            self.opened.set_exception(exc or ConnectionError("closed before it was open"))

    async def ask(self, body: bytes | None) -> None:
        """Send a message and wait until its answer has ended."""
        if self.transport.is_closing():
            return
        self._done = asyncio.get_running_loop().create_future()
        self._turn = RunInput(time.perf_counter())
        self.turns.append(self._turn)
        self._send(body)
        await self._done

    def close(self) -> None:
        """Break the connection off."""
        self.transport.abort()

    def events(self, turn: RunInput) -> list[dict[str, Any]]:
        """The frames of a turn, decoded."""
        raise NotImplementedError

    def _send(self, body: bytes | None) -> None:
        raise NotImplementedError

    def _finish(self, *, ended: bool = True) -> None:
        if self._turn is not None and not self._turn.ended:
            self._turn.ended = ended
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class SocketClient(Client):
    """A WebSocket that speaks JSON text or MessagePack bytes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._rest = b""
        self._content = b"\xa4type\xa7content" if self._binary else b'"type":"content"'
        self._end = b"\xa4type\xa3end" if self._binary else b'"type":"end"'
        self.transport.write(HANDSHAKE.format(path=self._path).encode())

    def _send(self, body: bytes | None) -> None:
        self._write(2 if self._binary else 1, body or b"")

    def _write(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        length = (
            bytes((0x80 | size,)) if size < 126 else bytes((0x80 | 126,)) + size.to_bytes(2, "big")
        )
        self.transport.write(bytes((0x80 | opcode,)) + length + NO_MASK + payload)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        buffer = self._rest + data if self._rest else data
        if not self.opened.done():
            head, found, buffer = buffer.partition(b"\r\n\r\n")
            if not found:
                self._rest = head
                return
            if b" 101 " not in head.split(b"\r\n")[0]:
                self.opened.set_exception(ConnectionError(head.decode()))
                return
            self.opened.set_result(None)
        self._frames(buffer, now)

    def _frames(self, buffer: bytes, now: float) -> None:
        at, have, brought_text = 0, len(buffer), False
        while have - at >= 2:
            size, start = buffer[at + 1], at + 2
            if size >= 126:
                width = 2 if size == 126 else 8
                size, start = int.from_bytes(buffer[start : start + width], "big"), start + width
            if start + size > have:
                break
            opcode, payload, at = buffer[at] & 15, buffer[start : start + size], start + size
            if opcode <= 2:
                brought_text |= self._event(payload)
            elif opcode == 9:
                self._write(10, payload)
            elif opcode == 8:
                self.complaint = f"closed: {payload!r}"
        self._rest = buffer[at:]
        if brought_text and self._turn is not None:
            self._turn.times.append(now)

    def _event(self, payload: bytes) -> bool:
        assert self._turn is not None
        self._turn.frames.append(payload)
        if self._end in payload[:24]:
            self._finish()
        return self._content in payload[:24]

    def events(self, turn: RunInput) -> list[dict[str, Any]]:
        return list(map(msgpack.unpackb if self._binary else json.loads, turn.frames))


class StreamClient(Client):
    """Server-sent events; the reads are kept, and taken apart when all is over."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.opened.set_result(None)

    def _send(self, body: bytes | None) -> None:
        if body is None:
            head = GET.format(path=self._path)
        else:
            head = POST.format(path=self._path, length=len(body))
        self.transport.write(head.encode() + (body or b""))

    def data_received(self, data: bytes) -> None:
        turn = self._turn
        assert turn is not None
        turn.frames.append(data)
        if b'"type":"content"' in data:
            turn.times.append(time.perf_counter())
        if data.endswith(LAST_CHUNK) or (len(data) < 5 and self._ends(turn)):
            self._finish()

    def _ends(self, turn: RunInput) -> bool:
        return b"".join(turn.frames[-5:]).endswith(LAST_CHUNK)

    def events(self, turn: RunInput) -> list[dict[str, Any]]:
        head, _, rest = b"".join(turn.frames).partition(b"\r\n\r\n")
        if head and b" 200" not in head.split(b"\r\n")[0]:
            self.complaint = (head + rest)[:500].decode()
            return []
        blocks = _unchunked(rest).split(b"\n\n")[:-1]
        data = [line[6:] for block in blocks for line in block.split(b"\n") if line[:5] == b"data:"]
        return [json.loads(each) for each in data]


def _unchunked(body: bytes) -> bytes:
    pieces, at = [], 0
    while (end := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:end], 16)
        pieces.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
    return b"".join(pieces)
