"""Authentication: Supabase tokens in every transport, the host's own users, what must not start."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from auth_server import (
    KEYS,
    NOT_TO_BE_LOGGED,
    SECRET,
    USER,
    AuthServer,
    SigningKey,
    auth_server,
    bearer,
    close_of,
    closed,
    encoded,
    get,
    remote_server,
    tampered,
)
from conftest import (
    SECONDS,
    Server,
    answer,
    clean_environment,
    client,
    connect,
    events_of,
    post,
    providers,
    unique,
)
from endpoint import END, Endpoint, Exchange, text
from hosts import hypercorn

from quart_chat.adapters.supabase import SupabaseAuthenticator

EXAMPLES = Path(__file__).parent.parent / "examples"
MISSING, INVALID, EXPIRED = (
    (1008, "Missing authentication"),
    (1008, "Invalid authentication"),
    (1008, "Authentication expired"),
)
ROUTES = [
    ("POST", "/chat/sse"),
    ("GET", "/chat/sse?thread_id=t"),
    ("GET", "/chat/threads"),
    ("POST", "/chat/threads"),
    ("GET", "/chat/threads/t"),
    ("PATCH", "/chat/threads/t"),
    ("DELETE", "/chat/threads/t"),
    ("GET", "/chat/threads/t/messages"),
    ("POST", "/chat/threads/t/stop"),
    ("PUT", "/chat/threads/t/messages/m/feedback"),
    ("GET", "/chat/models"),
]


@pytest.fixture(scope="module")
async def auth() -> AsyncIterator[AuthServer]:
    async with auth_server() as found:
        yield found


@pytest.fixture(scope="module")
async def remote(
    auth: AuthServer, shared_endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    cwd = tmp_path_factory.mktemp("remote")
    async with remote_server(auth, shared_endpoint, cwd, rate_limit="1000/second") as found:
        yield found


@pytest.fixture
async def own_auth() -> AsyncIterator[AuthServer]:
    """An auth server for a test that breaks it."""
    async with auth_server() as found:
        yield found


@pytest.fixture
async def own(
    own_auth: AuthServer, endpoint: Endpoint, tmp_path: Path
) -> AsyncIterator[tuple[Server, AuthServer]]:
    async with remote_server(own_auth, endpoint, tmp_path, rate_limit="1000/second") as found:
        yield found, own_auth


def refusal(response: httpx.Response, code: str) -> None:
    """A 401 as the protocol says: the header, the error's body, and no stream."""
    assert response.status_code == 401, response.text
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (error["code"], error["retryable"]) == (code, False)
    assert set(error) == {"code", "message", "retryable"}


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "HS256"])
async def test_a_good_token_is_good_in_every_transport(
    remote: Server, auth: AuthServer, algorithm: str
) -> None:
    user, thread = unique("user"), unique()
    token = auth.token(user, algorithm=algorithm)
    events = await post(
        remote, {"content": "hi", "thread_id": thread, "id": "m"}, headers=bearer(token)
    )
    assert events[-1]["status"] == "completed"
    run = events[0]["run_id"]
    followed = await get(remote, f"/chat/sse?run_id={run}", token)
    assert answer(events_of(followed.text)) == answer(events)
    followed = await get(remote, f"/chat/sse?run_id={run}&token={token}")
    assert answer(events_of(followed.text)) == answer(events)
    async with connect(remote, additional_headers=bearer(token)) as socket:
        assert (await socket.ask("hi", thread_id=thread))[-1]["status"] == "completed"
    async with connect(remote, path=f"?token={token}", binary=True) as socket:
        assert (await socket.ask("hi", thread_id=thread))[-1]["status"] == "completed"
    threads = (await get(remote, "/chat/threads", token)).json()["threads"]
    assert [(each["id"], each["message_count"]) for each in threads] == [(thread, 6)]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_without_a_good_token_every_route_is_401(
    remote: Server, auth: AuthServer, shared_endpoint: Endpoint, method: str, path: str
) -> None:
    asked, sent = len(auth.requests), len(shared_endpoint.requests)
    body = {"content": "hi"} if path == "/chat/sse" else {}
    for headers, code in (
        ({}, "authentication_required"),
        ({"Authorization": "Basic dXNlcjpwYXNz"}, "authentication_required"),
        (bearer("nonsense"), "authentication_failed"),
        (bearer(auth.token(lasts=-60)), "authentication_expired"),
    ):
        async with client(remote, headers=headers) as http:
            refusal(await http.request(method, path, json=body), code)
    assert (len(auth.requests), len(shared_endpoint.requests)) == (asked, sent)


