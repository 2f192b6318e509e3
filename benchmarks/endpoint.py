"""A cheap OpenAI-compatible endpoint in a process of its own: ``python -m benchmarks.endpoint``.

The model's name says how it answers: ``fast-1000`` gives 1,000 tokens as fast as they are taken, a
write a token; ``paced-50-500`` gives 500 tokens, 50 a second. One ticker paces all streams, in a
few groups, so that not all of them speak in the same instant.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import cast

import uvloop

from .processes import raise_file_limit
from .script import chunks, closing

GROUPS = 10

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)


class Endpoint:
    """The streams that are being answered."""

    def __init__(self) -> None:
        self.fast: set[Stream] = set()
        self.paced: dict[int, list[set[Stream]]] = {}
        self._loop = asyncio.get_running_loop()
        self._running = False

    def answer_fast(self, stream: Stream) -> None:
        self.fast.add(stream)
        if not self._running:
            self._running = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        for stream in tuple(self.fast):
            if not stream.paused and stream.say():
                self.fast.discard(stream)
        self._running = any(not stream.paused for stream in self.fast)
        if self._running:
            self._loop.call_soon(self._pump)

    def answer_paced(self, stream: Stream, rate: int) -> None:
        if rate not in self.paced:
            self.paced[rate] = [set() for _ in range(GROUPS)]
            self._tick(rate, self._loop.time(), 0)
        stream.say()
        min(self.paced[rate], key=len).add(stream)

    def _tick(self, rate: int, due: float, turn: int) -> None:
        group = self.paced[rate][turn % GROUPS]
        for stream in tuple(group):
            if stream.say():
                group.discard(stream)
        due += 1 / (rate * GROUPS)
        self._loop.call_at(due, self._tick, rate, due, turn + 1)

    def forget(self, stream: Stream) -> None:
        self.fast.discard(stream)
        for groups in self.paced.values():
            for group in groups:
                group.discard(stream)


class Stream(asyncio.Protocol):
    """One connection: a request at a time, answered by a script."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.paused = False
        self._endpoint = endpoint
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._endpoint.forget(self)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self in self._endpoint.fast:
            self._endpoint.answer_fast(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        if len(rest) >= length:
            self._buffer = rest[length:]
            self._answer(json.loads(rest[:length]))

    def _answer(self, body: dict[str, object]) -> None:
        kind, *numbers = str(body["model"]).split("-")
        tokens = int(numbers[-1])
        self._tokens = iter(chunks(tokens))
        self._closing = closing(tokens, bool(body.get("stream_options")))
        self._transport.write(HEAD)
        if kind == "fast":
            self._endpoint.answer_fast(self)
        else:
            self._endpoint.answer_paced(self, int(numbers[0]))

    def say(self) -> bool:
        """Send the next token, or the end; gives whether it was the end."""
        chunk = next(self._tokens, None)
        self._transport.write(self._closing if chunk is None else chunk)
        return chunk is None


async def main() -> None:
    """Serve until stdin ends."""
    loop = asyncio.get_running_loop()
    endpoint = Endpoint()
    server = await loop.create_server(lambda: Stream(endpoint), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    raise_file_limit()
    uvloop.run(main())
