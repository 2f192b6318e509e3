"""Supabase access tokens: asymmetric ones verified here, HS256 ones by the auth server."""

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
"""How long keys are used before they are asked for again; until there are new ones, they serve."""

UNKNOWN_KEY_SECONDS = 10
"""How often, at most, an unknown key id makes the server ask for the keys again."""

CACHED_TOKENS = 10_000
CACHED_TOKEN_SECONDS = 60
REFUSED_SECONDS = 10
REQUEST_SECONDS = 5
MAX_USER_CHARS = 255
UNREACHABLE = "The auth server can not be reached, so the token can not be verified. Try again."


@dataclass(frozen=True, slots=True)
class _Answer:
    user: User | None
    until: float


class SupabaseAuthenticator:
    """Knows users by the tokens of one Supabase project."""

    def __init__(self, url: str, key: str, audience: Sequence[str]) -> None:
        self._issuer = f"{url.rstrip('/')}/auth/v1"
        self._audience = list(audience)
        self._headers = {"apikey": key, "Authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(timeout=REQUEST_SECONDS, follow_redirects=True)
        self._client = AsyncGoTrueClient(
            url=self._issuer,
            headers=self._headers,
            http_client=self._http,
            auto_refresh_token=False,
            persist_session=False,
        )
        self._keys: dict[str, jwt.PyJWK] = {}
        self._asked_at: float | None = None
        self._asked_for_unknown_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()
        self._verifying: dict[bytes, asyncio.Task[User | None]] = {}

    async def open(self) -> None:
        """Get the keys, if they can be had by now."""
        await self._ask_for_keys()

    async def close(self) -> None:
        """Close the connections."""
        tasks = [*self._verifying.values(), *([self._asking] if self._asking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    async def authenticate(self, token: str) -> User:
        if len(token) > MAX_TOKEN_CHARS:
            raise NotAuthenticated
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            raise NotAuthenticated from None
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm in ALGORITHMS and isinstance(key_id, str):
            key = await self._key(key_id)
            return _user(self._claims(token, algorithm, key))
        if algorithm == "HS256":
            return await self._by_server(token, self._claims(token, algorithm, None))
        raise NotAuthenticated

    def _claims(self, token: str, algorithm: str, key: jwt.PyJWK | None) -> dict[str, Any]:
        """The claims; without a key all but the signature is checked. Raises NotAuthenticated."""
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

    async def _key(self, key_id: str) -> jwt.PyJWK:
        age = float("inf") if self._asked_at is None else time.monotonic() - self._asked_at
        known = self._keys.get(key_id)
        if known is not None:
            if age > KEYS_SECONDS:
                self._begin_asking()  # the known key serves meanwhile
            return known
        if self._asking is not None:
            await self._ask_for_keys()
        elif time.monotonic() - self._asked_for_unknown_at > UNKNOWN_KEY_SECONDS:
            self._asked_for_unknown_at = time.monotonic()
            await self._ask_for_keys()
        if (key := self._keys.get(key_id)) is None:
            raise NotAuthenticated
        return key

    async def _ask_for_keys(self) -> None:
        await asyncio.shield(self._begin_asking())

    def _begin_asking(self) -> asyncio.Task[None]:
        if self._asking is None:
            self._asking = asyncio.create_task(self._get_keys())
        return self._asking

    async def _get_keys(self) -> None:
        try:
            url = f"{self._issuer}/.well-known/jwks.json"
            response = await self._http.get(url, headers=self._headers)
            response.raise_for_status()
            found = jwt.PyJWKSet.from_dict(response.json()).keys
            self._keys = {key.key_id: key for key in found if key.key_id}
        except (httpx.HTTPError, jwt.PyJWTError, ValueError, TypeError, AttributeError) as error:
            # An empty set is an error to PyJWT; projects with HS256 alone have one.
            logger.info("no keys from the auth server: %s", type(error).__name__)
        finally:
            self._asked_at = time.monotonic()
            self._asking = None

    async def _by_server(self, token: str, claims: Mapping[str, Any]) -> User:
        digest = hashlib.sha256(token.encode()).digest()
        answer = self._answers.get(digest)
        if answer is None or answer.until < time.time():
            task = self._verifying.get(digest)
            if task is None:
                task = asyncio.create_task(self._ask_about(digest, token, claims))
                self._verifying[digest] = task
                task.add_done_callback(lambda _: self._verifying.pop(digest, None))
            found = await asyncio.shield(task)
        else:
            found = answer.user
        if found is None:
            raise NotAuthenticated
        return found

    async def _ask_about(self, digest: bytes, token: str, claims: Mapping[str, Any]) -> User | None:
        try:
            response = await self._client.get_user(token)
        except AuthApiError as error:
            if error.status not in (401, 403):
                raise NotAuthenticated(UNREACHABLE) from None
            found = None
        except (AuthError, httpx.HTTPError, ValueError):
            raise NotAuthenticated(UNREACHABLE) from None
        else:
            same = response is not None and response.user.id == claims["sub"]
            found = _user(claims) if same else None
        kept = REFUSED_SECONDS if found is None else CACHED_TOKEN_SECONDS
        until = min(time.time() + kept, float(claims["exp"]))
        self._answers[digest] = _Answer(found, until)
        if len(self._answers) > CACHED_TOKENS:
            self._answers.popitem(last=False)
        return found


def _user(claims: Mapping[str, Any]) -> User:
    user_id = claims["sub"]
    if not isinstance(user_id, str) or not 0 < len(user_id) <= MAX_USER_CHARS:
        raise NotAuthenticated
    return User(user_id, expires_at=float(claims["exp"]) + SKEW_SECONDS)
