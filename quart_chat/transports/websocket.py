"""The WebSocket: commands in, events out, many threads over one socket."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from quart import Blueprint, Websocket, websocket

from ..core.commands import (
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
from ..core.ports import RunRecord
from ..core.runs import STOPPED_BY_USER
from ..core.subscription import Subscription
from ..core.tool_executor import ApprovalReply, ClientResult
from ..errors import (
    ChatError,
    ForbiddenOrigin,
    NotAuthenticated,
    NotFound,
    NothingToResume,
    NotRunning,
)
from .asgi import Disconnected, Serve, Socket, hand_off
from .codec import (
    CLOSE_FACTOR,
    Frame,
    decode,
    error_event,
    event_of,
    json_events,
    msgpack_events,
    size_of_frame,
    to_json,
    to_msgpack,
)
from .guard import TooManyConnections
from .state import ChatState, HasChatState, as_chat_error, current_state

websocket_blueprint = Blueprint("quart_chat_websocket", __name__)

SendReply = Callable[[dict[str, Any]], Awaitable[None]]


@websocket_blueprint.websocket("")
async def chat_socket() -> None:
    """The chat over a WebSocket."""
    server = current_state()
    socket = websocket._get_current_object()  # type: ignore[attr-defined]
    serve = await _admitted(server, socket)
    if serve is None:
        return
    if (keep := hand_off(socket)) is not None:
        keep(serve)
    else:
        await serve(socket)


class ChatWebSocketRunner:
    """Serves the chat on any route: ``await ChatWebSocketRunner(chat).run(websocket)``."""

    def __init__(self, chat: HasChatState) -> None:
        self._server = chat.server

    async def run(self, websocket: Any) -> None:
        """Accept the socket and serve it until it closes.

        Args:
            websocket: Quart's ``websocket``, or the object behind it.
        """
        socket: Websocket = getattr(websocket, "_get_current_object", lambda: websocket)()
        serve = await _admitted(self._server, socket)
        if serve is not None:
            await serve(socket)


async def _admitted(server: ChatState, socket: Websocket) -> Serve | None:
    """Accept a socket and find its user; who may not come in is told why."""
    await socket.accept()
    try:
        server.guard.check_origin(socket)
        user = await server.guard.identify(socket, query_token=True)
    except (ForbiddenOrigin, NotAuthenticated) as error:
        await socket.close(1008, error.close_reason)
    except Exception as error:
        as_chat_error(error)
        await socket.close(1011, "Internal error")
    else:
        return functools.partial(_serve, server, user)
    return None


async def _serve(server: ChatState, user: User, wire: Socket) -> None:
    try:
        place = server.guard.take_place(user.id)
    except TooManyConnections:
        await wire.close(1013, "Too many connections")
        return
    try:
        await _Connection(server, wire, user).serve()
    except Disconnected:
        pass
    except Exception as error:
        as_chat_error(error)
        await wire.close(1011, "Internal error")
    finally:
        place.release()


class _Connection:
    """One socket: a loop that reads commands, and a task for every run that is followed."""

    __slots__ = (
        "_chat",
        "_closing",
        "_expiry",
        "_followed",
        "_followers",
        "_last_of_thread",
        "_server",
        "_task",
        "_tasks",
        "_threads",
        "_user",
        "_wire",
    )

    def __init__(self, server: ChatState, wire: Socket, user: User) -> None:
        self._server = server
        self._chat = server.conversation
        self._wire = wire
        self._user = user
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._last_of_thread: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._followed: dict[str, RunRecord] = {}
        self._threads: set[str] = set()
        self._expiry: asyncio.TimerHandle | None = None
        self._closing: tuple[int, str] | None = None

    async def serve(self) -> None:
        """Read and answer until the client leaves or the server closes."""
        self._task = asyncio.current_task()
        self._server.closers.add(self._go_away)
        self._watch_expiry()
        try:
            while self._closing is None:
                await self._frame(await self._wire.receive())
        except asyncio.CancelledError:
            if self._closing is None or self._task is None or self._task.uncancel() > 0:
                raise
        finally:
            self._leave()
        if self._closing is not None:
            await self._wire.close(*self._closing)

    def _leave(self) -> None:
        self._server.closers.discard(self._go_away)
        if self._expiry is not None:
            self._expiry.cancel()
        for task in self._tasks:
            task.cancel()
        if (expiry := self._chat.expiry) is not None:
            for thread_id in self._threads:
                expiry.leave(self._user.id, thread_id)

    def _close(self, code: int, reason: str) -> None:
        if self._closing is None and self._task is not None:
            self._closing = (code, reason)
            self._task.cancel()

    def _go_away(self) -> None:
        self._close(1001, "Server going away")

    def _watch_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        if (expires_at := self._user.expires_at) is not None:
            loop = asyncio.get_running_loop()
            left = max(0.0, expires_at - time.time())
            self._expiry = loop.call_later(left, lambda: self._spawn(self._expired()))

    async def _expired(self) -> None:
        error = NotAuthenticated.expired()
        await self._wire.send(to_json(error_event(error)))
        self._close(1008, error.close_reason)

    async def _frame(self, frame: Frame | None) -> None:
        frame = b"" if frame is None else frame
        encode: Callable[[Any], Frame] = to_json if isinstance(frame, str) else to_msgpack
        reply_to: str | None = None

        async def reply(body: dict[str, Any]) -> None:
            await self._wire.send(encode(body))

        bound = self._server.settings.max_message_bytes
        if size_of_frame(frame) > bound * CLOSE_FACTOR:
            self._closing = (1009, "Message too big")
            return
        try:
            data = decode(frame, bound)
            if isinstance(data, dict) and isinstance(data.get("id"), str):
                reply_to = data["id"][:128]
            await self._command(parse(data), isinstance(frame, str), reply)
        except Exception as error:
            known = as_chat_error(error)
            try:
                await reply(error_event(known, reply_to=reply_to))
            except UnicodeEncodeError:
                await reply(error_event(known))
            if isinstance(known, NotAuthenticated):
                self._closing = (1008, known.close_reason)

    async def _command(self, command: Any, text: bool, reply: SendReply) -> None:
        user = self._user.id
        match command:
            case Ping():
                await reply({"type": "pong"})
            case SendMessage():
                self._server.guard.take_message(user)
                self._expect(command.thread_id)
                sent = await self._chat.send(user, command)
                await self._take(sent, command.id, text, reply)
            case Regenerate():
                self._server.guard.take_message(user)
                regenerated = await self._chat.regenerate(user, command)
                await self._take(regenerated, command.id, text, reply)
            case Stop():
                await self._stop(command, reply)
            case Resume():
                await self._resume(command, text)
            case ToolResult():
                result = ClientResult(command.content, command.is_error)
                self._chat.answer_call(user, command.run_id, command.tool_call_id, result)
            case Approve():
                approval = ApprovalReply(command.approved, command.reason)
                self._chat.answer_call(user, command.run_id, command.tool_call_id, approval)
            case Auth():
                await self._authenticate(command.token, reply)

    async def _authenticate(self, token: str, reply: SendReply) -> None:
        user = await self._server.guard.verify(token)
        if user.id != self._user.id:
            raise NotAuthenticated("The token belongs to another user.")
        self._user = user
        self._watch_expiry()
        await reply({"type": "authenticated", "expires_at": user.expires_at})

    async def _take(
        self, sent: Subscription | Queued, reply_to: str | None, text: bool, reply: SendReply
    ) -> None:
        if isinstance(sent, Subscription):
            self._follow(sent, text)
            return
        queued = {"type": "queued", "thread_id": sent.thread_id, "position": sent.position}
        await reply(queued | ({"reply_to": reply_to} if reply_to else {}))
        self._expect(sent.thread_id)
        self._spawn(self._await_turn(sent, reply_to, text, reply))

    async def _await_turn(
        self, queued: Queued, reply_to: str | None, text: bool, reply: SendReply
    ) -> None:
        more = {"thread_id": queued.thread_id, "reply_to": reply_to}
        try:
            following = await queued.started()
        except Exception as error:
            await reply(error_event(as_chat_error(error), **more))
            return
        if following is not None:
            self._follow(following, text)
        else:
            dropped = {"type": "generation_stopped", "message": STOPPED_BY_USER, **more}
            await reply({k: v for k, v in dropped.items() if v is not None})

    async def _resume(self, command: Resume, text: bool) -> None:
        try:
            following = await self._chat.resume(
                self._user.id,
                run_id=command.run_id,
                thread_id=command.thread_id,
                after=command.last_seq,
            )
        except NotFound as error:
            raise NothingToResume(error.message) from None
        self._follow(following, text)

    async def _stop(self, command: Stop, reply: SendReply) -> None:
        user = self._user.id
        if command.thread_id is not None or command.run_id is not None:
            targets = [(command.thread_id, command.run_id)]
        else:
            mine = [r for r in self._followed.values() if self._chat.runs.get(user, r.id)]
            targets = [(record.thread_id, None) for record in mine]
        if not targets:
            raise NotRunning
        follows = {*self._followers}
        for thread_id, run_id in targets:
            record, (seq, event) = await self._chat.stop(user, thread_id=thread_id, run_id=run_id)
            if record.id not in follows:
                await reply(event_of(record, seq, event))

    def _follow(self, following: Subscription, text: bool) -> None:
        """Follow a run in a task of its own, after the thread's run before it has ended here."""
        record = following.record
        self._expect(record.thread_id)
        self._followed[record.id] = record
        before = self._last_of_thread.get(record.thread_id)
        if (known := self._followers.get(record.id)) is not None:
            known.cancel()
            before = None if before is known else before
        task = self._spawn(self._deliver(following, text, before))
        self._server.deliveries[task] = record.id
        task.add_done_callback(self._server.deliveries.pop)
        self._followers[record.id] = task
        self._last_of_thread[record.thread_id] = task

    async def _deliver(
        self, following: Subscription, text: bool, before: asyncio.Task[None] | None
    ) -> None:
        record, send = following.record, self._wire.send
        make = json_events if text else msgpack_events
        encode: Callable[[Any], Frame] = make(record)
        try:
            with self._chat.watching(following):
                if before is not None:
                    await asyncio.wait([before])
                async with aclosing(self._chat.follow(following)) as pages:
                    async for page in pages:
                        for numbered in page:
                            if frame := encode(numbered):
                                await send(frame)
        except ChatError as error:
            body = error_event(error, thread_id=record.thread_id, run_id=record.id)
            await send(to_json(body) if text else to_msgpack(body))
        finally:
            if self._followers.get(record.id) is asyncio.current_task():
                del self._followers[record.id]
                del self._followed[record.id]
            if self._last_of_thread.get(record.thread_id) is asyncio.current_task():
                del self._last_of_thread[record.thread_id]

    def _expect(self, thread_id: str | None) -> None:
        expiry = self._chat.expiry
        if expiry is None or thread_id is None or thread_id in self._threads:
            return
        self._threads.add(thread_id)
        expiry.arrive(self._user.id, thread_id)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
