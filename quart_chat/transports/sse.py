"""Server-sent events: a POST sends a message and streams its run, a GET follows one that exists."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote

from quart import Blueprint, Request, Response, request
from quart_schema import document_querystring, document_request

from ..core.commands import SendMessage, is_id, parse
from ..core.conversation import Queued
from ..core.messages import User
from ..core.runs import STOPPED_BY_USER
from ..core.subscription import Subscription
from ..errors import ChatError, InvalidMessage, NotFound, NothingToResume
from .codec import decode_json, error_event, sse_events, sse_frame
from .guard import ConnectionSlot
from .schemas import FollowQuery, documents_stream
from .state import (
    ChatState,
    HasChatState,
    as_chat_error,
    body_of,
    current_state,
    error_response,
    guarded,
)

sse_blueprint = Blueprint("quart_chat_sse", __name__)
guarded(sse_blueprint)

OPEN = ": open\n\n"
KEEP_ALIVE = ": keep-alive\n\n"


@sse_blueprint.post("")
@document_request(SendMessage)
@documents_stream
async def send_message() -> Response:
    """Send a message and stream the run that answers it."""
    return await ChatSSERunner(current_state()).respond(request)


@sse_blueprint.get("")
@document_querystring(FollowQuery)
@documents_stream
async def follow_run() -> Response:
    """Follow a run that exists, as a browser's EventSource does."""
    return await ChatSSERunner(current_state()).respond(request)


class ChatSSERunner:
    """Serves the stream on any route: ``return await ChatSSERunner(chat).respond(request)``."""

    def __init__(self, chat: HasChatState) -> None:
        self._server = chat.server

    async def respond(self, request: Any) -> Response:
        """Answer a POST (send a message) or a GET (follow a run); a refusal is an answer too."""
        connection: Request = getattr(request, "_get_current_object", lambda: request)()
        try:
            self._server.guard.check_origin(connection)
            if connection.method == "GET":
                return await self._follow(connection)
            return await self._send(connection)
        except NothingToResume:
            return Response("", 204)
        except Exception as error:
            return error_response(as_chat_error(error))

    async def _follow(self, connection: Request) -> Response:
        user = await self._server.guard.identify(connection, query_token=True)
        place = self._server.guard.take_place(user.id)
        return self._stream(_Stream(self._server, user, place, await self._found(connection, user)))

    async def _send(self, connection: Request) -> Response:
        guard, settings = self._server.guard, self._server.settings
        user = await guard.identify(connection)
        place = guard.take_place(user.id)
        body = await body_of(connection, settings)
        command = parse_message(body, connection.headers.get("Idempotency-Key"))
        guard.take_message(user.id)
        stateless = settings.storage == "memory"
        sent = await self._server.conversation.send(user.id, command, history_allowed=stateless)
        return self._stream(_Stream(self._server, user, place, sent, command.id))

    async def _found(self, connection: Request, user: User) -> Subscription:
        arguments = connection.args
        last = connection.headers.get("Last-Event-ID") or arguments.get("last_event_id")
        run_id, thread_id, after = arguments.get("run_id"), arguments.get("thread_id"), 0
        if last:
            run_id, after = _position(last)
            thread_id = None
        if not run_id and not thread_id:
            raise InvalidMessage("Name a run: thread_id, run_id or last_event_id.")
        if not is_id(run_id or thread_id or ""):
            raise NotFound("There is no such run or thread.")
        return await self._server.conversation.resume(
            user.id, run_id=run_id or None, thread_id=thread_id or None, after=after
        )

    def _stream(self, stream: _Stream) -> Response:
        response = Response(stream.frames(), content_type="text/event-stream; charset=utf-8")
        response.timeout = None
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
        response.headers["X-Thread-Id"] = _header_value(stream.thread_id)
        return response


def _header_value(text: str) -> str:
    """A header holds Latin-1; other characters go as in a URL."""
    return text if text.isascii() else quote(text, safe="")


def _position(last_event_id: str) -> tuple[str, int]:
    run_id, _, seq = last_event_id.rpartition(":")
    if not run_id or not (seq.isascii() and seq.isdigit()) or len(seq) > 18:
        raise InvalidMessage("last_event_id: this is no event id of ours (<run id>:<number>).")
    return run_id, int(seq)


