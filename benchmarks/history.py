"""Fills a thread with messages through the database adapter, as long use would have filled it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from quart_chat import adapters
from quart_chat.config import resolve
from quart_chat.core.messages import Message, new_id

USER = "1"
TOGETHER = 500
TEXT = "The quick brown fox jumps over the lazy dog, again and again, as it always did. "


def filled_thread(folder: Path, messages: int) -> str:
    """A thread of so many messages in the database of the server that runs in a folder."""
    thread_id = new_id()
    asyncio.run(_fill(folder / "quart_chat.sqlite3", thread_id, messages))
    return thread_id


async def _fill(database: Path, thread_id: str, messages: int) -> None:
    settings = resolve({"CHAT_DATABASE_URL": f"sqlite://{database}"})
    async with AsyncExitStack() as stack:
        storage = (await adapters.stores(settings, stack)).storage
        ids = [new_id() for _ in range(messages)]
        for start in range(0, messages, TOGETHER):
            some = [
                Message(
                    id=ids[number],
                    thread_id=thread_id,
                    role="assistant" if number % 2 else "user",
                    content=TEXT * (1 + number % 5),
                    parent_id=ids[number - 1] if number else None,
                )
                for number in range(start, min(start + TOGETHER, messages))
            ]
            await storage.add_messages(USER, some, create=True)
