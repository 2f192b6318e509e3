"""The newest sentences of the protocol, one test each, over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket as sockets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import pytest
import websockets
from auth_server import AuthServer, auth_server, remote_server
from conftest import (
    SECONDS,
    Server,
    answer,
    client,
    connect,
    events_of,
    post,
    providers,
    unique,
)
from endpoint import END, Endpoint, Exchange, calls, text
from quart import Blueprint, Quart

from quart_chat import (
    QuartChat,
    create_app,
    health_blueprint,
    sse_blueprint,
    threads_blueprint,
    websocket_blueprint,
)
from quart_chat.errors import ConfigurationError

BLUEPRINTS = (websocket_blueprint, sse_blueprint, threads_blueprint, health_blueprint)


def refused(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    message: str = error["message"]
    return message


def host(endpoint: Endpoint, folder: Path, **settings: Any) -> Quart:
    """An application without blueprints, on memory."""
    app = Quart(__name__)
    app.config.update(
        CHAT_STORAGE="memory",
        CHAT_PROVIDERS=providers(endpoint),
        **{f"CHAT_{name.upper()}": value for name, value in settings.items()},
    )
    QuartChat(app)
    return app


@pytest.mark.parametrize("nested", [False, True])
async def test_every_blueprint_takes_the_same_prefix(
    endpoint: Endpoint, tmp_path: Path, nested: bool
) -> None:
    app = host(endpoint, tmp_path)
    parent = Blueprint("parent", __name__)
    for blueprint in BLUEPRINTS:
        (parent if nested else app).register_blueprint(blueprint, url_prefix="/support")
    if nested:
        app.register_blueprint(parent, url_prefix="/shop")
    prefix = "/shop/support" if nested else "/support"
    async with app.test_app() as running:
        http = running.test_client()
        streamed = await http.post(f"{prefix}/sse", json={"content": "hi", "thread_id": "t"})
        assert events_of((await streamed.get_data()).decode())[-1]["status"] == "completed"
        assert (await http.get(f"{prefix}/threads/t")).status_code == 200
        assert (await http.get(f"{prefix}/health")).status_code == 200
        assert (await http.get(f"{prefix}/ready")).status_code == 200
        async with http.websocket(prefix) as socket:
            await socket.send('{"type": "ping"}')
            assert json.loads(await socket.receive()) == {"type": "pong"}


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda each: each.name)
def test_a_blueprint_without_the_chat_is_refused_at_once(blueprint: Blueprint) -> None:
    with pytest.raises(ConfigurationError, match=r"QuartChat\(app\)"):
        Quart(__name__).register_blueprint(blueprint, url_prefix="/chat")


async def test_an_application_that_does_not_serve_says_so(tmp_path: Path) -> None:
    app = create_app({"CHAT_STORAGE": "memory"})
    for path in ("/chat/models", "/health", "/openapi.json"):
        body = await (await app.test_client().get(path)).get_json()
        assert "async with app.test_app()" in body["error"]["message"]


@pytest.mark.parametrize("protocol", ["websocket", "sse"])
async def test_what_the_protocol_leaves_out_says_so(serve: Any, protocol: str) -> None:
    server = await serve("--protocol", protocol)
    async with client(server) as http:
        if protocol == "websocket":
            for method in ("GET", "POST"):
                said = refused(await http.request(method, "/chat/sse"), 404, "not_found")
                assert "--protocol websocket" in said
        else:
            with pytest.raises(websockets.InvalidStatus) as caught:
                async with connect(server):
                    pass
            assert caught.value.response.status_code == 404
            assert b"--protocol sse" in (caught.value.response.body or b"")
            assert "--protocol sse" in refused(await http.get("/chat"), 404, "not_found")


async def test_a_request_without_upgrade_is_told_of_the_proxy(server: Server) -> None:
    async with client(server) as http:
        response = await http.get("/chat")
    assert "Upgrade header" in refused(response, 426, "invalid_message")
    assert response.headers["upgrade"] == "websocket"


ASKED: list[str] = []


async def _delete(exchange: Exchange) -> None:
    last = exchange.body["messages"][-1]
    if last["role"] == "tool":
        await exchange.send(text(f"it said {last['content']}") + END)
    else:
        wanted = "locate" if "locate" in exchange.said else "wipe"
        await exchange.send(calls(("call_1", wanted, {})))


@asynccontextmanager
async def waiting(
    serve: Any, endpoint: Endpoint, tmp_path: Path, what: str
) -> AsyncIterator[tuple[Server, dict[str, Any], asyncio.Task[list[dict[str, Any]]]]]:
    """A run over SSE that waits for an approval, or for a client's tool."""
    (tmp_path / "wiping.py").write_text(
        "from quart_chat import tool\n\n"
        "@tool(needs_approval=True)\ndef wipe() -> str:\n    '''Wipe.'''\n    return 'wiped'\n"
    )
    endpoint.scripts["delete"] = _delete
    path = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent}"}
    server = await serve("--tools", "wiping", environ=path)
    command: dict[str, Any] = {"content": f"script:delete {what}", "thread_id": "t"}
    if what == "locate":
        command["client_tools"] = [{"name": "locate"}]
    else:
        command["tools"] = ["wipe"]
    async with (
        client(server) as http,
        http.stream("POST", "/chat/sse", json=command) as response,
    ):
        called: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        async def read() -> list[dict[str, Any]]:
            events = []
            async for event in httpx_sse.EventSource(response).aiter_sse():
                events.append(json.loads(event.data))
                if events[-1]["type"] == "tool_call":
                    called.set_result(events[-1])
            return events

        reading = asyncio.create_task(read())
        try:
            yield server, await asyncio.wait_for(called, SECONDS), reading
        finally:
            reading.cancel()