async def test_a_socket_without_a_good_token_is_closed(remote: Server, auth: AuthServer) -> None:
    assert await closed(remote) == MISSING
    assert await closed(remote, path="?token=") == MISSING
    assert await closed(remote, path="?token=nonsense") == INVALID
    assert await closed(remote, additional_headers=bearer("nonsense")) == INVALID
    assert await closed(remote, additional_headers=bearer(auth.token(lasts=-60))) == EXPIRED


async def test_what_is_public_needs_no_token(remote: Server) -> None:
    assert (await get(remote, "/health")).status_code == 200
    assert (await get(remote, "/openapi.json")).status_code == 200
    assert (await get(remote, "/nothing")).status_code == 404


async def test_the_header_wins_over_the_query(remote: Server, auth: AuthServer) -> None:
    good, other, bad = auth.token(unique("user")), auth.token(unique("user")), "nonsense"
    run = (await post(remote, {"content": "hi"}, headers=bearer(good)))[0]["run_id"]
    path = f"/chat/sse?run_id={run}&token="
    assert (await get(remote, path + bad, good)).status_code == 200
    assert (await get(remote, path + other, good)).status_code == 200
    refusal(await get(remote, path + good, bad), "authentication_failed")
    assert (await get(remote, path + good, other)).status_code == 404
    async with connect(remote, path=f"?token={bad}", additional_headers=bearer(good)) as socket:
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}
    assert await closed(remote, path=f"?token={good}", additional_headers=bearer(bad)) == INVALID


@pytest.mark.parametrize(
    ("method", "path"), [r for r in ROUTES if r != ("GET", "/chat/sse?thread_id=t")]
)
async def test_a_token_in_the_query_is_not_looked_at_elsewhere(
    remote: Server, auth: AuthServer, method: str, path: str
) -> None:
    async with client(remote, params={"token": auth.token()}) as http:
        answered = await http.request(method, path, json={"content": "hi"})
    refusal(answered, "authentication_required")


Make = Callable[[AuthServer], str]

UNUSABLE: dict[str, Make] = {
    "empty parts": lambda auth: "..",
    "two parts": lambda auth: "a.b",
    "no base64": lambda auth: "!!.!!.!!",
    "not ascii": lambda auth: "tökän",
    "very long": lambda auth: auth.token(user_metadata={"x": "x" * 20_000}),
    "header is a list": lambda auth: "W10.e30.c2ln",
    "alg none": lambda auth: auth.token(algorithm="none"),
    "alg none with a kid": lambda auth: auth.token(
        algorithm="none", headers={"kid": auth.newest("ES256").id}
    ),
    "unknown algorithm": lambda auth: jwt.encode({"sub": "x"}, SECRET * 3, "HS512"),
    "kid is a number": lambda auth: with_header(auth.token(), kid=7),
    "without kid": lambda auth: with_header(auth.token(), kid=None),
    "key of another project": lambda auth: forged(auth, "ES256"),
    "other algorithm than the key": lambda auth: with_header(
        auth.token(algorithm="RS256"), kid=auth.newest("ES256").id
    ),
    "changed claims": lambda auth: tampered(auth.token(), sub="somebody-else"),
    "wrong audience": lambda auth: auth.token(aud="anon"),
    "no audience": lambda auth: auth.token(aud=None),
    "wrong issuer": lambda auth: auth.token(iss="https://other.supabase.co/auth/v1"),
    "no issuer": lambda auth: auth.token(iss=None),
    "no expiry": lambda auth: auth.token(exp=None),
    "expiry is a text": lambda auth: auth.token(exp="soon"),
    "no subject": lambda auth: auth.token(sub=None),
    "empty subject": lambda auth: auth.token(""),
    "subject too long": lambda auth: auth.token("x" * 300),
    "not valid yet": lambda auth: auth.token(nbf=int(time.time()) + 60),
    "HS256 with the wrong audience": lambda auth: auth.token(algorithm="HS256", aud="anon"),
    "HS256 with the wrong issuer": lambda auth: auth.token(algorithm="HS256", iss="x"),
}


