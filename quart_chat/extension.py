"""``QuartChat``: settings, adapters and lifespan of the chat in a Quart application."""

from __future__ import annotations

import importlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Any, TypeVar

from quart import Quart, current_app

from . import adapters
from .config import Settings, resolve
from .core.conversation import Conversation
from .core.housekeeping import Housekeeping
from .core.models import ConfiguredProvider, ModelRegistry
from .core.parts import Parts
from .core.policy import Policy
from .core.ports import Authenticator, Provider, RunLog, Storage, UserData
from .core.recovery import Recovery
from .core.runs import Runs
from .core.titles import TitleMaker
from .core.tool_threads import ToolThreads
from .core.tools import ApprovalRule, Tool, ToolRegistry, tool
from .errors import ConfigurationError
from .transports.asgi import prepare
from .transports.guard import Guard, HostAuthenticate
from .transports.state import EXTENSION, ChatState

logger = logging.getLogger("quart_chat")

EXPIRED_THREADS = 100

H = TypeVar("H", bound=HostAuthenticate)


class QuartChat:
    """Quart extension for the chat: ``QuartChat(app)``, or ``init_app`` for several applications.

    Arguments win over the configuration: ``storage``, ``event_log`` and ``user_data`` (together),
    an ``authenticator`` of tokens, and ``providers`` by name. The decorators ``authenticate`` and
    ``tool`` register functions.

    Raises:
        ConfigurationError: A ``CHAT_`` key of the application is invalid; at ``init_app``.
    """

    def __init__(
        self,
        app: Quart | None = None,
        *,
        storage: Storage | None = None,
        event_log: RunLog | None = None,
        user_data: UserData | None = None,
        authenticator: Authenticator | None = None,
        providers: Mapping[str, Provider] | None = None,
    ) -> None:
        self._stores = (storage, event_log, user_data)
        self._authenticator = authenticator
        self._providers = dict(providers or {})
        self._host_authenticate: HostAuthenticate | None = None
        self._tools: list[Tool] = []
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Quart) -> None:
        """Add the chat to an application.

        Raises:
            ConfigurationError: A ``CHAT_`` key is invalid.
        """
        settings = resolve(app.config)
        if settings.environment == "production" and app.debug:
            raise ConfigurationError("DEBUG: debug mode shows tracebacks. Unset it in production.")
        if EXTENSION in app.extensions:
            raise ConfigurationError("This application already has a QuartChat. Use that one.")
        lifetime = ChatLifespan(self, settings)
        app.extensions[EXTENSION] = lifetime
        app.config.setdefault("QUART_SCHEMA_CONVERT_CASING", False)
        app.config.setdefault("QUART_SCHEMA_CONVERSION_PREFERENCE", None)
        prepare(app)
        app.before_serving(lifetime.open)
        app.after_serving(lifetime.close)

    @property
    def server(self) -> ChatState:
        """State of the chat of the application that handles this request."""
        server: ChatState = current_app.extensions[EXTENSION].server
        return server

    def authenticate(self, function: H) -> H:
        """Register the function that identifies the user.

        The function gets the request or websocket and returns a user id, or None.
        """
        self._host_authenticate = function
        return function

    def export(self, user: str) -> AsyncGenerator[dict[str, Any], None]:
        """Yield everything that the current application stores of a user, as plain maps."""
        return self.server.user_data.export(user)

    async def erase(self, user: str) -> int:
        """Stop a user's runs, delete all of the user's data, and return the number of threads."""
        await self.server.conversation.forget_runs(user)
        return await self.server.user_data.erase(user)

    async def expire(self, before: datetime, limit: int = EXPIRED_THREADS) -> int:
        """Delete at most ``limit`` threads without activity since then; return their number."""
        return await self.server.user_data.expire(before, limit)

    def tool(
        self,
        function: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        needs_approval: ApprovalRule = False,
        users: Callable[[str], bool] | None = None,
    ) -> Any:
        """Register a function as a tool; see ``quart_chat.tool``."""

        def register(function: Callable[..., Any]) -> Tool:
            registered = tool(name=name, needs_approval=needs_approval, users=users)(function)
            self._tools.append(registered)
            return registered

        return register if function is None else register(function)


