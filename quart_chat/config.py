"""Settings: one table of defaults, resolved and checked once."""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from .errors import ConfigurationError

PREFIX = "CHAT_"


def _listed(value: Any) -> Any:
    """Return the items of a list written as JSON or with commas."""
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
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from None


def _rate(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d*/(second|minute|hour)", value):
        raise ValueError("write a number per second, minute or hour, for instance 60/minute")
    return value


Rate = Annotated[str, AfterValidator(_rate)]
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
    """Every setting, without its prefix; ``docs/reference/configuration.md`` lists them."""

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
        "local", "`local`: all requests share user `1`. `remote`: Supabase access tokens."
    )
    supabase_url: str | None = _f(None, "The Supabase project's URL; else `SUPABASE_URL`.")
    supabase_key: str | None = _f(None, "Its publishable (anon) key; else `SUPABASE_KEY`.")
    supabase_audience: Strings = _f(("authenticated",), "Accepted `aud` claims of Supabase tokens.")
    supabase_algorithms: Annotated[
        tuple[Literal["ES256", "RS256", "HS256"], ...], BeforeValidator(_listed)
    ] = _f(
        ("ES256", "RS256", "HS256"),
        "Accepted signature algorithms. Without `HS256` no token is sent to the auth server.",
    )
    storage: Literal["database", "memory"] = _f(
        "database", "`memory` keeps conversations only while they are in use (`--no-database`)."
    )
    database_url: str = _f(
        "sqlite://quart_chat.sqlite3",
        "`sqlite://` + path, `postgres://…` or `postgresql://…`; else `DATABASE_URL`.",
    )
    migrate: bool = _f(True, "Apply the database's migrations at start.")
    providers: Annotated[dict[str, ProviderSettings], BeforeValidator(_json)] = _f(
        {},
        "`{name: {base_url?, api_key? or api_key_env?, models?, default_model?, reports_usage?}}`, "
        "in addition to the built-in providers whose key variable is set.",
    )
    default_provider: str | None = _f(
        None, "Provider of messages that name none; default: the first configured one."
    )
    default_model: str | None = _f(
        None, "Model of messages that name none; default: the default provider's default model."
    )
    local_model: str | None = _f(
        None, "GGUF file for the provider `local`; default: SmolLM2-135M-Instruct."
    )
    title_model: str | None = _f(None, "Model that writes a thread's title from its first message.")
    system_prompt: str | None = _f(None, "First message of every request to a model.")
    history_messages: Count = _f(100, "Number of the newest messages that are sent to a model.")
    history_chars: Count | None = _f(
        1_000_000, "Number of the newest characters that are sent to a model."
    )
    max_tokens: Count | None = _f(None, "Largest `max_tokens` that a client may request.")
    image_urls: Literal["all", "data"] = _f(
        "all",
        "`data` refuses pictures by URL: a provider of yours would fetch what a client names.",
    )
    tools: Strings = _f((), "Import paths of modules whose tools are registered.")
    mcp_servers: Annotated[dict[str, MCPServer], BeforeValidator(_json)] = _f(
        {},
        "`{name: {command, args?, env?} or {url, headers?}, needs_approval?}`: "
        "MCP servers whose tools are registered.",
    )
    max_tool_rounds: Count = _f(10, "Largest number of rounds of tool calls in one answer.")
    max_tool_calls: Count = _f(
        32, "Largest number of tool calls in one round; further ones get an error as result."
    )
    max_tool_threads: Count = _f(64, "Largest number of threads that run plain tool functions.")
    max_answer_chars: Count = _f(
        4_000_000,
        "Largest number of characters in one answer: text, reasoning, arguments and results of "
        "tools.",
    )
    tool_timeout: Seconds = _f(
        60.0, "Seconds that one tool call may take, on the server or at the client."
    )
    approval_timeout: Seconds = _f(
        3600.0, "Seconds until an unanswered approval counts as refused."
    )
    run_timeout: Seconds = _f(
        600.0, "Seconds that one answer may take, without the time it waits for approvals."
    )
    provider_idle_timeout: Seconds = _f(
        60.0, "Seconds without data after which a provider's request fails."
    )
    storage_retry: Seconds = _f(
        10.0, "Seconds of retries before a failure to store an answer is reported to the client."
    )
    on_busy: Literal["interrupt", "reject", "queue"] = _f(
        "interrupt",
        "What happens when a message arrives while its thread is already being answered.",
    )
    queue_limit: Count = _f(8, "Largest number of messages that wait in one thread.")
    on_disconnect: Literal["continue", "stop"] = _f(
        "continue", "What happens to a run whose last follower has disconnected."
    )
    resume_window: Seconds = _f(
        60.0, "Seconds that memory storage keeps a thread that no connection uses."
    )
    event_retention: Seconds = _f(600.0, "Seconds that the events of an ended run are kept.")
    retention_days: Annotated[float, Field(gt=0)] | None = _f(
        None, "Days without activity after which a thread is deleted."
    )
    max_message_bytes: Count = _f(1024 * 1024, "Largest size of a frame or body in bytes.")
    allowed_origins: Strings = _f(
        (),
        "Origins of pages that may use the chat, in addition to its own; `*` allows every origin.",
    )
    rate_limit: Rate | None = _f(
        None,
        "Rate limit for messages of one user, `N/second|minute|hour`; with remote auth 60/minute.",
    )
    request_rate_limit: Rate | None = _f(
        None,
        "Rate limit for JSON calls and refused frames of one user; with remote auth 600/minute.",
    )
    max_runs_per_user: Count | None = _f(
        None, "Largest number of simultaneous answers of one user; with remote auth 8."
    )
    max_connections_per_user: Count | None = _f(
        None, "Largest number of simultaneous sockets and streams of one user; with remote auth 32."
    )
    max_connections: Count = _f(
        10_000, "Largest number of simultaneous sockets and streams of all users."
    )
    handshake_timeout: Seconds = _f(10.0, "Seconds within which a token must be verified.")
    drain_timeout: Seconds = _f(25.0, "Seconds that running answers may continue at shutdown.")
    send_timeout: Annotated[float, Field(gt=0)] = _f(
        30.0, "Seconds after which a client that does not read pending data is disconnected."
    )
    body_timeout: Annotated[float, Field(gt=0)] = _f(
        60.0, "Seconds within which a request's head, and then its body, must arrive."
    )
    keepalive: Annotated[float, Field(gt=0)] = _f(
        15.0, "Seconds of silence after which an SSE stream sends a comment."
    )

    access_log: bool = _f(False, "Log each request; `chat-server` only (`--access-log`).")

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
"""Every key with its default; ``Settings`` describes each one."""

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
"""Variables that are read if the key is unset."""