def with_header(token: str, **changes: Any) -> str:
    """The token with other header fields (its signature does not fit any more)."""
    _, body, signature = token.split(".")
    header = {**jwt.get_unverified_header(token), **changes}
    return f"{encoded({k: v for k, v in header.items() if v is not None})}.{body}.{signature}"


def forged(auth: AuthServer, algorithm: str) -> str:
    """Signed by a key of somebody else, under the name of a known one."""
    kid = auth.newest(algorithm).id
    return auth.token(key=SigningKey(algorithm), algorithm=algorithm, headers={"kid": kid})


@pytest.mark.parametrize("name", UNUSABLE)
async def test_a_bad_token_is_refused_without_a_request(
    remote: Server, auth: AuthServer, name: str
) -> None:
    token = UNUSABLE[name](auth)
    asked = len(auth.requests)
    headers = {b"authorization": b"Bearer " + token.encode()}
    async with client(remote) as http:
        refusal(await http.get("/chat/models", headers=headers), "authentication_failed")
    if token.isascii() and len(token) < 8000:
        assert await closed(remote, path=f"?token={token}") == INVALID
    assert len(auth.requests) == asked


async def test_the_public_key_is_no_secret_of_hs256(remote: Server, auth: AuthServer) -> None:
    """The old confusion of algorithms: a token that is signed with the public key's text."""
    key = auth.newest("RS256")
    public = json.dumps(key.public)
    _, body, _ = auth.token(algorithm="HS256").split(".")
    header = encoded({"alg": "HS256", "typ": "JWT", "kid": key.id})
    for secret in (public, key.pem):
        signature = hmac.digest(secret.encode(), f"{header}.{body}".encode(), "sha256")
        token = f"{header}.{body}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"
        refusal(await get(remote, "/chat/models", token), "authentication_failed")


@pytest.mark.parametrize("algorithm", ["ES256", "RS256"])
async def test_a_clock_may_be_ten_seconds_off(
    remote: Server, auth: AuthServer, algorithm: str
) -> None:
    now = int(time.time())
    for claims in ({"exp": now - 5}, {"iat": now + 5}, {"nbf": now + 7}):
        token = auth.token(algorithm=algorithm, **claims)
        assert (await get(remote, "/chat/models", token)).status_code == 200
    late = auth.token(algorithm=algorithm, exp=now - 12)
    refusal(await get(remote, "/chat/models", late), "authentication_expired")
    early = auth.token(algorithm=algorithm, nbf=now + 20)
    refusal(await get(remote, "/chat/models", early), "authentication_failed")


async def test_an_expired_token_with_a_bad_signature_is_just_bad(
    remote: Server, auth: AuthServer
) -> None:
    token = tampered(auth.token(lasts=-60), sub="x")
    refusal(await get(remote, "/chat/models", token), "authentication_failed")


async def test_an_audience_may_be_one_of_several(remote: Server, auth: AuthServer) -> None:
    token = auth.token(aud=["other", "authenticated"])
    assert (await get(remote, "/chat/models", token)).status_code == 200


async def many(server: Server, tokens: list[str], at_once: int = 25) -> list[int]:
    """The status of a cheap request with each of the tokens."""
    waiting = iter(tokens)
    statuses: list[int] = []
    async with client(server) as http:

        async def worker() -> None:
            for token in waiting:
                answered = await http.get("/chat/models", headers=bearer(token))
                statuses.append(answered.status_code)

        await asyncio.gather(*(worker() for _ in range(at_once)))
    return statuses


async def test_a_thousand_requests_ask_a_handful_of_times(remote: Server, auth: AuthServer) -> None:
    asked = len(auth.requests)
    tokens = [auth.token(f"user-{n}") for n in range(250)]
    tokens += [auth.token(f"user-{n}", algorithm="RS256") for n in range(50)] * 5
    tokens += [auth.token(algorithm="HS256")] * 500
    assert set(await many(remote, tokens)) == {200}
    assert len(auth.requests) - asked <= 3


