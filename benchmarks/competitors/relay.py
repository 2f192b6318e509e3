"""The floor: a bare ASGI relay for Hypercorn, without framework, storage or error handling.

``/ws`` and ``/sse`` send a frame a token; ``/ws-merged`` sends one for all that a read has brought.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

URL = os.environ.get("BENCHMARK_BASE_URL", "") + "/chat/completions"
SSE_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]

_session: aiohttp.ClientSession | None = None


async def app(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI application."""
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
    elif scope["type"] == "websocket":
        await _websocket(scope["path"] == "/ws-merged", receive, send)
    else:
        await _sse(receive, send)


async def _lifespan(receive: Any, send: Any) -> None:
    global _session
    await receive()
    _session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await _session.close()
    await send({"type": "lifespan.shutdown.complete"})


async def _websocket(merged: bool, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        async for texts in _tokens(json.loads(event["text"])):
            for text in ["".join(texts)] if merged else texts:
                await send({"type": "websocket.send", "text": _event(text)})
        await send({"type": "websocket.send", "text": '{"type":"end"}'})


async def _sse(receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        event = await receive()
        body, more = body + event["body"], event["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
    async for texts in _tokens(json.loads(body)):
        for text in texts:
            frame = f"data: {_event(text)}\n\n".encode()
            await send({"type": "http.response.body", "body": frame, "more_body": True})
    await send({"type": "http.response.body", "body": b'data: {"type":"end"}\n\n'})


def _event(text: str) -> str:
    return json.dumps({"type": "content", "content": text}, separators=(",", ":"))


async def _tokens(asked: dict[str, Any]) -> AsyncIterator[list[str]]:
    """The tokens that each read has brought."""
    assert _session is not None
    messages = [{"role": "user", "content": asked["content"]}]
    body = {"model": asked["model"], "messages": messages, "stream": True}
    rest = b""
    async with _session.post(URL, json=body) as response:
        async for data in response.content.iter_any():
            *blocks, rest = (rest + data).split(b"\n\n")
            chunks = [json.loads(block[6:]) for block in blocks if block != b"data: [DONE]"]
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            if texts := [delta["content"] for delta in deltas if "content" in delta]:
                yield texts
