"""WebSocket: admission and routes."""

from __future__ import annotations

import functools
from typing import Any

from quart import Blueprint, Response, Websocket, request, websocket
from quart_schema import hide

from ..core.messages import User
from ..errors import ForbiddenOrigin, InvalidMessage, NotAuthenticated
from .asgi import Disconnected, Serve, Socket, hand_off
from .connection import Connection
from .guard import chosen_subprotocol
from .http import as_chat_error, guarded, refusal
from .limits import TooManyConnections
from .state import ChatState, HasChatState, current_state, state_of

websocket_blueprint = Blueprint("quart_chat_websocket", __name__)
guarded(websocket_blueprint)


@websocket_blueprint.websocket("")
async def chat_socket() -> None:
    """Serve the chat over a WebSocket."""
    server = current_state()
    socket = _without_proxy(websocket)
    serve = await _admitted(server, socket)
    if serve is None:
        return
    if (keep := hand_off(socket)) is not None:
        keep(serve)
    else:
        await serve(socket)


@websocket_blueprint.get("")
@hide
async def no_socket() -> Response:
    """Answer a request that should have opened a WebSocket."""
    error = InvalidMessage(
        "Open a WebSocket here. Did a proxy drop the Upgrade header?", status=426
    )
    response = await refusal(error, request)
    response.headers["Upgrade"] = "websocket"
    return response


class ChatWebSocketRunner:
    """Runner of the chat on any route: ``await ChatWebSocketRunner(chat).run(websocket)``."""

    def __init__(self, chat: HasChatState) -> None:
        self._server = state_of(chat)

    async def run(self, websocket: Any) -> None:
        """Accept the socket and serve it until it closes.

        Args:
            websocket: Quart's ``websocket``, or the object behind it.
        """
        socket = _without_proxy(websocket)
        serve = await _admitted(self._server, socket)
        if serve is not None:
            await serve(socket)


def _without_proxy(websocket: Any) -> Websocket:
    """Return the object behind Quart's ``websocket``: each use of that looks at the context."""
    socket: Websocket = getattr(websocket, "_get_current_object", lambda: websocket)()
    return socket


async def _admitted(server: ChatState, socket: Websocket) -> Serve | None:
    """Accept a socket and find its user, or close it with the reason."""
    await socket.accept(subprotocol=chosen_subprotocol(socket))
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


async def _serve(server: ChatState, user: User, socket: Socket) -> None:
    try:
        slot = server.guard.limits.take_place(user.id)
    except TooManyConnections:
        await socket.close(1013, "Too many connections")
        return
    try:
        await Connection(server, socket, user).serve()
    except Disconnected:
        pass
    except Exception as error:
        as_chat_error(error)
        await socket.close(1011, "Internal error")
    finally:
        slot.release()
