"""Providers that send what no provider should: other shapes, pages, redirects, NUL, long waits."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from conftest import Serve, answer, post
from endpoint import END, Endpoint, Exchange, chunk, text
from hypothesis import given, settings
from hypothesis import strategies as st

from quart_chat.adapters.openai.chunks import ChunkReader
from quart_chat.adapters.openai.failures import failure
from quart_chat.adapters.openai.retries import retry_after
from quart_chat.core.ports import CallDelta, TextDelta, UsageDelta


def data(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def delta(**fields: Any) -> bytes:
    return data({"choices": [{"delta": fields}]})


def one_call(**fields: Any) -> bytes:
    return delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f"}} | fields])


SHAPES = {
    "choices a map": data({"choices": {"delta": {}}}),
    "choices a text": data({"choices": "abc"}),
    "choices a number": data({"choices": 5}),
    "a null choice": data({"choices": [None]}),
    "delta a text": data({"choices": [{"delta": "x"}]}),
    "null calls": delta(tool_calls=[None]),
    "calls a map": delta(tool_calls={"0": {}}),
    "calls a text": delta(tool_calls="add"),
    "function a text": one_call(function="add"),
    "name a list": one_call(function={"name": ["add"]}),
    "arguments a number": one_call(function={"name": "f", "arguments": 5}),
    "id a list": one_call(id=["c"]),
    "index a text": one_call(index="first"),
    "finish a map": data({"choices": [{"finish_reason": {"a": 1}}]}),
    "usage infinite": data(
        {"choices": [], "usage": {"prompt_tokens": math.inf, "completion_tokens": 1}}
    ),
    "usage huge": data({"usage": {"prompt_tokens": 10**40, "completion_tokens": 1}}),
    "usage no number": data({"usage": {"prompt_tokens": math.nan, "completion_tokens": 1}}),
    "usage a list": data({"usage": [1, 2]}),
    "a list": data([1]),
    "deep": b"data: " + b"[" * 100_000 + b"\n\n",
    "an error with an odd code": data({"error": {"code": "\u00b2", "message": "x"}}),
}


async def test_a_chunk_of_another_shape_is_a_bad_response(serve: Serve, endpoint: Endpoint) -> None:
    server = await serve()
    for name, block in SHAPES.items():

        async def script(exchange: Exchange, block: bytes = block) -> None:
            await exchange.send(text("before ") + block + END)

        endpoint.scripts["shape"] = script
        events = await post(server, {"content": "script:shape"})
        codes = [event["code"] for event in events if event["type"] == "error"]
        wanted = "provider_unavailable" if name.startswith("an error") else "provider_bad_response"
        assert codes == [wanted], name
        assert answer(events) == "before ", name
        assert events[-1]["status"] == "failed", name
    await server.stop()
    assert "Traceback" not in server.log()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def fields(**known: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Maps with some of these keys, each with a likely value or with any; or anything else."""
    optional = {name: values | json_values for name, values in known.items()}
    return st.fixed_dictionaries({}, optional=optional) | json_values


functions = fields(name=st.text(), arguments=st.text())
tool_calls = st.lists(fields(index=st.integers(), id=st.text(), function=functions), max_size=3)
deltas = fields(content=st.text(), reasoning=st.text(), tool_calls=tool_calls)
choices = st.lists(fields(delta=deltas, finish_reason=st.text()), max_size=2)
chunks = fields(
    choices=choices,
    usage=fields(prompt_tokens=st.integers(), completion_tokens=st.integers()),
    error=fields(code=st.text() | st.integers(), type=st.text(), message=st.text()),
)


@given(st.lists(chunks, min_size=1, max_size=5))
@settings(max_examples=600, deadline=None)
def test_any_json_is_read_or_refused(bodies: list[Any]) -> None:
    reader = ChunkReader()
    for each in reader.read([json.dumps(body).encode() for body in bodies]):
        match each:
            case TextDelta(content):
                storable(content)
            case CallDelta(index, call_id, name, arguments):
                assert index is None or type(index) is int
                for part in (call_id or "", name or "", arguments):
                    storable(part)
            case UsageDelta(prompt, completion):
                assert 0 <= prompt <= 2**53
                assert 0 <= completion <= 2**53
    if reader.failure is not None:
        assert reader.failure.code != "internal_error"


def storable(part: str) -> None:
    assert "\0" not in part
    part.encode()


@given(st.lists(st.binary(max_size=60), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(events: list[bytes]) -> None:
    ChunkReader().read(events)


@given(st.text(st.sampled_from('\\u0a"\0'), max_size=14), st.data())
@settings(max_examples=400, deadline=None)
def test_arguments_do_not_depend_on_where_they_are_cut(arguments: str, cuts: st.DataObject) -> None:
    whole = read_arguments([arguments])
    pieces = []
    rest = arguments
    while rest:
        size = cuts.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    assert read_arguments(pieces) == whole


def read_arguments(pieces: list[str]) -> str:
    reader = ChunkReader()
    blocks = [one_call(function={"name": "f", "arguments": each})[6:] for each in pieces]
    return "".join(each.arguments for each in reader.read(blocks) if isinstance(each, CallDelta))


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ('{"a": "x\\u0000y"}', '{"a": "xy"}'),
        ('{"a": "x\\\\u0000y"}', '{"a": "x\\\\u0000y"}'),
        ('{"a": "x\0y"}', '{"a": "xy"}'),
        ('{"a": "\\u00e9\\ud83d\\ude00"}', '{"a": "\\u00e9\\ud83d\\ude00"}'),
    ],
)
def test_a_nul_in_arguments_is_dropped(arguments: str, kept: str) -> None:
    assert read_arguments([arguments]) == kept
    assert read_arguments(list(arguments)) == kept


