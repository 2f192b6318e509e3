"""``quart_chat migrate``."""

from __future__ import annotations

from typing import Any

import click

from .options import config_option, with_stores


@click.command()
@config_option
def migrate(config: str | None) -> None:
    """Apply the database's migrations; create the database if it is a new SQLite file."""

    async def work(stores: Any) -> None:
        click.echo("The database is up to date.")

    with_stores(config, work, {"CHAT_MIGRATE": True})