async def test_many_at_once_with_a_new_token_ask_once(remote: Server, auth: AuthServer) -> None:
    asked = auth.count(USER)
    token = auth.token(unique("user"), algorithm="HS256")
    assert set(await many(remote, [token] * 60, at_once=60)) == {200}
    assert auth.count(USER) - asked == 1


async def test_what_the_auth_server_refused_is_not_asked_again_at_once(
    remote: Server, auth: AuthServer
) -> None:
    asked = auth.count(USER)
    token = auth.token(algorithm="HS256", secret=SECRET[::-1])
    assert set(await many(remote, [token] * 30)) == {401}
    assert auth.count(USER) - asked == 1


async def test_a_user_who_is_gone_is_refused(remote: Server, auth: AuthServer) -> None:
    user = unique("gone")
    auth.deleted.add(user)
    token = auth.token(user, algorithm="HS256")
    refusal(await get(remote, "/chat/models", token), "authentication_failed")


async def test_a_storm_of_unknown_keys_costs_few_requests(own: tuple[Server, AuthServer]) -> None:
    server, auth = own
    asked = len(auth.requests)
    tokens = [auth.token(headers={"kid": f"unknown-{n}"}) for n in range(300)]
    assert set(await many(server, tokens, at_once=100)) == {401}
    assert len(auth.requests) - asked <= 8
    assert set(await many(server, [auth.token()])) == {200}


async def test_a_new_key_is_accepted_while_unknown_ones_storm(
    own: tuple[Server, AuthServer],
) -> None:
    server, auth = own
    storm = [auth.token(headers={"kid": f"unknown-{n}"}) for n in range(30)]
    forged = asyncio.ensure_future(many(server, storm, at_once=5))
    while auth.count(KEYS) < 2:
        await asyncio.sleep(0.01)
    auth.rotate("ES256")
    assert (await get(server, "/chat/models", auth.token())).status_code == 200
    assert set(await forged) == {401}


async def test_tokens_that_cannot_fit_do_not_fetch_keys(own: tuple[Server, AuthServer]) -> None:
    server, auth = own
    asked = len(auth.requests)
    bad: list[dict[str, Any]] = [{"aud": "another"}, {"iss": "https://x"}, {"lasts": -60.0}]
    tokens = [auth.token(headers={"kid": "unknown"}, **claims) for claims in bad]
    assert set(await many(server, tokens)) == {401}
    assert len(auth.requests) == asked


async def test_a_short_outage_delays_a_new_key_only(own: tuple[Server, AuthServer]) -> None:
    server, auth = own
    auth.rotate("ES256")
    token, shared = auth.token(), auth.token(unique("user"), algorithm="HS256")
    auth.fails_with = 503, "down"
    asked = len(auth.requests)
    waiting = asyncio.ensure_future(many(server, [token, shared], at_once=2))
    while auth.count(KEYS) < 2 or len(auth.requests) < asked + 2:
        await asyncio.sleep(0.01)
    auth.fails_with = None
    assert await waiting == [200, 200]


async def test_questions_to_the_auth_server_are_bounded(own: tuple[Server, AuthServer]) -> None:
    server, auth = own
    asked = len(auth.requests)
    auth.answering.clear()
    tokens = [auth.token(f"user-{n}", algorithm="HS256") for n in range(60)]
    waiting = asyncio.ensure_future(many(server, tokens, at_once=60))
    while len(auth.requests) - asked < 16:
        await asyncio.sleep(0.01)
    # The keys have connections of their own: an asymmetric user is not delayed.
    assert (await get(server, "/chat/models", auth.token())).status_code == 200
    assert len(auth.requests) - asked == 16
    auth.answering.set()
    assert set(await waiting) == {200}


async def test_algorithms_can_be_restricted(
    own_auth: AuthServer, endpoint: Endpoint, tmp_path: Path
) -> None:
    only = '["ES256"]'
    async with remote_server(own_auth, endpoint, tmp_path, supabase_algorithms=only) as server:
        asked = len(own_auth.requests)
        assert (await get(server, "/chat/models", own_auth.token())).status_code == 200
        for algorithm in ("HS256", "RS256"):
            token = own_auth.token(algorithm=algorithm)
            refusal(await get(server, "/chat/models", token), "authentication_failed")
        assert len(own_auth.requests) == asked


