"""The AsyncAPI document: valid, complete, and its examples work when they are sent."""

from __future__ import annotations

from typing import Any

import jsonschema
from conftest import Server, client, connect

from quart_chat.core.commands import COMMANDS
from quart_chat.core.events import EVENT_TYPES


async def document(server: Server) -> dict[str, Any]:
    async with client(server) as http:
        found: dict[str, Any] = (await http.get("/asyncapi.json")).json()
    return found


def payload(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The schema of a message, with what it refers to."""
    return {**found["components"]["messages"][name]["payload"], "components": found["components"]}


async def test_it_names_every_command_and_event(server: Server) -> None:
    found = await document(server)
    assert found["asyncapi"] == "3.0.0"
    messages = found["components"]["messages"]
    assert {f"command.{kind}" for kind in COMMANDS} <= set(messages)
    assert {f"event.{kind}" for kind in EVENT_TYPES if kind != "round_end"} <= set(messages)
    for operation in found["operations"].values():
        for reference in operation["messages"]:
            assert reference["$ref"].removeprefix("#/channels/chat/messages/") in messages
    for name in messages:
        jsonschema.Draft202012Validator.check_schema(payload(found, name))


async def test_every_example_is_taken_as_its_schema_says(server: Server) -> None:
    found = await document(server)
    for kind in COMMANDS:
        message = found["components"]["messages"][f"command.{kind}"]
        assert message["examples"], kind
        for example in message["examples"]:
            jsonschema.validate(example["payload"], payload(found, f"command.{kind}"))
            async with connect(server) as socket:
                await socket.send(example["payload"])
                first = await socket.receive()
                assert first.get("code") not in ("invalid_message", "internal_error"), first
                if first["type"] == "start":
                    await socket.until("end")


async def test_every_event_fits_its_schema(server: Server) -> None:
    found = await document(server)
    async with connect(server) as socket:
        events = await socket.ask("script:reasoning")
        events += await socket.ask("script:quota")
        await socket.send({"content": "script:silent"})
        await socket.until("content")
        await socket.send({"type": "stop"})
        events += await socket.until("end")
        await socket.send({"type": "ping"})
        events.append(await socket.receive())
    assert {event["type"] for event in events} >= {"start", "reasoning", "error", "pong", "message"}
    for event in events:
        jsonschema.validate(event, payload(found, f"event.{event['type']}"))


async def test_openapi_shows_the_streams_events(server: Server) -> None:
    async with client(server) as http:
        found = (await http.get("/openapi.json")).json()
    for method in ("get", "post"):
        answer = found["paths"]["/chat/sse"][method]["responses"]["200"]["content"]
        events = answer["text/event-stream"]["schema"]["oneOf"]
        assert (
            len(events) == len(EVENT_TYPES) - 1
        )  # the native protocol does not send the end of a round
