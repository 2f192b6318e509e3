"""A real language model in the server's process: it has to answer, never mind what."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Serve, Server, answer, clean_environment, client, connect, post

from quart_chat.adapters import local_model
from quart_chat.errors import ConfigurationError

ROOT = Path(__file__).parent.parent


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


async def test_it_stops_talking_and_is_sent_no_tools(model: Path, serve: Serve) -> None:
    server = await serve("--no-database", providers={})
    tool = {"name": "look", "description": "d", "parameters": {"type": "object"}}
    with_tool = await post(server, {"content": "Hi.", "client_tools": [tool], "max_tokens": 8})
    without = await post(server, {"content": "Hi.", "max_tokens": 8})
    prompts = [events[-1]["usage"]["prompt_tokens"] for events in (with_tool, without)]
    assert prompts[0] == prompts[1]
    assert with_tool[-1]["status"] == "completed"
    assert local_model.LocalModel().options["max_tokens"] == 512
    assert local_model.LocalModel(str(model)).options == {}


def test_a_file_that_is_no_model_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF and nothing more")
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        local_model.LocalModel(str(file))._load()
    file.write_bytes(b"# A README")
    assert "not a model in the GGUF format" in str(local_model.problem(str(file)))


def python(code: str, executable: str = sys.executable, **environ: str) -> tuple[int, str]:
    done = subprocess.run(
        [executable, "-c", code],
        env={**clean_environment(), "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


FETCH = """
from quart_chat.adapters import local_model
from quart_chat.errors import ConfigurationError
try:
    local_model.fetch()
except ConfigurationError as error:
    print(error)
"""


@pytest.mark.parametrize("folder", ["/proc/nowhere", __file__])
def test_a_cache_that_cannot_be_written_is_a_sentence(folder: str) -> None:
    code, output = python(FETCH, XDG_CACHE_HOME=folder)
    assert code == 0, output
    assert f"cannot be kept in {folder}/quart_chat" in output
    assert "Set XDG_CACHE_HOME" in output


def test_without_a_network_it_says_so(tmp_path: Path) -> None:
    code, output = python(FETCH, XDG_CACHE_HOME=str(tmp_path), PIP_NO_INDEX="1")
    assert code == 0, output
    assert "Is there a network connection?" in output
    assert list((tmp_path / "quart_chat").iterdir()) == []


def test_without_pip_the_one_of_python_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "v" / "bin" / "python"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command, environment = local_model.downloader(tmp_path)
    done = subprocess.run(
        [*command[:3], "--version"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("pip "), done


def test_a_fetched_model_can_be_read_by_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(folder: Path, progress: object) -> Path:
        copy = folder / "model.gguf"
        copy.symlink_to(model)
        return copy

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(local_model, "download", link)
    assert local_model.fetch().stat().st_mode & 0o777 == 0o644