SECRET_KEYS = frozenset({"supabase_key", "providers", "database_url", "mcp_servers"})


def resolve(config: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Check an application's configuration and fill in the rest.

    Args:
        config: Keys with the prefix ``CHAT_`` are settings; others are ignored.
        environ: Mapping of well-known variables; default: the process's environment.

    Raises:
        ConfigurationError: Names the key, the value and what is allowed.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for key, value in config.items():
        if not key.startswith(PREFIX):
            continue
        if key not in DEFAULTS:
            raise ConfigurationError(unknown_key(key, environ))
        if value is not None and value != "":
            values[key.removeprefix(PREFIX).lower()] = value
    for name, variables in WELL_KNOWN.items():
        value = next((environ[variable] for variable in variables if environ.get(variable)), None)
        if value is not None:
            values.setdefault(name, value.lower() if name == "environment" else value)
    if values.get("auth") == "remote":
        values = REMOTE_DEFAULTS | values
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_sentence(error, values)) from None


def unknown_key(key: str, environ: Mapping[str, str] | None = None) -> str:
    """Return a message about an unknown key, with the closest known key and its source."""
    near = difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0)[0]
    variable = f"QUART_{key}"
    if environ is not None and variable in environ:
        return (
            f"{key}: there is no such key. The environment variable {variable} sets it. Did you "
            f"mean QUART_{near}? If it belongs to another program, unset it here."
        )
    return f"{key}: there is no such key. Did you mean {near}?"


def merge_keywords(
    config: Mapping[str, Any] | None, keywords: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the configuration of an application from its keys and from keyword arguments.

    Keyword arguments are settings in lower case without the prefix (``protocol="sse"``); they win.

    Raises:
        ConfigurationError: A key of ``config`` lacks the prefix, or a keyword is not a setting.
    """
    values = dict(config or {})
    for key in values:
        if PREFIX + key.upper() in DEFAULTS:
            raise ConfigurationError(
                f"{key}: settings have the prefix {PREFIX}. Write {PREFIX}{key.upper()}."
            )
    for name, value in (keywords or {}).items():
        key = name.upper() if name.upper().startswith(PREFIX) else PREFIX + name.upper()
        if key not in DEFAULTS:
            near = unknown_key(key).rpartition(PREFIX)[2].rstrip("?").lower()
            raise ConfigurationError(f"{name}: there is no such setting. Did you mean {near}?")
        values[key] = value
    return values


def install_command(extra: str) -> str:
    """Return the command that installs an extra, also if the package came from a folder."""
    name = "quart-chat"
    try:
        source = json.loads(distribution(name).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        source = {}
    if "dir_info" in source and (path := Path(unquote(urlsplit(source["url"]).path))).is_dir():
        name = str(path)
    return f"pip install '{name}[{extra}]'"


def _sentence(error: ValidationError, values: Mapping[str, Any]) -> str:
    first = error.errors(include_url=False)[0]
    message = re.sub(r"^Value error, ", "", first["msg"])
    if not first["loc"]:
        name, _, rest = message.partition(": ")
        return f"{PREFIX}{name.upper()}: {rest}."
    name = str(first["loc"][0])
    inner = ".".join(str(step) for step in first["loc"][1:])
    value = "" if name in SECRET_KEYS else f" {values.get(name)!r} is not allowed:"
    where = f" ({inner})" if inner else ""
    return f"{PREFIX}{name.upper()}{where}:{value} {message[:1].lower()}{message[1:]}."


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
    """Refuse to serve all requests as one user on a public address in production.

    Raises:
        ConfigurationError: ``CHAT_AUTH`` is local and the address is not loopback.
    """
    if settings.environment == "production" and settings.auth == "local" and not loopback(host):
        raise ConfigurationError(
            f"CHAT_AUTH: with local auth all requests share one user, and {host} is a public "
            "address. In production set CHAT_AUTH=remote (--remote-auth) or --host 127.0.0.1."
        )
