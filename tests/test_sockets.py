"""What lies between a socket and the chat: Quart's handshake, the server's own socket below it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import websockets
from conftest import SECONDS, Serve, Server, client, connect, post, providers
from endpoint import Endpoint
from hosts import hypercorn
from wsproto.connection import Connection, ConnectionType
from wsproto.events import Message

from quart_chat.compat.hypercorn.message import websocket_frame


async def test_compression_is_not_agreed_to(server: Server) -> None:
    """It would keep a quarter of a megabyte for every socket and inflate frames unseen."""
    async with connect(server, compression="deflate") as socket:
        response = socket.connection.response
        assert response is not None
        assert "Sec-WebSocket-Extensions" not in response.headers
        assert (await socket.ask("hi"))[-1]["status"] == "completed"


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 1_000_000])
def test_a_frame_is_what_wsproto_reads(size: int) -> None:
    """The lengths at which the head of a frame changes its form (RFC 6455, section 5.2)."""
    for message in ("x" * size, "é" * (size // 2), b"x" * size):
        client = Connection(ConnectionType.CLIENT)
        client.receive_data(websocket_frame(message))
        pieces = [event for event in client.events() if isinstance(event, Message)]
        assert pieces[-1].message_finished
        whole = ("" if isinstance(message, str) else b"").join(piece.data for piece in pieces)
        assert whole == message


async def test_nothing_is_lost_that_comes_before_the_user_is_known(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    tests = Path(__file__).parent
    environ = {"QUART_CHAT_PROVIDERS": json.dumps(providers(endpoint))}
    async with (
        hypercorn("hosts:gated_app()", tests, tmp_path, environ) as host,
        connect(host) as socket,
        websockets.connect(f"ws://127.0.0.1:{host.port}/echo", proxy=None) as echo,
    ):
        names = [f"n{number}" for number in range(100)]
        for name in names:
            await socket.connection.send(json.dumps({"id": name}))
            await echo.send(name)
        assert [await asyncio.wait_for(echo.recv(), SECONDS) for _ in names] == names
        async with client(host) as http:
            assert (await http.post("/open")).status_code == 204
        assert [(await socket.receive())["reply_to"] for _ in names] == names
        assert (await socket.ask("hi"))[-1]["status"] == "completed"
    assert "Traceback" not in host.log(), host.log()


async def test_a_client_that_leaves_before_its_user_is_known_leaves_nothing(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    tests = Path(__file__).parent
    environ = {
        "QUART_CHAT_PROVIDERS": json.dumps(providers(endpoint)),
        "QUART_CHAT_MAX_CONNECTIONS_PER_USER": "1",
    }
    async with hypercorn("hosts:gated_app()", tests, tmp_path, environ) as host:
        for _ in range(3):
            async with connect(host) as socket:
                await socket.send({"type": "ping"})
        async with client(host) as http:
            await http.post("/open")
        async with connect(host) as socket:
            assert (await socket.ask("hi"))[-1]["status"] == "completed"
    assert "Traceback" not in host.log(), host.log()


async def test_a_host_s_hooks_see_the_handshake_of_a_socket(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    tests = Path(__file__).parent
    environ = {"QUART_CHAT_PROVIDERS": json.dumps(providers(endpoint))}
    async with hypercorn("hosts:gated_app()", tests, tmp_path, environ) as host:
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with connect(host, additional_headers={"X-Banned": "yes"}):
                pass
        assert refused.value.response.status_code == 403
        async with client(host) as http, connect(host) as socket:
            before = (await http.get("/ended")).json()["ended"]
            await http.post("/open")
            assert (await socket.ask("hi"))[-1]["status"] == "completed"
            assert (await http.get("/ended")).json()["ended"] == before + 1
    assert "Traceback" not in host.log(), host.log()


async def test_a_provider_is_reached_through_the_proxy_of_the_environment(
    serve: Serve, endpoint: Endpoint
) -> None:
    """The scripted endpoint is the proxy; the provider's own name cannot be resolved."""
    proxy = endpoint.url.removesuffix("/v1")
    server = await serve(
        environ={"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": "", "no_proxy": ""},
        providers=providers(endpoint, base_url="http://provider.invalid/v1"),
    )
    assert (await post(server, {"content": "hi"}))[-1]["status"] == "completed"
