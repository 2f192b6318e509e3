"""Command line: ``quart_chat chat-server`` and its helpers, one file per command."""

from __future__ import annotations

import difflib

import click

from .chat_server import chat_server
from .fetch_model import fetch_model
from .migrate import migrate
from .users import erase, export

__all__ = ["main"]

ALIASES = {"serve": "chat-server"}
NEVER_SUGGESTED = {"erase"}


class Commands(click.Group):
    """Group that knows aliases and does not suggest what deletes."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        known = self.get_command(ctx, name) is not None
        if not known and not name.startswith("-") and not ctx.resilient_parsing:
            names = {*self.commands, *ALIASES} - NEVER_SUGGESTED
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]}?" if near else "See quart_chat --help."
            ctx.fail(f"There is no command {name!r}. {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quart-chat", prog_name="quart_chat")
def main() -> None:
    """A chat server whose answers are never lost.

    \b
    Start one:            quart_chat chat-server
    With OpenAI:          OPENAI_API_KEY=… quart_chat chat-server
    On a public address:  quart_chat chat-server --host 0.0.0.0 --remote-auth

    chat-server can be written serve. Each setting is a CHAT_… key; its environment variable is
    QUART_CHAT_…
    """


for command in (chat_server, fetch_model, migrate, export, erase):
    main.add_command(command)
