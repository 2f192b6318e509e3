"""OpenAI-compatible endpoint, streamed.

The SDK makes the request: authentication and errors. The stream is decoded here, all that one read
brought at a time, which costs a tenth of the SDK's own parser.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from ...compat.openai import streamed
from ...core.ports import Delta, ProviderMessage, ProviderRequest
from ...errors import ProviderError
from .chunks import ChunkReader
from .event_stream import EventDecoder
from .failures import bad_response, failure
from .retries import retry_after, with_retries

logger = logging.getLogger("quart_chat.provider")

CONNECT_SECONDS = 10
IDLE_SECONDS = 60.0
MAX_ERROR_BYTES = 64 * 1024
READ_BYTES = 32 * 1024
"""The most that one read takes of a stream."""

STREAM_HEADERS = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
NO_STREAMS = ("text/html", "application/json", "application/problem+json")
TOOL_OPTIONS = ("tool_choice", "parallel_tool_calls")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """URL and key of an endpoint, and what it can do.

    ``options`` are sent with each request that does not set them itself.
    """

    base_url: str
    api_key: str
    reports_usage: bool = True
    takes_tools: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


class OpenAIProvider:
    """Provider that streams from one endpoint, which is looked up at the first request."""

    def __init__(
        self,
        name: str,
        endpoint: Callable[[], Awaitable[Endpoint]],
        idle_timeout: float = IDLE_SECONDS,
    ) -> None:
        self._name = name
        self._find = endpoint
        self._idle_timeout = idle_timeout
        self._opening: asyncio.Task[tuple[Any, Endpoint]] | None = None

    def warm_up(self) -> None:
        """Start opening, so that the first message does not have to wait for it."""
        self._begin_opening().add_done_callback(_retrieved)

    async def open(self) -> tuple[Any, Endpoint]:
        """Return the SDK's client; it is imported in a thread, because that takes a second."""
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
            max_retries=0,
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
        decoder, chunks, body = EventDecoder(), ChunkReader(), _body(request, endpoint)
        try:
            async with AsyncExitStack() as stack:
                reader, is_stream = await self._send(stack, client, body)
                while data := await reader.read(READ_BYTES):
                    if deltas := chunks.read(decoder.feed(data)):
                        yield deltas
                    if chunks.failure is not None:
                        raise chunks.failure
        except ProviderError:
            raise
        except Exception as error:
            raise self._translated(error) from error
        if deltas := chunks.read(decoder.end()):
            yield deltas
        if chunks.failure is not None:
            raise chunks.failure
        if not (is_stream or chunks.started):
            raise bad_response()
        if not chunks.finished:
            raise ProviderError(
                "The provider ended the connection in the middle of its answer. Try again."
            )

    async def _send(
        self, stack: AsyncExitStack, client: Any, body: Mapping[str, Any]
    ) -> tuple[Any, bool]:
        """Return the response's reader, and whether its content type is a stream's."""
        from .transport import reader_of

        response = await with_retries(
            lambda: stack.enter_async_context(streamed(client, body, STREAM_HEADERS)),
            self._idle_timeout,
        )
        reader = reader_of(response)
        kind = str(response.headers.get("content-type", "")).partition(";")[0].strip().lower()
        if kind in NO_STREAMS:
            logger.warning("%s answered %s with %s", self._name, response.status_code, kind)
            raise await _error_in(reader) if kind != "text/html" else bad_response()
        return reader, kind == "text/event-stream"

    def _translated(self, error: Exception) -> Exception:
        import aiohttp
        import openai

        if isinstance(error, openai.APIStatusError):
            body: Mapping[str, Any] = error.body if isinstance(error.body, dict) else {}
            inner = body.get("error")
            body = inner if isinstance(inner, dict) else body
            refusal = failure(error.status_code, body, retry_after(error.response.headers))
            logger.warning("%s answered %s: %s", self._name, error.status_code, refusal.code)
            return refusal
        if isinstance(error, aiohttp.ClientResponseError):
            return bad_response()
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return ProviderError("The provider did not answer in time.", code="provider_timeout")
        if isinstance(error, openai.APIConnectionError | aiohttp.ClientError | OSError):
            cause = error.__cause__ or error
            logger.warning("%s cannot be reached: %s", self._name, cause)
            return ProviderError("The connection to the model's provider failed.")
        return error


def _retrieved(opening: asyncio.Task[Any]) -> None:
    if not opening.cancelled():
        opening.exception()


async def _error_in(reader: Any) -> ProviderError:
    """Return the error that an endpoint sent with status 200."""
    body = b""
    while len(body) < MAX_ERROR_BYTES and (data := await reader.read(READ_BYTES)):
        body += data
    try:
        error = json.loads(body)["error"]
        return failure(None, error if isinstance(error, dict) else {"message": str(error)}, None)
    except (ValueError, LookupError, TypeError, RecursionError):
        return bad_response()


def _body(request: ProviderRequest, endpoint: Endpoint) -> dict[str, Any]:
    options = {**endpoint.options, **request.options}
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
    if not endpoint.takes_tools:
        for name in TOOL_OPTIONS:
            body.pop(name, None)
    elif request.tools:
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
