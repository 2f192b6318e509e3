"""What is used of the openai package beyond its public interface."""

from __future__ import annotations

from typing import Any

import pytest
from endpoint import Endpoint, scripted_endpoint

from quart_chat.adapters.openai.transport import http_client, reader_of
from quart_chat.compat import openai as compat

BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "stream_options": {"include_usage": True},
    "repeat_penalty": 1.1,
}


def test_the_installed_version_has_the_fast_way() -> None:
    found = compat.problem()
    assert found is None, f"{found}. Answers still work, by the slower public API: see {compat}."


@pytest.mark.parametrize("public", [False, True], ids=["fast", "public"])
async def test_both_ways_send_the_same_and_leave_the_body_unread(
    public: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    monkeypatch.setattr(compat, "problem", lambda: "an upgrade" if public else None)
    async with scripted_endpoint() as endpoint, sdk(openai, endpoint) as client:
        async with compat.streamed(client, BODY, {"Accept-Encoding": "identity"}) as response:
            read = await reader_of(response).read()
        (sent,) = endpoint.requests
        (headers,) = endpoint.headers
    assert sent == BODY
    assert headers["authorization"] == "Bearer k"
    assert headers["accept-encoding"] == "identity"
    assert read.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("public", [False, True], ids=["fast", "public"])
async def test_both_ways_raise_a_refusal(public: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai

    monkeypatch.setattr(compat, "problem", lambda: "an upgrade" if public else None)
    body = BODY | {"messages": [{"role": "user", "content": "script:unauthorized"}]}
    async with scripted_endpoint() as endpoint, sdk(openai, endpoint) as client:
        with pytest.raises(openai.AuthenticationError) as raised:
            async with compat.streamed(client, body, {}):
                raise AssertionError("a refusal has no stream")
    assert raised.value.status_code == 401
    assert isinstance(raised.value.body, dict)


def sdk(openai: Any, endpoint: Endpoint) -> Any:
    return openai.AsyncOpenAI(
        base_url=endpoint.url,
        api_key="k",
        max_retries=0,
        timeout=None,
        http_client=http_client(endpoint.url, 10),
    )
