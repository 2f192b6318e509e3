"""A Supabase auth server as the real one answers: keys, users, rotation, outage; and its tokens.

A real HTTP server on loopback. What it was asked is in ``requests``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
import pytest
from conftest import Server, client, connect, providers, start
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from endpoint import Endpoint
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from websockets.exceptions import ConnectionClosed

PUBLISHABLE_KEY = "sb_publishable_do-not-log-me"
SECRET = "the-shared-secret-of-this-project-do-not-log-me"
KEYS = "/auth/v1/.well-known/jwks.json"
USER = "/auth/v1/user"
NOT_TO_BE_LOGGED = (PUBLISHABLE_KEY, SECRET, "sk-secret")


class SigningKey:
    """A private key, its id, and the public half as a JWKS shows it."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self.id = str(uuid.uuid4())
        self.private: Any
        if algorithm == "ES256":
            self.private = ec.generate_private_key(ec.SECP256R1())
            shown = ECAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        else:
            self.private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            shown = RSAAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        more = {"alg": algorithm, "kid": self.id, "use": "sig", "key_ops": ["verify"], "ext": True}
        form = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.pem: str = self.private.public_key().public_bytes(*form).decode()
        self.public: dict[str, Any] = {**shown, **more}


@dataclass
class AuthServer:
    """One project's auth server, and the tokens that it gives out."""

    requests: list[str] = field(default_factory=list)
    keys: dict[str, SigningKey] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    fails_with: tuple[int, str] | None = None
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    _server: asyncio.Server | None = None
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """The variables that a server of this project is started with."""
        return {"SUPABASE_URL": self.url, "SUPABASE_KEY": PUBLISHABLE_KEY}

    def count(self, path: str = "") -> int:
        return sum(path in request for request in self.requests)

    def rotate(self, algorithm: str) -> SigningKey:
        """Sign with a new key from now on; the older ones stay published."""
        key = SigningKey(algorithm)
        self.keys[key.id] = key
        return key

    def newest(self, algorithm: str) -> SigningKey:
        return [key for key in self.keys.values() if key.algorithm == algorithm][-1]

    def token(
        self,
        user: str = "user-1",
        *,
        algorithm: str = "ES256",
        key: SigningKey | None = None,
        secret: str = SECRET,
        headers: dict[str, Any] | None = None,
        lasts: float = 3600,
        **claims: Any,
    ) -> str:
        """An access token; a claim or header of None is left out."""
        now = int(time.time())
        body: dict[str, Any] = {
            "iss": f"{self.url}/auth/v1",
            "sub": user,
            "aud": "authenticated",
            "exp": int(now + lasts),
            "iat": now,
            "email": f"{user}@example.com",
            "phone": "",
            "app_metadata": {"provider": "email", "providers": ["email"]},
            "user_metadata": {},
            "role": "authenticated",
            "aal": "aal1",
            "session_id": str(uuid.uuid4()),
            "is_anonymous": False,
        }
        given = {name: value for name, value in (body | claims).items() if value is not None}
        if algorithm == "HS256":
            return jwt.encode(given, secret, "HS256", headers={"kid": "legacy", **(headers or {})})
        if algorithm == "none":
            return jwt.encode(given, None, "none", headers=headers)
        key = key or self.newest(algorithm)
        return jwt.encode(given, key.private, algorithm, headers={"kid": key.id, **(headers or {})})

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Be gone: no listening socket, and no open connection either."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._open:
            writer.transport.abort()

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[None]:
        """Cannot be reached for a while."""
        await self.stop()
        try:
            yield
        finally:
            await self.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, target, _ = head.split("\r\n", 1)[0].split(" ")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (x.partition(":") for x in head.split("\r\n")[1:] if x)
                }
                self.requests.append(f"{method} {target}")
                await self.answering.wait()
                writer.write(self._answer(method, target, headers))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    def _answer(self, method: str, target: str, headers: dict[str, str]) -> bytes:
        if self.fails_with is not None:
            status, text = self.fails_with
            return _response(status, text, "text/html")
        if "apikey" not in headers:
            hint = "No `apikey` request header or url param was found."
            return _json(401, {"message": "No API key found in request", "hint": hint})
        if (method, target) == ("GET", KEYS):
            public = [key.public for key in self.keys.values()]
            return _json(200, {"keys": public}, "Cache-Control: public, max-age=600\r\n")
        if (method, target) == ("GET", USER):
            return self._user(headers)
        return _json(404, {"code": 404, "msg": "404 page not found"})

    def _user(self, headers: dict[str, str]) -> bytes:
        versioned = headers.get("x-supabase-api-version") is not None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            says = "This endpoint requires a Bearer token"
            return _error(401, "no_authorization", says, versioned)
        try:
            claims = self._verified(token)
        except jwt.ExpiredSignatureError:
            says = "unable to parse or verify signature, token has invalid claims: token is expired"
            return _error(403, "bad_jwt", f"invalid JWT: {says}", versioned)
        except (jwt.InvalidTokenError, KeyError):
            says = "unable to parse or verify signature, token signature is invalid"
            return _error(403, "bad_jwt", f"invalid JWT: {says}", versioned)
        if claims["sub"] in self.deleted:
            says = "User from sub claim in JWT does not exist"
            return _error(403, "user_not_found", says, versioned)
        return _json(200, _user_of(claims))

    def _verified(self, token: str) -> dict[str, Any]:
        header = jwt.get_unverified_header(token)
        key: Any = SECRET
        if header["alg"] != "HS256":
            key = self.keys[header["kid"]].private.public_key()
        options: Any = {"verify_aud": False}
        claims: dict[str, Any] = jwt.decode(token, key, [header["alg"]], options=options)
        return claims


