"""Banner that a server prints when it is ready."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..config import Settings


def show_banner(app: Any, settings: Settings, host: str, port: int) -> None:
    """Print the addresses, the configuration, and a command to try."""
    from ..config import loopback
    from ..transports.state import EXTENSION

    server = app.extensions[EXTENSION].server
    models = server.conversation.models
    base = f"{host}:{port}"
    endpoints = []
    if settings.protocol in ("websocket", "both"):
        endpoints.append(f"ws://{base}/chat")
    if settings.protocol in ("sse", "both"):
        endpoints.append(f"http://{base}/chat/sse")
    auth = "local (all requests share user 1)" if settings.auth == "local" else "remote (Supabase)"
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
            f"Warning: everyone who can reach {host} is the same user. "
            "Use --remote-auth on a public address.",
            fg="yellow",
            err=True,
        )
    if os.environ.get("WEB_CONCURRENCY", "1") not in ("", "1"):
        click.echo("Note: WEB_CONCURRENCY is ignored. One process serves.", err=True)
    sys.stdout.flush()


def _example(settings: Settings, base: str) -> str:
    token = " -H 'Authorization: Bearer TOKEN'" if settings.auth == "remote" else ""
    if settings.protocol == "websocket":
        return f"python -m websockets ws://{base}/chat, then type " + '{"content": "Hello"}'
    return f"curl -N http://{base}/chat/sse{token} -d " + '\'{"content": "Hello"}\''


def _storage(settings: Settings) -> str:
    if settings.storage == "memory":
        return "memory (kept while it is in use)"
    scheme, _, rest = settings.database_url.partition("://")
    return f"{scheme}, {rest.rpartition('@')[2].partition('?')[0]}"