@pytest.mark.parametrize("algorithm", ["ES256", "RS256"])
async def test_a_new_key_is_known_as_soon_as_it_is_used(
    own: tuple[Server, AuthServer], algorithm: str
) -> None:
    server, auth = own
    old = auth.token(algorithm=algorithm)
    assert (await get(server, "/chat/models", old)).status_code == 200
    asked = auth.count(KEYS)
    auth.rotate(algorithm)
    new = auth.token(algorithm=algorithm)
    assert set(await many(server, [new] * 20, at_once=20)) == {200}
    assert (await get(server, "/chat/models", old)).status_code == 200
    assert auth.count(KEYS) - asked == 1


async def test_known_keys_and_tokens_work_on_through_an_outage(
    own: tuple[Server, AuthServer],
) -> None:
    server, auth = own
    shared = auth.token(algorithm="HS256")
    assert (await get(server, "/chat/models", shared)).status_code == 200
    unseen = auth.token("user-2", algorithm="HS256")
    async with auth.outage():
        assert set(await many(server, [auth.token(), auth.token(algorithm="RS256")])) == {200}
        assert (await get(server, "/chat/models", shared)).status_code == 200
        refusal(await get(server, "/chat/models", unseen), "authentication_failed")
        strange = auth.token(headers={"kid": "unknown"})
        refusal(await get(server, "/chat/models", strange), "authentication_failed")
    assert (await get(server, "/chat/models", unseen)).status_code == 200


@pytest.mark.parametrize(
    "failure", [(500, "<h1>Oops</h1>"), (429, "slow down"), (502, ""), (200, "?")]
)
async def test_a_sick_auth_server_is_no_verdict(
    own: tuple[Server, AuthServer], failure: tuple[int, str]
) -> None:
    server, auth = own
    token = auth.token(algorithm="HS256")
    auth.fails_with = failure
    refusal(await get(server, "/chat/models", token), "authentication_failed")
    auth.fails_with = None
    assert (await get(server, "/chat/models", token)).status_code == 200


async def test_it_starts_without_the_auth_server_and_finds_it_later(
    own_auth: AuthServer, endpoint: Endpoint, tmp_path: Path
) -> None:
    await own_auth.stop()
    async with remote_server(own_auth, endpoint, tmp_path) as server:
        token = own_auth.token()
        refusal(await get(server, "/chat/models", token), "authentication_failed")
        await own_auth.start()
        deadline = time.monotonic() + SECONDS
        while (await get(server, "/chat/models", token)).status_code != 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


async def test_a_silent_auth_server_holds_nobody_for_long(
    own_auth: AuthServer, endpoint: Endpoint, tmp_path: Path
) -> None:
    async with remote_server(own_auth, endpoint, tmp_path, handshake_timeout=0.3) as server:
        own_auth.answering.clear()
        token = own_auth.token(algorithm="HS256")
        async with asyncio.timeout(4):
            refusal(await get(server, "/chat/models", token), "authentication_failed")
            assert await closed(server, path=f"?token={token}") == INVALID
        assert (await get(server, "/chat/models", own_auth.token())).status_code == 200
        own_auth.answering.set()


async def test_what_is_cached_of_a_shared_secret_does_not_outlive_the_token(
    remote: Server, auth: AuthServer
) -> None:
    exp = int(time.time()) + 2
    token = auth.token(unique("user"), algorithm="HS256", exp=exp)
    assert (await get(remote, "/chat/models", token)).status_code == 200
    asked = auth.count(USER)
    while time.time() <= exp + 0.1:
        await asyncio.sleep(exp + 0.2 - time.time())
    await get(remote, "/chat/models", token)
    assert auth.count(USER) == asked + 1


