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
        *("--config", "--tools", "--no-migrate", "--log-level", "--access-log"),
    ):
        assert option in options


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        (["--workers", "2"], {}, "one process"),
        (["--config", "missing.toml"], {}, "--config missing.toml: there is no file missing.toml."),
        (["--port", "abc"], {}, "'abc' is not a number from 0 to 65535"),
        (["--port", "70000"], {}, "'70000' is not a number from 0 to 65535"),
        ([], {"QUART_CHAT_CMD": "x"}, "The environment variable QUART_CHAT_CMD sets it"),
        ([], {"QUART_CHAT_RATE_LIMIT": "60"}, "for instance 60/minute"),
        ([], {"QUART_CHAT_PROVIDERS": '{"x": }'}, "not valid JSON (line 1, column 7"),
        ([], {"QUART_CHAT_ON_BUSY": "wait"}, "CHAT_ON_BUSY: 'wait' is not allowed"),
        ([], {"QUART_CHAT_ON_BUSSY": "queue"}, "Did you mean QUART_CHAT_ON_BUSY?"),
        ([], {"DATABASE_URL": "mysql://h/d"}, "'mysql' is not known"),
        ([], {"DATABASE_URL": "sqlite:///nowhere/x"}, "the folder of /nowhere/x does not exist"),
        ([], {"DATABASE_URL": "postgres://127.0.0.1:9/x"}, "the database cannot be opened"),
        ([], {"QUART_CHAT_DEFAULT_PROVIDER": "groq"}, "Set GROQ_API_KEY to use it"),
        ([], {"QUART_CHAT_LOCAL_MODEL": "missing.gguf"}, "there is no file missing.gguf"),
        (["--tools", "nothing_here"], {}, "the module nothing_here cannot be imported"),
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


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("CHAT_ON_BUSSY = 'x'", "there is no such key. Did you mean CHAT_ON_BUSY?"),
        ("ON_BUSY = 'queue'", "Write CHAT_ON_BUSY."),
        ("CHAT_ON_BUSY = = 1", "line 1, column"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "chat.toml").write_text(content)
    done = run("chat-server", "--config", "chat.toml", cwd=tmp_path, OPENAI_API_KEY="k")
    assert done.returncode == 1
    assert "--config chat.toml: " in done.stderr
    assert says in done.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [("chatserver", "Did you mean chat-server?"), ("eras", "--help"), ("migrat", "mean migrate?")],
)
def test_an_unknown_command_is_never_taken_for_erase(tmp_path: Path, name: str, says: str) -> None:
    done = run(name, cwd=tmp_path)
    assert done.returncode == 2
    assert f"There is no command {name!r}." in done.stderr
    assert says in done.stderr
    assert "erase" not in done.stderr


def test_serve_is_another_name_of_chat_server(tmp_path: Path) -> None:
    assert run("serve", "--help", cwd=tmp_path).stdout.count("--remote-auth") == 1


@pytest.mark.parametrize("command", [["export"], ["erase", "--yes"]])
def test_a_folder_without_a_database_stays_as_it_is(tmp_path: Path, command: list[str]) -> None:
    done = run(*command, "--user", "ada", cwd=tmp_path)
    assert done.returncode == 1
    assert "There is no database" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["export"], ["erase", "--yes"]])
def test_a_user_of_whom_nothing_is_kept(tmp_path: Path, command: list[str]) -> None:
    assert run("migrate", cwd=tmp_path).returncode == 0
    done = run(*command, "--user", "ada", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "Nothing is kept of 'ada'.\n"


async def test_requests_are_logged_if_wanted(serve: Serve) -> None:
    silent, loud = await serve(), await serve("--access-log", "--log-level", "debug")
    for server in (silent, loud):
        async with client(server) as http:
            await http.get("/health?token=secret")
        await server.stop()
    assert "GET /health" not in silent.log()
    assert "GET /health" in loud.log()
    assert "secret" not in loud.log()


async def test_the_banner_says_what_there_is(serve: Serve) -> None:
    server = await serve()
    told = dict(re.findall(r"^(\w[\w ]*): +(.*)$", server.banner, re.MULTILINE))
    assert told["Chat"] == f"{server.ws}  {server.url}/chat/sse"
    assert told["Auth"] == "local (all requests share user 1)"
    assert told["Storage"] == "sqlite, quart_chat.sqlite3"
    assert told["Providers"] == "scripted"
    assert told["Model"] == "m (scripted)"
    assert "curl -N" in told["Try it"]
    assert "Warning" not in server.log()


async def test_local_auth_in_public_is_warned_about(serve: Serve) -> None:
    server = await serve("--host", "0.0.0.0")
    assert await server.stop() == 0
    assert "Warning: everyone who can reach 0.0.0.0 is the same user" in server.log()


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
    (line,) = server.log().splitlines()
    assert " INFO quart_chat.run: " in line


async def test_an_address_in_use_is_a_sentence(serve: Serve, tmp_path: Path) -> None:
    server = await serve()
    done = await asyncio.to_thread(
        run, "chat-server", "--port", str(server.port), cwd=tmp_path, OPENAI_API_KEY="k"
    )
    assert done.returncode == 1
    assert f"--port {server.port}: the address can" in done.stderr
    # The address comes first: nothing is fetched for a server that cannot listen.
    empty = await asyncio.to_thread(
        run, "chat-server", "--port", str(server.port), cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path)
    )
    assert empty.returncode == 1
    assert f"--port {server.port}: the address can" in empty.stderr
    assert not (tmp_path / "quart_chat").exists()


async def test_plain_hypercorn_serves_it_as_well(tmp_path: Path, endpoint: Endpoint) -> None:
    import json

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", "quart_chat:create_app()"),
        env={
            **clean_environment(),
            "QUART_CHAT_PROVIDERS": json.dumps(providers(endpoint)),
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
