"""Configuration of Tortoise and asyncpg from a database URL."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from ...errors import ConfigurationError

CONNECTION = "chat"
APP = "quart_chat"
COMMAND_TIMEOUT = 15
CONNECT_TIMEOUT = 15
POOL_SIZE = 10

NUMBERS = {
    "maxsize": int,
    "minsize": int,
    "statement_cache_size": int,
    "max_cached_statement_lifetime": int,
    "max_cacheable_statement_size": int,
    "max_inactive_connection_lifetime": float,
    "command_timeout": float,
    "timeout": float,
}
TEXTS = ("application_name", "passfile", "target_session_attrs", "krbsrvname", "gsslib", "schema")
SSL = ("sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl")
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
SERVER = (
    "options",
    "search_path",
    "timezone",
    "role",
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "tcp_keepalives_idle",
    "tcp_keepalives_interval",
    "tcp_keepalives_count",
)
OTHERS = ("host", "port", "user", "password", "dbname", "connect_timeout", "direct_tls")


def tortoise_config(url: str) -> dict[str, Any]:
    """Return Tortoise's configuration for a database URL.

    Raises:
        ConfigurationError: It is neither SQLite nor PostgreSQL, its folder does not exist, or an
            option is unknown.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest:
        engine, credentials = "tortoise.backends.sqlite", _sqlite(rest)
    elif scheme in ("postgres", "postgresql") and rest:
        engine, credentials = "tortoise.backends.asyncpg", _postgres(url)
    else:
        raise ConfigurationError(
            f"CHAT_DATABASE_URL: {scheme or url!r} is not known; allowed are sqlite://PATH, "
            "postgres://… and postgresql://…."
        )
    return {
        "connections": {CONNECTION: {"engine": engine, "credentials": credentials}},
        "apps": {
            APP: {
                "models": ["quart_chat.adapters.database.models"],
                "default_connection": CONNECTION,
                "migrations": "quart_chat.adapters.database.migrations",
            }
        },
    }


def _sqlite(rest: str) -> dict[str, Any]:
    path, _, query = rest.partition("?")
    if path == ":memory:":
        raise ConfigurationError("CHAT_DATABASE_URL: for memory set CHAT_STORAGE=memory.")
    if not path:
        raise ConfigurationError("CHAT_DATABASE_URL: write the file's path after sqlite://.")
    if not Path(path).expanduser().absolute().parent.is_dir():
        raise ConfigurationError(f"CHAT_DATABASE_URL: the folder of {path} does not exist.")
    pragmas: dict[str, Any] = {
        "journal_mode": "WAL",
        "synchronous": "NORMAL",
        "busy_timeout": 5000,
    }
    pragmas |= {k: v for k, v in parse_qsl(query) if re.fullmatch(r"\w+", k + v)}
    return {"file_path": str(Path(path).expanduser()), **pragmas}


def _postgres(url: str) -> dict[str, Any]:
    try:
        import asyncpg  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "CHAT_DATABASE_URL: PostgreSQL needs asyncpg. Run: pip install 'quart-chat[postgres]'"
        ) from None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigurationError("CHAT_DATABASE_URL: the port is not a number.") from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    _refuse_unknown(options)
    number = _number(options, "port", int) or port or 5432
    credentials: dict[str, Any] = {
        "host": options.get("host") or parts.hostname or "localhost",
        "port": number,
        "user": options.get("user") or unquote(parts.username or "") or None,
        "password": options.get("password") or unquote(parts.password or "") or None,
        "database": unquote(parts.path.lstrip("/")) or options.get("dbname") or "postgres",
        "minsize": 1,
        "maxsize": POOL_SIZE,
        "command_timeout": COMMAND_TIMEOUT,
        "timeout": _number(options, "connect_timeout", float) or CONNECT_TIMEOUT,
        "application_name": "quart_chat",
    }
    credentials |= {k: _number(options, k, kind) for k, kind in NUMBERS.items() if k in options}
    credentials |= {name: options[name] for name in TEXTS if name in options}
    if "direct_tls" in options:
        credentials["direct_tls"] = options["direct_tls"] in ("1", "true")
    if settings := {name: options[name] for name in SERVER if name in options}:
        credentials["server_settings"] = settings
    if (mode := _ssl(options)) is not None:
        credentials["ssl"] = mode
    if credentials["maxsize"] < 1 or not 0 <= credentials["minsize"] <= credentials["maxsize"]:
        raise ConfigurationError(
            "CHAT_DATABASE_URL: maxsize must be at least 1, and minsize not larger than it."
        )
    return credentials


def _refuse_unknown(options: dict[str, str]) -> None:
    known = {*NUMBERS, *TEXTS, *SSL, *SERVER, *OTHERS}
    if unknown := [name for name in options if name not in known]:
        raise ConfigurationError(
            f"CHAT_DATABASE_URL: the option {unknown[0]!r} is not known. "
            f"Allowed are {', '.join(sorted(known))}."
        )


def _number(options: dict[str, str], name: str, kind: type[int] | type[float]) -> Any:
    if name not in options:
        return None
    try:
        value = kind(options[name])
    except ValueError:
        value = kind(-1)
    if not 0 <= value < 1e9:
        raise ConfigurationError(f"CHAT_DATABASE_URL: {name} must be a number, 0 or more.")
    return value


def _ssl(options: dict[str, str]) -> str | ssl.SSLContext | None:
    mode = options.get("sslmode")
    if mode is not None and mode not in SSL_MODES:
        raise ConfigurationError(
            f"CHAT_DATABASE_URL: sslmode must be one of {', '.join(SSL_MODES)}."
        )
    files = [name for name in SSL[1:] if options.get(name)]
    if not files:
        return mode
    if mode not in SSL_MODES[3:]:
        raise ConfigurationError(
            f"CHAT_DATABASE_URL: {files[0]} needs sslmode=require, verify-ca or verify-full."
        )
    return _ssl_context(mode, options)


def _ssl_context(mode: str, options: dict[str, str]) -> ssl.SSLContext:
    """Return what libpq does with these files: a root certificate is checked even if required."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "verify-full"
    roots = options.get("sslrootcert")
    if mode == "require" and not roots:
        context.verify_mode = ssl.CERT_NONE
    name = "sslrootcert"
    try:
        if roots and roots != "system":
            context.load_verify_locations(roots)
        else:
            context.load_default_certs()
        if crl := options.get("sslcrl"):
            name = "sslcrl"
            context.load_verify_locations(crl)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        if certificate := options.get("sslcert"):
            name = "sslcert"
            context.load_cert_chain(certificate, options.get("sslkey"), options.get("sslpassword"))
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"CHAT_DATABASE_URL: {name} cannot be read ({type(error).__name__})."
        ) from error
    return context
