"""``quart_chat export`` and ``quart_chat erase``: the data of one user."""

from __future__ import annotations

import json
from typing import Any

import click

from .options import config_option, with_stores


@click.command()
@click.option("--user", required=True, help="The user's id.")
@config_option
def export(user: str, config: str | None) -> None:
    """Write all stored data of a user as JSON Lines."""

    async def work(stores: Any) -> None:
        count = 0
        async for record in stores.user_data.export(user):
            click.echo(json.dumps(record, ensure_ascii=False))
            count += 1
        if not count:
            _nothing(user)

    with_stores(config, work, create=False)


@click.command()
@click.option("--user", required=True, help="The user's id.")
@click.option("--yes", is_flag=True, help="Skip the confirmation prompt.")
@config_option
def erase(user: str, yes: bool, config: str | None) -> None:
    """Delete all stored data of a user."""
    if not yes:
        click.confirm(f"Delete all conversations of user {user!r} permanently?", abort=True)

    async def work(stores: Any) -> None:
        if count := await stores.user_data.erase(user):
            threads = "1 thread was" if count == 1 else f"{count} threads were"
            click.echo(f"{threads} deleted for user {user!r}.")
        else:
            _nothing(user)

    with_stores(config, work, create=False)


def _nothing(user: str) -> None:
    click.echo(f"Nothing is kept of {user!r}.", err=True)
