"""Every example runs as it is."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import (
    SECONDS,
    Serve,
    Server,
    answer,
    clean_environment,
    client,
    connect,
    events_of,
    providers,
)
from endpoint import Endpoint, Exchange, calls

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = "Hello, wörld 😀!"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_the_clients_examples(serve: Serve, endpoint: Endpoint) -> None:
    parts = load("chat_server_examples").PARTS
    server = await serve()
    memory = await serve("--no-database")
    for name, part in parts.items():
        where = memory if name == "history" else server
        shown = await asyncio.wait_for(part(f"{where.host}:{where.port}"), SECONDS)
        assert shown == TEXT or name == "stop", name
    sent = [request["messages"] for request in endpoint.requests]
    assert [m["content"] for m in sent[1]][::2] == [
        "My name is Ada. Say hello.",
        "What is my name?",
    ]
    assert [m["role"] for m in sent[-1]] == ["user", "assistant", "user"]


@pytest.fixture
async def shop(tmp_path: Path, endpoint: Endpoint) -> AsyncIterator[Server]:
    """The embedding example, served by plain Hypercorn."""
    import json

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", f"{EXAMPLES}/embed.py:app"),
        env={
            **clean_environment(),
            "CHAT_DB": f"sqlite://{tmp_path}/chat.sqlite3",
            "SHOP_DB": f"sqlite://{tmp_path}/shop.sqlite3",
            "OPENAI_API_KEY": "k",
            "OPENAI_BASE_URL": endpoint.url,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "QUIET": json.dumps(providers(endpoint)),
        },
        cwd=tmp_path,
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stderr
    line = ""
    while "Running on" not in line:
        line = (await asyncio.wait_for(process.stderr.readline(), SECONDS)).decode()
        assert line, "it did not start"
    port = re.search(r"http://127.0.0.1:(\d+)", line)
    assert port
    yield Server(process, f"http://127.0.0.1:{port[1]}/chat")
    process.terminate()
    await asyncio.wait_for(process.wait(), 60)


async def test_a_host_with_its_own_database_embeds_the_chat(
    shop: Server, endpoint: Endpoint
) -> None:
    async def use_the_database(exchange: Exchange) -> None:
        if exchange.body["messages"][-1]["role"] == "tool":
            await exchange.send(_echo_tool(exchange))
        else:
            await exchange.send(calls(("c1", "orders_of_the_shop", {})))

    def _echo_tool(exchange: Exchange) -> bytes:
        from endpoint import END, text

        return text(exchange.body["messages"][-1]["content"]) + END

    endpoint.scripts["orders"] = use_the_database
    customer = {"X-Customer": "ada"}
    async with client(shop) as http:
        assert (await http.post("/orders", json={"item": "a bell"})).status_code == 201
        assert (await http.get("/orders")).json() == ["a bell"]
        missing = await http.get("/nothing")
        assert (missing.status_code, missing.text) == (404, "This page is not in our shop.")
        refused = await http.post("/support/sse", json={"content": "hi"})
        assert refused.status_code == 401
        for path in ("/support/sse", "/ask"):
            streamed = await http.post(path, json={"content": "hi"}, headers=customer)
            assert answer(events_of(streamed.text)) == TEXT
        threads = (await http.get("/support/threads", headers=customer)).json()["threads"]
        assert len(threads) == 2
        others = await http.get("/support/threads", headers={"X-Customer": "bob"})
        assert others.json()["threads"] == []
        used = await http.post(
            "/support/sse",
            json={"content": "script:orders", "tools": ["orders_of_the_shop"]},
            headers=customer,
        )
        assert answer(events_of(used.text)) == '["a bell"]'
    shop_socket: Any = shop
    shop_socket.__class__ = type("Shop", (Server,), {"ws": f"ws://{shop.host}:{shop.port}/support"})
    async with connect(shop, additional_headers=customer) as socket:
        assert answer(await socket.ask("hi")) == TEXT
    assert endpoint.requests[0]["messages"][0]["content"].startswith("You are the friendly")


def test_the_pages_name_what_the_protocol_has() -> None:
    for page in ("browser.html", "resume.html"):
        text = (EXAMPLES / page).read_text()
        assert '({ type: "' in text
        assert "/messages" in text
        assert "file:" in text
        assert "overflow-wrap: anywhere" in text
        assert "/chat" in text
