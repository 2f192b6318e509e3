"""``quart_chat fetch-model``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .options import readable_errors


@click.command("fetch-model")
def fetch_model() -> None:
    """Fetch the small local model (94 MB) ahead of time."""
    with readable_errors():
        click.echo(fetch())


def fetch() -> Path:
    """Fetch the local model and show the progress."""
    from .. import adapters

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
