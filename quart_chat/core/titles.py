"""Titles that a model makes of a thread's first message, in the background."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from ..errors import ChatError
from .events import ContentDelta, Event
from .messages import TITLE_CHARS, Message, text_of
from .models import ModelRegistry
from .ports import ProviderMessage, ProviderRequest, Storage
from .round import Round

logger = logging.getLogger("quart_chat.titles")

INSTRUCTION = (
    "Write a title of two to six words for a conversation that begins with the next message. "
    "Answer with the title alone."
)
ASKED_CHARS = 2000
TITLE_SECONDS = 60


class TitleMaker:
    """Makes titles with ``CHAT_TITLE_MODEL``, delaying nobody."""

    def __init__(self, storage: Storage, models: ModelRegistry, model: str) -> None:
        self._storage = storage
        self._models = models
        self._model = model
        self._tasks: set[asyncio.Task[None]] = set()

    def make(self, user: str, first: Message) -> None:
        """Begin to make a title for the thread of its first message."""
        task = asyncio.create_task(self._make(user, first), name="quart_chat title")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is not done."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _make(self, user: str, first: Message) -> None:
        question = text_of(first.content)[:ASKED_CHARS]
        messages = [ProviderMessage("system", INSTRUCTION), ProviderMessage("user", question)]
        pieces: list[str] = []

        def keep(events: Sequence[Event]) -> None:
            pieces.extend(event.content for event in events if isinstance(event, ContentDelta))

        try:
            source, model = self._models.choose(None, self._model)
            request = ProviderRequest(model, messages, options={"max_tokens": 32})
            async with asyncio.timeout(TITLE_SECONDS):
                await Round(request, keep).stream(source.provider, TITLE_SECONDS, _no_disk)
            if title := " ".join("".join(pieces).split()).strip("\"'*# .")[:TITLE_CHARS]:
                changes = {"title": title}
                await self._storage.update_thread(
                    user, first.thread_id, changes, only_untitled=True
                )
        except (ChatError, TimeoutError) as error:
            logger.warning("no title was made: %s", type(error).__name__)


async def _no_disk() -> None:
    """A title is never long."""
