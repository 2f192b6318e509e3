"""Adapters of the settings, each imported only when it is configured."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from ..config import ProviderSettings, Settings, install_command
from ..core.models import ConfiguredProvider
from ..core.ports import Authenticator, RunLog, Storage, UserData
from ..core.tools import ToolRegistry
from ..errors import ConfigurationError
from .catalogue import CATALOGUE
from .openai.provider import Endpoint, OpenAIProvider

__all__ = [
    "Stores",
    "authenticator",
    "connect_tools",
    "fetch_local_model",
    "known_providers",
    "local_model_is_there",
    "sources",
    "stores",
    "uses_local_model",
]

LOCAL = "local"
LOCAL_KEY = "not needed"


@dataclass(frozen=True)
class Stores:
    """Stores of conversations, user data and events."""

    storage: Storage
    user_data: UserData
    log: RunLog


async def stores(
    settings: Settings, stack: AsyncExitStack, *, create: bool = True, serving: bool = False
) -> Stores:
    """Open the storage and the event log; the stack closes them.

    Without ``create`` an SQLite file must exist; a process that is ``serving`` warns of another.

    Raises:
        ConfigurationError: The database cannot be opened.
    """
    if settings.storage == "memory":
        from .memory import MemoryEventLog, MemoryStorage

        memory = MemoryStorage()
        return Stores(memory, memory, MemoryEventLog(settings.event_retention))
    from .database.connection import Database
    from .database.event_log import DatabaseEventLog
    from .database.storage import DatabaseStorage
    from .database.user_data import DatabaseUserData

    database = Database(settings.database_url)
    await database.open(migrate=settings.migrate, create=create, serving=serving)
    stack.push_async_callback(database.close)
    log = DatabaseEventLog(database, settings.event_retention)
    log.start()
    stack.push_async_callback(log.close)
    return Stores(DatabaseStorage(database), DatabaseUserData(database), log)


def known_providers() -> dict[str, str]:
    """Return every provider that could be configured, with a hint how."""
    return {name: entry.hint for name, entry in CATALOGUE.items()} | {
        LOCAL: f"Install it with: {install_command('local')}."
    }


def sources(settings: Settings, stack: AsyncExitStack) -> list[ConfiguredProvider]:
    """Return the configured providers by preference; the local model if there is no other.

    Raises:
        ConfigurationError: ``CHAT_LOCAL_MODEL`` or ``CHAT_DEFAULT_PROVIDER`` is not available.
    """
    configured = [
        _configured(name, options, settings, stack) for name, options in settings.providers.items()
    ]
    names = {source.name for source in configured}
    configured += [
        _source(name, endpoint, entry.default_model, (), settings, stack)
        for name, entry in CATALOGUE.items()
        if name not in names and (endpoint := _built_in(name, os.environ)) is not None
    ]
    order = [*settings.providers, *CATALOGUE]
    configured.sort(key=lambda source: order.index(source.name))
    wanted = settings.local_model is not None or settings.default_provider == LOCAL
    if LOCAL not in settings.providers and (wanted or not configured):
        configured += _local(settings, stack, required=wanted)
    default = settings.default_provider
    if default is not None and default not in {source.name for source in configured}:
        choices = ", ".join(source.name for source in configured) or "none"
        hint = known_providers().get(default, "Describe it in CHAT_PROVIDERS.")
        raise ConfigurationError(
            f"CHAT_DEFAULT_PROVIDER: {default!r} is not configured ({choices} are). {hint}"
        )
    for source in configured:
        if source.name == (default or configured[0].name) and isinstance(
            source.provider, OpenAIProvider
        ):
            source.provider.warm_up()
    return configured


def _configured(
    name: str, options: ProviderSettings, settings: Settings, stack: AsyncExitStack
) -> ConfiguredProvider:
    entry = CATALOGUE.get(name)
    base_url = options.base_url or (entry.base_url if entry else None)
    if base_url is None:
        raise ConfigurationError(f"CHAT_PROVIDERS ({name}.base_url): a URL is required.")
    key = options.api_key
    variable = options.api_key_env or (entry.key if entry and options.base_url is None else None)
    if key is None and variable is not None:
        key = os.environ.get(variable)
        if not key:
            raise ConfigurationError(
                f"CHAT_PROVIDERS ({name}): the variable {variable} is not set."
            )
    default = options.default_model
    if default is None and entry is not None and not options.models:
        default = entry.default_model
    endpoint = Endpoint(base_url, key or LOCAL_KEY, options.reports_usage)
    return _source(name, endpoint, default, options.models, settings, stack)


def _built_in(name: str, environ: Mapping[str, str]) -> Endpoint | None:
    entry = CATALOGUE[name]
    key = environ.get(entry.key) if entry.key else None
    url = environ.get(entry.url) if entry.url else None
    if not key and not url:
        return None
    if entry.key and not key and name != "openai":
        return None
    return Endpoint(url or entry.base_url, key or LOCAL_KEY, entry.reports_usage)


def _source(
    name: str,
    endpoint: Endpoint,
    default_model: str | None,
    models: tuple[str, ...],
    settings: Settings,
    stack: AsyncExitStack,
) -> ConfiguredProvider:
    async def find() -> Endpoint:
        return endpoint

    return ConfiguredProvider(name, _provider(name, find, settings, stack), default_model, models)


def _provider(
    name: str,
    find: Callable[[], Awaitable[Endpoint]],
    settings: Settings,
    stack: AsyncExitStack,
) -> OpenAIProvider:
    provider = OpenAIProvider(name, find, settings.provider_idle_timeout)
    stack.push_async_callback(provider.close)
    return provider


def _local(
    settings: Settings, stack: AsyncExitStack, *, required: bool
) -> list[ConfiguredProvider]:
    from .local_model import LocalModel, problem

    if (why := problem(settings.local_model)) is not None:
        if required:
            raise ConfigurationError(why)
        return []
    model = LocalModel(settings.local_model)
    stack.callback(model.close)

    async def find() -> Endpoint:
        url, key = await model.endpoint()
        return Endpoint(url, key, takes_tools=model.takes_tools, options=model.options)

    return [ConfiguredProvider(LOCAL, _provider(LOCAL, find, settings, stack), model.name)]


def uses_local_model(settings: Settings) -> bool:
    """Return whether the local model answers.

    Raises:
        ConfigurationError: It is configured and cannot answer.
    """
    wanted = settings.local_model is not None or settings.default_provider == LOCAL
    others = bool(settings.providers) or any(_built_in(name, os.environ) for name in CATALOGUE)
    if LOCAL in settings.providers or (others and not wanted):
        return False
    from .local_model import problem

    if (why := problem(settings.local_model)) is not None:
        raise ConfigurationError(why)
    return True


def fetch_local_model(progress: Callable[[int, int], None]) -> Path:
    """Fetch the default local model into the user's cache; see ``local_model.fetch``."""
    from .local_model import fetch

    return fetch(progress)


def local_model_is_there() -> bool:
    """Return whether the default local model is in the user's cache."""
    from .local_model import MODEL_BYTES, cached_model

    path = cached_model()
    return path.exists() and path.stat().st_size == MODEL_BYTES


async def authenticator(settings: Settings, stack: AsyncExitStack) -> Authenticator | None:
    """Return the authenticator of access tokens, or None with local auth."""
    if settings.auth == "local":
        return None
    from .supabase import SupabaseAuthenticator

    assert settings.supabase_url is not None
    assert settings.supabase_key is not None
    verifier = SupabaseAuthenticator(
        settings.supabase_url,
        settings.supabase_key,
        settings.supabase_audience,
        settings.supabase_algorithms,
    )
    await verifier.open()
    stack.push_async_callback(verifier.close)
    return verifier


async def connect_tools(settings: Settings, tools: ToolRegistry, stack: AsyncExitStack) -> None:
    """Register the tools of the configured MCP servers, and keep connected to them."""
    if not settings.mcp_servers:
        return
    from .mcp import MCPTools

    for name, server in settings.mcp_servers.items():
        source = MCPTools(name, server, tools)
        await source.open()
        stack.push_async_callback(source.close)