@pytest.mark.parametrize("what", ["wipe", "locate"])
async def test_a_call_is_answered_over_http(
    serve: Any, endpoint: Endpoint, tmp_path: Path, what: str
) -> None:
    async with (
        waiting(serve, endpoint, tmp_path, what) as (server, called, reading),
        client(server) as http,
    ):
        named = {"run_id": called["run_id"], "tool_call_id": called["tool_call_id"]}
        approve, result = {**named, "approved": True}, {**named, "content": "52.5"}
        await http.post("/chat/threads", json={"id": "other"})
        answers = {"approve": approve, "tool_result": result}
        route = "approve" if what == "wipe" else "tool_result"
        for wrong in ("other", "missing"):
            path = f"/chat/threads/{wrong}/{route}"
            refused(await http.post(path, json=answers[route]), 404, "not_found")
        (not_awaited,) = answers.keys() - {route}
        for path, body in (
            (f"/chat/threads/t/{not_awaited}", answers[not_awaited]),
            (f"/chat/threads/t/{route}", {**answers[route], "tool_call_id": "nope"}),
            (f"/chat/threads/t/{route}", {**answers[route], "run_id": "nope"}),
        ):
            refused(await http.post(path, json=body), 404, "not_found")
        bad = await http.post(f"/chat/threads/t/{route}", json={**answers[route], "typo": 1})
        assert "typo" in refused(bad, 422, "invalid_message")
        taken = await http.post(f"/chat/threads/t/{route}", json=answers[route])
        assert (taken.status_code, taken.content) == (204, b"")
        events = await asyncio.wait_for(reading, SECONDS)
        assert answer(events) == f"it said {'wiped' if what == 'wipe' else '52.5'}"
        again = await http.post(f"/chat/threads/t/{route}", json=answers[route])
        refused(again, 404, "not_found")


async def test_ready_while_a_message_would_be_taken(serve: Any, endpoint: Endpoint) -> None:
    server = await serve(drain_timeout=SECONDS)
    async with client(server) as http:
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    async with connect(server) as socket, client(server) as http:
        await socket.send({"content": "script:gated"})
        await socket.until("content")
        assert (await http.get("/ready")).status_code == 200
        server.process.terminate()
        deadline = time.monotonic() + SECONDS
        while (draining := await http.get("/ready")).status_code == 200:
            assert time.monotonic() < deadline
        refused(draining, 503, "server_draining")
        assert int(draining.headers["retry-after"]) >= 1
        assert (await http.get("/health")).status_code == 200
        endpoint.gate("go").set()
        await socket.until("end")