async def test_nul_is_dropped_from_all_that_a_model_says(serve: Serve, endpoint: Endpoint) -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.body["messages"][-1]["role"] == "tool":
            await exchange.send(delta(content="a\0b") + delta(content="\0") + END)
            return
        call = {
            "index": 0,
            "id": "c\0all",
            "function": {"name": "lo\0ok", "arguments": '{"for": "x\\u0000y"}'},
        }
        await exchange.send(delta(reasoning="think\0ing") + delta(tool_calls=[call]))
        await exchange.send(chunk({}, "tool_calls") + END)

    endpoint.scripts["nul"] = script
    server = await serve()
    tool = {"name": "look", "description": "d", "parameters": {"type": "object"}}
    events = await post(server, {"content": "script:nul", "client_tools": [tool], "thread_id": "t"})
    # The call waits for its client over SSE; what was announced is what is kept.
    (called,) = [event for event in events if event["type"] == "tool_call"]
    assert (called["tool_call_id"], called["name"]) == ("call", "look")
    assert called["arguments"] == {"for": "xy"}
    assert [e["content"] for e in events if e["type"] == "reasoning"] == ["thinking"]


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("text/html; charset=utf-8", b"<html>Please log in</html>", "provider_bad_response"),
        ("text/plain", b"Please log in", "provider_bad_response"),
        ("application/json", b'{"choices": []}', "provider_bad_response"),
        ("application/json", b"[", "provider_bad_response"),
        ("application/json", b'{"error": {"message": "rate_limit"}}', "provider_rate_limited"),
    ],
)
async def test_a_body_that_is_no_stream(
    serve: Serve, endpoint: Endpoint, kind: str, body: bytes, code: str
) -> None:
    async def script(exchange: Exchange) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        exchange.writer.write(head.encode() + body)

    endpoint.scripts["page"] = script
    events = await post(await serve(), {"content": "script:page"})
    assert [event["code"] for event in events if event["type"] == "error"] == [code]
    assert events[-1]["status"] == "failed"


async def test_a_redirect_is_not_followed(serve: Serve, endpoint: Endpoint) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.refuse(
            307, {"message": "elsewhere"}, f"Location: {endpoint.url}/chat/completions\r\n"
        )

    endpoint.scripts["redirect"] = script
    server = await serve()
    events = await post(server, {"content": "script:redirect"})
    (error,) = [event for event in events if event["type"] == "error"]
    assert error["code"] == "provider_bad_response"
    assert "307" in error["message"]
    assert "base_url" in error["message"]
    assert len(endpoint.requests) == 1
    await server.stop()
    assert "Traceback" not in server.log()


def rate_limited(headers: str) -> Any:
    async def script(exchange: Exchange) -> None:
        body = b'{"error": {"message": "quota"}}'
        head = f"HTTP/1.1 429 X\r\nContent-Type: application/json\r\n{headers}"
        exchange.writer.write(
            f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
        )

    return script


async def test_a_long_retry_after_is_reported_at_once(serve: Serve, endpoint: Endpoint) -> None:
    endpoint.scripts["limited"] = rate_limited("Retry-After: 45\r\n")
    server = await serve(provider_idle_timeout=10)
    events = await post(server, {"content": "script:limited"})
    (error,) = [event for event in events if event["type"] == "error"]
    assert (error["code"], error["retry_after"]) == ("provider_rate_limited", 45)
    assert len(endpoint.requests) == 1


async def test_a_short_retry_after_is_waited_for(serve: Serve, endpoint: Endpoint) -> None:
    refuse = rate_limited("Retry-After: 0.2\r\n")

    async def script(exchange: Exchange) -> None:
        if len(endpoint.requests) < 3:
            await refuse(exchange)
        else:
            await exchange.send(text("at last") + END)

    endpoint.scripts["limited"] = script
    events = await post(await serve(), {"content": "script:limited"})
    assert answer(events) == "at last"
    assert len(endpoint.requests) == 3


async def test_a_rate_limit_is_reported_where_the_retry_never_answers(
    serve: Serve, endpoint: Endpoint
) -> None:
    refuse = rate_limited("Retry-After: 0.1\r\n")

    async def script(exchange: Exchange) -> None:
        if exchange.said.endswith("warm"):
            await exchange.send(END)
        elif len(endpoint.requests) == 2:
            await refuse(exchange)
        else:
            await asyncio.Event().wait()

    endpoint.scripts["limited"] = script
    server = await serve(provider_idle_timeout=4)
    assert (await post(server, {"content": "script:limited warm"}))[-1]["status"] == "completed"
    events = await post(server, {"content": "script:limited"})
    (error,) = [event for event in events if event["type"] == "error"]
    assert (error["code"], error["retry_after"]) == ("provider_rate_limited", 0.1)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("-3", 0),
        ("inf", None),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("1e9", 86_400),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": value}) == seconds


@given(fields(code=st.text() | st.integers(), type=st.text(), message=st.text()))
@settings(max_examples=200, deadline=None)
def test_any_error_object_has_a_code(body: Any) -> None:
    if isinstance(body, dict):
        assert failure(None, body, None).code