class ChatLifespan:
    """Lifespan of the chat of one application."""

    def __init__(self, chat: QuartChat, settings: Settings) -> None:
        self.settings = settings
        self.tools = ToolRegistry(_modules_tools(settings.tools))
        self._chat = chat
        self._server: ChatState | None = None
        self._log: RunLog | None = None
        self._stack = AsyncExitStack()
        self._drained = False

    @property
    def server(self) -> ChatState:
        """State that the transports use.

        Raises:
            RuntimeError: The application is not serving.
        """
        if self._server is None:
            raise RuntimeError("The chat is not open: the application does not serve yet.")
        return self._server

    async def open(self) -> None:
        """Open the adapters, unless they are open, and recover the runs of dead processes.

        Raises:
            ConfigurationError: An adapter cannot be opened.
        """
        if self._server is not None:
            return
        self._stack = AsyncExitStack()
        self._drained = False
        try:
            self._server = await self._open(self._stack)
        except BaseException:
            await self._stack.aclose()
            raise

    async def _open(self, stack: AsyncExitStack) -> ChatState:
        chat, settings = self._chat, self.settings
        storage, log, user_data = await self._open_stores(stack)
        sources = [ConfiguredProvider(name, provider) for name, provider in chat._providers.items()]
        models = ModelRegistry(
            sources or adapters.sources(settings, stack),
            default_provider=settings.default_provider,
            default_model=settings.default_model,
            known=adapters.known_providers(),
        )
        for each in chat._tools:
            self.tools.add(each)
        await adapters.connect_tools(settings, self.tools, stack)
        policy = policy_of(settings)
        threads = ToolThreads(settings.max_tool_threads)
        parts = Parts(storage, log, models, self.tools, policy, threads)
        runs = Runs(parts)
        titles = None
        if settings.title_model is not None:
            titles = TitleMaker(storage, models, settings.title_model)
            stack.push_async_callback(titles.close)
        conversation = Conversation(parts, runs, titles)
        if conversation.expiry is not None:
            stack.callback(conversation.expiry.close)
        guard = Guard(settings)
        guard.host_authenticate = chat._host_authenticate
        guard.authenticator = chat._authenticator
        if guard.is_local:
            guard.authenticator = await adapters.authenticator(settings, stack)
        housekeeping = Housekeeping(
            log,
            user_data,
            Recovery(conversation, runs, parts),
            event_retention=settings.event_retention,
            retention_days=settings.retention_days,
        )
        log.on_available = housekeeping.wake
        stack.push_async_callback(housekeeping.close)
        await housekeeping.start()
        self._log = log
        return ChatState(settings, conversation, guard, user_data)

    async def _open_stores(self, stack: AsyncExitStack) -> tuple[Storage, RunLog, UserData]:
        storage, log, user_data = self._chat._stores
        if storage is not None and log is not None and user_data is not None:
            return storage, log, user_data
        if (storage, log, user_data) != (None, None, None):
            raise ConfigurationError(
                "Pass storage, event_log and user_data together, or none of them."
            )
        stores = await adapters.stores(self.settings, stack, serving=True)
        return stores.storage, stores.log, stores.user_data

    async def drain(self, seconds: float) -> None:
        """Refuse new messages, let answers end in time, store the rest, and close connections."""
        if self._server is not None and self._log is not None:
            self._drained = True
            await self._server.drain(seconds, durable=self._log.durable)

    def begin_drain(self) -> None:
        """Refuse new messages from now on."""
        if self._server is not None:
            self._server.conversation.runs.draining = True

    async def close(self) -> None:
        """Drain, unless that is done, and close the adapters in reverse order."""
        if not self._drained:
            await self.drain(self.settings.drain_timeout)
        self._server = None
        await self._stack.aclose()


def policy_of(settings: Settings) -> Policy:
    """Return the part of the settings that the core uses."""
    names = [name for name in Policy.__slots__ if name in type(settings).model_fields]
    values = {name: getattr(settings, name) for name in names}
    return Policy(**values, forget_after_window=settings.storage == "memory")


def _modules_tools(modules: Iterable[str]) -> list[Tool]:
    registered: list[Tool] = []
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigurationError(
                f"CHAT_TOOLS: the module {name} cannot be imported ({error})."
            ) from error
        tools = [value for value in vars(module).values() if isinstance(value, Tool)]
        if not tools:
            raise ConfigurationError(f"CHAT_TOOLS: {name} has no function decorated with @tool.")
        registered += [each for each in tools if each not in registered]
    return registered
