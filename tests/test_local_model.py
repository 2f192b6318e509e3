"""A real language model in the server's process: it has to answer, never mind what."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from conftest import Serve, Server, answer, client, connect, post

from quart_chat.adapters import local_model


@pytest.fixture(scope="module")
def model() -> Path:
    """The model in the user's cache, fetched where it is not there yet."""
    return local_model.fetch()


async def test_it_answers_with_memory_over_both_transports(model: Path, serve: Serve) -> None:
    server: Server = await serve(providers={})
    assert "SmolLM2-135M-Instruct (local)" in server.banner
    thread = "t"
    async with connect(server) as socket:
        first = await socket.ask("Say hello.", thread_id=thread, max_tokens=12)
    second = await post(server, {"content": "Again.", "thread_id": thread, "max_tokens": 12})
    for events in (first, second):
        assert answer(events)
        assert events[-1]["status"] == "completed"
        assert events[-1]["usage"]["estimated"] is False
        assert str(model.parent) not in str(events)
    assert second[-1]["usage"]["prompt_tokens"] > first[-1]["usage"]["prompt_tokens"] + 10
    async with client(server) as http:
        models = (await http.get("/chat/models")).json()["models"]
    assert models == [{"id": "SmolLM2-135M-Instruct", "provider": "local", "default": True}]


async def test_it_serves_several_turns_at_once_and_stops(model: Path, serve: Serve) -> None:
    server = await serve("--no-database", providers={}, local_model=str(model))

    async def turn(number: int) -> str:
        events = await post(server, {"content": f"Count from {number}.", "max_tokens": 16})
        return str(events[-1]["status"])

    assert await asyncio.gather(*(turn(number) for number in range(4))) == ["completed"] * 4
    async with connect(server) as socket:
        await socket.send({"content": "Tell me a very long story about the sea."})
        await socket.until("content")
        await socket.send({"type": "stop"})
        events = await socket.until("end")
    assert events[-1]["status"] == "stopped"


async def test_a_conversation_over_its_context_is_refused(model: Path, serve: Serve) -> None:
    server = await serve("--no-database", providers={})
    events = await post(server, {"content": "word " * 9000})
    assert [e["code"] for e in events if e["type"] == "error"] == ["context_too_long"]


def test_a_file_that_is_no_model_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(Exception, match="can not be loaded"):
        local_model.LocalModel(str(file))._load()
