"""Common parts of HTTP routes: bodies within bounds, errors as JSON, headers, one user's calls."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from typing import Any, Concatenate, ParamSpec

from quart import Blueprint, Request, Response, has_request_context, jsonify, request
from quart.blueprints import BlueprintSetupState
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from ..config import Settings
from ..errors import (
    ChatError,
    ConfigurationError,
    InternalError,
    InvalidMessage,
    NotAuthenticated,
    NotFound,
    TooLarge,
)
from .codec import LARGE_BYTES, decode_json
from .guard import SECURITY_HEADERS
from .state import EXTENSION, ChatState, current_state

logger = logging.getLogger("quart_chat.http")

NO_STORE = "no-store"

DISCARDED_BYTES = 16 * 1024 * 1024
DISCARD_SECONDS = 2
"""So much of a refused body is read and forgotten after the answer, and for so long: a client that
still sends when its connection closes may lose the answer."""

P = ParamSpec("P")


async def body_of(connection: Request, settings: Settings) -> bytes:
    """Return a request's body.

    Raises:
        TooLarge: It is over ``CHAT_MAX_MESSAGE_BYTES``, or its Content-Length is.
        InvalidMessage: It did not arrive within ``CHAT_BODY_TIMEOUT`` (408).
    """
    bound = settings.max_message_bytes
    too_large = TooLarge(f"The body is too large. It may have at most {bound} bytes.")
    if (connection.content_length or 0) > bound:
        raise too_large
    body = bytearray()
    try:
        # Quart's own timeout does not act while a body is iterated.
        async with asyncio.timeout(settings.body_timeout):
            async for piece in connection.body:
                body += piece
                if len(body) > bound:
                    raise too_large
    except RequestEntityTooLarge:
        raise too_large from None
    except TimeoutError:
        raise InvalidMessage(
            f"The body did not arrive within {settings.body_timeout:g} s.", status=408
        ) from None
    return bytes(body)


async def json_of(body: bytes) -> Any:
    """Return the values of a JSON body; a large one is decoded outside the loop."""
    if len(body) > LARGE_BYTES:
        return await asyncio.to_thread(decode_json, body)
    return decode_json(body)


def error_response(error: ChatError) -> Response:
    """Return the error as JSON, with the status and headers that go with it."""
    body = error.to_dict()
    retry_after = body.pop("retry_after", None)
    response: Response = jsonify({"error": body})
    response.status_code = error.status
    if retry_after is not None:
        response.headers["Retry-After"] = str(max(1, -(-int(retry_after * 1000) // 1000)))
    if isinstance(error, NotAuthenticated):
        response.headers["WWW-Authenticate"] = "Bearer"
    if has_request_context() and _may_have_a_body(request):
        # The body may not have been read. A socket to an unknown address has no request.
        response.headers["Connection"] = "close"
    return response


def _may_have_a_body(connection: Request) -> bool:
    headers = connection.headers
    return connection.http_version in ("1.0", "1.1") and (
        bool(connection.content_length) or "Transfer-Encoding" in headers
    )


async def refusal(error: Exception, connection: Request) -> Response:
    """Return the response for an exception, and read the rest of a body that is too large.

    The answer is sent at once and whole; the connection closes when the body has been read.
    """
    known = as_chat_error(error)
    response = error_response(known)
    if isinstance(known, TooLarge):
        answer = await response.get_data(as_text=False)
        headers = response.headers
        response = Response(_then_discard(answer, connection.body), known.status, headers)
        response.headers["Content-Length"] = str(len(answer))
    return response


async def _then_discard(answer: bytes, body: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    yield answer
    discarded = 0
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            async for piece in body:
                discarded += len(piece)
                if discarded > DISCARDED_BYTES:
                    break
    except (TimeoutError, RequestEntityTooLarge):
        pass


def as_chat_error(error: Exception) -> ChatError:
    """Return the error for a client; log an unexpected exception with its reference."""
    if isinstance(error, ChatError):
        return error
    if isinstance(error, RequestEntityTooLarge):
        return TooLarge("The body is larger than this server accepts.")
    if isinstance(error, HTTPException):
        status = error.code or 500
        if status == 404:
            return NotFound("This address does not exist. Check the path.")
        if status < 500:
            return InvalidMessage(f"{error.name}: the request cannot be served.", status=status)
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
    """Add the origin check, CORS, error bodies and security headers to a blueprint's routes."""

    @blueprint.record_once
    def check_application(setup: BlueprintSetupState) -> None:
        if EXTENSION not in setup.app.extensions:
            raise ConfigurationError(
                f"The blueprint {blueprint.name} needs the chat. "
                "Call QuartChat(app) before app.register_blueprint(…)."
            )

    @blueprint.before_request
    async def check() -> Response | None:
        server = current_state()
        if request.method == "OPTIONS":
            return Response("", 204)
        server.guard.check_origin(request)
        return None

    @blueprint.after_request
    async def finish(response: Response) -> Response:
        chat = current_state_or_none()
        if chat is not None:
            chat.guard.cors(request, response)
        return secured(response)

    @blueprint.errorhandler(Exception)
    async def refuse(error: Exception) -> Response:
        if not has_request_context():
            return error_response(as_chat_error(error))
        response = await refusal(error, request)
        if isinstance(error, HTTPException):
            for name, value in error.get_headers():
                if name in ("Allow", "Retry-After"):
                    response.headers[name] = value
        return response


def current_state_or_none() -> ChatState | None:
    """Return the chat, or None before the application serves."""
    try:
        return current_state()
    except ChatError:
        return None


def for_user(
    function: Callable[Concatenate[ChatState, str, P], Awaitable[Response]],
) -> Callable[P, Awaitable[Response]]:
    """Call a route with the chat and the user, within the bounds on a user's calls."""

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> Response:
        server = current_state()
        user = (await server.guard.identify(request)).id
        server.guard.limits.take_request(user)
        with server.guard.limits.request(user):
            return await function(server, user, *args, **kwargs)

    return call
