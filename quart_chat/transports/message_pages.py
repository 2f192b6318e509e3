"""Pages of a thread's messages, bounded in messages and in text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

from quart import Response

from ..core.messages import Message
from ..core.ports import Window
from ..errors import InvalidMessage, NotFound
from .codec import to_json
from .pages import INVALID_CURSOR, from_cursor, to_cursor
from .schemas import MessageQuery
from .state import ChatState

PAGE_CHARS = 4 * 1024 * 1024
"""A page ends with the message with which its text is over this."""

LARGE_CHARS = 256 * 1024
"""Larger pages are encoded outside the event loop."""


async def message_page(
    server: ChatState, user: str, thread_id: str, query: MessageQuery
) -> Response:
    """Return a page of messages as JSON.

    Raises:
        NotFound: The user has no such thread.
        InvalidMessage: The cursor is not one of this thread.
    """
    storage = server.conversation.storage
    window = Window(limit=query.limit + 1, order=query.order, branch=query.branch)
    window = replace(window, max_chars=PAGE_CHARS)
    if (place := from_cursor(query.cursor, int, str)) is not None:
        if not 0 < place[0] < 2**31:
            raise InvalidMessage(INVALID_CURSOR)
        window = replace(window, after=place[0], leaf=place[1])
    try:
        messages = await storage.messages(user, thread_id, window)
    except NotFound:
        await storage.thread(user, thread_id)
        raise InvalidMessage(INVALID_CURSOR) from None
    page, chars = _bounded(messages[: query.limit])
    following = None
    if page and await _has_more(server, user, thread_id, window, messages, page, chars):
        following = to_cursor([page[-1].position, await _leaf(server, user, thread_id, window)])
    if chars > LARGE_CHARS:
        async with server.large_pages:
            body = await asyncio.to_thread(_encoded, page, following)
    else:
        body = _encoded(page, following)
    return Response(body, content_type="application/json")


def _bounded(messages: Sequence[Message]) -> tuple[list[Message], int]:
    """Return the messages up to the bound on text, and the characters of their text."""
    page: list[Message] = []
    chars = 0
    for message in messages:
        if chars > PAGE_CHARS:
            break
        page.append(message)
        chars += _chars(message)
    return page, chars


def _chars(message: Message) -> int:
    content = message.content
    parts = [content] if isinstance(content, str) else [to_json(part) for part in content]
    calls = [to_json(call.arguments) for call in message.tool_calls]
    return sum(map(len, (*parts, *calls, message.reasoning or "")))


async def _has_more(
    server: ChatState,
    user: str,
    thread_id: str,
    window: Window,
    messages: Sequence[Message],
    page: list[Message],
    chars: int,
) -> bool:
    if len(page) < len(messages):
        return True
    if chars <= LARGE_CHARS:
        return False
    # The storage may have ended the page early, because of its text.
    following = replace(window, limit=1, after=page[-1].position)
    return bool(await server.conversation.storage.messages(user, thread_id, following))


async def _leaf(server: ChatState, user: str, thread_id: str, window: Window) -> str:
    """Return the end of the path that the first page chose.

    A branch that begins while a client reads its pages does not cut them.
    """
    if window.leaf is not None:
        return window.leaf
    newest = Window(limit=1, order="desc", branch=window.branch)
    return (await server.conversation.storage.messages(user, thread_id, newest))[0].id


def _encoded(page: list[Message], following: str | None) -> str:
    # Each by itself: the interpreter is not given to others in the middle of one call.
    messages = ",".join(to_json(message.to_dict()) for message in page)
    return f'{{"messages":[{messages}],"next":{json.dumps(following)}}}'
