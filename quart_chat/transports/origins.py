"""Origin checks for pages in browsers: allowed origins, CORS and DNS rebinding."""

from __future__ import annotations

import re
from typing import Any

from quart import Request, Response, Websocket

from ..config import loopback

HTTPConnection = Request | Websocket

LOOPBACK = r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?"
LOOPBACK_HOST = re.compile(LOOPBACK, re.ASCII | re.IGNORECASE)
LOOPBACK_ORIGIN = re.compile(f"https?://{LOOPBACK}", re.ASCII | re.IGNORECASE)

CORS_METHODS = "GET, POST, PUT, PATCH, DELETE, OPTIONS"
CORS_HEADERS = "Authorization, Content-Type, Idempotency-Key, Last-Event-ID"
CORS_EXPOSED = "X-Thread-Id, Retry-After"


class Origins:
    """Origins that an application allows."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = frozenset(allowed)
        self._hosts = frozenset(each.partition("://")[2].lower() for each in allowed)
        self._everyone = "*" in self._allowed

    def refuses(self, connection: HTTPConnection, *, local: bool) -> bool:
        """Return whether a page of another origin is behind a request or socket.

        Args:
            connection: The request or socket; programs that are no browsers send no ``Origin``.
            local: Whether all requests share one user, so that the address is all that protects.
        """
        if self._everyone:
            return False
        origin = connection.headers.get("Origin")
        if origin is None:
            return local and self._is_rebound(connection)
        return not self.allows(origin, connection, local=local)

    def allows(self, origin: str, connection: HTTPConnection, *, local: bool) -> bool:
        """Return whether pages of an origin may use the chat."""
        if self._everyone or origin in self._allowed:
            return True
        if local and _bound_to_loopback(connection):
            # A page of any other name that resolves to this machine is an attack (DNS rebinding).
            return LOOPBACK_ORIGIN.fullmatch(origin) is not None
        _, _, netloc = origin.partition("://")
        return netloc != "" and netloc.lower() == connection.headers.get("Host", "").lower()

    def _is_rebound(self, connection: HTTPConnection) -> bool:
        """Return whether a page reached a loopback address by a name of its own."""
        host = connection.headers.get("Host", "").lower()
        if not host or host in self._hosts or LOOPBACK_HOST.fullmatch(host):
            return False
        return _bound_to_loopback(connection)

    def cors(self, connection: HTTPConnection, response: Response, *, local: bool) -> None:
        """Set the headers that let allowed pages read the answer."""
        origin = connection.headers.get("Origin")
        headers = response.headers
        headers.add("Vary", "Origin")
        if origin is None or not self.allows(origin, connection, local=local):
            return
        wildcard = self._everyone and origin not in self._allowed
        headers["Access-Control-Allow-Origin"] = "*" if wildcard else origin
        headers["Access-Control-Expose-Headers"] = CORS_EXPOSED
        if not wildcard:
            headers["Access-Control-Allow-Credentials"] = "true"
        if connection.method == "OPTIONS":
            headers["Access-Control-Allow-Methods"] = CORS_METHODS
            headers["Access-Control-Allow-Headers"] = CORS_HEADERS
            headers["Access-Control-Max-Age"] = "600"


def _bound_to_loopback(connection: HTTPConnection) -> bool:
    server: Any = connection.scope.get("server") if connection.scope else None
    return bool(server) and loopback(str(server[0]))
