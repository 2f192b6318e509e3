"""A scripted OpenAI-compatible endpoint: a real HTTP server that answers as the test says.

The last user message chooses the script: ``script:`` and a name, or else a short fixed answer.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Script = Callable[["Exchange"], Any]


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One chat completion chunk as an SSE block."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    body = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": choices, **more}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def text(content: str) -> bytes:
    return chunk({"content": content})


DONE = b"data: [DONE]\n\n"
USAGE = chunk(usage={"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18})
END = chunk({}, "stop") + USAGE + DONE


def calls(*wanted: tuple[str, str, dict[str, Any]]) -> bytes:
    """Tool calls, each in one piece."""
    return (
        chunk(
            {
                "tool_calls": [
                    {
                        "index": index,
                        "id": call_id,
                        "type": "function",
                        "function": {"name": name, "arguments": json.dumps(arguments)},
                    }
                    for index, (call_id, name, arguments) in enumerate(wanted)
                ]
            }
        )
        + chunk({}, "tool_calls")
        + USAGE
        + DONE
    )


@dataclass
class Exchange:
    """One request and the connection to answer it on."""

    body: dict[str, Any]
    headers: dict[str, str]
    writer: asyncio.StreamWriter
    endpoint: Endpoint
    begun: bool = False

    @property
    def said(self) -> str:
        """The newest user message."""
        for message in reversed(self.body.get("messages", [])):
            if message["role"] == "user":
                content = message["content"]
                if isinstance(content, str):
                    return content
                return " ".join(part.get("text", "") for part in content)
        return ""

    async def begin(self, status: int = 200, headers: str = "") -> None:
        self.begun = True
        self.writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Type: text/event-stream\r\n{headers}"
            "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
        )

    async def send(self, data: bytes) -> None:
        if not self.begun:
            await self.begin()
        self.writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await self.writer.drain()

    async def refuse(self, status: int, error: dict[str, Any], headers: str = "") -> None:
        body = json.dumps({"error": error}).encode()
        self.writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nx-should-retry: false\r\n"
            f"{headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )

    async def finish(self) -> None:
        if self.begun and not self.writer.is_closing():
            self.writer.write(b"0\r\n\r\n")


@dataclass
class Endpoint:
    """What the server under test was seen to do, and gates that hold scripts back."""

    scripts: dict[str, Script] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    closed: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    open: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        name = "?"
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = {
                k.lower(): v.strip()
                for k, _, v in (line.partition(":") for line in head.split("\r\n")[1:] if line)
            }
            body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))))
            self.requests.append(body)
            self.headers.append(headers)
            exchange = Exchange(body, headers, writer, self)
            found = re.search(r"script:(\w+)", exchange.said)
            name = found[1] if found else "default"
            script = self.scripts.get(name) or SCRIPTS[name]
            work = asyncio.ensure_future(script(exchange))
            gone = asyncio.ensure_future(reader.read(1))
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
            else:
                work.result()
                await exchange.finish()
            gone.cancel()
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()
            self.closed.put_nowait(name)


async def _default(exchange: Exchange) -> None:
    for word in ("Hello", ", ", "wörld", " 😀", "!"):
        await exchange.send(text(word))
    await exchange.send(END)


async def _echo(exchange: Exchange) -> None:
    """The roles and texts that were sent up, so that a test reads memory from the answer."""
    said = [f"{m['role']}:{m['content']}" for m in exchange.body["messages"]]
    await exchange.send(text("|".join(said)) + END)


async def _gated(exchange: Exchange) -> None:
    """A first part, then what the gate ``go`` lets through."""
    await exchange.send(text("first "))
    await exchange.endpoint.gate("go").wait()
    await exchange.send(text("second") + END)


async def _endless(exchange: Exchange) -> None:
    count = 0
    while True:
        await exchange.send(text(f"{count} "))
        count += 1
        await asyncio.sleep(0.005)


async def _silent(exchange: Exchange) -> None:
    await exchange.send(text("partial "))
    await asyncio.Event().wait()


async def _mute(exchange: Exchange) -> None:
    await asyncio.Event().wait()


async def _numbers(exchange: Exchange) -> None:
    """As many tokens as the message says: ``script:numbers 400``."""
    match = re.search(r"numbers (\d+)", exchange.said)
    for number in range(int(match[1]) if match else 100):
        await exchange.send(text(f"{number} "))
    await exchange.send(END)


async def _reasoning(exchange: Exchange) -> None:
    await exchange.send(chunk({"reasoning_content": "think "}) + chunk({"reasoning": "hard"}))
    await exchange.send(text("answer") + END)


async def _no_usage(exchange: Exchange) -> None:
    await exchange.send(text("twelve chars") + chunk({}, "stop") + DONE)


async def _cut(exchange: Exchange) -> None:
    await exchange.send(text("before the cut "))
    await exchange.endpoint.gate("cut").wait()
    exchange.begun = False  # no last chunk: the body is not complete


async def _stream_error(exchange: Exchange) -> None:
    await exchange.send(text("partial "))
    await exchange.send(b'data: {"error": {"message": "overloaded sk-secret", "code": 503}}\n\n')


async def _garbage(exchange: Exchange) -> None:
    await exchange.send(b"data: this is not json\n\n")


async def _awkward(exchange: Exchange) -> None:
    """CRLF, comments, event lines, a byte order mark, an emoji cut in two, one byte at a time."""
    body = "\ufeff: hi\r\n\r\nevent: x\r\nid: 1\r\n: c\r\n\r\n"
    body += 'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\r\n\r\n'
    body += 'data: {"choices":[{"delta":{"content":"\\ude00é"}}]}\n\n'
    body += 'data: {"choices":[{"delta":\rdata: {"content":"✓"}}]}\r\r'
    body += 'data:{"choices":[{"delta":{},"finish_reason":"length"}]}\n\ndata: [DONE]'
    for byte in body.encode():
        await exchange.send(bytes([byte]))


async def _tool_loop(exchange: Exchange) -> None:
    await exchange.send(calls((f"call_{len(exchange.body['messages'])}", "add", {"a": 1, "b": 2})))


def _refusal(status: int, error: dict[str, Any], headers: str = "") -> Script:
    async def script(exchange: Exchange) -> None:
        await exchange.refuse(status, error, headers)

    return script


SCRIPTS: dict[str, Script] = {
    "default": _default,
    "echo": _echo,
    "gated": _gated,
    "endless": _endless,
    "silent": _silent,
    "mute": _mute,
    "numbers": _numbers,
    "reasoning": _reasoning,
    "nousage": _no_usage,
    "cut": _cut,
    "streamerror": _stream_error,
    "garbage": _garbage,
    "awkward": _awkward,
    "toolloop": _tool_loop,
    "unauthorized": _refusal(401, {"message": "Incorrect API key provided: sk-secret"}),
    "quota": _refusal(429, {"message": "quota"}, "Retry-After: 7\r\n"),
    "nomodel": _refusal(404, {"code": "model_not_found", "message": "no such model"}),
    "toolong": _refusal(400, {"code": "context_length_exceeded", "message": "maximum context"}),
    "filtered": _refusal(400, {"code": "content_filter", "message": "content management policy"}),
    "refused": _refusal(400, {"message": "unsupported parameter"}),
    "broken": _refusal(500, {"message": "oops"}),
}


@asynccontextmanager
async def scripted_endpoint() -> AsyncIterator[Endpoint]:
    """The endpoint on a free port of loopback."""
    endpoint = Endpoint()
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0)
    endpoint.port = server.sockets[0].getsockname()[1]
    try:
        yield endpoint
    finally:
        server.close()