def _user_of(claims: dict[str, Any]) -> dict[str, Any]:
    moment = "2026-01-01T00:00:00.000000Z"
    return {
        "id": claims["sub"],
        "aud": claims["aud"],
        "role": claims["role"],
        "email": claims["email"],
        "email_confirmed_at": moment,
        "phone": "",
        "confirmed_at": moment,
        "last_sign_in_at": moment,
        "app_metadata": claims["app_metadata"],
        "user_metadata": claims["user_metadata"],
        "identities": [],
        "created_at": moment,
        "updated_at": moment,
        "is_anonymous": False,
    }


def _response(status: int, text: str, kind: str, headers: str = "") -> bytes:
    body = text.encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{headers}Content-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def _json(status: int, value: Any, headers: str = "") -> bytes:
    return _response(status, json.dumps(value), "application/json", headers)


def _error(status: int, code: str, says: str, versioned: bool) -> bytes:
    """GoTrue's errors: of two kinds, by the version that the client asked for."""
    if versioned:
        shown = {"code": code, "message": says}
        return _json(status, shown, "X-Supabase-Api-Version: 2024-01-01\r\n")
    return _json(status, {"code": status, "error_code": code, "msg": says})


@asynccontextmanager
async def auth_server() -> AsyncIterator[AuthServer]:
    """The auth server on a free port of loopback, with an ES256 and an RS256 key."""
    server = AuthServer()
    server.answering.set()
    server.rotate("RS256")
    server.rotate("ES256")
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def remote_server(
    auth: AuthServer, endpoint: Endpoint, cwd: Path, *arguments: str, **settings: Any
) -> AsyncIterator[Server]:
    """A server with remote auth; it ends cleanly, and has logged neither secret nor traceback."""
    given = {"providers": providers(endpoint), "protocol": "both", "drain_timeout": 1, **settings}
    server = await start("--remote-auth", *arguments, environ=auth.environ, cwd=cwd, **given)
    try:
        yield server
    finally:
        code = await server.stop()
    assert code == 0
    assert "Traceback" not in server.log(), server.log()
    for secret in NOT_TO_BE_LOGGED:
        assert secret not in server.log()


def bearer(token: str) -> dict[str, str]:
    """The header that carries a token."""
    return {"Authorization": f"Bearer {token}"}


def tampered(token: str, **claims: Any) -> str:
    """The same signature under other claims."""
    head, body, signature = token.split(".")
    known = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return f"{head}.{encoded(known | claims)}.{signature}"


def encoded(value: Any) -> str:
    """A value as a part of a token."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


async def closed(server: Server, **options: Any) -> tuple[int, str]:
    """The code and reason with which the server closes a new socket."""
    async with connect(server, **options) as socket:
        return await close_of(socket)


async def close_of(socket: Any) -> tuple[int, str]:
    """The code and reason of a socket that the server closes; events before that are dropped."""

    async def read() -> None:
        while True:
            await socket.receive()

    with pytest.raises(ConnectionClosed) as caught:
        await read()
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code, caught.value.rcvd.reason


async def get(server: Server, path: str, token: str = "", **options: Any) -> Any:
    """A GET with a token in the header, where there is one."""
    async with client(server, headers=bearer(token) if token else {}) as http:
        return await http.get(path, **options)
