"""Full-text search: SQLite's FTS5, or PostgreSQL's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .connection import Database

POSTGRES_WORDS = "regexp_replace(lower({}), '\\W+', ' ', 'g')"
"""What is indexed: without it the parser takes addresses, versions and file names for one word."""


def search(database: Database, user: str, words: Sequence[str]) -> tuple[str, list[Any]]:
    """The condition on threads ``t`` whose title or messages have words that begin so."""
    if database.is_sqlite:
        terms = " ".join(f'"{word}" *' for word in words)
        match = f'owner : "{user.encode().hex()}" AND body : ({terms})'
        return (
            "(t.row_id IN (SELECT rowid FROM chat_thread_search WHERE chat_thread_search "
            "MATCH ?) OR t.id IN (SELECT m.thread_id FROM chat_message_search s "
            "JOIN chat_messages m ON m.row_id = s.rowid "
            "WHERE chat_message_search MATCH ? AND m.user_id = ?))"
        ), [match, match, user]
    query = POSTGRES_WORDS.format("?::text")
    query = f"replace(nullif(btrim({query}), ''), ' ', ':* & ')"
    query = f"to_tsquery('simple', {query} || ':*')"

    def matches(column: str) -> str:
        body = POSTGRES_WORDS.format(f"left(coalesce({column}, ''), 200000)")
        return f"to_tsvector('simple', {body}) @@ {query}"

    text = " ".join(words)
    return (
        f"({matches('t.title')} OR t.id IN (SELECT m.thread_id FROM chat_messages m "
        f"WHERE m.user_id = ? AND {matches('m.text')}))"
    ), [text, user, text]
