"""The WebSocket protocol as an AsyncAPI 3 document, made of the types that the code uses."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from ..core.commands import COMMANDS
from ..core.events import EVENT_TYPES, RoundEnded
from .schemas import ErrorDetail, MessageSchema

REFERENCES = "#/components/schemas/{model}"
EXAMPLE_RUN = "01a20616-0f76-7a70-9c11-a91263a4a719"

COMMAND_EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "message": [
        {"type": "message", "content": "Hello", "thread_id": "thread_123"},
        {
            "content": [
                {"type": "text", "text": "What is in this picture?"},
                {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}},
            ],
            "id": "a-client-id",
            "temperature": 0.2,
            "metadata": {"page": "/help"},
        },
    ],
    "stop": [{"type": "stop"}, {"type": "stop", "thread_id": "thread_123"}],
    "resume": [{"type": "resume", "run_id": EXAMPLE_RUN, "last_seq": 41}],
    "regenerate": [{"type": "regenerate", "thread_id": "thread_123"}],
    "tool_result": [
        {
            "type": "tool_result",
            "run_id": EXAMPLE_RUN,
            "tool_call_id": "call_1",
            "content": "52.5, 13.4",
        }
    ],
    "approve": [
        {
            "type": "approve",
            "run_id": EXAMPLE_RUN,
            "tool_call_id": "call_1",
            "approved": False,
            "reason": "Not today",
        }
    ],
    "auth": [{"type": "auth", "token": "a fresh access token"}],
    "ping": [{"type": "ping"}],
}

UNNUMBERED: dict[str, dict[str, Any]] = {
    "pong": {"summary": "Answers `ping`."},
    "queued": {
        "summary": "The message waits for the running one to end; position 1 is next.",
        "thread_id": {"type": "string"},
        "position": {"type": "integer", "minimum": 1},
        "reply_to": {"type": "string"},
    },
    "authenticated": {
        "summary": "Answers `auth`; `expires_at` is in seconds since 1970.",
        "expires_at": {"type": ["number", "null"]},
    },
    "refusal": {"summary": "A command was refused; the socket stays open."},
}


BEARER = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "Not needed with local auth. Browsers send the subprotocol bearer.<token>.",
}


def _server(protocol: str) -> dict[str, Any]:
    return {
        "host": "{host}",
        "protocol": protocol,
        "variables": {"host": {"default": "127.0.0.1:8080"}},
        "security": [{"$ref": "#/components/securitySchemes/bearer"}],
    }


def _schema(model: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    schema = TypeAdapter(model).json_schema(ref_template=REFERENCES)
    schemas.update(schema.pop("$defs", {}))
    schema.pop("title", None)
    return schema


def event_schemas(schemas: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a JSON schema for every event of a run, and add what they refer to to ``schemas``."""
    events = {}
    for kind, event in EVENT_TYPES.items():
        if event is RoundEnded:
            continue
        schema = _schema(event, schemas)
        properties = schema.setdefault("properties", {})
        if kind == "message":
            schemas["MessageDocument"] = _schema(MessageSchema, schemas)
            properties["message"] = {"$ref": REFERENCES.format(model="MessageDocument")}
        envelope = {
            "type": {"const": kind},
            "thread_id": {"type": "string"},
            "run_id": {"type": "string"},
            "seq": {"type": "integer", "minimum": 1},
        }
        schema["properties"] = envelope | properties
        schema["required"] = [*envelope, *schema.get("required", [])]
        schema["type"] = "object"
        events[kind] = schema
    return events


def _unnumbered(schemas: dict[str, Any]) -> dict[str, dict[str, Any]]:
    messages = {}
    for kind, fields in UNNUMBERED.items():
        properties = {key: value for key, value in fields.items() if key != "summary"}
        if kind == "refusal":
            detail = _schema(ErrorDetail, schemas)["properties"]
            properties = {**detail, "reply_to": {"type": "string"}}
        name = "error" if kind == "refusal" else kind
        messages[kind] = {
            "type": "object",
            "description": fields["summary"],
            "properties": {"type": {"const": name}, **properties},
            "required": ["type", *(key for key in properties if key in ("code", "message"))],
        }
    return messages


def asyncapi(version: str, mount: str) -> dict[str, Any]:
    """Return the document: what goes to the server, and what comes from it."""
    schemas: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    for kind, command in COMMANDS.items():
        schemas[command.__name__] = _schema(command, schemas)
        messages[f"command.{kind}"] = {
            "name": kind,
            "summary": (command.__doc__ or "").strip(),
            "payload": {"$ref": REFERENCES.format(model=command.__name__)},
            "examples": [{"payload": example} for example in COMMAND_EXAMPLES[kind]],
        }
    answers = {**event_schemas(schemas), **_unnumbered(schemas)}
    for kind, schema in answers.items():
        schemas[f"event.{kind}"] = schema
        messages[f"event.{kind}"] = {
            "name": kind,
            "summary": schema.get("description", ""),
            "payload": {"$ref": REFERENCES.format(model=f"event.{kind}")},
        }

    def operation(action: str, prefix: str, summary: str) -> dict[str, Any]:
        names = [name for name in messages if name.startswith(prefix)]
        return {
            "action": action,
            "summary": summary,
            "channel": {"$ref": "#/channels/chat"},
            "messages": [{"$ref": f"#/channels/chat/messages/{name}"} for name in names],
        }

    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "quart_chat over WebSocket",
            "version": version,
            "description": "Text frames are JSON; binary frames are MessagePack of the same maps.",
        },
        "defaultContentType": "application/json",
        "servers": {name: _server(name) for name in ("ws", "wss")},
        "channels": {
            "chat": {
                "address": mount,
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
            }
        },
        "operations": {
            "command": operation("receive", "command.", "Commands of clients"),
            "event": operation("send", "event.", "Events of the server"),
        },
        "components": {
            "messages": messages,
            "schemas": schemas,
            "securitySchemes": {"bearer": BEARER},
        },
    }
