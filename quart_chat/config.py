"""The settings: one table of defaults, resolved and checked once."""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigurationError

PREFIX = "CHAT_"


def _listed(value: Any) -> Any:
    """Lists come as JSON or with commas from the environment."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json(value)
    return [item.strip() for item in value.split(",") if item.strip()]


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("is not valid JSON") from None


Strings = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class ProviderSettings(BaseModel):
    """One entry of ``CHAT_PROVIDERS``."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    base_url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    api_key: str | None = Field(default=None, repr=False)
    api_key_env: str | None = None
    models: Strings = ()
    default_model: str | None = None
    reports_usage: bool = True


class MCPServer(BaseModel):
    """One entry of ``CHAT_MCP_SERVERS``: a command to start, or a streamable HTTP URL."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] | None = Field(default=None, repr=False)
    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    headers: dict[str, str] | None = Field(default=None, repr=False)
    needs_approval: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> MCPServer:
        if (self.command is None) == (self.url is None):
            raise ValueError("needs either command or url")
        return self


def _f(default: Any, description: str) -> Any:
    return Field(default=default, description=description)


class Settings(BaseModel):
    """Every setting, without its prefix; ``docs/reference/configuration.md`` is made of this."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, str_strip_whitespace=True
    )

    environment: Literal["development", "production"] = _f(
        "development", "`production` refuses to start with settings that are unsafe in public."
    )
    protocol: Literal["websocket", "sse", "both"] = _f(
        "both", "What `create_app()` serves: the WebSocket, the SSE stream, or both."
    )
    auth: Literal["local", "remote"] = _f(
        "local", "`local`: everybody is user `1`. `remote`: Supabase access tokens."
    )
    supabase_url: str | None = _f(None, "The Supabase project's URL; else `SUPABASE_URL`.")
    supabase_key: str | None = _f(None, "Its publishable (anon) key; else `SUPABASE_KEY`.")
    supabase_audience: Strings = _f(("authenticated",), "Accepted `aud` claims of Supabase tokens.")
    storage: Literal["database", "memory"] = _f(
        "database", "`memory` keeps conversations only while they are used (`--no-database`)."
    )
    database_url: str = _f(
        "sqlite://quart_chat.sqlite3",
        "`sqlite://` + path, `postgres://…` or `postgresql://…`; else `DATABASE_URL`.",
    )
    migrate: bool = _f(True, "Bring the database's tables up to date at start.")
    providers: Annotated[dict[str, ProviderSettings], BeforeValidator(_json)] = _f(
        {},
        "`{name: {base_url?, api_key? or api_key_env?, models?, default_model?, reports_usage?}}`, "
        "besides the ready-made providers whose key variable is set.",
    )
    default_provider: str | None = _f(None, "Default: the first that is configured.")
    default_model: str | None = _f(None, "Default: the default provider's default model.")
    local_model: str | None = _f(
        None, "A GGUF file for the provider `local`; default: SmolLM2-135M-Instruct."
    )
    title_model: str | None = _f(None, "A model that makes titles of first messages.")
    system_prompt: str | None = _f(None, "Comes first in every request to a model.")
    history_messages: Count = _f(100, "The newest messages that a model gets.")
    history_chars: Count | None = _f(1_000_000, "The newest characters that a model gets.")
    max_tokens: Count | None = _f(None, "The largest `max_tokens` that a client may ask for.")
    tools: Strings = _f((), "Import paths of modules whose tools are registered.")
    mcp_servers: Annotated[dict[str, MCPServer], BeforeValidator(_json)] = _f(
        {}, "`{name: {command, args?, env?} or {url, headers?}, needs_approval?}`: tools by MCP."
    )
    max_tool_rounds: Count = _f(10, "Rounds of tool calls in one answer.")
    max_tool_calls: Count = _f(
        32, "Tool calls in one round; further ones get an error as their result."
    )
    max_tool_threads: Count = _f(64, "Threads of the process that plain tool functions may occupy.")
    max_answer_chars: Count = _f(
        4_000_000, "Characters of one answer (text, reasoning, arguments and results of tools)."
    )
    tool_timeout: Seconds = _f(60.0, "Seconds for one tool call, on the server or at the client.")
    approval_timeout: Seconds = _f(3600.0, "Seconds until an unanswered approval is a refusal.")
    run_timeout: Seconds = _f(600.0, "Seconds for one answer, waiting for people not counted.")
    provider_idle_timeout: Seconds = _f(60.0, "Seconds of a provider's silence.")
    storage_retry: Seconds = _f(
        10.0, "Seconds in which storing an answer is tried again before the client is told."
    )
    on_busy: Literal["interrupt", "reject", "queue"] = _f(
        "interrupt", "What a message does to the one that is being answered in its thread."
    )
    queue_limit: Count = _f(8, "Messages that may wait in one thread.")
    on_disconnect: Literal["continue", "stop"] = _f(
        "continue", "What becomes of a run whose last follower has gone."
    )
    resume_window: Seconds = _f(
        60.0, "Seconds for which memory storage keeps a thread that no connection uses."
    )
    event_retention: Seconds = _f(600.0, "Seconds for which an ended run's events are kept.")
    retention_days: Annotated[float, Field(gt=0)] | None = _f(
        None, "Days without activity after which a thread is deleted."
    )
    max_message_bytes: Count = _f(1024 * 1024, "Bytes of a frame or body.")
    allowed_origins: Strings = _f(
        (), "Origins of pages that may use the chat, besides its own; `*` is every one."
    )
    rate_limit: Annotated[str, Field(pattern=r"^[1-9]\d*/(second|minute|hour)$")] | None = _f(
        None, "Messages of one user, `N/second|minute|hour`; with remote auth 60/minute."
    )
    request_rate_limit: Annotated[str, Field(pattern=r"^[1-9]\d*/(second|minute|hour)$")] | None = (
        _f(
            None,
            "JSON calls and refused frames of one user, `N/second|minute|hour`; with remote auth "
            "600/minute.",
        )
    )
    max_runs_per_user: Count | None = _f(None, "Answers at once; with remote auth 8.")
    max_connections_per_user: Count | None = _f(
        None, "Sockets and streams at once; with remote auth 32."
    )
    max_connections: Count = _f(10_000, "Sockets and streams of all users at once.")
    handshake_timeout: Seconds = _f(10.0, "Seconds in which a token has to be verified.")
    drain_timeout: Seconds = _f(25.0, "Seconds that running answers get at shutdown.")
    send_timeout: Annotated[float, Field(gt=0)] = _f(
        30.0, "Seconds after which a client that takes nothing of what waits for it is dropped."
    )
    body_timeout: Annotated[float, Field(gt=0)] = _f(
        60.0, "Seconds in which a request's head, and then its body, has to arrive."
    )
    keepalive: Annotated[float, Field(gt=0)] = _f(
        15.0, "Seconds of silence after which an SSE stream sends a comment."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        if self.auth == "remote":
            for name in ("supabase_url", "supabase_key"):
                if not getattr(self, name):
                    raise ValueError(
                        f"{name}: remote auth needs it; set {name.upper()} in the environment"
                    )
        if self.environment == "production" and "*" in self.allowed_origins:
            raise ValueError(
                "allowed_origins: '*' is not allowed in production; list the origins of your pages"
            )
        return self


DEFAULTS: dict[str, Any] = {
    PREFIX + name.upper(): field.get_default() for name, field in Settings.model_fields.items()
}
"""Every key with its default; ``Settings`` says what each one means."""

REMOTE_DEFAULTS: dict[str, Any] = {
    "rate_limit": "60/minute",
    "request_rate_limit": "600/minute",
    "max_runs_per_user": 8,
    "max_connections_per_user": 32,
}

WELL_KNOWN = {
    "database_url": ("DATABASE_URL",),
    "supabase_url": ("SUPABASE_URL",),
    "supabase_key": ("SUPABASE_KEY",),
    "environment": ("QUART_CHAT_ENVIRONMENT", "NODETOOL_ENVIRONMENT"),
}
"""Variables that are read where the key is unset."""

SECRET_KEYS = frozenset({"supabase_key", "providers", "database_url", "mcp_servers"})


def resolve(config: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Check an application's configuration and fill in the rest.

    Args:
        config: Keys with the prefix ``CHAT_`` are ours; the others are not looked at.
        environ: Where well-known variables are read; default: the process's environment.

    Raises:
        ConfigurationError: Names the key, the value and what is allowed.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for key, value in config.items():
        if not key.startswith(PREFIX):
            continue
        if key not in DEFAULTS:
            raise ConfigurationError(_unknown(key))
        if value is not None and value != "":
            values[key.removeprefix(PREFIX).lower()] = value
    for name, variables in WELL_KNOWN.items():
        found = next((environ[variable] for variable in variables if environ.get(variable)), None)
        if found is not None:
            values.setdefault(name, found.lower() if name == "environment" else found)
    if values.get("auth") == "remote":
        values = REMOTE_DEFAULTS | values
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_sentence(error, values)) from None


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0)
    return f"{key}: there is no such key. Did you mean {near[0]}?"


def _sentence(error: ValidationError, values: Mapping[str, Any]) -> str:
    first = error.errors(include_url=False)[0]
    says = re.sub(r"^Value error, ", "", first["msg"])
    if not first["loc"]:
        name, _, rest = says.partition(": ")
        return f"{PREFIX}{name.upper()}: {rest}."
    name = str(first["loc"][0])
    inner = ".".join(str(step) for step in first["loc"][1:])
    value = "" if name in SECRET_KEYS else f" {values.get(name)!r} is not allowed:"
    where = f" ({inner})" if inner else ""
    return f"{PREFIX}{name.upper()}{where}:{value} {says[:1].lower()}{says[1:]}."


def loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_address(settings: Settings, host: str) -> None:
    """Refuse to serve everybody as the same user, in public, in production.

    Raises:
        ConfigurationError: ``CHAT_AUTH`` is local and the address is not loopback.
    """
    if settings.environment == "production" and settings.auth == "local" and not loopback(host):
        raise ConfigurationError(
            f"CHAT_AUTH: local auth serves everybody as one user, and {host} is a public address. "
            "In production set CHAT_AUTH=remote (--remote-auth) or --host 127.0.0.1."
        )
