"""Supabase access tokens: ES256 and RS256 verified here, HS256 verified by the auth server."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import jwt
from supabase_auth import AsyncGoTrueClient
from supabase_auth.errors import AuthApiError, AuthError

from ..core.messages import User
from ..errors import NotAuthenticated

logger = logging.getLogger("quart_chat.supabase")

SKEW_SECONDS = 10
MAX_TOKEN_CHARS = 16_384
ALGORITHMS = ("ES256", "RS256")
KEYS_SECONDS = 600
"""Age at which keys are fetched again; until there are new ones, they stay in use."""

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 4.0
"""Pause before the keys are fetched again for an unknown key id; it doubles if that was in vain."""

PATIENCE_SECONDS = 8.0
"""How long a token waits for keys or for an auth server that cannot be reached."""

QUESTIONS_AT_ONCE = 16
QUESTIONS_WAITING = 1000
"""Bounds for tokens that only the auth server can verify."""

CACHED_TOKENS = 10_000
CACHED_TOKEN_SECONDS = 60
REFUSED_SECONDS = 10
REQUEST_SECONDS = 5
MAX_USER_CHARS = 255
UNREACHABLE = (
    "The access token cannot be verified because the auth server is not available. Try again later."
)
BUSY = "Too many access tokens are being verified at the moment. Try again later."


@dataclass(frozen=True, slots=True)
class _Answer:
    user: User | None
    until: float


class SupabaseAuthenticator:
    """Authenticator for the access tokens of one Supabase project."""

    def __init__(
        self,
        url: str,
        key: str,
        audience: Sequence[str],
        algorithms: Sequence[str] = (*ALGORITHMS, "HS256"),
    ) -> None:
        self._issuer = f"{url.rstrip('/')}/auth/v1"
        self._audience = list(audience)
        self._headers = {"apikey": key, "Authorization": f"Bearer {key}"}
        self._algorithms = frozenset(algorithms)
        # Each has its own connections, so that questions about tokens do not delay the keys.
        self._http = httpx.AsyncClient(timeout=REQUEST_SECONDS, follow_redirects=True)
        self._keys_http = httpx.AsyncClient(timeout=REQUEST_SECONDS, follow_redirects=True)
        self._client = AsyncGoTrueClient(
            url=self._issuer,
            headers=self._headers,
            http_client=self._http,
            auto_refresh_token=False,
            persist_session=False,
        )
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = float("-inf")
        self._found_at = float("-inf")
        self._pause = FIRST_PAUSE
        self._fetching: asyncio.Task[None] | None = None
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()
        self._verifying: dict[bytes, asyncio.Task[User | None]] = {}
        self._questions = asyncio.Semaphore(QUESTIONS_AT_ONCE)

    async def open(self) -> None:
        """Fetch the keys, if the auth server is available."""
        await self._fetch_keys()

    async def close(self) -> None:
        """Close the connections."""
        tasks = [*self._verifying.values(), *([self._fetching] if self._fetching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()
        await self._keys_http.aclose()

    async def authenticate(self, token: str) -> User:
        if len(token) > MAX_TOKEN_CHARS:
            raise NotAuthenticated
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            raise NotAuthenticated from None
        algorithm, key_id = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            raise NotAuthenticated
        if algorithm in ALGORITHMS and isinstance(key_id, str):
            key = self._known_key(key_id) or await self._new_key(key_id, token, algorithm)
            return _user(self._claims(token, algorithm, key))
        if algorithm == "HS256":
            return await self._by_server(token, self._claims(token, algorithm, None))
        raise NotAuthenticated

    def _claims(self, token: str, algorithm: str, key: jwt.PyJWK | None) -> dict[str, Any]:
        """Return the claims; without a key, do not check the signature. Raises NotAuthenticated."""
        verifying: Any = key if key is not None else ""
        options: Any = {
            "require": ["exp", "sub"],
            "verify_signature": key is not None,
            "verify_exp": True,
            "verify_nbf": True,
            "verify_iat": True,
            "verify_aud": True,
            "verify_iss": True,
        }
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                verifying,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=SKEW_SECONDS,
                options=options,
            )
        except jwt.ExpiredSignatureError:
            raise NotAuthenticated.expired() from None
        except (jwt.InvalidTokenError, jwt.PyJWKError, ValueError, TypeError):
            raise NotAuthenticated from None
        return claims

    def _known_key(self, key_id: str) -> jwt.PyJWK | None:
        key = self._keys.get(key_id)
        if key is not None and time.monotonic() - self._fetched_at > KEYS_SECONDS:
            self._begin_fetching()  # the known key serves meanwhile
        return key

    async def _new_key(self, key_id: str, token: str, algorithm: str) -> jwt.PyJWK:
        """Return a key that is not known yet, once keys were fetched after the token came.

        Only a token whose other claims fit may wait for that.
        """
        try:
            self._claims(token, algorithm, None)
        except NotAuthenticated:
            raise NotAuthenticated from None
        came = time.monotonic()
        while True:
            if self._fetching is None:
                await asyncio.sleep(max(0.0, self._fetched_at + self._pause - time.monotonic()))
            await self._fetch_keys()
            if (key := self._keys.get(key_id)) is not None:
                return key
            if self._found_at >= came:
                raise NotAuthenticated
            if time.monotonic() + self._pause > came + PATIENCE_SECONDS:
                raise NotAuthenticated(UNREACHABLE)

    async def _fetch_keys(self) -> None:
        await asyncio.shield(self._begin_fetching())

    def _begin_fetching(self) -> asyncio.Task[None]:
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._get_keys())
        return self._fetching

    async def _get_keys(self) -> None:
        began, known = time.monotonic(), set(self._keys)
        if began - self._fetched_at > KEYS_SECONDS:
            self._pause = FIRST_PAUSE
        try:
            url = f"{self._issuer}/.well-known/jwks.json"
            response = await self._keys_http.get(url, headers=self._headers)
            response.raise_for_status()
            listed = response.json()
            # An empty set is an error to PyJWT; projects with HS256 alone have one.
            keys = jwt.PyJWKSet.from_dict(listed).keys if listed["keys"] else []
            self._keys = {key.key_id: key for key in keys if key.key_id}
            self._found_at = began
        except (httpx.HTTPError, jwt.PyJWTError, ValueError, TypeError, LookupError) as error:
            logger.info("no keys from the auth server: %s", type(error).__name__)
        except AttributeError:
            logger.info("no keys from the auth server: another format")
        finally:
            self._fetched_at = time.monotonic()
            has_new = not set(self._keys) <= known
            self._pause = FIRST_PAUSE if has_new else min(self._pause * 2, LONGEST_PAUSE)
            self._fetching = None

    def _verified(self, digest: bytes, task: asyncio.Task[User | None]) -> None:
        self._verifying.pop(digest, None)
        if not task.cancelled():
            task.exception()  # whoever waited may have gone

    async def _by_server(self, token: str, claims: Mapping[str, Any]) -> User:
        digest = hashlib.sha256(token.encode()).digest()
        answer = self._answers.get(digest)
        if answer is None or answer.until < time.time():
            task = self._verifying.get(digest)
            if task is None:
                if len(self._verifying) >= QUESTIONS_WAITING:
                    raise NotAuthenticated(BUSY)
                task = asyncio.create_task(self._ask_about(digest, token, claims))
                self._verifying[digest] = task
                task.add_done_callback(lambda task: self._verified(digest, task))
            user = await asyncio.shield(task)
        else:
            user = answer.user
        if user is None:
            raise NotAuthenticated
        return user

    async def _ask_about(self, digest: bytes, token: str, claims: Mapping[str, Any]) -> User | None:
        user = await self._user_of(token, claims)
        kept = REFUSED_SECONDS if user is None else CACHED_TOKEN_SECONDS
        until = min(time.time() + kept, float(claims["exp"]))
        self._answers[digest] = _Answer(user, until)
        if len(self._answers) > CACHED_TOKENS:
            self._answers.popitem(last=False)
        return user

    async def _user_of(self, token: str, claims: Mapping[str, Any]) -> User | None:
        """Return the auth server's verdict; wait for a server that is not available."""
        deadline, pause = time.monotonic() + PATIENCE_SECONDS, FIRST_PAUSE
        while True:
            try:
                async with self._questions:
                    response = await self._client.get_user(token)
            except AuthApiError as error:
                if error.status in (401, 403):
                    return None
            except (AuthError, httpx.HTTPError, ValueError):
                pass
            else:
                same = response is not None and response.user.id == claims["sub"]
                return _user(claims) if same else None
            if time.monotonic() + pause > deadline:
                raise NotAuthenticated(UNREACHABLE)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)


def _user(claims: Mapping[str, Any]) -> User:
    user_id = claims["sub"]
    if not isinstance(user_id, str) or not 0 < len(user_id) <= MAX_USER_CHARS:
        raise NotAuthenticated
    return User(user_id, expires_at=float(claims["exp"]) + SKEW_SECONDS)
