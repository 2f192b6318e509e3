"""Who is asking, from which origin, how often."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from quart import Request, Response, Websocket

from ..config import Settings, loopback
from ..core.messages import User
from ..core.ports import Authenticator
from ..errors import ChatError, ForbiddenOrigin, NotAuthenticated, RateLimited

LOCAL_USER = "1"
MAX_RATES = 100_000
MAX_USER_ID = 255
SECONDS = {"second": 1, "minute": 60, "hour": 3600}

HTTPConnection = Request | Websocket
HostAuthenticate = Callable[[HTTPConnection], str | User | Awaitable[str | User | None] | None]

CORS_METHODS = "GET, POST, PUT, PATCH, DELETE, OPTIONS"
CORS_HEADERS = "Authorization, Content-Type, Idempotency-Key, Last-Event-ID"
CORS_EXPOSED = "X-Thread-Id, Retry-After"

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class TooManyConnections(ChatError):
    """As many connections as are allowed are open; close 1013."""

    code = "rate_limited"
    status = 429
    default_message = "Too many connections are open. Close one, or try again later."


class RateLimiter:
    """The generic cell rate algorithm: ``count`` messages a period, evenly refilled."""

    def __init__(self, limit: str) -> None:
        count, _, period = limit.partition("/")
        self._period = float(SECONDS[period])
        self._interval = self._period / int(count)
        self._arrivals: OrderedDict[str, float] = OrderedDict()

    def take(self, user: str) -> None:
        """Count a message. Raises RateLimited with the seconds until the next one may come."""
        now = time.monotonic()
        arrival = max(self._arrivals.get(user, now), now)
        wait = arrival - now - (self._period - self._interval)
        if wait > 1e-9:
            raise RateLimited(retry_after=round(wait + 0.0005, 3))
        self._arrivals[user] = arrival + self._interval
        self._arrivals.move_to_end(user)
        if len(self._arrivals) > MAX_RATES:
            self._arrivals.popitem(last=False)


class ConnectionSlot:
    """A counted connection; given back once, at the latest when nobody holds it any more."""

    def __init__(self, connections: Counter[str], user: str) -> None:
        self._connections = connections
        self._user: str | None = user
        connections[user] += 1

    def release(self) -> None:
        """Count the connection no longer."""
        user, self._user = self._user, None
        if user is not None:
            self._connections[user] -= 1
            if not self._connections[user]:
                del self._connections[user]

    __del__ = release


class Guard:
    """The rules of one application."""

    def __init__(self, settings: Settings) -> None:
        self.authenticator: Authenticator | None = None
        self.host_authenticate: HostAuthenticate | None = None
        self._settings = settings
        self._rate = RateLimiter(settings.rate_limit) if settings.rate_limit else None
        self._connections: Counter[str] = Counter()

    @property
    def is_local(self) -> bool:
        """Whether everybody is the same user."""
        return self.authenticator is None and self.host_authenticate is None

    async def identify(self, connection: HTTPConnection, *, query_token: bool = False) -> User:
        """The user behind a request or socket.

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
        if not token:
            raise NotAuthenticated.required()
        return await self.verify(token)

    async def verify(self, token: str) -> User:
        """The user of a token. Raises NotAuthenticated."""
        if self.authenticator is None:
            if not self.is_local:
                raise NotAuthenticated("This server takes no tokens; sign in as the page says.")
            return User(LOCAL_USER)
        try:
            async with asyncio.timeout(self._settings.handshake_timeout):
                return await self.authenticator.authenticate(token)
        except TimeoutError:
            raise NotAuthenticated("The access token could not be verified in time.") from None

    async def _ask_host(self, ask: HostAuthenticate, connection: HTTPConnection) -> User:
        answer = ask(connection)
        found = await answer if inspect.isawaitable(answer) else answer
        if isinstance(found, User):
            return found
        if found is None or found == "":
            raise NotAuthenticated("Sign in first.", code="authentication_required")
        if not isinstance(found, str) or len(found) > MAX_USER_ID:
            raise TypeError("authenticate gives a user id: a string of at most 255 characters")
        return User(found)

    def take_message(self, user: str) -> None:
        """Count a message of a user. Raises RateLimited."""
        if self._rate is not None:
            self._rate.take(user)

    def take_place(self, user: str) -> ConnectionSlot:
        """Count a socket or stream from now on. Raises TooManyConnections."""
        mine = self._settings.max_connections_per_user
        if self._connections.total() >= self._settings.max_connections or (
            mine is not None and self._connections[user] >= mine
        ):
            raise TooManyConnections(retry_after=1)
        return ConnectionSlot(self._connections, user)

    def check_origin(self, connection: HTTPConnection) -> None:
        """Refuse pages of other origins; what is no browser sends none. Raises ForbiddenOrigin."""
        origin = connection.headers.get("Origin")
        if origin is not None and not self._allows(origin, connection):
            raise ForbiddenOrigin
        if origin is None and self._is_rebound(connection):
            raise ForbiddenOrigin

    def _is_rebound(self, connection: HTTPConnection) -> bool:
        """Whether a page got here by a name of its own that resolves to this machine."""
        if not (self.is_local and _bound_to_loopback(connection)):
            return False
        host = connection.headers.get("Host", "")
        listed = {each.partition("://")[2] for each in self._settings.allowed_origins}
        return bool(host) and not loopback(_hostname(f"//{host}")) and host not in listed

    def _allows(self, origin: str, connection: HTTPConnection) -> bool:
        allowed = self._settings.allowed_origins
        if "*" in allowed or origin in allowed:
            return True
        if self.is_local and _bound_to_loopback(connection):
            # A page of any other name that resolves to this machine is an attack (DNS rebinding).
            return loopback(_hostname(origin))
        _, _, netloc = origin.partition("://")
        return netloc != "" and netloc.lower() == connection.headers.get("Host", "").lower()

    def cors(self, connection: HTTPConnection, response: Response) -> None:
        """Let the pages that may read the answer read it."""
        origin = connection.headers.get("Origin")
        response.headers.add("Vary", "Origin")
        if origin is None or not self._allows(origin, connection):
            return
        listed = origin in self._settings.allowed_origins
        wildcard = "*" in self._settings.allowed_origins and not listed
        response.headers["Access-Control-Allow-Origin"] = "*" if wildcard else origin
        response.headers["Access-Control-Expose-Headers"] = CORS_EXPOSED
        if not wildcard:
            response.headers["Access-Control-Allow-Credentials"] = "true"
        if connection.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = CORS_METHODS
            response.headers["Access-Control-Allow-Headers"] = CORS_HEADERS
            response.headers["Access-Control-Max-Age"] = "600"


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def bearer(connection: HTTPConnection) -> str | None:
    """The token of ``Authorization: Bearer …`` (RFC 6750)."""
    scheme, _, token = connection.headers.get("Authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _bound_to_loopback(connection: HTTPConnection) -> bool:
    server: Any = connection.scope.get("server") if connection.scope else None
    return bool(server) and loopback(str(server[0]))
