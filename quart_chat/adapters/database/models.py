"""Tables. Times are microseconds since 1970 in UTC, structured values are JSON text.

Tortoise describes and migrates them, and provides connections and transactions; the statements
are in ``storage.py`` and ``event_log.py``.
"""

from __future__ import annotations

from tortoise import fields
from tortoise.indexes import Index
from tortoise.models import Model

USER = 255
ID = 128


class ChatThread(Model):
    """A conversation.

    ``newest_*`` describe its newest message, which the next one continues.
    """

    row_id = fields.BigIntField(primary_key=True)
    user_id = fields.CharField(max_length=USER)
    id = fields.CharField(max_length=ID)
    title = fields.TextField(null=True)
    preview = fields.TextField(null=True)
    metadata = fields.TextField()
    message_count = fields.IntField(default=0)
    newest_id = fields.CharField(max_length=ID, null=True)
    newest_branch = fields.IntField(default=1)
    newest_lineage = fields.TextField(default="[]")
    created_at = fields.BigIntField()
    updated_at = fields.BigIntField()

    class Meta:
        table = "chat_threads"
        unique_together = (("user_id", "id"),)
        indexes = [
            Index(fields=("user_id", "updated_at", "id"), name="chat_threads_activity"),
            Index(fields=("updated_at",), name="chat_threads_quiet"),
        ]


class ChatMessage(Model):
    """A message.

    ``branch`` is the position of the first message of its branch; ``lineage`` lists the branches
    before it, oldest first, each with the last position that belongs to the path.
    """

    row_id = fields.BigIntField(primary_key=True)
    user_id = fields.CharField(max_length=USER)
    thread_id = fields.CharField(max_length=ID)
    id = fields.CharField(max_length=ID)
    position = fields.IntField()
    branch = fields.IntField()
    lineage = fields.TextField()
    parent_id = fields.CharField(max_length=ID, null=True)
    run_id = fields.CharField(max_length=ID, null=True)
    role = fields.CharField(max_length=16)
    text = fields.TextField()
    parts = fields.TextField(null=True)
    reasoning = fields.TextField(null=True)
    tool_calls = fields.TextField(null=True)
    tool_call_id = fields.TextField(null=True)
    name = fields.TextField(null=True)
    model = fields.TextField(null=True)
    provider = fields.TextField(null=True)
    status = fields.CharField(max_length=16)
    token_usage = fields.TextField(null=True)
    feedback = fields.TextField(null=True)
    metadata = fields.TextField()
    options = fields.TextField()
    created_at = fields.BigIntField()

    class Meta:
        table = "chat_messages"
        unique_together = (("user_id", "thread_id", "id"), ("user_id", "thread_id", "position"))
        indexes = [
            Index(
                fields=("user_id", "thread_id", "branch", "position"), name="chat_messages_branch"
            )
        ]


class ChatRun(Model):
    """A run.

    ``owner`` is the process that holds its lease, ``seen_at`` that process's last heartbeat.
    """

    id = fields.CharField(max_length=ID, primary_key=True)
    user_id = fields.CharField(max_length=USER)
    thread_id = fields.CharField(max_length=ID)
    user_message_id = fields.CharField(max_length=ID)
    message_id = fields.CharField(max_length=ID)
    owner = fields.CharField(max_length=255)
    seen_at = fields.BigIntField()
    last_seq = fields.BigIntField(default=0)
    created_at = fields.BigIntField()
    ended_at = fields.BigIntField(null=True)
    has_events = fields.BooleanField(default=True)

    class Meta:
        table = "chat_runs"
        indexes = [
            Index(fields=("user_id", "thread_id", "created_at"), name="chat_runs_thread"),
            Index(fields=("has_events", "ended_at"), name="chat_runs_ended"),
            Index(fields=("ended_at", "owner"), name="chat_runs_living"),
        ]


class ChatEvents(Model):
    """A batch of a run's events.

    It holds the events up to number ``last_seq`` that no earlier batch holds.
    """

    row_id = fields.BigIntField(primary_key=True)
    run_id = fields.CharField(max_length=ID)
    last_seq = fields.BigIntField()
    data = fields.BinaryField()

    class Meta:
        table = "chat_events"
        unique_together = (("run_id", "last_seq"),)
