from tortoise import fields, migrations
from tortoise.indexes import Index
from tortoise.migrations import operations as ops


class Migration(migrations.Migration):
    initial = True

    operations = [
        ops.CreateModel(
            name="ChatEvents",
            fields=[
                (
                    "row_id",
                    fields.BigIntField(
                        generated=True, primary_key=True, unique=True, db_index=True
                    ),
                ),
                ("run_id", fields.CharField(max_length=128)),
                ("last_seq", fields.BigIntField()),
                ("data", fields.BinaryField()),
            ],
            options={
                "table": "chat_events",
                "app": "quart_chat",
                "unique_together": (("run_id", "last_seq"),),
                "pk_attr": "row_id",
                "table_description": "A batch of a run's events.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="ChatMessage",
            fields=[
                (
                    "row_id",
                    fields.BigIntField(
                        generated=True, primary_key=True, unique=True, db_index=True
                    ),
                ),
                ("user_id", fields.CharField(max_length=255)),
                ("thread_id", fields.CharField(max_length=128)),
                ("id", fields.CharField(max_length=128)),
                ("position", fields.IntField()),
                ("branch", fields.IntField()),
                ("lineage", fields.TextField(unique=False)),
                ("parent_id", fields.CharField(null=True, max_length=128)),
                ("run_id", fields.CharField(null=True, max_length=128)),
                ("role", fields.CharField(max_length=16)),
                ("text", fields.TextField(unique=False)),
                ("parts", fields.TextField(null=True, unique=False)),
                ("reasoning", fields.TextField(null=True, unique=False)),
                ("tool_calls", fields.TextField(null=True, unique=False)),
                ("tool_call_id", fields.TextField(null=True, unique=False)),
                ("name", fields.TextField(null=True, unique=False)),
                ("model", fields.TextField(null=True, unique=False)),
                ("provider", fields.TextField(null=True, unique=False)),
                ("status", fields.CharField(max_length=16)),
                ("token_usage", fields.TextField(null=True, unique=False)),
                ("feedback", fields.TextField(null=True, unique=False)),
                ("metadata", fields.TextField(unique=False)),
                ("options", fields.TextField(unique=False)),
                ("created_at", fields.BigIntField()),
            ],
            options={
                "table": "chat_messages",
                "app": "quart_chat",
                "unique_together": (
                    ("user_id", "thread_id", "id"),
                    ("user_id", "thread_id", "position"),
                ),
                "indexes": [
                    Index(
                        fields=["user_id", "thread_id", "branch", "position"],
                        name="chat_messages_branch",
                    )
                ],
                "pk_attr": "row_id",
                "table_description": "A message.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="ChatRun",
            fields=[
                (
                    "id",
                    fields.CharField(primary_key=True, unique=True, db_index=True, max_length=128),
                ),
                ("user_id", fields.CharField(max_length=255)),
                ("thread_id", fields.CharField(max_length=128)),
                ("user_message_id", fields.CharField(max_length=128)),
                ("message_id", fields.CharField(max_length=128)),
                ("owner", fields.CharField(max_length=255)),
                ("seen_at", fields.BigIntField()),
                ("last_seq", fields.BigIntField(default=0)),
                ("created_at", fields.BigIntField()),
                ("ended_at", fields.BigIntField(null=True)),
                ("has_events", fields.BooleanField(default=True)),
            ],
            options={
                "table": "chat_runs",
                "app": "quart_chat",
                "indexes": [
                    Index(fields=["user_id", "thread_id", "created_at"], name="chat_runs_thread"),
                    Index(fields=["has_events", "ended_at"], name="chat_runs_ended"),
                    Index(fields=["ended_at", "owner"], name="chat_runs_living"),
                ],
                "pk_attr": "id",
                "table_description": "A run.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="ChatThread",
            fields=[
                (
                    "row_id",
                    fields.BigIntField(
                        generated=True, primary_key=True, unique=True, db_index=True
                    ),
                ),
                ("user_id", fields.CharField(max_length=255)),
                ("id", fields.CharField(max_length=128)),
                ("title", fields.TextField(null=True, unique=False)),
                ("preview", fields.TextField(null=True, unique=False)),
                ("metadata", fields.TextField(unique=False)),
                ("message_count", fields.IntField(default=0)),
                ("newest_id", fields.CharField(null=True, max_length=128)),
                ("newest_branch", fields.IntField(default=1)),
                ("newest_lineage", fields.TextField(default="[]", unique=False)),
                ("created_at", fields.BigIntField()),
                ("updated_at", fields.BigIntField()),
            ],
            options={
                "table": "chat_threads",
                "app": "quart_chat",
                "unique_together": (("user_id", "id"),),
                "indexes": [
                    Index(fields=["user_id", "updated_at", "id"], name="chat_threads_activity"),
                    Index(fields=["updated_at"], name="chat_threads_quiet"),
                ],
                "pk_attr": "row_id",
                "table_description": "A conversation.",
            },
            bases=["Model"],
        ),
    ]
