"""Full-text search over titles and messages: FTS5 on SQLite, GIN indexes on PostgreSQL."""

from tortoise import migrations
from tortoise.migrations import operations as ops

SEARCHED = (
    ("chat_messages", "chat_message_search", "text"),
    ("chat_threads", "chat_thread_search", "title"),
)


def _sqlite(table: str, index: str, column: str) -> list[str]:
    # The user stands in the index as one token, so that a search reads that user's postings alone.
    added = f"INSERT INTO {index}(rowid, owner, body) VALUES (new.row_id, hex(new.user_id), coalesce(new.{column}, ''))"
    gone = (
        f"INSERT INTO {index}({index}, rowid, owner, body) "
        f"VALUES ('delete', old.row_id, hex(old.user_id), coalesce(old.{column}, ''))"
    )
    return [
        f"CREATE VIRTUAL TABLE {index} USING fts5(owner, body, content='')",
        f"CREATE TRIGGER {index}_added AFTER INSERT ON {table} BEGIN {added}; END",
        f"CREATE TRIGGER {index}_gone AFTER DELETE ON {table} BEGIN {gone}; END",
        f"CREATE TRIGGER {index}_changed AFTER UPDATE OF {column} ON {table} BEGIN {gone}; {added}; END",
        f"INSERT INTO {index}(rowid, owner, body) SELECT row_id, hex(user_id), coalesce({column}, '') FROM {table}",
    ]


def _postgres(table: str, index: str, column: str) -> list[str]:
    return [
        f"CREATE INDEX {index} ON {table} "
        f"USING GIN (to_tsvector('simple', regexp_replace(lower(left(coalesce({column}, ''), 200000)), '\\W+', ' ', 'g')))"
    ]


async def forward(apps, schema_editor) -> None:
    client = schema_editor.client
    make = _sqlite if client.capabilities.dialect == "sqlite" else _postgres
    for searched in SEARCHED:
        for statement in make(*searched):
            await client.execute_query(statement)


async def backward(apps, schema_editor) -> None:
    client = schema_editor.client
    for _, index, _ in SEARCHED:
        if client.capabilities.dialect != "sqlite":
            await client.execute_query(f"DROP INDEX {index}")
            continue
        for what in ("added", "gone", "changed"):
            await client.execute_query(f"DROP TRIGGER {index}_{what}")
        await client.execute_query(f"DROP TABLE {index}")


class Migration(migrations.Migration):
    dependencies = [("quart_chat", "0001_initial")]

    operations = [ops.RunPython(forward, backward)]
