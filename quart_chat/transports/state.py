"""The chat of one application while it serves, as the transports see it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from quart import current_app

from ..config import Settings
from ..core.conversation import Conversation
from ..core.ports import UserData
from ..errors import ChatError, NotFound, ServerDraining, ServerError, StorageUnavailable
from .guard import LOCAL_USER, Guard

EXTENSION = "quart_chat"

LAST_EVENTS_SECONDS = 1
"""How long the followers of runs that have ended may take for the last events."""

CLOSING_SECONDS = 0.3
"""How long connections may take to notice that they are closed."""

STORAGE_SECONDS = 2
"""How long the database may take to show that it answers."""

CHECK_SECONDS = 1
"""The database is asked at most so often, however many ask for ``/ready``."""


class NotServing(ServerError):
    """Error for a request before the application was started."""

    default_message = (
        "The chat is not open, because the application does not serve yet. "
        "In a test, wrap the requests in 'async with app.test_app()'."
    )


@dataclass
class ChatState:
    """The chat of one application, between its start and its end."""

    settings: Settings
    conversation: Conversation
    guard: Guard
    user_data: UserData
    closers: set[Callable[[], None]] = field(default_factory=set)
    deliveries: dict[asyncio.Future[None], str] = field(default_factory=dict)
    large_pages: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a large page of messages is made: one at a time."""
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _checked: tuple[float, ChatError | None] = (float("-inf"), None)

    @property
    def server(self) -> ChatState:
        return self

    async def check_ready(self) -> None:
        """Check that a message would be taken.

        Raises:
            ServerDraining: The process is about to end.
            StorageUnavailable: The database does not answer.
        """
        if self.conversation.runs.draining:
            raise ServerDraining
        async with self._checking:
            at, error = self._checked
            if time.monotonic() - at >= CHECK_SECONDS:
                error = await self._storage_error()
                self._checked = (time.monotonic(), error)
        if error is not None:
            raise error

    async def _storage_error(self) -> ChatError | None:
        try:
            async with asyncio.timeout(STORAGE_SECONDS):
                await self.conversation.storage.thread(LOCAL_USER, "ready")
        except NotFound:
            return None
        except TimeoutError:
            return StorageUnavailable("The database does not answer.", retry_after=CHECK_SECONDS)
        except ChatError as error:
            return error
        return None

    def close_connections(self) -> int:
        """Close sockets with 1001 and cut streams, so that clients resume elsewhere."""
        closing = list(self.closers)
        for close in closing:
            close()
        return len(closing)

    async def drain(self, seconds: float, *, durable: bool) -> None:
        """Let running answers end within ``seconds``, store the rest, and close connections."""
        left = await self.conversation.runs.drain(seconds, durable=durable)
        ending = [each for each, run_id in self.deliveries.items() if run_id not in left]
        if ending:
            await asyncio.wait(ending, timeout=LAST_EVENTS_SECONDS)
        self.close_connections()
        until = time.monotonic() + CLOSING_SECONDS
        while self.closers and time.monotonic() < until:
            await asyncio.sleep(0.01)


class HasChatState(Protocol):
    """A ``QuartChat``, or the ``ChatState`` of an application."""

    @property
    def server(self) -> ChatState: ...


def state_of(chat: HasChatState) -> ChatState:
    """Return the state of a chat. Raises NotServing."""
    try:
        return chat.server
    except RuntimeError:
        raise NotServing from None


def current_state() -> ChatState:
    """Return the chat of the application that handles this request.

    Raises:
        NotServing: The application does not serve yet.
    """
    return state_of(current_app.extensions[EXTENSION])