async def test_a_cached_key_verifies_in_half_a_millisecond() -> None:
    async with auth_server() as auth:
        authenticator = SupabaseAuthenticator(auth.url, "key", ["authenticated"])
        await authenticator.open()
        tokens = [auth.token(f"user-{n}") for n in range(200)]
        took = []
        for token in tokens:
            begun = time.thread_time()
            await authenticator.authenticate(token)
            took.append(time.thread_time() - begun)
        await authenticator.close()
        assert auth.count() == 1
    assert statistics.median(took) < 0.0005


def soon(auth: AuthServer, user: str, seconds: int = 2) -> str:
    """A token that has expired already, and is good for this long yet by the tolerated skew."""
    return auth.token(user, exp=int(time.time()) - 10 + seconds)


async def test_a_socket_ends_with_its_token_and_its_run_goes_on(
    remote: Server, auth: AuthServer, shared_endpoint: Endpoint
) -> None:
    go = asyncio.Event()

    async def held(exchange: Exchange) -> None:
        await exchange.send(text("first "))
        await go.wait()
        await exchange.send(text("second") + END)

    shared_endpoint.scripts["held"] = held
    user, thread = unique("user"), unique()
    async with connect(remote, additional_headers=bearer(soon(auth, user))) as socket:
        await socket.send({"content": "script:held", "thread_id": thread})
        await socket.until("content")
        error = (await socket.until("error"))[-1]
        assert (error["code"], error["retryable"]) == ("authentication_expired", False)
        assert "seq" not in error
        assert await close_of(socket) == EXPIRED
    token = auth.token(user)
    running = (await get(remote, f"/chat/threads/{thread}", token)).json()
    assert running["active_run_id"] is not None
    async with (
        client(remote, headers=bearer(token)) as http,
        http.stream("GET", "/chat/sse", params={"thread_id": thread}) as response,
    ):
        go.set()
        events = events_of((await response.aread()).decode())
    assert answer(events) == "first second"
    assert events[-1]["status"] == "completed"


@pytest.mark.parametrize("binary", [False, True], ids=["json", "msgpack"])
async def test_a_fresh_token_keeps_a_socket_open(
    remote: Server, auth: AuthServer, binary: bool
) -> None:
    user = unique("user")
    old = bearer(soon(auth, user, 3))
    exp = int(time.time()) + 600
    async with (
        connect(remote, additional_headers=old) as clock,
        connect(remote, additional_headers=old, binary=binary) as socket,
    ):
        await socket.send({"type": "auth", "token": auth.token(user, exp=exp)})
        authenticated = await socket.receive()
        assert set(authenticated) == {"type", "expires_at"}
        assert authenticated["type"] == "authenticated"
        assert exp <= authenticated["expires_at"] <= exp + 10
        assert await close_of(clock) == EXPIRED
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}


async def test_a_fresh_token_may_expire_too(remote: Server, auth: AuthServer) -> None:
    user = unique("user")
    async with connect(remote, additional_headers=bearer(auth.token(user))) as socket:
        await socket.send({"type": "auth", "token": soon(auth, user)})
        assert (await socket.receive())["type"] == "authenticated"
        assert (await socket.receive())["code"] == "authentication_expired"
        assert await close_of(socket) == EXPIRED


@pytest.mark.parametrize(
    ("make", "code", "close"),
    [
        (lambda auth: "nonsense", "authentication_failed", INVALID),
        (lambda auth: auth.token("somebody-else"), "authentication_failed", INVALID),
        (lambda auth: auth.token(algorithm="none"), "authentication_failed", INVALID),
        (lambda auth: auth.token(lasts=-60), "authentication_expired", EXPIRED),
    ],
    ids=["bad", "another user", "alg none", "expired"],
)
async def test_a_wrong_fresh_token_closes_the_socket(
    remote: Server, auth: AuthServer, make: Make, code: str, close: tuple[int, str]
) -> None:
    async with connect(remote, additional_headers=bearer(auth.token())) as socket:
        await socket.send({"type": "auth", "token": make(auth), "id": "a1"})
        error = await socket.receive()
        assert (error["type"], error["code"], error["reply_to"]) == ("error", code, "a1")
        assert await close_of(socket) == close


async def test_an_auth_command_without_a_token_is_just_invalid(
    remote: Server, auth: AuthServer
) -> None:
    async with connect(remote, additional_headers=bearer(auth.token())) as socket:
        await socket.send({"type": "auth"})
        assert (await socket.receive())["code"] == "invalid_message"
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}


