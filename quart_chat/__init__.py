"""A chat backend for Quart: WebSocket and SSE, runs that survive everything, any model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quart import Quart

    from .core.messages import User as User
    from .core.tools import Tool as Tool
    from .core.tools import ToolContext as ToolContext
    from .core.tools import ToolError as ToolError
    from .core.tools import tool as tool
    from .errors import ChatError as ChatError
    from .errors import ConfigurationError as ConfigurationError
    from .extension import QuartChat as QuartChat
    from .transports.health import health_blueprint as health_blueprint
    from .transports.sse import ChatSSERunner as ChatSSERunner
    from .transports.sse import sse_blueprint as sse_blueprint
    from .transports.threads import threads_blueprint as threads_blueprint
    from .transports.websocket import ChatWebSocketRunner as ChatWebSocketRunner
    from .transports.websocket import websocket_blueprint as websocket_blueprint

_HOMES = {
    "ChatError": "errors",
    "ChatSSERunner": "transports.sse",
    "ChatWebSocketRunner": "transports.websocket",
    "ConfigurationError": "errors",
    "QuartChat": "extension",
    "Tool": "core.tools",
    "ToolContext": "core.tools",
    "ToolError": "core.tools",
    "User": "core.messages",
    "health_blueprint": "transports.health",
    "sse_blueprint": "transports.sse",
    "threads_blueprint": "transports.threads",
    "tool": "core.tools",
    "websocket_blueprint": "transports.websocket",
}

__all__ = [
    "ChatError",
    "ChatSSERunner",
    "ChatWebSocketRunner",
    "ConfigurationError",
    "QuartChat",
    "Tool",
    "ToolContext",
    "ToolError",
    "User",
    "create_app",
    "health_blueprint",
    "sse_blueprint",
    "threads_blueprint",
    "tool",
    "websocket_blueprint",
]


def create_app(
    config: Mapping[str, Any] | None = None, chat: QuartChat | None = None, **keywords: Any
) -> Quart:
    """Make a Quart application that is a chat server; see ``quart_chat.app.create_app``."""
    from .app import create_app

    return create_app(config, chat, **keywords)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("quart-chat")
    # Quart takes 0.4 s to import, which `quart_chat --help` has no time for.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
