"""Loop of one accepted socket, which reads commands until either side closes it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ..core.commands import (
    AnyCommand,
    Approve,
    Auth,
    Ping,
    Regenerate,
    Resume,
    SendMessage,
    Stop,
    ToolResult,
    parse,
)
from ..core.conversation import Queued
from ..core.messages import User
from ..core.runs import STOPPED_BY_USER
from ..core.subscription import Subscription
from ..core.tool_executor import ApprovalReply, ClientResult
from ..errors import (
    ChatError,
    NotAuthenticated,
    NotFound,
    NothingToResume,
    NotRunning,
    RateLimited,
)
from .asgi import Socket
from .codec import (
    CLOSE_FACTOR,
    LARGE_BYTES,
    Frame,
    decode,
    error_event,
    event_of,
    size_of_frame,
    to_json,
    to_msgpack,
)
from .deliveries import Deliveries
from .http import as_chat_error
from .state import ChatState
from .timers import SendTimeout

CLOSE_SECONDS = 1.0
"""How long a client may take for the last event and the close frame, each."""

FREE_REFUSALS = 10
PAUSE = 0.01
MAX_PAUSE = 0.05
MAX_LARGE_PAUSE = 1.0
"""After ten refused frames in a row the next frame waits, a little longer each time."""


class Connection:
    """State of one socket: its commands, runs and end."""

    __slots__ = (
        "_chat",
        "_closing",
        "_deliveries",
        "_expiry",
        "_last_words",
        "_refusals",
        "_server",
        "_socket",
        "_task",
        "_timeout",
        "_user",
    )

    def __init__(self, server: ChatState, socket: Socket, user: User) -> None:
        self._server = server
        self._chat = server.conversation
        self._socket = socket
        self._user = user
        self._timeout = SendTimeout(server.settings.send_timeout, self._too_slow)
        self._deliveries = Deliveries(server, socket, user.id, self._timeout)
        self._expiry: asyncio.TimerHandle | None = None
        self._closing: tuple[int, str] | None = None
        self._last_words: str | None = None
        self._refusals = 0

    async def serve(self) -> None:
        """Read and answer until the client leaves or the server closes."""
        self._task = asyncio.current_task()
        self._server.closers.add(self._going_away)
        self._watch_expiry()
        try:
            while self._closing is None:
                await self._frame(await self._socket.receive())
        except asyncio.CancelledError:
            if self._closing is None or self._task is None or self._task.uncancel() > 0:
                raise
        finally:
            self._leave()
        if self._closing is not None:
            await self._say_goodbye(*self._closing)

    def _leave(self) -> None:
        self._server.closers.discard(self._going_away)
        self._timeout.stop()
        if self._expiry is not None:
            self._expiry.cancel()
        self._deliveries.close()

    async def _say_goodbye(self, code: int, reason: str) -> None:
        try:
            if self._last_words is not None:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._socket.send(self._last_words)
        except TimeoutError:
            pass
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._socket.close(code, reason)
        except TimeoutError:
            pass

    def _close(self, code: int, reason: str, last_words: str | None = None) -> None:
        """Take no further command, and close when the one at work has been cancelled."""
        if self._closing is None and self._task is not None:
            self._closing = (code, reason)
            self._last_words = last_words
            self._task.cancel()

    def _going_away(self) -> None:
        self._close(1001, "Server going away")

    def _too_slow(self) -> None:
        self._close(1013, "Client reads too slowly")

    def _watch_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        if (expires_at := self._user.expires_at) is not None:
            left = max(0.0, expires_at - time.time())
            self._expiry = asyncio.get_running_loop().call_later(left, self._expired)

    def _expired(self) -> None:
        error = NotAuthenticated.expired()
        self._close(1008, error.close_reason, to_json(error_event(error)))

    async def _frame(self, frame: Frame | None) -> None:
        frame = b"" if frame is None else frame
        size = size_of_frame(frame)
        if size > self._server.settings.max_message_bytes * CLOSE_FACTOR:
            self._closing = (1009, "Message too big")
            return
        if self._user.expires_at is not None and time.time() >= self._user.expires_at:
            self._expired()
            await asyncio.sleep(0)  # where the cancellation arrives
        exchange = _Exchange(self._socket, self._timeout, frame)
        try:
            bound = self._server.settings.max_message_bytes
            await self._command(await exchange.command(bound, large=size > LARGE_BYTES), exchange)
        except Exception as error:
            await self._refuse(as_chat_error(error), exchange, large=size > LARGE_BYTES)
        else:
            self._refusals = 0

    async def _refuse(self, error: ChatError, exchange: _Exchange, *, large: bool) -> None:
        """Answer with an error. A client that is refused again and again has to wait."""
        self._refusals += 1
        longest = MAX_LARGE_PAUSE if large else MAX_PAUSE
        pause = min(longest, PAUSE * max(0, self._refusals - FREE_REFUSALS))
        try:
            self._server.guard.limits.take_request(self._user.id)
        except RateLimited as limited:
            error = error if isinstance(error, NotAuthenticated) else limited
            pause = min(MAX_LARGE_PAUSE, limited.retry_after or 0)
        await exchange.refuse(error)
        if isinstance(error, NotAuthenticated):
            self._closing = (1008, error.close_reason)
        elif pause:
            await asyncio.sleep(pause)

    async def _command(self, command: AnyCommand, exchange: _Exchange) -> None:
        user = self._user.id
        match command:
            case Ping():
                await exchange.reply({"type": "pong"})
            case SendMessage():
                self._server.guard.limits.take_message(user)
                self._deliveries.expect(command.thread_id)
                await self._take(await self._chat.send(user, command), exchange)
            case Regenerate():
                self._server.guard.limits.take_message(user)
                await self._take(await self._chat.regenerate(user, command), exchange)
            case Stop():
                await self._stop(command, exchange)
            case Resume():
                await self._resume(command, exchange)
            case ToolResult():
                result = ClientResult(command.content, command.is_error)
                self._chat.answer_call(user, command.run_id, command.tool_call_id, result)
            case Approve():
                approval = ApprovalReply(command.approved, command.reason)
                self._chat.answer_call(user, command.run_id, command.tool_call_id, approval)
            case Auth():
                await self._authenticate(command.token, exchange)

    async def _authenticate(self, token: str, exchange: _Exchange) -> None:
        user = await self._server.guard.verify(token)
        if user.id != self._user.id:
            raise NotAuthenticated("The access token belongs to another user. Open a new socket.")
        self._user = user
        self._watch_expiry()
        await exchange.reply({"type": "authenticated", "expires_at": user.expires_at})

    async def _take(self, sent: Subscription | Queued, exchange: _Exchange) -> None:
        if isinstance(sent, Subscription):
            self._deliveries.follow(sent, text=exchange.text)
            return
        queued = {"type": "queued", "thread_id": sent.thread_id, "position": sent.position}
        await exchange.reply(queued | exchange.reply_to)
        self._deliveries.expect(sent.thread_id)
        self._deliveries.spawn(self._await_turn(sent, exchange))

    async def _await_turn(self, queued: Queued, exchange: _Exchange) -> None:
        more = {"thread_id": queued.thread_id, **exchange.reply_to}
        try:
            subscription = await queued.started()
        except Exception as error:
            await exchange.reply(error_event(as_chat_error(error), **more))
            return
        if subscription is not None:
            self._deliveries.follow(subscription, text=exchange.text)
        else:
            dropped = {"type": "generation_stopped", "message": STOPPED_BY_USER, **more}
            await exchange.reply(dropped)

    async def _resume(self, command: Resume, exchange: _Exchange) -> None:
        try:
            subscription = await self._chat.resume(
                self._user.id,
                run_id=command.run_id,
                thread_id=command.thread_id,
                after=command.last_seq,
            )
        except NotFound as error:
            raise NothingToResume(error.message) from None
        self._deliveries.follow(subscription, text=exchange.text)

    async def _stop(self, command: Stop, exchange: _Exchange) -> None:
        if command.thread_id is None and command.run_id is None:
            await self._stop_all(exchange)
            return
        followed = {record.id for record in self._deliveries.records()}
        record, (seq, event) = await self._chat.stop(
            self._user.id, thread_id=command.thread_id, run_id=command.run_id
        )
        if record.id not in followed:
            await exchange.reply(event_of(record, seq, event))

    async def _stop_all(self, exchange: _Exchange) -> None:
        """Stop the runs that this socket follows, and drop what waits in their threads."""
        stopped = False
        user = self._user.id
        for record in self._deliveries.records():
            if self._chat.runs.get(user, record.id) is None:
                continue
            self._chat.runs.queues.drop(user, record.thread_id)
            try:
                await self._chat.stop(user, run_id=record.id)
            except (NotRunning, NotFound):  # it has ended by itself meanwhile
                continue
            stopped = True
        if not stopped:
            raise NotRunning


class _Exchange:
    """One frame and its answers, in its own encoding."""

    __slots__ = ("_encode", "_frame", "_socket", "_timeout", "reply_to", "text")

    def __init__(self, socket: Socket, timeout: SendTimeout, frame: Frame) -> None:
        self.text = isinstance(frame, str)
        self.reply_to: dict[str, str] = {}
        self._socket = socket
        self._timeout = timeout
        self._frame = frame
        self._encode: Callable[[Any], Frame] = to_json if self.text else to_msgpack

    async def command(self, max_bytes: int, *, large: bool) -> AnyCommand:
        """Return the frame's command. Raises RequestError."""
        if large:
            return await asyncio.to_thread(self._parse, max_bytes)
        return self._parse(max_bytes)

    def _parse(self, max_bytes: int) -> AnyCommand:
        data = decode(self._frame, max_bytes)
        if isinstance(data, dict) and isinstance(data.get("id"), str):
            self.reply_to = {"reply_to": data["id"][:128]}
        return parse(data)

    async def reply(self, body: dict[str, Any]) -> None:
        """Send an event that belongs to no run."""
        frame = self._encode(body)
        self._timeout.begin()
        try:
            await self._socket.send(frame)
            self._timeout.sent += 1
        finally:
            self._timeout.end()

    async def refuse(self, error: ChatError) -> None:
        """Send an error, with the command's id if it can be encoded."""
        try:
            await self.reply(error_event(error, **self.reply_to))
        except UnicodeEncodeError:
            await self.reply(error_event(error))
