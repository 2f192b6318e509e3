"""The openai package: a streamed response whose body the caller reads.

Checked with openai 3.50 to 3.54; ``pyproject.toml`` allows 3.x. The typed method
``chat.completions.create`` walks through every message of the history before it sends the request.
The low-level ``post`` does not, and the header ``X-Stainless-Raw-Response`` leaves the body unread.
If a version has neither, the public ``with_streaming_response`` is used instead: slower, but the
same response.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

RAW_HEADER = "X-Stainless-Raw-Response"
PATH = "/chat/completions"
NAMED = ("model", "messages", "stream")


@functools.cache
def problem() -> str | None:
    """Return what this version of the package lacks for the fast way, or None."""
    import openai

    try:
        from openai._constants import RAW_RESPONSE_HEADER
    except ImportError:
        return f"openai {openai.__version__} has no RAW_RESPONSE_HEADER in openai._constants"
    if RAW_RESPONSE_HEADER != RAW_HEADER:
        return f"openai {openai.__version__} names the raw response header {RAW_RESPONSE_HEADER}"
    missing = {"cast_to", "body", "options"} - set(
        inspect.signature(openai.AsyncOpenAI.post).parameters
    )
    if missing:
        return (
            f"openai {openai.__version__}: AsyncOpenAI.post takes no {', '.join(sorted(missing))}"
        )
    return None


@asynccontextmanager
async def streamed(
    client: Any, body: Mapping[str, Any], headers: Mapping[str, str]
) -> AsyncGenerator[Any, None]:
    """Send a chat completion request and yield the HTTP response, its body unread."""
    if problem() is not None:
        async with _by_public_api(client, body, headers) as response:
            yield response
        return
    raw = await client.post(
        PATH, body=body, cast_to=object, options={"headers": {**headers, RAW_HEADER: "stream"}}
    )
    try:
        yield raw.http_response
    finally:
        await raw.close()


@asynccontextmanager
async def _by_public_api(
    client: Any, body: Mapping[str, Any], headers: Mapping[str, str]
) -> AsyncGenerator[Any, None]:
    named = {name: body[name] for name in NAMED}
    more = {name: value for name, value in body.items() if name not in NAMED}
    create = client.chat.completions.with_streaming_response.create
    async with create(**named, extra_body=more, extra_headers=dict(headers)) as response:
        yield response.http_response
