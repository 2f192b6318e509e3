"""The command line: ``quart_chat chat-server`` and its helpers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from .config import Settings

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8080
CONFIG_HELP = "A TOML or Python file with CHAT_… keys; the environment wins over it."


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quart-chat", prog_name="quart_chat")
def main() -> None:
    """A chat server whose answers are never lost.

    \b
    Start one:            quart_chat chat-server
    With OpenAI:          OPENAI_API_KEY=… quart_chat chat-server
    On a public address:  quart_chat chat-server --host 0.0.0.0 --remote-auth

    Every setting is a CHAT_… key, in the environment QUART_CHAT_…
    """


def config_option(command: F) -> F:
    """The option --config."""
    return click.option("--config", type=click.Path(dir_okay=False), help=CONFIG_HELP)(command)


@main.command("chat-server")
@click.option("--host", default=DEFAULT_HOST, show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    envvar="PORT",
    default=DEFAULT_PORT,
    show_default=True,
    help="The port to listen on; 0 takes a free one. Also read from PORT.",
)
@click.option(
    "--protocol",
    type=click.Choice(["websocket", "sse", "both"]),
    help="Serve the WebSocket, the SSE stream, or both.  [default: websocket]",
)
@click.option("--remote-auth", is_flag=True, help="Ask for Supabase access tokens.")
@click.option("--no-database", is_flag=True, help="Keep conversations in memory only.")
@click.option("--no-migrate", is_flag=True, help="Do not bring the database's tables up to date.")
@click.option("--workers", type=click.IntRange(1), help="Processes; for now 1.")
@config_option
@click.option(
    "--tools",
    multiple=True,
    metavar="MODULE",
    help="A module whose @tool functions clients may name; repeatable.",
)
def chat_server(
    host: str,
    port: int,
    protocol: str | None,
    remote_auth: bool,
    no_database: bool,
    no_migrate: bool,
    workers: int | None,
    config: str | None,
    tools: tuple[str, ...],
) -> None:
    """Serve the chat until Ctrl-C or SIGTERM.

    Without any provider's key it answers with a small model in its own process.
    """
    if workers is not None and workers > 1:
        raise click.UsageError("--workers: for now one process serves; start it without --workers.")
    given: dict[str, Any] = {}
    if protocol:
        given["CHAT_PROTOCOL"] = protocol
    if remote_auth:
        given["CHAT_AUTH"] = "remote"
    if no_database:
        given["CHAT_STORAGE"] = "memory"
    if no_migrate:
        given["CHAT_MIGRATE"] = False
    with readable_errors():
        _serve(host, port, _from_file(config), given, tools)


def _serve(
    host: str, port: int, file: dict[str, Any], given: dict[str, Any], tools: tuple[str, ...]
) -> None:
    from . import adapters, serving
    from .app import create_app
    from .config import check_address, resolve
    from .transports.state import EXTENSION

    sys.path.insert(0, os.getcwd())  # modules named by --tools and CHAT_TOOLS
    values = file | given
    if tools:
        known = resolve(_environment() | values).tools
        values["CHAT_TOOLS"] = list(dict.fromkeys([*known, *tools]))
    app = create_app(values)
    settings: Settings = app.extensions[EXTENSION].settings
    check_address(settings, host)
    if adapters.uses_local_model(settings) and settings.local_model is None:
        _fetch()
    _log_to_stderr()
    listener = serving.bind(host, port)
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]

    def ready() -> None:
        _banner(app, settings, shown, address[1])

    serving.serve(app, listener, ready)


def _banner(app: Any, settings: Settings, host: str, port: int) -> None:
    from .config import loopback
    from .transports.state import EXTENSION

    server = app.extensions[EXTENSION].server
    models = server.conversation.models
    base = f"{host}:{port}"
    endpoints = []
    if settings.protocol in ("websocket", "both"):
        endpoints.append(f"ws://{base}/chat")
    if settings.protocol in ("sse", "both"):
        endpoints.append(f"http://{base}/chat/sse")
    auth = "local (everybody is user 1)" if settings.auth == "local" else "remote (Supabase)"
    lines = [
        ("Chat", "  ".join(endpoints)),
        ("API", f"http://{base}/openapi.json"),
        ("Auth", auth),
        ("Storage", _storage(settings)),
        ("Providers", ", ".join(models.names()) or "none"),
        ("Model", f"{models.default_model or 'named by each message'} ({models.default_provider})"),
        ("Try it", _example(settings, base)),
    ]
    for name, text in lines:
        click.echo(f"{name + ':':<11}{text}")
    if settings.auth == "local" and not loopback(host):
        click.secho(
            f"Warning: everybody who reaches {host} is the same user. Use --remote-auth in public.",
            fg="yellow",
            err=True,
        )
    if os.environ.get("WEB_CONCURRENCY", "1") not in ("", "1"):
        click.echo("Note: WEB_CONCURRENCY is not used yet; one process serves.", err=True)
    sys.stdout.flush()


def _example(settings: Settings, base: str) -> str:
    token = " -H 'Authorization: Bearer TOKEN'" if settings.auth == "remote" else ""
    if settings.protocol == "websocket":
        return f"python -m websockets ws://{base}/chat, then type " + '{"content": "Hello"}'
    return f"curl -N http://{base}/chat/sse{token} -d " + '\'{"content": "Hello"}\''


def _storage(settings: Settings) -> str:
    if settings.storage == "memory":
        return "memory (kept while it is used)"
    scheme, _, rest = settings.database_url.partition("://")
    return f"{scheme}, {rest.rpartition('@')[2].partition('?')[0]}"


def _log_to_stderr() -> None:
    import logging

    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form)
    logging.getLogger("quart_chat").setLevel(logging.INFO)


@main.command("fetch-model")
def fetch_model() -> None:
    """Fetch the small local model (94 MB) ahead of time."""
    with readable_errors():
        click.echo(_fetch())


def _fetch() -> Path:
    from . import adapters

    if adapters.local_model_is_there():
        return adapters.fetch_local_model(lambda have, of: None)
    done = 0
    with click.progressbar(length=100, label="Fetching the local model", file=sys.stderr) as bar:

        def progress(have: int, of: int) -> None:
            nonlocal done
            percent = have * 100 // of
            bar.update(max(0, percent - done))
            done = max(done, percent)

        return adapters.fetch_local_model(progress)


@main.command()
@config_option
def migrate(config: str | None) -> None:
    """Bring the database's tables up to date."""

    async def work(stores: Any) -> None:
        click.echo("The database is up to date.")

    _with_stores(config, work, {"CHAT_MIGRATE": True})


