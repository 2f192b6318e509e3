"""Search by grams: one index for titles and messages, filled from Python; marks of deletions."""

import importlib

from tortoise import migrations
from tortoise.migrations import operations as ops

from quart_chat.adapters.database.search import entry_id, grams
from quart_chat.core.search import SEARCHED_CHARS

OLD = ("chat_message_search", "chat_thread_search")
CHUNK = 200

SQLITE = [
    "CREATE VIRTUAL TABLE chat_search USING fts5(grams, content='', detail=none, columnsize=0, tokenize='ascii')",
]
POSTGRES = [
    "CREATE TABLE chat_search (id BIGINT PRIMARY KEY, grams INTEGER[] NOT NULL)",
    "CREATE INDEX chat_search_grams ON chat_search USING GIN (grams)",
]
DELETIONS = [
    "CREATE TABLE chat_deletions (row_id BIGINT PRIMARY KEY, user_id VARCHAR(255) NOT NULL, "
    "id VARCHAR(128) NOT NULL, marked_at BIGINT NOT NULL)",
    "CREATE INDEX chat_deletions_thread ON chat_deletions (user_id, id)",
]
ENTRIES = (
    f"SELECT m.row_id, m.user_id, m.position, t.row_id AS thread_row, substr(m.text, 1, {SEARCHED_CHARS}) AS text "
    "FROM chat_messages m JOIN chat_threads t ON t.user_id = m.user_id AND t.id = m.thread_id "
    "WHERE m.row_id > {after} ORDER BY m.row_id LIMIT {chunk}",
    "SELECT row_id, user_id, 0 AS position, row_id AS thread_row, coalesce(title, '') AS text "
    "FROM chat_threads WHERE row_id > {after} ORDER BY row_id LIMIT {chunk}",
)


async def forward(apps, schema_editor) -> None:
    client = schema_editor.client
    sqlite = client.capabilities.dialect == "sqlite"
    for statement in (*_drop_old(sqlite), *(SQLITE if sqlite else POSTGRES), *DELETIONS):
        await client.execute_query(statement)
    for entries in ENTRIES:
        await _fill(client, sqlite, entries)


def _drop_old(sqlite: bool) -> list[str]:
    if not sqlite:
        return [f"DROP INDEX {index}" for index in OLD]
    triggers = [
        f"DROP TRIGGER {index}_{what}" for index in OLD for what in ("added", "gone", "changed")
    ]
    return [*triggers, *(f"DROP TABLE {index}" for index in OLD)]


async def _fill(client, sqlite: bool, entries: str) -> None:
    after = 0
    while rows := await client.execute_query_dict(entries.format(after=after, chunk=CHUNK)):
        after = rows[-1]["row_id"]
        made = [_entry(row, sqlite) for row in rows]
        statement = (
            "INSERT INTO chat_search (rowid, grams) VALUES (?, ?)"
            if sqlite
            else "INSERT INTO chat_search (id, grams) VALUES ($1, $2)"
        )
        await client.execute_many(statement, [each for each in made if each[1]])


def _entry(row, sqlite: bool) -> list:
    numbers = grams(row["user_id"], row["text"])
    if sqlite:
        value = " ".join(f"{number:x}" for number in numbers)
    else:
        value = [number - (1 << 31) for number in numbers]
    return [entry_id(row["thread_row"], row["position"]), value]


async def backward(apps, schema_editor) -> None:
    client = schema_editor.client
    before = importlib.import_module("quart_chat.adapters.database.migrations.0002_search")
    for table in ("chat_search", "chat_deletions"):
        await client.execute_query(f"DROP TABLE {table}")
    await before.forward(apps, schema_editor)


class Migration(migrations.Migration):
    dependencies = [("quart_chat", "0002_search")]

    operations = [ops.RunPython(forward, backward)]
