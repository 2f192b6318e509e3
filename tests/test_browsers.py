"""Pages of other origins: what they may not do, and what browsers are told about it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from auth_server import AuthServer, auth_server, bearer, closed, remote_server
from conftest import Server, answer, client, connect, events_of, unique
from endpoint import Endpoint

LISTED = "https://app.example"
FOREIGN = "https://evil.example"
REFUSED = (1008, "Origin not allowed")
ROUTES = [
    ("POST", "/chat/sse", {"content": "hi"}),
    ("GET", "/chat/sse?run_id=x", None),
    ("GET", "/chat/threads", None),
    ("POST", "/chat/threads", {}),
    ("GET", "/chat/threads/x", None),
    ("PATCH", "/chat/threads/x", {}),
    ("DELETE", "/chat/threads/x", None),
    ("GET", "/chat/threads/x/messages", None),
    ("POST", "/chat/threads/x/stop", None),
    ("PUT", "/chat/threads/x/messages/y/feedback", {"score": 1}),
    ("GET", "/chat/models", None),
]
CORS = "access-control-"


@pytest.fixture(scope="module")
async def auth() -> AsyncIterator[AuthServer]:
    async with auth_server() as found:
        yield found


@pytest.fixture(scope="module")
async def public(
    auth: AuthServer, shared_endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    """A server for the public: remote auth, one listed origin."""
    settings = {"allowed_origins": [LISTED], "rate_limit": "1000/second"}
    cwd = tmp_path_factory.mktemp("public")
    async with remote_server(auth, shared_endpoint, cwd, **settings) as found:
        yield found


async def ask(
    server: Server, method: str, path: str, body: Any = None, **headers: str
) -> httpx.Response:
    """A request with headers, named with underscores."""
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client(server) as http:
        return await http.request(method, path, json=body, headers=shown)


def cors_of(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name.startswith(CORS)}


def forbidden(response: httpx.Response) -> None:
    assert response.status_code == 403, response.text
    error = response.json()["error"]
    assert (error["code"], error["retryable"]) == ("forbidden_origin", False)
    assert not cors_of(response)


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_a_foreign_page_is_refused_on_every_route(
    public: Server, auth: AuthServer, method: str, path: str, body: Any
) -> None:
    token = bearer(auth.token())
    for origin in (FOREIGN, "null", "https://app.example.evil.example", "http://app.example"):
        forbidden(await ask(public, method, path, body, Origin=origin, **token))


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_a_listed_page_may_read_every_answer(
    public: Server, auth: AuthServer, method: str, path: str, body: Any
) -> None:
    for token, refused in ((auth.token(), False), ("nonsense", True)):
        response = await ask(public, method, path, body, Origin=LISTED, **bearer(token))
        assert (response.status_code == 401) is refused
        assert response.status_code != 403
        shown = cors_of(response)
        assert shown["access-control-allow-origin"] == LISTED
        assert shown["access-control-allow-credentials"] == "true"
        exposed = shown["access-control-expose-headers"].lower()
        assert {"x-thread-id", "retry-after"} <= set(exposed.replace(" ", "").split(","))
        assert "origin" in response.headers["vary"].lower()


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_a_preflight_tells_what_is_allowed(
    public: Server, method: str, path: str, body: Any
) -> None:
    wanted = {
        "Access_Control_Request_Method": method,
        "Access_Control_Request_Headers": "authorization,content-type,idempotency-key",
    }
    allowed = await ask(public, "OPTIONS", path, Origin=LISTED, **wanted)
    assert allowed.status_code in (200, 204)
    shown = cors_of(allowed)
    assert shown["access-control-allow-origin"] == LISTED
    assert shown["access-control-allow-credentials"] == "true"
    assert method in shown["access-control-allow-methods"].replace(" ", "").split(",")
    headers = set(shown["access-control-allow-headers"].lower().replace(" ", "").split(","))
    assert {"authorization", "content-type", "idempotency-key", "last-event-id"} <= headers
    assert int(shown["access-control-max-age"]) > 0
    assert "origin" in allowed.headers["vary"].lower()
    refused = await ask(public, "OPTIONS", path, Origin=FOREIGN, **wanted)
    assert not cors_of(refused)
    assert refused.status_code < 500


async def test_what_is_no_page_or_of_the_same_origin_is_served(
    public: Server, auth: AuthServer
) -> None:
    token = bearer(auth.token())
    assert (await ask(public, "GET", "/chat/models", **token)).status_code == 200
    same = await ask(public, "GET", "/chat/models", Origin=public.url, **token)
    assert same.status_code == 200
    proxied = {"Host": "chat.example", "Origin": "https://chat.example"}
    assert (await ask(public, "GET", "/chat/models", **proxied, **token)).status_code == 200
    for origin in (LISTED, public.url, None):
        options = {"origin": origin} if origin else {}
        async with connect(public, additional_headers=token, **options) as socket:
            assert (await socket.ask("hi"))[-1]["status"] == "completed"


async def test_loopback_pages_are_foreign_to_a_public_server(
    public: Server, auth: AuthServer
) -> None:
    token = bearer(auth.token())
    for origin in ("http://localhost:3000", "http://127.0.0.1:1", "http://[::1]:8080"):
        forbidden(await ask(public, "GET", "/chat/models", Origin=origin, **token))
        assert await closed(public, additional_headers=token, origin=origin) == REFUSED


@pytest.mark.parametrize("origin", [FOREIGN, "null", "file://", "http://app.example", "x" * 50])
async def test_a_foreign_page_opens_no_socket(
    public: Server, auth: AuthServer, origin: str
) -> None:
    token = auth.token()
    assert await closed(public, path=f"?token={token}", origin=origin) == REFUSED
    assert await closed(public, origin=origin) == REFUSED


async def test_a_refused_page_has_done_nothing(
    public: Server, auth: AuthServer, shared_endpoint: Endpoint
) -> None:
    token, thread = bearer(auth.token(unique("user"))), unique()
    before = len(shared_endpoint.requests)
    command = {"content": "hi", "thread_id": thread}
    forbidden(await ask(public, "POST", "/chat/sse", command, Origin=FOREIGN, **token))
    async with client(public, headers=token) as http:
        plain = {"Content-Type": "text/plain", "Origin": FOREIGN}
        forbidden(await http.post("/chat/sse", content=json.dumps(command), headers=plain))
        assert (await http.get(f"/chat/threads/{thread}")).status_code == 404
    assert len(shared_endpoint.requests) == before


@pytest.mark.parametrize(
    "origin",
    ["http://localhost:3000", "http://127.0.0.1:5173", "http://[::1]:8080", "https://localhost"],
)
async def test_pages_of_this_machine_may_use_a_local_server(server: Server, origin: str) -> None:
    response = await ask(server, "POST", "/chat/sse", {"content": "hi"}, Origin=origin)
    assert answer(events_of(response.text))
    assert cors_of(response)["access-control-allow-origin"] == origin
    async with connect(server, origin=origin) as socket:
        assert (await socket.ask("hi"))[-1]["status"] == "completed"


@pytest.mark.parametrize(
    "origin",
    [
        FOREIGN,
        "null",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://evil.example:8080",
        "http://0.0.0.0:8080",
        "http://192.168.0.1",
        "http://user@evil.example",
        "http://localhost@evil.example",
        "http://[::1",
    ],
)
async def test_other_pages_may_not_use_a_local_server(server: Server, origin: str) -> None:
    for method, path, body in (ROUTES[0], ROUTES[2], ROUTES[-1]):
        forbidden(await ask(server, method, path, body, Origin=origin))
    assert await closed(server, origin=origin) == REFUSED


async def test_a_name_that_was_made_to_mean_this_machine_is_refused(server: Server) -> None:
    """DNS rebinding: to the browser the page and the server are one origin, evil.example."""
    evil = f"evil.example:{server.port}"
    same = {"Host": evil, "Origin": f"http://{evil}"}
    for method, path, body in (ROUTES[0], ROUTES[2], ROUTES[-1]):
        forbidden(await ask(server, method, path, body, **same))
    named: Any = SimpleNamespace(ws=f"ws://{evil}/chat")
    place = {"host": server.host, "port": server.port}
    assert await closed(named, origin=f"http://{evil}", **place) == REFUSED


async def test_a_rebound_page_reads_nothing_without_an_origin_header_either(server: Server) -> None:
    """A browser sends no Origin with a GET to what it takes for the same origin."""
    evil = f"evil.example:{server.port}"
    for path in ("/chat/threads", "/chat/models", "/chat/sse?thread_id=x", "/chat/threads/x"):
        forbidden(await ask(server, "GET", path, Host=evil))
    for host in (f"localhost:{server.port}", f"127.0.0.1:{server.port}", "[::1]:80", "localhost"):
        assert (await ask(server, "GET", "/chat/models", Host=host)).status_code == 200


async def test_every_origin_gets_no_credentials(
    auth: AuthServer, endpoint: Endpoint, tmp_path: Path
) -> None:
    settings = {"allowed_origins": ["*", LISTED]}
    async with remote_server(auth, endpoint, tmp_path, **settings) as server:
        token = bearer(auth.token())
        for method in ("GET", "OPTIONS"):
            wild = cors_of(await ask(server, method, "/chat/models", Origin=FOREIGN, **token))
            assert wild["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in wild
            listed = cors_of(await ask(server, method, "/chat/models", Origin=LISTED, **token))
            assert listed["access-control-allow-origin"] == LISTED
            assert listed["access-control-allow-credentials"] == "true"
        async with connect(server, additional_headers=token, origin=FOREIGN) as socket:
            assert (await socket.ask("hi"))[-1]["status"] == "completed"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/nothing", 404),
        ("GET", "/chat/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/chat/models", 200),
        ("GET", "/chat/threads/missing", 404),
        ("PUT", "/chat/models", 405),
        ("PUT", "/health", 405),
        ("POST", "/openapi.json", 405),
        ("POST", "/chat/sse", 400),
        ("POST", "/chat/threads", 201),
        ("DELETE", "/chat/threads/missing", 404),
        ("OPTIONS", "/chat/sse", 204),
        ("HEAD", "/health", 200),
    ],
)
async def test_every_answer_has_security_headers(
    server: Server, method: str, path: str, status: int
) -> None:
    response = await ask(server, method, path)
    assert response.status_code == status
    secure(response)


def secure(response: httpx.Response) -> None:
    headers = response.headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "server" not in headers


async def test_streams_and_refusals_have_security_headers_too(
    server: Server, public: Server
) -> None:
    secure(await ask(server, "POST", "/chat/sse", {"content": "hi"}))
    secure(await ask(server, "GET", "/chat/threads", Origin=FOREIGN))
    refused = await ask(public, "GET", "/chat/threads")
    assert refused.status_code == 401
    secure(refused)
    assert refused.headers["cache-control"] == "no-store"


async def test_private_answers_are_not_kept_by_caches(public: Server, auth: AuthServer) -> None:
    listed = await ask(public, "GET", "/chat/threads", **bearer(auth.token()))
    assert listed.headers["cache-control"] == "no-store"


PAGE = """<!doctype html><script>
const server = "SERVER"
const report = {}
async function attempt(name, work) {
  try { report[name] = await work() } catch (error) { report[name] = "failed" }
}
const socket = () => new Promise(resolve => {
  const socket = new WebSocket(server.replace("http", "ws") + "/chat")
  socket.onopen = () => socket.send('{"type":"ping"}')
  socket.onmessage = event => resolve(event.data)
  socket.onclose = event => resolve("closed " + event.code + " " + event.reason)
})
const source = () => new Promise(resolve => {
  const source = new EventSource(server + "/chat/sse?run_id=RUN")
  source.onmessage = event => { source.close(); resolve(event.data.slice(0, 15)) }
  source.onerror = () => { source.close(); resolve("failed") }
})
const read = (path, options) => async () => {
  const response = await fetch(server + path, options)
  return (await response.text()).length
}
const body = JSON.stringify({content: "from a page"})
Promise.all([
  attempt("socket", socket),
  attempt("source", source),
  attempt("threads", read("/chat/threads")),
  attempt("post", read("/chat/sse", {method: "POST", body})),
  attempt("json", read("/chat/sse", {
    method: "POST", body, headers: {"Content-Type": "application/json"}, credentials: "include",
  })),
]).then(() => fetch("/report", {method: "POST", body: JSON.stringify(report)}))
</script>"""


@dataclass
class Site:
    """A site on loopback that gives out one page and takes its report."""

    page: str = ""
    port: int = 0
    reports: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = (line.partition(":") for line in head.lower().split("\r\n"))
        length = next((int(value) for name, _, value in lines if name == "content-length"), 0)
        body = await reader.readexactly(length)
        if head.startswith("POST /report"):
            self.reports.put_nowait(json.loads(body))
        page = self.page.encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
            + f"Content-Length: {len(page)}\r\n\r\n".encode()
            + page
        )
        await writer.drain()
        writer.close()


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    found = Site()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()


@asynccontextmanager
async def chromium(url: str, profile: Path) -> AsyncIterator[None]:
    """A browser that shows a page; every name means this machine."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no Chromium here")
    process = await asyncio.create_subprocess_exec(
        program,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
        *("--no-proxy-server", "--host-resolver-rules=MAP * 127.0.0.1"),
        *(f"--user-data-dir={profile}", "--remote-debugging-port=0", url),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def test_a_real_browser_keeps_a_foreign_page_out(
    serve: Any, endpoint: Endpoint, tmp_path: Path
) -> None:
    """The same page can do everything from a listed origin, and nothing from another one."""
    seen: dict[str, dict[str, Any]] = {}
    async with site() as pages:
        server = await serve(allowed_origins=[f"http://app.example:{pages.port}"])
        async with connect(server) as socket:
            run = (await socket.ask("hi"))[0]["run_id"]
        pages.page = PAGE.replace("SERVER", server.url).replace("RUN", run)
        for name in ("app.example", "evil.example"):
            before = len(endpoint.requests)
            async with chromium(f"http://{name}:{pages.port}/", tmp_path / name):
                seen[name] = await asyncio.wait_for(pages.reports.get(), 60)
            seen[name]["requests"] = len(endpoint.requests) - before
    app = seen["app.example"]
    assert (app["socket"], app["source"]) == ('{"type":"pong"}', '{"type":"start"')
    assert app["requests"] == 2
    assert min(app["threads"], app["post"], app["json"]) > 10
    assert seen["evil.example"] == {
        "socket": "closed 1008 Origin not allowed",
        **dict.fromkeys(("source", "threads", "post", "json"), "failed"),
        "requests": 0,
    }
