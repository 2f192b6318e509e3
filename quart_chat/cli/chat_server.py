"""``quart_chat chat-server``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from .banner import show_banner
from .fetch_model import fetch
from .options import Port, config_option, environment, from_file, readable_errors

if TYPE_CHECKING:
    from ..config import Settings

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8080
LEVELS = ("debug", "info", "warning", "error")


@click.command("chat-server")
@click.option("--host", default=DEFAULT_HOST, show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=Port(),
    envvar="PORT",
    default=DEFAULT_PORT,
    show_default=True,
    help="Port to listen on; 0 picks a free one. Also read from PORT.",
)
@click.option(
    "--protocol",
    type=click.Choice(["websocket", "sse", "both"]),
    help="Serve the WebSocket, the SSE stream, or both.  [default: both]",
)
@click.option("--remote-auth", is_flag=True, help="Require Supabase access tokens.")
@click.option("--no-database", is_flag=True, help="Keep conversations in memory only.")
@click.option("--no-migrate", is_flag=True, help="Do not apply the database's migrations.")
@click.option("--workers", type=click.IntRange(1), help="Number of worker processes.")
@config_option
@click.option(
    "--tools",
    multiple=True,
    metavar="MODULE",
    help="Module whose @tool functions clients may name; repeatable.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS),
    default="info",
    show_default=True,
    help="Least severe messages that are logged to standard error.",
)
@click.option("--access-log", is_flag=True, help="Log each request to standard error.")
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
    log_level: str,
    access_log: bool,
) -> None:
    """Serve the chat until Ctrl-C or SIGTERM.

    Without a provider's key, a small model in the server's own process answers.
    """
    if workers is not None and workers > 1:
        raise click.UsageError(
            "--workers: only one process is supported so far. Start it without --workers."
        )
    options: dict[str, Any] = {}
    if protocol:
        options["CHAT_PROTOCOL"] = protocol
    if remote_auth:
        options["CHAT_AUTH"] = "remote"
    if no_database:
        options["CHAT_STORAGE"] = "memory"
    if no_migrate:
        options["CHAT_MIGRATE"] = False
    if access_log:
        options["CHAT_ACCESS_LOG"] = True
    with readable_errors():
        values = _with_tools(from_file(config) | options, tools)
        _serve(host, port, values, log_level)


def _with_tools(values: dict[str, Any], tools: tuple[str, ...]) -> dict[str, Any]:
    from ..config import resolve

    sys.path.insert(0, os.getcwd())  # modules named by --tools and CHAT_TOOLS
    if not tools:
        return values
    known = resolve(environment() | values).tools
    return values | {"CHAT_TOOLS": list(dict.fromkeys([*known, *tools]))}


def _serve(host: str, port: int, values: dict[str, Any], log_level: str) -> None:
    from .. import adapters, serving
    from ..app import create_app
    from ..config import check_address
    from ..transports.state import EXTENSION

    app = create_app(values)
    settings: Settings = app.extensions[EXTENSION].settings
    check_address(settings, host)
    needs_model = adapters.uses_local_model(settings) and settings.local_model is None
    listener = serving.bind(host, port)
    if needs_model:
        fetch()
    _log_to_stderr(log_level, settings.access_log)
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]

    def ready() -> None:
        show_banner(app, settings, shown, address[1])

    serving.serve(app, listener, ready)


def _log_to_stderr(level: str, access_log: bool) -> None:
    import logging

    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form)
    logging.getLogger("quart_chat").setLevel(level.upper())
    if access_log:
        logging.getLogger("hypercorn.access").setLevel(logging.INFO)