async def refused_start(cwd: Path, *arguments: str, **environ: str) -> str:
    """What a server says that does not start: exit code 1, a sentence, no traceback."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "quart_chat", "chat-server", "--port", "0", *arguments),
        env={**clean_environment(), **environ},
        cwd=cwd,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(), SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 1, (stdout, stderr)
    assert stdout == b""
    said = stderr.decode()
    assert "Traceback" not in said
    assert said.startswith("Error: ")
    assert len(said.splitlines()) <= 3
    return said


SUPABASE = {"SUPABASE_URL": "http://127.0.0.1:9", "SUPABASE_KEY": "do-not-log-me"}
ONE_PROVIDER = {"QUART_CHAT_PROVIDERS": '{"x": {"base_url": "http://127.0.0.1:9/v1"}}'}


@pytest.mark.parametrize("name", SUPABASE)
async def test_remote_auth_says_what_it_lacks(tmp_path: Path, name: str) -> None:
    environ = {key: value for key, value in SUPABASE.items() if key != name}
    said = await refused_start(tmp_path, "--remote-auth", **ONE_PROVIDER, **environ)
    assert name in said
    assert "do-not-log-me" not in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
@pytest.mark.parametrize("variable", ["QUART_CHAT_ENVIRONMENT", "NODETOOL_ENVIRONMENT"])
async def test_production_does_not_serve_everybody_as_one_user(
    tmp_path: Path, host: str, variable: str
) -> None:
    environ = {**ONE_PROVIDER, variable: "production"}
    said = await refused_start(tmp_path, "--host", host, **environ)
    assert "CHAT_AUTH" in said
    assert host in said


async def test_production_does_not_take_every_origin(tmp_path: Path) -> None:
    environ = {
        **ONE_PROVIDER,
        **SUPABASE,
        "QUART_CHAT_ENVIRONMENT": "production",
        "QUART_CHAT_ALLOWED_ORIGINS": "*",
    }
    said = await refused_start(tmp_path, "--remote-auth", **environ)
    assert "CHAT_ALLOWED_ORIGINS" in said


async def test_production_does_not_debug(tmp_path: Path) -> None:
    environ = {
        **ONE_PROVIDER,
        **SUPABASE,
        "QUART_CHAT_ENVIRONMENT": "production",
        "QUART_DEBUG": "1",
    }
    said = await refused_start(tmp_path, "--remote-auth", **environ)
    assert "DEBUG" in said


async def test_production_starts_with_remote_auth_and_on_loopback(
    auth: AuthServer, serve: Any, endpoint: Endpoint, tmp_path: Path
) -> None:
    local = await serve(environment="production")
    assert (await get(local, "/health")).status_code == 200
    async with remote_server(
        auth, endpoint, tmp_path, "--host", "0.0.0.0", environment="production"
    ) as public:
        assert (await get(public, "/chat/models")).status_code == 401


async def test_a_public_address_with_local_auth_is_warned_about(serve: Any) -> None:
    server = await serve("--host", "0.0.0.0")
    deadline = time.monotonic() + SECONDS
    while "same user" not in server.log():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_nothing_secret_is_logged(
    own_auth: AuthServer, endpoint: Endpoint, tmp_path: Path
) -> None:
    prompt = "my-private-prompt"
    good = own_auth.token("secret-user", algorithm="HS256")
    tokens = [
        *(good, own_auth.token(lasts=-60), "nonsense-token-do-not-log"),
        *(own_auth.token(algorithm="none"), own_auth.token(headers={"kid": "unknown-kid"})),
    ]
    async with remote_server(own_auth, endpoint, tmp_path) as server:
        for token in tokens:
            await get(server, "/chat/threads", token)
            await get(server, f"/chat/sse?thread_id=t&token={token}")
            await get(server, f"/nothing/{token}?token={token}")
            async with client(server) as http:
                await http.put(f"/chat/models?token={token}", headers=bearer(token))
            if token != good:
                await closed(server, path=f"?token={token}")
        for script in ("default", "unauthorized", "broken", "garbage", "streamerror"):
            async with client(server, headers=bearer(good)) as http:
                await http.post("/chat/sse", json={"content": f"{prompt} script:{script}"})
                await http.post("/chat/sse", content=f'{{"content": "{prompt}'.encode())
        async with connect(server, path=f"?token={good}") as socket:
            await socket.send({"content": prompt, "surprise": prompt})
            await socket.receive()
            await socket.connection.send(prompt)
            await socket.receive()
            await socket.send({"type": "auth", "token": "nonsense-token-do-not-log"})
            await close_of(socket)
        own_auth.fails_with = (500, "<h1>" + own_auth.token() + "</h1>")
        await get(server, "/chat/models", own_auth.token("other", algorithm="HS256"))
    log = server.log()
    for secret in (*NOT_TO_BE_LOGGED, *tokens, prompt, "eyJ", "nonsense-token", "token="):
        assert secret not in log, log


def host_environ(endpoint: Endpoint, **more: str) -> dict[str, str]:
    return {"QUART_CHAT_PROVIDERS": json.dumps(providers(endpoint)), **more}


async def test_a_host_with_quart_auth_embeds_the_chat(endpoint: Endpoint, tmp_path: Path) -> None:
    environ = host_environ(endpoint, QUART_QUART_AUTH_COOKIE_SECURE="false")
    async with (
        hypercorn("quart_auth_login:app", EXAMPLES, tmp_path, environ) as host,
        client(host) as ada,
        client(host) as grace,
    ):
        refusal(await ada.get("/chat/threads"), "authentication_required")
        refusal(await ada.post("/chat/sse", json={"content": "x"}), "authentication_required")
        assert await closed(host) == MISSING
        wrong = await ada.post("/login", data={"name": "ada", "password": "hopper"})
        assert wrong.status_code == 403
        for http, name, password in ((ada, "ada", "lovelace"), (grace, "grace", "hopper")):
            signed = await http.post("/login", data={"name": name, "password": password})
            assert signed.status_code == 204
        posted = await ada.post("/chat/sse", json={"content": "of ada", "thread_id": "t"})
        assert events_of(posted.text)[-1]["status"] == "completed"
        cookie = {"Cookie": "; ".join(f"{k}={v}" for k, v in grace.cookies.items())}
        async with connect(host, additional_headers=cookie) as socket:
            await socket.ask("of grace", thread_id="t")
            await socket.send({"type": "auth", "token": "a.b.c"})
            assert (await socket.receive())["code"] == "authentication_failed"
            assert await close_of(socket) == INVALID
        assert [await titles(ada), await titles(grace)] == [["of ada"], ["of grace"]]
        foreign = {"Origin": "https://evil.example"}
        crossed = await ada.post("/chat/sse", json={"content": "x"}, headers=foreign)
        assert crossed.status_code == 403
        hijack = await closed(host, additional_headers=cookie, origin="https://evil.example")
        assert hijack == (1008, "Origin not allowed")
        await ada.post("/logout")
        refusal(await ada.get("/chat/threads"), "authentication_required")
    assert "Traceback" not in host.log(), host.log()


async def titles(http: httpx.AsyncClient) -> list[str]:
    return [each["title"] for each in (await http.get("/chat/threads")).json()["threads"]]


async def test_a_host_with_keys_of_its_own(endpoint: Endpoint, tmp_path: Path) -> None:
    tests = Path(__file__).parent
    async with hypercorn("hosts:keyed_app()", tests, tmp_path, host_environ(endpoint)) as host:
        ada, crash = {"X-API-Key": "key-of-ada"}, {"X-API-Key": "crash"}
        assert (await post(host, {"content": "hi"}, headers=ada))[-1]["status"] == "completed"
        async with connect(host, additional_headers=ada) as socket:
            assert (await socket.ask("hi"))[-1]["status"] == "completed"
        assert await closed(host) == MISSING
        async with client(host, headers=crash) as http:
            failed = await http.get("/chat/threads")
        assert failed.status_code == 500
        error = failed.json()["error"]
        assert (error["code"], error["retryable"]) == ("internal_error", True)
        assert "hunter2" not in failed.text
        assert (await closed(host, additional_headers=crash))[0] == 1011
    assert error["reference"] in host.log()