async def test_not_ready_without_the_database(serve: Any, postgres: Any) -> None:
    import asyncpg

    url = postgres()
    server = await serve(database_url=url)
    async with client(server) as http:
        assert (await http.get("/ready")).status_code == 200
        connection = await asyncpg.connect(url)
        try:
            async with connection.transaction():
                await connection.execute("LOCK TABLE chat_threads IN ACCESS EXCLUSIVE MODE")
                deadline = time.monotonic() + SECONDS
                while (lost := await http.get("/ready")).status_code == 200:
                    assert time.monotonic() < deadline
                refused(lost, 503, "storage_unavailable")
        finally:
            await connection.close()
        deadline = time.monotonic() + SECONDS
        while (await http.get("/ready")).status_code != 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["quart-chat"], "quart-chat"),
        (["other", "quart-chat"], "quart-chat"),
        (["bearer.x", "first", "second"], "first"),
        (["bearer.x"], None),
    ],
)
async def test_a_subprotocol_is_chosen(
    server: Server, offered: list[str], chosen: str | None
) -> None:
    async with connect(server, subprotocols=offered) as socket:
        assert socket.connection.subprotocol == chosen
        await socket.send({"type": "ping"})
        assert (await socket.receive())["type"] == "pong"


@pytest.fixture(scope="module")
async def auth() -> AsyncIterator[AuthServer]:
    async with auth_server() as found:
        yield found


async def test_a_token_as_a_subprotocol(
    auth: AuthServer, endpoint: Endpoint, tmp_path: Path
) -> None:
    async with remote_server(auth, endpoint, tmp_path) as server:
        ada, grace = auth.token("ada"), auth.token("grace")
        async with connect(server, subprotocols=[f"bearer.{ada}", "quart-chat"]) as socket:
            assert socket.connection.subprotocol == "quart-chat"
            events = await socket.ask("hi", thread_id="of-ada")
            assert events[-1]["status"] == "completed"
        for more in (
            {"path": f"?token={grace}"},
            {"additional_headers": {"Authorization": f"Bearer {grace}"}},
        ):
            # The header wins, then the query: this is grace, who has no such thread.
            offered = [f"bearer.{ada}", "quart-chat"]
            async with connect(server, subprotocols=offered, **more) as socket:
                await socket.send({"type": "stop", "thread_id": "of-ada"})
                assert (await socket.receive())["code"] == "not_found"
        async with connect(server, subprotocols=["bearer.nonsense"]) as socket:
            await asyncio.wait_for(socket.connection.wait_closed(), SECONDS)
            closed = (socket.connection.close_code, socket.connection.close_reason)
            assert closed == (1008, "Invalid authentication")


async def test_comments_are_no_events_to_a_parser(serve: Any, endpoint: Endpoint) -> None:
    server = await serve(keepalive=0.05)
    async with (
        client(server) as http,
        http.stream("POST", "/chat/sse", json={"content": "script:gated"}) as response,
    ):
        kept: list[str] = []

        async def lines() -> AsyncIterator[str]:
            async for line in response.aiter_lines():
                kept.append(line)
                if kept.count(": keep-alive") == 3:
                    endpoint.gate("go").set()
                yield line

        decoder = httpx_sse._decoders.SSEDecoder()
        decoded = [decoder.decode(line) async for line in lines()]
    events = [event for event in decoded if event is not None]
    assert kept[0] == ": open"
    assert kept[1].startswith("id: ")
    assert "\n".join(kept).count(": keep-alive\n\n") == 0
    assert all(event.data for event in events)
    assert json.loads(events[-1].data)["status"] == "completed"


async def test_a_post_with_last_event_id_goes_on(server: Server, shared_endpoint: Endpoint) -> None:
    command = {"content": "script:numbers 5", "thread_id": unique()}
    events = await post(server, command)
    asked = len(shared_endpoint.requests)
    run = events[0]["run_id"]
    rest = await post(server, command, headers={"Last-Event-ID": f"{run}:1"})
    assert answer(rest) == answer(events)
    assert rest[0]["seq"] > 1
    async with client(server) as http:
        for last, status in ((f"{run}:{events[-1]['seq']}", 204), ("nobody:1", 404), ("x", 422)):
            headers = {"Last-Event-ID": last}
            response = await http.post("/chat/sse", json=command, headers=headers)
            assert response.status_code == status
        path = f"/chat/threads/{command['thread_id']}"
        assert (await http.get(path)).json()["message_count"] == 2
    assert len(shared_endpoint.requests) == asked


