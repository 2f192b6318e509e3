"""The validator of transcripts finds each kind of mistake."""

from __future__ import annotations

from typing import Any

import pytest
from transcript import check_messages

USER = {"role": "user", "content": "hi"}


def calling(*ids: str, arguments: str = "{}") -> dict[str, Any]:
    calls = [
        {"id": i, "type": "function", "function": {"name": "f", "arguments": arguments}}
        for i in ids
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": ""}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [USER],
        [USER, calling("a"), result("a")],
        [USER, calling("a", "b"), result("b"), result("a"), USER],
        [USER, calling("a"), result("a"), calling("a"), result("a"), USER],
    ],
)
def test_valid(messages: list[dict[str, Any]]) -> None:
    check_messages(messages)


@pytest.mark.parametrize(
    "messages",
    [
        [USER, calling("a")],
        [USER, calling("a"), USER],
        [USER, calling("a"), USER, result("a")],
        [USER, calling("a", "b"), result("a"), USER],
        [USER, calling("a"), result("a"), result("a")],
        [USER, calling("a"), result("b")],
        [USER, result("a")],
        [USER, calling("a", "a"), result("a"), result("a")],
        [USER, calling("")],
        [USER, calling("a", arguments=""), result("a")],
        [USER, calling("a", arguments="[]"), result("a")],
        [USER, calling("a", arguments='{"x": NaN}'), result("a")],
        [USER, calling()],
        [USER, {**calling("a"), "role": "user"}, result("a")],
        [USER, {"role": "assistant", "content": ""}],
        [{"role": "nobody", "content": "x"}],
    ],
)
def test_invalid(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(AssertionError):
        check_messages(messages)
