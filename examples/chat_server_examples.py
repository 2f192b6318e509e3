"""The chat server from a client's side, a function for each way to use it.

Start a server, then run a part against it; text is shown as it streams:

    quart_chat chat-server                    websocket, msgpack, sse, stop
    quart_chat chat-server --no-database      history

    python examples/chat_server_examples.py websocket
    python examples/chat_server_examples.py all --server 127.0.0.1:8080

Needs: pip install websockets httpx httpx-sse msgpack
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgpack
import websockets
from httpx_sse import aconnect_sse


def show(event: dict[str, Any]) -> str:
    """Print what an event adds to the answer, and return that text."""
    match event["type"]:
        case "content":
            print(event["content"], end="", flush=True)
            return str(event["content"])
        case "error":
            print(f"\n[{event['code']}] {event['message']}")
        case "end":
            print(f"\n({event['status']}, {event['usage']['total_tokens']} tokens)")
    return ""


async def websocket_json(server: str) -> str:
    """Send two turns over one WebSocket in JSON; the second one knows the first."""
    answers = []
    async with websockets.connect(f"ws://{server}/chat", proxy=None) as socket:
        thread_id = None
        for question in ("My name is Ada. Say hello.", "What is my name?"):
            print(f"> {question}")
            message = {"type": "message", "content": question, "thread_id": thread_id}
            await socket.send(json.dumps(message))
            answer = ""
            async for frame in socket:
                event = json.loads(frame)
                answer += show(event)
                thread_id = event.get("thread_id", thread_id)
                if event["type"] in ("end", "error"):
                    break
            answers.append(answer)
    return answers[-1]


async def websocket_msgpack(server: str) -> str:
    """Send the same frames as MessagePack: smaller, and binary both ways."""
    answer = ""
    async with websockets.connect(f"ws://{server}/chat", proxy=None) as socket:
        await socket.send(msgpack.packb({"content": "Count to five."}))
        async for frame in socket:
            event = msgpack.unpackb(frame)
            answer += show(event)
            if event["type"] in ("end", "error"):
                break
    return answer


async def sse(server: str) -> str:
    """Post a message and read its run as server-sent events."""
    return await _post(server, {"content": "What is the capital of France?"})


async def sse_with_history(server: str) -> str:
    """Send the earlier turns along, for a server without a database (--no-database)."""
    history = [
        {"role": "user", "content": "My favourite colour is green."},
        {"role": "assistant", "content": "Green is a lovely colour!"},
    ]
    return await _post(server, {"content": "Which colour do I like?", "history": history})


async def _post(server: str, body: dict[str, Any]) -> str:
    answer = ""
    async with (
        httpx.AsyncClient(timeout=None, trust_env=False) as http,
        aconnect_sse(http, "POST", f"http://{server}/chat/sse", json=body) as stream,
    ):
        if stream.response.status_code != 200:
            await stream.response.aread()
            raise SystemExit(stream.response.text)
        async for frame in stream.aiter_sse():
            answer += show(json.loads(frame.data))
    return answer


async def stop(server: str) -> str:
    """Stop an answer in the middle; the server keeps its text so far."""
    answer = ""
    async with websockets.connect(f"ws://{server}/chat", proxy=None) as socket:
        await socket.send(json.dumps({"content": "Tell me a very long story."}))
        async for frame in socket:
            event = json.loads(frame)
            answer += show(event)
            if event["type"] == "content" and len(answer) > 5:
                await socket.send(json.dumps({"type": "stop"}))
            if event["type"] == "end":
                break
    return answer


PARTS: dict[str, Callable[[str], Awaitable[str]]] = {
    "websocket": websocket_json,
    "msgpack": websocket_msgpack,
    "sse": sse,
    "stop": stop,
    "history": sse_with_history,
}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument(
        "part", nargs="?", default="all", choices=[*PARTS, "all"], help="default: all but history"
    )
    parser.add_argument("--server", default="127.0.0.1:8080", help="host:port of the server")
    options = parser.parse_args()
    names = (
        [options.part] if options.part != "all" else [name for name in PARTS if name != "history"]
    )
    for name in names:
        print(f"--- {name}")
        await PARTS[name](options.server)


if __name__ == "__main__":
    asyncio.run(main())
