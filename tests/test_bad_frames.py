"""Two hundred kinds of bad frames: each is answered, none closes the socket."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from conftest import Server, answer, connect
from hypothesis import given, settings
from hypothesis import strategies as st

from quart_chat.core.commands import parse
from quart_chat.errors import InvalidMessage, TooLarge, UnsupportedField
from quart_chat.transports.codec import decode


def deep(levels: int) -> str:
    return '{"content":"x","metadata":{"a":' + "[" * levels + "]" * levels + "}}"


RAW: list[str | bytes] = [
    "",
    " ",
    "null",
    "true",
    "1",
    "1e999",
    "-",
    "NaN",
    "Infinity",
    '"text"',
    "[]",
    "[[]]",
    "{",
    "}",
    "{}",
    "{]",
    '{"content"}',
    '{"content":}',
    "{'content':'x'}",
    '{"content":"x"} {}',
    '{"content":"x",}',
    '{"content":"\\ud800"}',
    '{"content":"\\u0000"}',
    '{"content":"x","metadata":{"a":NaN}}',
    '{"content":"x","metadata":{"a":-Infinity}}',
    '{"content":"x","metadata":{"a":1e400}}',
    '{"content":"x","metadata":{"a":' + "9" * 400 + "}}",
    '{"content":"x","metadata":{"a":' + "9" * 5000 + "}}",
    '{"content":"x","seed":18446744073709551616}',
    '{"content":"x","metadata":{"\\u0000":1}}',
    deep(40),
    deep(900),
    "[" * 100_000,
    '{"a":' * 100_000,
    "\x00",
    "\ufeff{}",
    "hello",
    "undefined",
    b"",
    b"\xc1",
    b"\xff",
    b"\x80",
    b"\x90",
    b"\x01",
    b"\xc0",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\x81\xa7content",
    b"\x81\x01\x02",
    b"\x81\xc0\x02",
    b"\x81\x90\x02",
    b"\x91" * 50_000,
    b"\x81\xa1a" * 50_000,
    b"\xa7\xff\xfe\xfd\xfc\xfb\xfa\xf9",
    b"\xd6\xff\x00\x00\x00\x00",
    msgpack.packb({"content": b"bytes"}),
    msgpack.packb({"content": "x", "metadata": {"a": float("nan")}}),
    msgpack.packb({"content": "x", "metadata": {1: 2}}),
    msgpack.packb({"content": "x", "metadata": {"t": msgpack.Timestamp(1)}}),
    msgpack.packb({"content": "x", "metadata": {"t": msgpack.ExtType(5, b"x")}}),
    msgpack.packb({"content": "a\x00b"}),
    msgpack.packb({b"content": "x"}),
    msgpack.packb({"content": "x"}) + b"\x01",
    b'{"content":"x"}',
]

WRONG: list[dict[str, Any]] = [
    {"content": None},
    {"content": 1},
    {"content": True},
    {"content": {}},
    {"content": []},
    {"content": [None]},
    {"content": ["x"]},
    {"content": [{}]},
    {"content": [{"type": "text"}]},
    {"content": [{"type": "text", "text": ""}]},
    {"content": [{"type": "text", "text": 1}]},
    {"content": [{"type": "video", "video": {}}]},
    {"content": [{"type": "text", "text": "x", "more": 1}]},
    {"content": [{"type": "image_url", "image_url": "http://x"}]},
    {"content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
    {"content": [{"type": "image_url", "image_url": {"url": "ftp://x"}}]},
    {"content": [{"type": "image_url", "image_url": {"url": "http://x", "detail": "best"}}]},
    {"content": [{"type": "input_audio", "input_audio": {"data": "x"}}]},
    {"content": [{"type": "file", "file": {}}]},
    {"content": [{"type": "text", "text": "x"}] * 65},
    {"content": "x", "type": "nope"},
    {"content": "x", "type": 1},
    {"content": "x", "type": ["message"]},
    {"content": "x", "type": {"a": 1}},
    {"type": ""},
    {"type": "constructor"},
    {"type": "__class__"},
]
for name in ("id", "thread_id", "parent_id"):
    odd = ("", 1, True, [], {}, "x" * 129, "a\nb", "a\x7fb", 1.5)
    WRONG += [{"content": "x", name: bad} for bad in odd]
for name in ("model", "provider", "role", "tools", "client_tools", "history", "metadata"):
    odd = (1, True, [1], [{}], {"a": 1} if name != "metadata" else "x")
    WRONG += [{"content": "x", name: bad} for bad in odd]
for name, bads in {
    "temperature": (-1, 3, "1", True, []),
    "top_p": (-0.1, 1.1, "x", {}),
    "max_tokens": (0, -1, 1.5, "5", True),
    "stop": ("", [], ["a"] * 5, [1], 5),
    "seed": ("x", 1.5, []),
    "response_format": ("json", 1, []),
    "reasoning_effort": (1, "VERY HIGH", ""),
    "tool_choice": (1, [], ""),
    "role": ("assistant", "system", "tool", "admin"),
    "surprise": (1, "x", [], {}),
    "__proto__": (1,),
}.items():
    WRONG += [{"content": "x", name: bad} for bad in bads]
WRONG += [
    {"content": "x", "metadata": {"a": "x" * 16 * 1024}},
    {"content": "x", "tools": ["nope"]},
    {"content": "x", "provider": "nope"},
    {"content": "x", "client_tools": [{"name": "a b"}]},
    {"content": "x", "client_tools": [{"name": "a"}, {"name": "a"}]},
    {"content": "x", "client_tools": [{"name": f"t{i}"} for i in range(33)]},
    {"content": "x", "client_tools": [{"name": "a", "parameters": {"d": "x" * 33_000}}]},
    {"content": "x", "parent_id": "nope", "thread_id": "nope"},
    {"type": "stop"},
    {"type": "stop", "thread_id": "nope"},
    {"type": "stop", "run_id": "nope"},
    {"type": "stop", "run_id": 1},
    {"type": "resume"},
    {"type": "resume", "run_id": "nope"},
    {"type": "resume", "thread_id": "nope"},
    {"type": "resume", "run_id": "x", "last_seq": -1},
    {"type": "resume", "run_id": "x", "last_seq": "1"},
    {"type": "resume", "run_id": "x", "last_seq": 2**60},
    {"type": "regenerate"},
    {"type": "regenerate", "thread_id": "nope"},
    {"type": "tool_result", "run_id": "x", "tool_call_id": "y"},
    {"type": "tool_result", "run_id": "x", "tool_call_id": "y", "content": "z"},
    {"type": "approve", "run_id": "x", "tool_call_id": "y", "approved": "yes"},
    {"type": "approve", "run_id": "x", "tool_call_id": "y", "approved": True},
    {"type": "auth"},
    {"type": "auth", "token": ""},
    {"type": "ping", "surprise": True},
]
FRAMES: list[str | bytes] = [
    *RAW,
    *(json.dumps(command) for command in WRONG),
    *(msgpack.packb(command) for command in WRONG[::3]),
]


def test_there_are_two_hundred_kinds() -> None:
    assert len(set(FRAMES)) >= 200


async def test_each_is_answered_and_none_closes_the_socket(server: Server) -> None:
    async with connect(server) as socket:
        for number, frame in enumerate(FRAMES):
            await socket.connection.send(frame)
            socket.binary = isinstance(frame, bytes)
            refused = await socket.receive()
            assert refused["type"] == "error", (frame[:200], refused)
            assert refused["code"] != "internal_error", (frame[:200], refused)
            assert set(refused) <= {"type", "code", "message", "retryable", "reply_to"}
            assert "Traceback" not in refused["message"]
            if number % 50 == 0:
                await socket.send({"type": "ping"})
                assert await socket.receive() == {"type": "pong"}
        socket.binary = False
        assert answer(await socket.ask("still there"))


@pytest.mark.parametrize("binary", [False, True], ids=["json", "msgpack"])
async def test_a_large_frame_is_refused_and_a_huge_one_closes(server: Server, binary: bool) -> None:
    async with connect(server, binary=binary) as socket:
        await socket.send({"content": "x" * 1024 * 1024})
        assert (await socket.receive())["code"] == "too_large"
        await socket.send({"type": "ping"})
        assert (await socket.receive())["type"] == "pong"
        await socket.connection.send("x" * (4 * 1024 * 1024 + 2))
        await socket.connection.wait_closed()
        assert socket.connection.close_code == 1009


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON | st.dictionaries(st.sampled_from(["type", "content", "id", "tools", "stop"]), JSON))
@settings(max_examples=400, deadline=None)
def test_any_value_is_a_command_or_an_error(value: Any) -> None:
    with suppress(InvalidMessage, UnsupportedField):
        parse(value)


@given(st.binary(max_size=300) | st.text(max_size=300))
@settings(max_examples=400, deadline=None)
def test_any_bytes_are_a_value_or_an_error(frame: bytes | str) -> None:
    with suppress(InvalidMessage, TooLarge):
        decode(frame, 1024)
