"""A TCP connection that cannot stay open, or hold memory, longer than it is used.

Hypercorn's own waits for its idle timeout after the client has left, waits forever for a client
that does not read, and closes with unread input, which makes the kernel discard the last answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import sys
from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.h11 import H11Protocol

from .config import BoundedConfig, send_timeout
from .http import BoundedH11
from .websocket import BoundedWebSocket

if sys.platform == "linux":
    import fcntl
    import termios

logger = logging.getLogger("quart_chat.connections")

WRITE_BUFFER = 32 * 1024
"""Bytes that may wait in this process for a client; then whoever sends has to wait."""

LINGER_SECONDS = 2.0
"""After the last answer, a client has so long to read it before the connection is cut."""

FLUSH_SECONDS = 0.5
"""After the client has closed its side, what is left may take so long."""


class BoundedTCPServer(TCPServer):
    """Hypercorn's connection, bounded in memory and time."""

    _ending = False
    _timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Serve the connection until its end."""
        connections: set[Any] = getattr(self.config, "open_connections", set())
        self._transport: Any = self.writer.transport
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER)
        connections.add(self)
        try:
            await super().run()
        finally:
            connections.discard(self)

    def cut(self) -> None:
        """End the connection at once, whatever waits to be sent."""
        self._ending = True
        self._transport.abort()
        if isinstance(self.protocol, BoundedH11):
            self.protocol.end()

    async def _read_data(self) -> None:
        plain = self.protocol.protocol
        if type(plain) is H11Protocol:
            self.protocol = BoundedH11.instead_of(plain, self.cut)  # type: ignore[assignment]
        hosted = not isinstance(self.config, BoundedConfig)
        ending = asyncio.create_task(self._end_with_server()) if hosted else None
        try:
            await super()._read_data()
        finally:
            if ending is not None:
                ending.cancel()
            self._ending = True
            if self._timer is not None:
                self._timer.cancel()
            if isinstance(self.protocol, BoundedH11):
                self.protocol.end()
            # Hypercorn's task group would wait for it as long as an idle connection may stay.
            await self.idle_task.stop()

    async def _end_with_server(self) -> None:
        """End in time when a host's Hypercorn ends: it cancels, or waits forever (issue 308)."""
        await self.context.terminated.wait()
        await asyncio.sleep(max(0.0, self.config.graceful_timeout - 2 * FLUSH_SECONDS))
        stream = getattr(self.protocol, "stream", None)
        if isinstance(stream, BoundedWebSocket):
            await stream.go_away()
            await asyncio.sleep(FLUSH_SECONDS)
        self.cut()

    async def protocol_send(self, event: Event) -> None:
        """Send what the protocol has for the client."""
        if type(event) is RawData:
            await self._write(event.data)
        elif isinstance(event, Closed):
            self._end()
        else:
            await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        transport = self._transport
        if self._ending or transport.is_closing():
            await asyncio.sleep(0)  # whoever sends in a loop must not keep the event loop
            await self.protocol.handle(Closed())
        elif not self.send_lock.locked():
            transport.write(data)
            if transport.get_write_buffer_size() > WRITE_BUFFER:
                await self._write_slowly(b"")
        else:
            await self._write_slowly(data)

    async def _write_slowly(self, data: bytes) -> None:
        try:
            async with self.send_lock:
                if data and not self._ending:
                    self._transport.write(data)
                await self._drained()
        except (ConnectionError, RuntimeError):
            await self.protocol.handle(Closed())

    async def _drained(self) -> None:
        """Wait until the client has taken enough; cut it if it takes nothing for too long."""
        waiting = self._waiting()
        while True:
            try:
                async with asyncio.timeout(send_timeout(self.config)):
                    return await self.writer.drain()
            except TimeoutError:
                before, waiting = waiting, self._waiting()
                if waiting >= before:
                    logger.info("a client that takes nothing was dropped")
                    self.cut()
                    raise ConnectionResetError from None

    def _waiting(self) -> int:
        """Return the bytes that the client has not taken, here and in the kernel."""
        kernel = 0
        if sys.platform == "linux":
            with contextlib.suppress(OSError, ValueError):
                descriptor = self.writer.get_extra_info("socket").fileno()
                answer = fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4))
                (kernel,) = struct.unpack("i", answer)
        return kernel + int(self._transport.get_write_buffer_size())

    def _end(self) -> None:
        """Send what is left, then the end; go on reading for a while, and forget what comes.

        A connection that is closed with unread input is reset, and the client may lose the answer
        that says why (RFC 9112, section 9.6).
        """
        if self._ending:
            return
        self._ending = True
        if isinstance(self.protocol, BoundedH11):
            self.protocol.end()
        transport = self._transport
        if transport.is_closing():
            return
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            if transport.can_write_eof():
                transport.write_eof()
            else:  # TLS
                transport.close()
        self._cut_later(self._waiting(), 0.0)

    def _cut_later(self, waiting: int, silent: float) -> None:
        self._timer = self.loop.call_later(LINGER_SECONDS, self._check_end, waiting, silent)

    def _check_end(self, before: int, silent: float) -> None:
        waiting = self._waiting()
        silent = silent + LINGER_SECONDS if waiting >= before else 0.0
        if not waiting or silent >= send_timeout(self.config):
            self.cut()
        else:
            self._cut_later(waiting, silent)

    async def _close(self) -> None:
        """Close the connection of a client that has left, or was told everything."""
        self._transport.close()
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await self.writer.wait_closed()
        except TimeoutError:
            self._transport.abort()
        except (OSError, RuntimeError):
            pass  # it is closed
        except asyncio.CancelledError:
            self._transport.abort()
            raise
        finally:
            await self.idle_task.stop()
