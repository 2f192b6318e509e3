"""Server-sent events: a POST sends a message and streams its run, a GET follows one that exists."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

from quart import Blueprint, Request, Response, request
from quart_schema import document_querystring, document_request, operation_id, tag

from ..core.commands import SendMessage, is_id, parse
from ..core.conversation import Queued
from ..core.messages import User
from ..core.subscription import Subscription
from ..errors import ChatError, InvalidMessage, NotFound, NothingToResume
from .http import body_of, guarded, json_of, refusal
from .schemas import FollowQuery, documents_stream
from .state import HasChatState, current_state, state_of
from .stream import Stream

sse_blueprint = Blueprint("quart_chat_sse", __name__)
guarded(sse_blueprint)


@sse_blueprint.post("/sse")
@operation_id("sendMessage")
@tag(["stream"])
@document_request(SendMessage)
@documents_stream
async def send_message() -> Response:
    """Send a message and stream the run that answers it."""
    return await ChatSSERunner(current_state()).respond(request)


@sse_blueprint.get("/sse")
@operation_id("followRun")
@tag(["stream"])
@document_querystring(FollowQuery)
@documents_stream
async def follow_run() -> Response:
    """Follow a run that exists, as a browser's EventSource does."""
    return await ChatSSERunner(current_state()).respond(request)


class ChatSSERunner:
    """Serves the stream on any route: ``return await ChatSSERunner(chat).respond(request)``."""

    def __init__(self, chat: HasChatState) -> None:
        self._server = state_of(chat)

    async def respond(self, request: Any) -> Response:
        """Answer a POST (send a message) or a GET (follow a run); a refusal is an answer too."""
        connection: Request = getattr(request, "_get_current_object", lambda: request)()
        try:
            self._server.guard.check_origin(connection)
            if connection.method in ("GET", "HEAD"):
                user = await self._server.guard.identify(connection, query_token=True)
                return await self._counted(user, self._follow(connection, user))
            user = await self._server.guard.identify(connection)
            return await self._counted(user, self._post(connection, user))
        except NothingToResume:
            return Response("", 204)
        except Exception as error:
            return await refusal(error, connection)

    async def _counted(self, user: User, answer: Any) -> Response:
        """Count a refusal among the user's requests."""
        try:
            response: Response = await answer
        except NothingToResume:
            raise
        except ChatError:
            self._server.guard.limits.take_request(user.id)
            raise
        return response

    async def _post(self, connection: Request, user: User) -> Response:
        with self._server.guard.limits.request(user.id):
            body = await body_of(connection, self._server.settings)
        if connection.headers.get("Last-Event-ID"):
            return await self._follow(connection, user)
        command = parse_message(await json_of(body), connection.headers.get("Idempotency-Key"))
        with ExitStack() as held:
            held.callback(self._server.guard.limits.take_place(user.id).release)
            self._server.guard.limits.take_message(user.id)
            stateless = self._server.settings.storage == "memory"
            sent = await self._server.conversation.send(user.id, command, history_allowed=stateless)
            return self._stream(user, held, sent, command.id)

    async def _follow(self, connection: Request, user: User) -> Response:
        if connection.method == "HEAD":
            record = (await self._found(connection, user)).record
            return _event_stream("", record.thread_id)
        with ExitStack() as held:
            held.callback(self._server.guard.limits.take_place(user.id).release)
            return self._stream(user, held, await self._found(connection, user))

    async def _found(self, connection: Request, user: User) -> Subscription:
        arguments = connection.args
        last = connection.headers.get("Last-Event-ID") or arguments.get("last_event_id")
        run_id, thread_id, after = arguments.get("run_id"), arguments.get("thread_id"), 0
        if last:
            run_id, after = _position(last)
            thread_id = None
        if not run_id and not thread_id:
            raise InvalidMessage("Name a run by thread_id, run_id or last_event_id.")
        if not is_id(run_id or thread_id or ""):
            raise NotFound("This run or thread does not exist.")
        return await self._server.conversation.resume(
            user.id, run_id=run_id or None, thread_id=thread_id or None, after=after
        )

    def _stream(
        self,
        user: User,
        held: ExitStack,
        sent: Subscription | Queued,
        reply_to: str | None = None,
    ) -> Response:
        stream = Stream(self._server, user, held, sent, reply_to)
        response = _event_stream(stream.frames(), stream.thread_id)
        response.timeout = None
        return response


def _event_stream(body: Any, thread_id: str) -> Response:
    response = Response(body, content_type="text/event-stream; charset=utf-8")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    response.headers["X-Thread-Id"] = _header_value(thread_id)
    return response


def _header_value(text: str) -> str:
    """Return a text as a header holds it: other characters than ASCII go as in a URL."""
    return text if text.isascii() else quote(text, safe="")


def _position(last_event_id: str) -> tuple[str, int]:
    run_id, _, seq = last_event_id.rpartition(":")
    if not run_id or not (seq.isascii() and seq.isdigit()) or len(seq) > 18:
        raise InvalidMessage(
            "last_event_id is invalid. Send the id of an event, <run id>:<number>."
        )
    return run_id, int(seq)


def parse_message(data: Any, idempotency_key: str | None) -> SendMessage:
    """Return the message of a decoded body.

    Raises:
        InvalidMessage: The body is not a message.
    """
    if idempotency_key and isinstance(data, dict):
        if data.setdefault("id", idempotency_key) not in (None, idempotency_key):
            raise InvalidMessage("id: the Idempotency-Key header has another value. Send one.")
        data["id"] = idempotency_key
    command = parse(data)
    if not isinstance(command, SendMessage):
        raise InvalidMessage(
            "type: only a message can be posted here. Other commands need a WebSocket, or a route "
            "of their own under /threads/<id>."
        )
    return command