def parse_message(body: bytes, idempotency_key: str | None) -> SendMessage:
    """The one message of a body.

    Raises:
        InvalidMessage: The body is not JSON, or not a message.
    """
    data = decode_json(body)
    if idempotency_key and isinstance(data, dict):
        if data.setdefault("id", idempotency_key) not in (None, idempotency_key):
            raise InvalidMessage("id: the Idempotency-Key header says something else.")
        data["id"] = idempotency_key
    command = parse(data)
    if not isinstance(command, SendMessage):
        raise InvalidMessage("type: only a message can be posted; other commands need a WebSocket.")
    return command


class _Stream:
    """One response body. It ends after ``end``; when the server goes away it is broken off."""

    def __init__(
        self,
        server: ChatState,
        user: User,
        place: ConnectionSlot,
        sent: Subscription | Queued,
        reply_to: str | None = None,
    ) -> None:
        self._place = place
        self.thread_id = sent.thread_id if isinstance(sent, Queued) else sent.record.thread_id
        self._server = server
        self._user = user
        self._sent = sent
        self._reply_to = reply_to

    async def frames(self) -> AsyncGenerator[str, None]:
        """The body, a frame or several at a time."""
        task = asyncio.current_task()
        assert task is not None
        expiry = self._server.conversation.expiry

        def break_off() -> None:
            task.cancel()

        self._server.closers.add(break_off)
        pulse = _KeepAlive(self._server.settings.keepalive, task)
        if expiry is not None:
            expiry.arrive(self._user.id, self.thread_id)
        try:
            yield OPEN
            async for frames in self._frames(pulse):
                yield frames
        finally:
            self._place.release()
            pulse.stop()
            self._server.closers.discard(break_off)
            if expiry is not None:
                expiry.leave(self._user.id, self.thread_id)

    async def _frames(self, pulse: _KeepAlive) -> AsyncGenerator[str, None]:
        following: Subscription | None
        if isinstance(self._sent, Subscription):
            following = self._sent
        else:
            more = {"reply_to": self._reply_to} if self._reply_to else {}
            queued = {"thread_id": self.thread_id, "position": self._sent.position, **more}
            yield sse_frame({"type": "queued", **queued})
            try:
                while (began := await pulse.wait(self._turn)) is None:
                    yield KEEP_ALIVE
            except ChatError as error:
                yield sse_frame(error_event(error, thread_id=self.thread_id, **more))
                return
            following = began[0]
            if following is None:
                told = {"thread_id": self.thread_id, "message": STOPPED_BY_USER, **more}
                yield sse_frame({"type": "generation_stopped", **told})
                return
        delivered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server.deliveries[delivered] = following.record.id
        try:
            with self._server.conversation.watching(following):
                async for frames in self._events(following, pulse):
                    yield frames
        finally:
            del self._server.deliveries[delivered]
            delivered.cancel()

    async def _turn(self) -> tuple[Subscription | None]:
        assert isinstance(self._sent, Queued)
        return (await self._sent.started(),)

    async def _events(
        self, following: Subscription, pulse: _KeepAlive
    ) -> AsyncGenerator[str, None]:
        encode = sse_events(following.record)
        follow = self._server.conversation.follow
        pages = follow(following)
        try:
            while True:
                try:
                    page = await pulse.wait(pages.__anext__)
                except StopAsyncIteration:
                    return
                if page is None:
                    pages = follow(following)
                    yield KEEP_ALIVE
                else:
                    following = replace(following, after=page[-1][0])
                    if frames := "".join(map(encode, page)):
                        yield frames
        except ChatError as error:
            yield sse_frame(error_event(error, thread_id=self.thread_id))
        finally:
            await pages.aclose()


T = TypeVar("T")


class _KeepAlive:
    """Notices silence while the body waits; one timer for a stream, none per event."""

    def __init__(self, seconds: float, task: asyncio.Task[Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._task = task
        self._heard = self._loop.time()
        self._waiting = False
        self._beat = False
        self._timer = self._loop.call_later(seconds, self._check)

    async def wait(self, begin: Callable[[], Awaitable[T]]) -> T | None:
        """What ``begin`` gives, or None after a silence, when it was cancelled."""
        self._waiting = True
        try:
            return await begin()
        except asyncio.CancelledError:
            beat, self._beat = self._beat, False
            if beat and self._task.uncancel() == 0:
                return None
            raise
        finally:
            self._waiting = False
            self._heard = self._loop.time()

    def stop(self) -> None:
        """No more beats."""
        self._timer.cancel()

    def _check(self) -> None:
        left = self._heard + self._seconds - self._loop.time()
        if left <= 0.001 and self._waiting:
            self._beat = True
            self._task.cancel()
        self._timer = self._loop.call_later(left if left > 0.001 else self._seconds, self._check)