async def test_head_does_nothing(server: Server, shared_endpoint: Endpoint) -> None:
    thread = unique()
    events = await post(server, {"content": "hi", "thread_id": thread})
    asked = len(shared_endpoint.requests)
    async with client(server) as http:
        for query, status in (
            (f"run_id={events[0]['run_id']}", 200),
            (f"thread_id={thread}", 204),
            ("run_id=nobody", 404),
        ):
            for method in ("HEAD", "GET"):
                command = {"content": "x", "thread_id": thread}
                response = await http.request(method, f"/chat/sse?{query}", json=command)
                assert response.status_code == status
        assert (await http.get(f"/chat/threads/{thread}")).json()["message_count"] == 2
    assert len(shared_endpoint.requests) == asked


async def test_history_entries_are_whole(serve: Any) -> None:
    server = await serve("--no-database")
    call = {"id": "c", "name": "n", "arguments": {}}
    called = {"role": "assistant", "tool_calls": [call]}
    async with client(server) as http:
        for entry in ({"role": "user"}, {"role": "user", "content": ""}, {"role": "assistant"}):
            body = {"content": "x", "history": [entry]}
            said = refused(await http.post("/chat/sse", json=body), 422, "invalid_message")
            assert said.startswith("history.0: content is required")
        tool = {"role": "tool", "tool_call_id": "c", "content": "1"}
        for first in (called, {**called, "content": ""}, {**called, "content": "so"}):
            body = {"content": "x", "history": [first, tool]}
            assert (await http.post("/chat/sse", json=body)).status_code == 200


async def test_commands_in_one_packet_are_answered_in_order(server: Server) -> None:
    thread = unique()
    commands: list[Any] = [
        {"type": "ping"},
        {"contnt": "x", "id": "a"},
        {"content": "hi", "thread_id": thread},
        {"type": "stop", "run_id": "nobody", "id": "b"},
        {"type": "ping"},
    ]
    frames = b"".join(_masked(json.dumps(command).encode()) for command in commands)
    async with connect(server) as socket:
        socket.connection.transport.write(frames)
        seen: list[Any] = []
        while len(seen) < 4 or not any(each["type"] == "end" for each in seen):
            seen.append(await socket.receive())
    replies = [each for each in seen if "seq" not in each]
    assert [each.get("reply_to", each["type"]) for each in replies] == ["pong", "a", "b", "pong"]
    assert answer(seen) == "Hello, wörld 😀!"


def _masked(payload: bytes) -> bytes:
    assert len(payload) < 126
    return bytes((0x81, 0x80 | len(payload))) + bytes(4) + payload


async def test_documents_are_made_once(server: Server) -> None:
    async with client(server) as http:
        for path in ("/openapi.json", "/asyncapi.json"):
            first = await http.get(path)
            assert "max-age" in first.headers["cache-control"]
            tag = first.headers["etag"]
            again = await http.get(path, headers={"If-None-Match": tag})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == tag
            assert (await http.get(path, headers={"If-None-Match": '"x"'})).status_code == 200


async def test_pages_end_early(serve: Any) -> None:
    """Six questions of a megabyte: no page has more than five of them, and none is lost."""
    server = await serve("--no-database")
    async with connect(server) as socket:
        for number in range(6):
            content = f"{number} " + "x" * 1_000_000
            assert (await socket.ask(content, thread_id="t"))[-1]["status"] == "completed"
        async with client(server) as http:
            for order in ("asc", "desc"):
                seen: list[Any] = []
                pages = 0
                cursor: str | None = ""
                while cursor is not None:
                    query = {"limit": 200, "order": order, "cursor": cursor}
                    page = (await http.get("/chat/threads/t/messages", params=query)).json()
                    assert sum(len(each["content"]) for each in page["messages"]) < 5_300_000
                    assert page["messages"]
                    seen += page["messages"]
                    cursor = page["next"]
                    pages += 1
                assert pages == 2
                assert len({each["id"] for each in seen}) == len(seen) == 12


