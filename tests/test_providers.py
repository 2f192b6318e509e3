"""Every way in which a provider answers or fails."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Server, answer, client, connect, post, providers, unique
from endpoint import Endpoint, chunk
from hypothesis import given, settings
from hypothesis import strategies as st

from quart_chat.adapters.openai.chunks import ChunkReader
from quart_chat.adapters.openai.event_stream import EventDecoder
from quart_chat.core.ports import TextDelta

FAILURES = {
    "unauthorized": ("provider_auth", False),
    "quota": ("provider_rate_limited", True),
    "nomodel": ("unknown_model", False),
    "toolong": ("context_too_long", False),
    "filtered": ("content_filtered", False),
    "refused": ("provider_bad_response", False),
    "broken": ("provider_unavailable", True),
    "streamerror": ("provider_unavailable", True),
    "garbage": ("provider_bad_response", False),
}


@pytest.mark.parametrize("script", FAILURES)
async def test_a_failure_has_its_code_and_keeps_the_text(server: Server, script: str) -> None:
    code, retryable = FAILURES[script]
    thread = unique()
    events = await post(server, {"content": f"script:{script}", "thread_id": thread})
    error = next(event for event in events if event["type"] == "error")
    assert (error["code"], error["retryable"]) == (code, retryable)
    assert "sk-secret" not in str(events)
    assert "Error(" not in error["message"]
    if script == "quota":
        assert error["retry_after"] == 7
    end = events[-1]
    assert (end["type"], end["status"]) == ("end", "failed")
    async with client(server) as http:
        stored = (await http.get(f"/chat/threads/{thread}/messages")).json()["messages"]
    assert [message["role"] for message in stored] == ["user", "assistant"]
    assert stored[1]["status"] == "failed"
    assert stored[1]["content"] == answer(events)
    assert answer(events) == ("partial " if script == "streamerror" else "")


async def test_a_broken_connection_keeps_the_text(
    server: Server, shared_endpoint: Endpoint
) -> None:
    async with connect(server) as socket:
        await socket.send({"content": "script:cut"})
        await socket.until("content")
        shared_endpoint.gate("cut").set()
        events = await socket.until("end")
    assert [e["code"] for e in events if e["type"] == "error"] == ["provider_unavailable"]
    assert events[-2]["message"]["content"] == "before the cut "
    assert events[-2]["message"]["status"] == "failed"


async def test_the_next_turn_after_a_failure_is_whole(server: Server) -> None:
    thread = unique()
    await post(server, {"content": "script:broken", "thread_id": thread})
    events = await post(server, {"content": "script:echo", "thread_id": thread})
    assert answer(events) == "user:script:broken|user:script:echo"


async def test_an_awkward_stream_is_read_to_the_letter(server: Server) -> None:
    events = await post(server, {"content": "script:awkward"})
    assert answer(events) == "😀é✓"
    assert events[-1]["finish_reason"] == "length"


async def test_missing_usage_is_estimated_and_says_so(server: Server) -> None:
    events = await post(server, {"content": "script:nousage"})
    usage = events[-1]["usage"]
    assert usage["estimated"] is True
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3


async def test_a_dead_provider_is_unavailable(serve: Any) -> None:
    dead = {"x": {"base_url": "http://127.0.0.1:9/v1", "api_key": "k", "default_model": "m"}}
    events = await post(await serve(providers=dead), {"content": "hi"})
    assert [e["code"] for e in events if e["type"] == "error"] == ["provider_unavailable"]


@pytest.mark.parametrize("script", ["mute", "silent"])
async def test_a_silent_provider_times_out(serve: Any, endpoint: Endpoint, script: str) -> None:
    server = await serve(provider_idle_timeout=0.3)
    await warm(server, endpoint)
    events = await post(server, {"content": f"script:{script}"})
    assert [e["code"] for e in events if e["type"] == "error"] == ["provider_timeout"]
    assert events[-1]["status"] == "failed"
    assert await endpoint.closed.get() == script


async def warm(server: Server, endpoint: Endpoint) -> None:
    """Have the server load what it needs for its first question, however long that takes."""
    while (await post(server, {"content": "hi"}))[-1]["status"] != "completed":
        pass
    while endpoint.open or not endpoint.closed.empty():
        await endpoint.closed.get()


async def test_a_run_has_a_bound_in_time(serve: Any, endpoint: Endpoint) -> None:
    server = await serve(run_timeout=0.3)
    await warm(server, endpoint)
    events = await post(server, {"content": "script:endless"})
    assert [e["code"] for e in events if e["type"] == "error"] == ["run_timeout"]
    assert answer(events).startswith("0 1 ")
    assert events[-2]["message"]["status"] == "failed"


async def test_stop_closes_the_providers_request_at_once(serve: Any, endpoint: Endpoint) -> None:
    server = await serve()
    async with connect(server) as socket:
        await socket.send({"content": "script:endless", "thread_id": "t"})
        await socket.until("content")
        await socket.send({"type": "stop"})
        events = await socket.until("end")
    stops = [event for event in events if event["type"] == "generation_stopped"]
    assert [event["message"] for event in stops] == ["Generation stopped by user"]
    assert events[-1]["status"] == "stopped"
    assert events[-1]["usage"]["estimated"] is True
    assert events[-2]["message"]["status"] == "stopped"
    assert await endpoint.closed.get() == "endless"
    assert endpoint.open == 0


async def test_two_providers_and_their_models(serve: Any, endpoint: Endpoint) -> None:
    two = providers(endpoint) | {
        "second": {"base_url": endpoint.url, "models": ["a", "b"], "api_key": "k2"}
    }
    server = await serve(providers=two, default_model="z")
    async with client(server) as http:
        models = (await http.get("/chat/models")).json()["models"]
        assert models == [
            {"id": "z", "provider": "scripted", "default": True},
            {"id": "a", "provider": "second", "default": False},
            {"id": "b", "provider": "second", "default": False},
        ]
        refused = await http.post(
            "/chat/sse", json={"content": "x", "provider": "second", "model": "c"}
        )
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "unknown_model")
    events = await post(server, {"content": "hi", "provider": "second"})
    assert (events[0]["provider"], events[0]["model"]) == ("second", "a")
    assert endpoint.headers[-1]["authorization"] == "Bearer k2"
    assert (await post(server, {"content": "hi"}))[0]["model"] == "z"


@given(st.lists(st.text(min_size=1), min_size=1, max_size=12), st.data())
@settings(max_examples=150, deadline=None)
def test_decoding_does_not_depend_on_where_the_bytes_are_cut(
    pieces: list[str], data: st.DataObject
) -> None:
    ends = [data.draw(st.sampled_from(["\n\n", "\r\n\r\n", "\r\r"])) for _ in pieces]
    body = b"".join(
        chunk({"content": piece.encode("utf-8", "replace").decode()})[:-2] + end.encode()
        for piece, end in zip(pieces, ends, strict=True)
    )
    decoder, reader, text = EventDecoder(), ChunkReader(), ""
    while body:
        size = data.draw(st.integers(1, max(1, min(len(body), 40))))
        deltas = reader.read(decoder.feed(body[:size]))
        body = body[size:]
        text += "".join(d.text for d in deltas if isinstance(d, TextDelta))
    text += "".join(d.text for d in reader.read(decoder.end()) if isinstance(d, TextDelta))
    sent = "".join(piece.encode("utf-8", "replace").decode() for piece in pieces)
    assert text == sent.replace("\0", "")
