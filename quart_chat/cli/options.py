"""Configuration of a command, and what several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

CONFIG_HELP = "TOML or Python file with CHAT_… keys; environment variables override it."


class Port(click.IntRange):
    """Number of a TCP port."""

    name = "port"

    def __init__(self) -> None:
        super().__init__(0, 65535)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(super().convert(value, param, ctx))
        except click.BadParameter:
            self.fail(f"{value!r} is not a number from 0 to 65535.", param, ctx)


def config_option(command: F) -> F:
    """Add the option --config."""
    return click.option("--config", type=click.Path(dir_okay=False), help=CONFIG_HELP)(command)


def environment() -> dict[str, Any]:
    """Return the keys of the environment."""
    from quart import Config

    values = Config(os.getcwd())
    values.from_prefixed_env()
    return dict(values)


def from_file(path: str | None) -> dict[str, Any]:
    """Return the keys of a file that the environment does not set.

    Raises:
        ConfigurationError: The file cannot be read, or has an unknown key.
    """
    if path is None:
        return {}
    from quart import Config

    from ..config import DEFAULTS, PREFIX, merge_keywords, unknown_key
    from ..errors import ConfigurationError

    values = Config(os.getcwd())
    if not Path(path).is_file():
        raise ConfigurationError(f"--config {path}: there is no file {path}.")
    try:
        if path.endswith(".toml"):
            import tomllib

            values.from_file(os.path.abspath(path), tomllib.load, text=False)
        else:
            values.from_pyfile(os.path.abspath(path))
        merge_keywords(values)
    except (ConfigurationError, OSError, SyntaxError, ValueError) as error:
        raise ConfigurationError(f"--config {path}: {error}") from None
    for key in values:
        if key.startswith(PREFIX) and key not in DEFAULTS:
            raise ConfigurationError(f"--config {path}: {unknown_key(key)}")
    return {key: value for key, value in values.items() if f"QUART_{key}" not in os.environ}


class readable_errors:
    """Context that shows an error in the settings as a sentence; exit code 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        from ..errors import ConfigurationError

        if isinstance(error, ConfigurationError):
            raise click.ClickException(str(error)) from None


def with_stores(
    config: str | None,
    work: Callable[[Any], Any],
    overrides: dict[str, Any] | None = None,
    **how: Any,
) -> None:
    """Open the storage, run a coroutine function with it, and close it."""
    import asyncio
    from contextlib import AsyncExitStack

    from .. import adapters
    from ..config import resolve

    with readable_errors():
        settings = resolve(environment() | from_file(config) | (overrides or {}))
        if settings.storage == "memory":
            raise click.UsageError("CHAT_STORAGE is memory. There is no database.")

        async def run() -> None:
            async with AsyncExitStack() as stack:
                await work(await adapters.stores(settings, stack, **how))

        asyncio.run(run())