@main.command()
@click.option("--user", required=True, help="The user's id.")
@config_option
def export(user: str, config: str | None) -> None:
    """Write everything that is kept of a user, as JSON Lines."""

    async def work(stores: Any) -> None:
        async for record in stores.user_data.export(user):
            click.echo(json.dumps(record, ensure_ascii=False))

    _with_stores(config, work)


@main.command()
@click.option("--user", required=True, help="The user's id.")
@click.option("--yes", is_flag=True, help="Do not ask first.")
@config_option
def erase(user: str, yes: bool, config: str | None) -> None:
    """Delete everything that is kept of a user."""
    if not yes:
        click.confirm(f"Delete all conversations of user {user!r} for ever?", abort=True)

    async def work(stores: Any) -> None:
        count = await stores.user_data.erase(user)
        click.echo(f"{count} threads of user {user!r} were deleted.")

    _with_stores(config, work)


def _with_stores(
    config: str | None, work: Callable[[Any], Any], given: dict[str, Any] | None = None
) -> None:
    import asyncio
    from contextlib import AsyncExitStack

    from . import adapters
    from .config import resolve

    async def run() -> None:
        async with AsyncExitStack() as stack:
            await work(await adapters.stores(settings, stack))

    with readable_errors():
        settings = resolve(_environment() | _from_file(config) | (given or {}))
        if settings.storage == "memory":
            raise click.UsageError("CHAT_STORAGE is memory; there is no database.")
        asyncio.run(run())


def _environment() -> dict[str, Any]:
    from quart import Config

    values = Config(os.getcwd())
    values.from_prefixed_env()
    return dict(values)


def _from_file(path: str | None) -> dict[str, Any]:
    """The keys of a file that the environment does not set."""
    if path is None:
        return {}
    from quart import Config

    from .errors import ConfigurationError

    values = Config(os.getcwd())
    try:
        if path.endswith(".toml"):
            import tomllib

            values.from_file(os.path.abspath(path), tomllib.load, text=False)
        else:
            values.from_pyfile(os.path.abspath(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigurationError(f"--config {path}: {error}") from None
    return {key: value for key, value in values.items() if f"QUART_{key}" not in os.environ}


class readable_errors:
    """Shows what is wrong with the settings as a sentence, without a traceback; exit code 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        from .errors import ConfigurationError

        if isinstance(error, ConfigurationError):
            raise click.ClickException(str(error)) from None
