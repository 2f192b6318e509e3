"""What every transport of one application works with, and what its HTTP answers have in common."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from quart import (
    Blueprint,
    Request,
    Response,
    current_app,
    has_request_context,
    jsonify,
    request,
)
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from ..config import Settings
from ..core.conversation import Conversation
from ..core.ports import UserData
from ..errors import ChatError, InternalError, InvalidMessage, NotAuthenticated, NotFound, TooLarge
from .guard import SECURITY_HEADERS, Guard

logger = logging.getLogger("quart_chat.http")

EXTENSION = "quart_chat"
NO_STORE = "no-store"

LAST_EVENTS_SECONDS = 2
"""How long the followers of runs that have ended may take for the last events."""

DISCARDED_BYTES = 16 * 1024 * 1024
"""So much of a body that is too large is read and forgotten: a client that still sends when the
connection closes does not see why."""


@dataclass
class ChatState:
    """The chat of one application, between its start and its end."""

    settings: Settings
    conversation: Conversation
    guard: Guard
    user_data: UserData
    closers: set[Callable[[], None]] = field(default_factory=set)
    deliveries: dict[asyncio.Future[None], str] = field(default_factory=dict)

    @property
    def server(self) -> ChatState:
        return self

    def close_connections(self) -> int:
        """Close sockets with 1001 and break streams off, so that clients resume elsewhere."""
        closing = list(self.closers)
        for close in closing:
            close()
        return len(closing)

    async def drain(self, seconds: float, *, durable: bool) -> None:
        """Let running answers end for so long, store the rest, and close every connection."""
        left = await self.conversation.runs.drain(seconds, durable=durable)
        ending = [each for each, run_id in self.deliveries.items() if run_id not in left]
        if ending:
            await asyncio.wait(ending, timeout=LAST_EVENTS_SECONDS)
        self.close_connections()
        while self.closers:
            await asyncio.sleep(0.01)


class HasChatState(Protocol):
    """A ``QuartChat``, or the ``ChatServer`` of an application."""

    @property
    def server(self) -> ChatState: ...


def current_state() -> ChatState:
    """The chat of the application that handles this request.

    Raises:
        RuntimeError: The application has no ``QuartChat``, or does not serve yet.
    """
    found = current_app.extensions.get(EXTENSION)
    server: ChatState | None = found.server if found is not None else None
    if server is None:
        raise RuntimeError("Register QuartChat with this app before its blueprints are used.")
    return server


async def body_of(connection: Request, settings: Settings) -> bytes:
    """A request's body, within the bound of a message. Raises TooLarge."""
    bound = settings.max_message_bytes
    body, length = bytearray(), 0
    async for piece in connection.body:
        length += len(piece)
        if length <= bound:
            body += piece
        elif length > DISCARDED_BYTES:
            break
    if length > bound:
        raise TooLarge(f"A body has at most {bound} bytes.")
    return bytes(body)


def error_response(error: ChatError) -> Response:
    """The error as JSON, with the status and headers that go with it."""
    body = error.to_dict()
    retry_after = body.pop("retry_after", None)
    response: Response = jsonify({"error": body})
    response.status_code = error.status
    if retry_after is not None:
        response.headers["Retry-After"] = str(max(1, -(-int(retry_after * 1000) // 1000)))
    if isinstance(error, NotAuthenticated):
        response.headers["WWW-Authenticate"] = "Bearer"
    asked = has_request_context()  # a socket to an unknown address is refused here as well
    if asked and request.content_length and request.http_version in ("1.0", "1.1"):
        response.headers["Connection"] = "close"  # the body may not have been read
    return response


def as_chat_error(error: Exception) -> ChatError:
    """What a client is told of an exception; the log has the unexpected, with a reference."""
    if isinstance(error, ChatError):
        return error
    if isinstance(error, RequestEntityTooLarge):
        return TooLarge("The body is larger than this server takes.")
    if isinstance(error, HTTPException):
        status = error.code or 500
        if status == 404:
            return NotFound("There is nothing at this address.")
        if status < 500:
            return InvalidMessage(f"{error.name}: the request can not be served.", status=status)
    unexpected = InternalError()
    logger.error("unexpected failure, reference %s", unexpected.reference, exc_info=error)
    return unexpected


def secured(response: Response) -> Response:
    """Set the headers that keep browsers from misreading an answer."""
    for name, value in SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Cache-Control", NO_STORE)
    return response


def guarded(blueprint: Blueprint) -> None:
    """Give a blueprint's HTTP routes the origin check, CORS, error bodies and security headers."""

    @blueprint.before_request
    async def check() -> Response | None:
        server = current_state()
        if request.method == "OPTIONS":
            return Response("", 204)
        server.guard.check_origin(request)
        return None

    @blueprint.after_request
    async def finish(response: Response) -> Response:
        current_state().guard.cors(request, response)
        return secured(response)

    @blueprint.errorhandler(Exception)
    async def refuse(error: Exception) -> Response:
        response = error_response(as_chat_error(error))
        if isinstance(error, HTTPException):
            for name, value in error.get_headers():
                if name in ("Allow", "Retry-After"):
                    response.headers[name] = value
        return response