async def test_a_thread_that_nobody_uses_expires(serve: Any) -> None:
    server = await serve("--no-database", resume_window=0.2)
    async with client(server) as http:
        assert (await http.post("/chat/threads", json={"id": "t"})).status_code == 201
        deadline = time.monotonic() + SECONDS
        while (await http.get("/chat/threads/t")).status_code == 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


def _small_window() -> sockets.socket:
    """A socket that holds little of what its reader does not take."""
    found = sockets.socket()
    found.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    return found


async def _flood(exchange: Exchange) -> None:
    """Text until the connection is closed, faster than a socket that is not read holds it."""
    while True:
        await exchange.send(text("x" * 4000))
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_client_that_takes_nothing_is_dropped(
    serve: Any, endpoint: Endpoint, transport: str
) -> None:
    """Its place is free again, and the run goes on without it and can be followed."""
    endpoint.scripts["flood"] = _flood
    server = await serve(send_timeout=0.5, max_connections=1, max_answer_chars=10**9)
    raw = _small_window()
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, (server.host, server.port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=1024)
    body = json.dumps({"content": "script:flood", "thread_id": "t"}).encode()
    head = f"Host: {server.host}:{server.port}\r\n"
    if transport == "sse":
        writer.write(
            f"POST /chat/sse HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        )
    else:
        writer.write(
            f"GET /chat HTTP/1.1\r\n{head}Upgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
    try:
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
        if transport == "websocket":
            writer.write(_masked(body))
        async with client(server) as http:
            deadline = time.monotonic() + SECONDS
            while True:
                async with http.stream("GET", "/chat/sse?thread_id=t") as again:
                    if again.status_code == 200:
                        break
                assert time.monotonic() < deadline, again.status_code
                await asyncio.sleep(0.1)
            assert (await http.post("/chat/threads/t/stop")).json()["stopped"]
    finally:
        writer.close()


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_reader_that_is_slow_is_not_dropped(
    serve: Any, endpoint: Endpoint, transport: str
) -> None:
    """Silence of the provider is not the client's fault."""
    server = await serve(send_timeout=0.2, keepalive=0.1)

    async def go() -> None:
        await asyncio.sleep(1)  # several time-outs
        endpoint.gate("go").set()

    going = asyncio.create_task(go())
    if transport == "sse":
        events = await post(server, {"content": "script:gated"})
    else:
        async with connect(server) as socket:
            events = await socket.ask("script:gated")
    await going
    assert answer(events) == "first second"


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_client_that_sends_and_leaves_at_once_stops_its_run(
    serve: Any, endpoint: Endpoint, transport: str
) -> None:
    server = await serve(on_disconnect="stop")
    for number in range(10):
        thread = f"t{number}"
        body = json.dumps({"content": "script:silent", "thread_id": thread})
        if transport == "sse":
            _, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(
                f"POST /chat/sse HTTP/1.1\r\nHost: {server.host}:{server.port}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            await writer.drain()
            writer.close()
        else:
            async with connect(server) as socket:
                await socket.connection.send(body)
                socket.connection.transport.close()
    async with client(server) as http:
        deadline = time.monotonic() + SECONDS
        while True:
            threads = (await http.get("/chat/threads")).json()["threads"]
            if threads and all(each["active_run_id"] is None for each in threads):
                break
            assert time.monotonic() < deadline, threads
            await asyncio.sleep(0.1)


async def test_a_bare_stop_passes_runs_that_have_ended(server: Server) -> None:
    one, two = unique(), unique()
    async with connect(server) as socket, client(server) as http:
        for thread in (one, two):
            await socket.send({"content": "script:silent", "thread_id": thread})
            await socket.until("content", thread_id=thread)
        assert (await http.post(f"/chat/threads/{one}/stop")).json()["stopped"]
        await socket.send({"type": "stop"})
        await socket.until("end", thread_id=two)
        await socket.send({"type": "stop"})
        assert (await socket.receive())["code"] == "not_running"
