"""Authentication and origin checks."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable

from quart import Response, Websocket

from ..config import Settings
from ..core.messages import User
from ..core.ports import Authenticator
from ..errors import ForbiddenOrigin, NotAuthenticated
from .limits import Limits
from .origins import HTTPConnection, Origins

LOCAL_USER = "1"
MAX_USER_ID = 255

SUBPROTOCOL = "quart-chat"
TOKEN_SUBPROTOCOL = "bearer."

HostAuthenticate = Callable[[HTTPConnection], str | User | Awaitable[str | User | None] | None]

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Guard:
    """Guard of one application: authentication, origins and limits."""

    def __init__(self, settings: Settings) -> None:
        self.authenticator: Authenticator | None = None
        self.host_authenticate: HostAuthenticate | None = None
        self.limits = Limits(settings)
        self._settings = settings
        self._origins = Origins(settings.allowed_origins)

    @property
    def is_local(self) -> bool:
        """Return whether all requests share one user."""
        return self.authenticator is None and self.host_authenticate is None

    async def identify(self, connection: HTTPConnection, *, query_token: bool = False) -> User:
        """Return the user behind a request or socket.

        Args:
            connection: The request or socket.
            query_token: Whether ``?token=`` is read if there is no header.

        Raises:
            NotAuthenticated: There is none.
        """
        if self.host_authenticate is not None:
            return await self._ask_host(self.host_authenticate, connection)
        if self.authenticator is None:
            return User(LOCAL_USER)
        token = bearer(connection)
        if token is None and query_token:
            token = connection.args.get("token")
        if not token and isinstance(connection, Websocket):
            token = subprotocol_token(connection)
        if not token:
            raise NotAuthenticated.required()
        return await self.verify(token)

    async def verify(self, token: str) -> User:
        """Return the user of a token. Raises NotAuthenticated."""
        if self.authenticator is None:
            if not self.is_local:
                raise NotAuthenticated(
                    "This server takes no access tokens. Sign in on the page that shows the chat."
                )
            return User(LOCAL_USER)
        try:
            async with asyncio.timeout(self._settings.handshake_timeout):
                return await self.authenticator.authenticate(token)
        except TimeoutError:
            raise NotAuthenticated(
                "The access token could not be verified in time. Try again later."
            ) from None

    async def _ask_host(self, ask: HostAuthenticate, connection: HTTPConnection) -> User:
        answer = ask(connection)
        user = await answer if inspect.isawaitable(answer) else answer
        if isinstance(user, User):
            return user
        if user is None or user == "":
            raise NotAuthenticated("Sign in, then try again.", code="authentication_required")
        if not isinstance(user, str) or len(user) > MAX_USER_ID:
            raise TypeError("authenticate returns a user id: a string of at most 255 characters")
        return User(user)

    def check_origin(self, connection: HTTPConnection) -> None:
        """Refuse pages of other origins. Raises ForbiddenOrigin."""
        if self._origins.refuses(connection, local=self.is_local):
            raise ForbiddenOrigin

    def cors(self, connection: HTTPConnection, response: Response) -> None:
        """Set the headers that let allowed pages read the answer."""
        self._origins.cors(connection, response, local=self.is_local)


def bearer(connection: HTTPConnection) -> str | None:
    """Return the token of ``Authorization: Bearer …`` (RFC 6750)."""
    scheme, _, token = connection.headers.get("Authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def subprotocol_token(socket: Websocket) -> str | None:
    """Return the token that a page offers as a subprotocol, since it cannot set a header."""
    for offered in socket.requested_subprotocols:
        if offered.startswith(TOKEN_SUBPROTOCOL):
            return offered.removeprefix(TOKEN_SUBPROTOCOL) or None
    return None


def chosen_subprotocol(socket: Websocket) -> str | None:
    """Return the subprotocol to accept, never one that holds a token."""
    offered = [
        each for each in socket.requested_subprotocols if not each.startswith(TOKEN_SUBPROTOCOL)
    ]
    return SUBPROTOCOL if SUBPROTOCOL in offered else next(iter(offered), None)
