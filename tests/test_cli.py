"""The command line, as its users meet it."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Serve, Server, answer, clean_environment, client, post, providers, start
from endpoint import Endpoint

TEXT = "Hello, wörld 😀!"


def run(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quart_chat", *arguments],
        env={**clean_environment(), **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_teaches_and_is_light(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = run("--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0
    assert "chat-server" in shown.stdout
    assert "OPENAI_API_KEY" in shown.stdout
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 1, "the target is 0.3 s; this only catches the import of something heavy"
    options = run("chat-server", "--help", cwd=tmp_path).stdout
    for option in (
        *("--host", "--port", "--protocol", "--remote-auth", "--no-database", "--workers"),
        *("--config", "--tools", "--no-migrate"),
    ):
        assert option in options


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        (["--workers", "2"], {}, "one process"),
        (["--config", "missing.toml"], {}, "--config missing.toml"),
        ([], {"QUART_CHAT_ON_BUSY": "wait"}, "CHAT_ON_BUSY: 'wait' is not allowed"),
        ([], {"QUART_CHAT_ON_BUSSY": "queue"}, "Did you mean CHAT_ON_BUSY?"),
        ([], {"DATABASE_URL": "mysql://h/d"}, "'mysql' is not known"),
        ([], {"DATABASE_URL": "sqlite:///nowhere/x"}, "the folder of /nowhere/x does not exist"),
        ([], {"DATABASE_URL": "postgres://127.0.0.1:9/x"}, "the database cannot be opened"),
        ([], {"QUART_CHAT_DEFAULT_PROVIDER": "groq"}, "Set GROQ_API_KEY to use it"),
        ([], {"QUART_CHAT_LOCAL_MODEL": "missing.gguf"}, "there is no file missing.gguf"),
        (["--tools", "nothing_here"], {}, "the module nothing_here can not be imported"),
        (["--tools", "json"], {}, "json has no function decorated with @tool"),
        (["--remote-auth"], {}, "set SUPABASE_URL in the environment"),
    ],
)
def test_a_wrong_start_is_a_sentence(
    tmp_path: Path, arguments: list[str], environ: dict[str, str], says: str
) -> None:
    environ = {"OPENAI_API_KEY": "k"} | environ
    done = run("chat-server", "--port", "0", *arguments, cwd=tmp_path, **environ)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


async def test_the_banner_says_what_there_is(serve: Serve) -> None:
    server = await serve()
    told = dict(re.findall(r"^(\w[\w ]*): +(.*)$", server.banner, re.MULTILINE))
    assert told["Chat"] == f"{server.ws}  {server.url}/chat/sse"
    assert told["Auth"] == "local (everybody is user 1)"
    assert told["Storage"] == "sqlite, quart_chat.sqlite3"
    assert told["Providers"] == "scripted"
    assert told["Model"] == "m (scripted)"
    assert "curl -N" in told["Try it"]
    assert "Warning" not in server.log()


async def test_local_auth_in_public_is_warned_about(serve: Serve) -> None:
    server = await serve("--host", "0.0.0.0")
    assert await server.stop() == 0
    assert "Warning: everybody who reaches 0.0.0.0 is the same user" in server.log()


async def test_a_file_configures_and_the_environment_wins(
    tmp_path: Path, endpoint: Endpoint, serve: Serve
) -> None:
    file = tmp_path / "chat.toml"
    file.write_text('CHAT_ON_BUSY = "reject"\nCHAT_SYSTEM_PROMPT = "From the file."\n')
    server = await serve("--config", str(file), system_prompt="From the environment.")
    assert answer(await post(server, {"content": "script:echo"})).startswith(
        "system:From the environment.|"
    )
    python = tmp_path / "chat.py"
    python.write_text('CHAT_SYSTEM_PROMPT = "From Python."\n')
    server = await serve("--config", str(python))
    assert answer(await post(server, {"content": "script:echo"})).startswith("system:From Python.|")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it_cleanly(serve: Serve, number: signal.Signals) -> None:
    server = await serve()
    await post(server, {"content": "hi"})
    assert await server.stop(number) == 0
    assert server.log() == ""


async def test_an_address_in_use_is_a_sentence(serve: Serve, tmp_path: Path) -> None:
    server = await serve()
    done = await asyncio.to_thread(
        run, "chat-server", "--port", str(server.port), cwd=tmp_path, OPENAI_API_KEY="k"
    )
    assert done.returncode == 1
    assert f"--port {server.port}: the address can not be used" in done.stderr


async def test_plain_hypercorn_serves_it_as_well(tmp_path: Path, endpoint: Endpoint) -> None:
    import json

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", "quart_chat:create_app()"),
        env={
            **clean_environment(),
            "QUART_CHAT_PROVIDERS": json.dumps(providers(endpoint)),
            "QUART_CHAT_PROTOCOL": "both",
        },
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr
    line = ""
    while "Running on" not in line:
        line = (await process.stderr.readline()).decode()
        assert line
    found = re.search(r"http://127.0.0.1:(\d+)", line)
    assert found
    server = Server(process, f"http://127.0.0.1:{found[1]}/chat")
    assert answer(await post(server, {"content": "hi"})) == TEXT
    assert await server.stop() == 0
    assert "Traceback" not in server.log()


async def test_the_model_names_of_the_environment_are_used(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    server = await start(
        protocol="sse",
        cwd=tmp_path,
        environ={"OPENAI_API_KEY": "sk-x", "OPENAI_BASE_URL": endpoint.url, "PORT": "0"},
    )
    async with client(server) as http:
        models = (await http.get("/chat/models")).json()["models"]
    assert models == [{"id": "gpt-4o-mini", "provider": "openai", "default": True}]
    assert answer(await post(server, {"content": "hi"})) == TEXT
    assert endpoint.headers[-1]["authorization"] == "Bearer sk-x"
    assert await server.stop() == 0


def test_the_procfile_starts_what_the_command_line_has() -> None:
    root = Path(__file__).parent.parent
    line = (root / "Procfile").read_text()
    assert line.startswith("web: quart_chat chat-server --host 0.0.0.0")
    assert os.access(root / ".ci" / "run", os.X_OK)
