"""OpenAI's rules for the messages of a request, as a check that fails with the rule's name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def check_request(body: dict[str, Any]) -> None:
    """Fail where an OpenAI-compatible endpoint may refuse a request for its form."""
    _no_constants(body)
    check_messages(body["messages"])
    names = [tool["function"]["name"] for tool in body.get("tools", [])]
    assert len(set(names)) == len(names), f"two tools of one name: {names}"
    for each in body.get("tools", []):
        assert each["type"] == "function"
        assert NAME.fullmatch(each["function"]["name"]), each["function"]["name"]
        assert each["function"]["parameters"]["type"] == "object"
    assert body.get("tools") != [], "an empty list of tools is refused"
    assert names or "tool_choice" not in body, "tool_choice is only allowed with tools"


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Fail unless every tool call is answered once, directly after it, and nothing else is."""
    unanswered: list[str] = []
    for place, message in enumerate(messages):
        where = f"message {place} of {json.dumps(messages, ensure_ascii=False)[:4000]}"
        role = message["role"]
        if role == "tool":
            assert message["tool_call_id"] in unanswered, f"a result without a call: {where}"
            unanswered.remove(message["tool_call_id"])
            assert isinstance(message["content"], str), f"a result is a text: {where}"
            assert "tool_calls" not in message
            continue
        assert not unanswered, f"{unanswered} not answered before {where}"
        assert role in ("system", "user", "assistant"), where
        calls = message.get("tool_calls")
        assert calls is None or role == "assistant", f"only assistants call: {where}"
        assert calls != [], f"an empty list of calls is refused: {where}"
        assert calls or message["content"] or role != "assistant", f"an empty answer: {where}"
        unanswered = [_checked(call) for call in calls or ()]
        assert len(set(unanswered)) == len(unanswered), f"two calls of one id: {where}"
        assert "tool_call_id" not in message
    assert not unanswered, f"{unanswered} never answered: {json.dumps(messages)[:4000]}"


def _checked(call: dict[str, Any]) -> str:
    assert call.keys() == {"id", "type", "function"}
    assert call["type"] == "function"
    assert call["function"].keys() == {"name", "arguments"}
    assert NAME.fullmatch(call["function"]["name"]), call
    try:
        arguments = json.loads(call["function"]["arguments"], parse_constant=_refuse)
    except ValueError as error:
        raise AssertionError(f"arguments are JSON: {call}") from error
    assert isinstance(arguments, dict), f"arguments are an object: {call}"
    assert isinstance(call["id"], str)
    assert call["id"]
    return str(call["id"])


def as_sent(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored messages, as the JSON API gives them, in the form in which they are sent up."""
    sent = []
    for stored in messages:
        message = {"role": stored["role"], "content": stored["content"]}
        if stored.get("tool_calls"):
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])},
                }
                for call in stored["tool_calls"]
            ]
        if stored["role"] == "tool":
            message["tool_call_id"] = stored["tool_call_id"]
        if message["content"] or len(message) > 2:
            sent.append(message)
    return sent


def _no_constants(body: dict[str, Any]) -> None:
    json.loads(json.dumps(body), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
