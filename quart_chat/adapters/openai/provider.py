"""Any OpenAI-compatible endpoint, streamed.

The SDK makes the request: authentication, retries before the first byte, errors. The stream is
decoded here, all that one read brought at a time, which costs a tenth of the SDK's own parser.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.ports import Delta, ProviderMessage, ProviderRequest
from ...errors import ProviderError
from .chunks import ChunkReader
from .event_stream import EventDecoder
from .failures import bad_response, failure

logger = logging.getLogger("quart_chat.provider")

CONNECT_SECONDS = 10
MAX_RETRIES = 2
READ_BYTES = 32 * 1024
"""What is taken of a stream at one go."""

STREAM_HEADERS = {"Accept-Encoding": "identity", "X-Stainless-Raw-Response": "stream"}
"""No compression, and the SDK's own mark for a response whose body it leaves to the caller."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go, and the key that opens it."""

    base_url: str
    api_key: str
    reports_usage: bool = True


class OpenAIProvider:
    """Speaks to one endpoint; ``endpoint`` is asked for it at the first request."""

    def __init__(self, name: str, endpoint: Callable[[], Awaitable[Endpoint]]) -> None:
        self._name = name
        self._find = endpoint
        self._opening: asyncio.Task[tuple[Any, Endpoint]] | None = None

    def warm_up(self) -> None:
        """Begin to open, so that the first question does not have to wait for it."""
        self._begin_opening().add_done_callback(_retrieved)

    async def open(self) -> tuple[Any, Endpoint]:
        """The SDK's client; importing it takes a second, so it happens once, in a thread."""
        return await asyncio.shield(self._begin_opening())

    def _begin_opening(self) -> asyncio.Task[tuple[Any, Endpoint]]:
        opening = self._opening
        if opening is None or (opening.done() and (opening.cancelled() or opening.exception())):
            opening = self._opening = asyncio.create_task(self._open())
        return opening

    async def _open(self) -> tuple[Any, Endpoint]:
        endpoint = await self._find()
        sdk = await asyncio.to_thread(importlib.import_module, "openai")
        transport = await asyncio.to_thread(importlib.import_module, ".transport", __package__)
        client = sdk.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=endpoint.api_key or "none",
            max_retries=MAX_RETRIES,
            timeout=None,
            http_client=transport.http_client(endpoint.base_url, CONNECT_SECONDS),
        )
        return client, endpoint

    async def close(self) -> None:
        """Close the connections."""
        if self._opening is None:
            return
        if not self._opening.done():
            self._opening.cancel()
        opened = (await asyncio.gather(self._opening, return_exceptions=True))[0]
        if isinstance(opened, tuple):
            await opened[0].close()

    async def stream(self, request: ProviderRequest) -> AsyncGenerator[Sequence[Delta], None]:
        client, endpoint = await self.open()
        from .transport import reader_of

        decoder, chunks = EventDecoder(), ChunkReader()
        try:
            # The low-level verb: the typed one walks through every message of the history first.
            response = await client.post(
                "/chat/completions",
                body=_body(request, endpoint),
                cast_to=object,
                options={"headers": STREAM_HEADERS},
            )
            try:
                reader = reader_of(response.http_response)
                while data := await reader.read(READ_BYTES):
                    if deltas := chunks.read(decoder.feed(data)):
                        yield deltas
                    if chunks.failure is not None:
                        raise chunks.failure
            finally:
                await response.close()
        except ProviderError:
            raise
        except Exception as error:
            raise self._translated(error) from error
        if deltas := chunks.read(decoder.end()):
            yield deltas
        if chunks.failure is not None:
            raise chunks.failure
        if not chunks.finished:
            raise ProviderError("The provider broke off in the middle of its answer.")

    def _translated(self, error: Exception) -> Exception:
        import aiohttp
        import openai

        if isinstance(error, openai.APIStatusError):
            body: Mapping[str, Any] = error.body if isinstance(error.body, dict) else {}
            inner = body.get("error")
            body = inner if isinstance(inner, dict) else body
            found = failure(error.status_code, body, _retry_after(error.response.headers))
            logger.warning("%s answered %s: %s", self._name, error.status_code, found.code)
            return found
        if isinstance(error, aiohttp.ClientResponseError):
            return bad_response()
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return ProviderError("The provider did not answer in time.", code="provider_timeout")
        if isinstance(error, openai.APIConnectionError | aiohttp.ClientError | OSError):
            cause = error.__cause__ or error
            logger.warning("%s can not be reached: %s", self._name, cause)
            return ProviderError("The connection to the model's provider failed.")
        return error


def _retrieved(opening: asyncio.Task[Any]) -> None:
    if not opening.cancelled():
        opening.exception()


def _body(request: ProviderRequest, endpoint: Endpoint) -> dict[str, Any]:
    options = dict(request.options)
    if "max_tokens" in options and "//api.openai.com" in endpoint.base_url:
        options["max_completion_tokens"] = options.pop("max_tokens")
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [_message(message) for message in request.messages],
        "stream": True,
        **options,
    }
    if endpoint.reports_usage:
        body["stream_options"] = {"include_usage": True}
    if request.tools:
        body["tools"] = list(request.tools)
    return body


def _message(message: ProviderMessage) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        body["content"] = message.content or None
        body["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        body["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        body["name"] = message.name
    return body


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return None
