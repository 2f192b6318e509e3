"""Any OpenAI-compatible endpoint, streamed.

The SDK makes the request: authentication, retries before the first byte, errors. The stream is
decoded here, all that one read brought at a time, which costs a tenth of the SDK's own parser.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.ports import (
    CallDelta,
    Delta,
    FinishDelta,
    ProviderMessage,
    ProviderRequest,
    TextDelta,
    UsageDelta,
)
from ..errors import ProviderError

logger = logging.getLogger("quart_chat.provider")

CONNECT_SECONDS = 10
MAX_RETRIES = 2
MAX_CONNECTIONS = 100_000
MAX_EVENT_BYTES = 4 * 1024 * 1024
"""One event of the stream may have so many bytes; a provider that sends more is broken."""

STREAM_HEADERS = {"Accept-Encoding": "identity", "X-Stainless-Raw-Response": "stream"}
"""No compression, and the SDK's own mark for a response whose body it leaves to the caller."""

HIGH = "\ud800", "\udbff"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go, and the key that opens it."""

    base_url: str
    api_key: str
    reports_usage: bool = True


class EventDecoder:
    """Server-sent events as the HTML Standard defines them: the data of every block, as bytes."""

    def __init__(self) -> None:
        self._rest = b""
        self._begun = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that are complete with these bytes.

        Raises:
            ProviderError: An event has more than 4 MiB.
        """
        buffer = self._rest + chunk if self._rest else chunk
        if not self._begun and len(buffer) >= 3:
            self._begun = True
            buffer = buffer.removeprefix(b"\xef\xbb\xbf")
        held = b""
        if b"\r" in buffer:
            if buffer.endswith(b"\r"):  # perhaps the first half of a CRLF
                buffer, held = buffer[:-1], b"\r"
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        blocks = buffer.split(b"\n\n")
        self._rest = blocks.pop() + held
        if len(self._rest) > MAX_EVENT_BYTES:
            raise _bad_response()
        return [data for block in blocks if (data := _data(block)) is not None]

    def end(self) -> list[bytes]:
        """What an endpoint left without the blank line that should end it."""
        data = _data(self._rest.replace(b"\r", b"\n"))
        self._rest = b""
        return [] if data is None else [data]


def _data(block: bytes) -> bytes | None:
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:]
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line[:5] == b"data:"]
    return b"\n".join(lines) if lines else None


class ChunkReader:
    """Chat completion chunks become deltas; neighbouring text of one read becomes one."""

    def __init__(self) -> None:
        import jiter

        self._parse = functools.partial(jiter.from_json, cache_mode="keys")
        self._half = ""
        self._pieces: list[str] = []
        self._reasoning = False
        self.finished = False
        self.failure: ProviderError | None = None

    def read(self, events: Sequence[bytes]) -> list[Delta]:
        """What a read's events say, up to a ``failure`` among them."""
        deltas: list[Delta] = []
        try:
            for data in events:
                if data == b"[DONE]":
                    self.finished = True
                else:
                    self._take(self._chunk(data), deltas)
        except ProviderError as failure:
            self.failure = failure
        self._flush(deltas)
        return deltas

    def _take(self, chunk: dict[str, Any], deltas: list[Delta]) -> None:
        choices = chunk.get("choices")
        if choices:
            choice = choices[0]
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            if thought and isinstance(thought, str):
                self._add(thought, True, deltas)
            text = delta.get("content")
            if text and isinstance(text, str):
                self._add(text, False, deltas)
            if delta.get("tool_calls") or choice.get("finish_reason"):
                self._flush(deltas)
                deltas += self._rest_of(choice, delta)
        if chunk.get("usage"):
            deltas += _usage(chunk["usage"])

    def _add(self, piece: str, reasoning: bool, deltas: list[Delta]) -> None:
        if reasoning is not self._reasoning:
            self._flush(deltas)
            self._reasoning = reasoning
        self._pieces.append(piece)

    def _flush(self, deltas: list[Delta]) -> None:
        if self._pieces:
            delta = self._text(self._pieces, self._reasoning)
            self._pieces = []
            if delta.text:
                deltas.append(delta)

    def _chunk(self, data: bytes) -> dict[str, Any]:
        try:
            chunk = self._parse(data)
        except ValueError:
            chunk = _loads(data)  # half a surrogate pair, which jiter refuses
        if not isinstance(chunk, dict):
            raise _bad_response()
        if error := chunk.get("error"):
            raise failure(None, error if isinstance(error, dict) else {"message": str(error)}, None)
        return chunk

    def _text(self, pieces: list[str], reasoning: bool) -> TextDelta:
        text = self._half + "".join(pieces)
        self._half = ""
        if not text.isascii():
            if HIGH[0] <= text[-1] <= HIGH[1]:
                text, self._half = text[:-1], text[-1]
            try:
                text.encode()
            except UnicodeEncodeError:
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return TextDelta(text, reasoning)

    def _rest_of(self, choice: Mapping[str, Any], delta: Mapping[str, Any]) -> list[Delta]:
        rest: list[Delta] = []
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            arguments = function.get("arguments")
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments)
            rest.append(
                CallDelta(call.get("index"), call.get("id"), function.get("name"), arguments or "")
            )
        if reason := choice.get("finish_reason"):
            self.finished = True
            if reason == "content_filter":
                raise ProviderError(
                    "The provider's content filter ended the answer.", code="content_filtered"
                )
            rest.append(FinishDelta(str(reason)))
        return rest


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise _bad_response() from None


def _usage(usage: Mapping[str, Any]) -> list[Delta]:
    try:
        return [UsageDelta(int(usage["prompt_tokens"]), int(usage["completion_tokens"]))]
    except (KeyError, TypeError, ValueError):
        return []


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
        http = await asyncio.to_thread(importlib.import_module, "httpx2")
        limits = http.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=100)
        timeout = http.Timeout(None, connect=CONNECT_SECONDS)
        client = sdk.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=endpoint.api_key or "none",
            max_retries=MAX_RETRIES,
            timeout=timeout,
            http_client=sdk.DefaultAioHttpClient(limits=limits, timeout=timeout),
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
        decoder, reader = EventDecoder(), ChunkReader()
        try:
            # The low-level verb: the typed one walks through every message of the history first.
            response = await client.post(
                "/chat/completions",
                body=_body(request, endpoint),
                cast_to=object,
                options={"headers": STREAM_HEADERS},
            )
            try:
                async for chunk in response.http_response.stream:
                    if deltas := reader.read(decoder.feed(chunk)):
                        yield deltas
                    if reader.failure is not None:
                        raise reader.failure
            finally:
                await response.close()
        except ProviderError:
            raise
        except Exception as error:
            raise self._translated(error) from error
        if deltas := reader.read(decoder.end()):
            yield deltas
        if reader.failure is not None:
            raise reader.failure
        if not reader.finished:
            raise ProviderError("The provider broke off in the middle of its answer.")

    def _translated(self, error: Exception) -> Exception:
        import aiohttp
        import httpx2
        import openai

        if isinstance(error, openai.APIStatusError):
            body: Mapping[str, Any] = error.body if isinstance(error.body, dict) else {}
            inner = body.get("error")
            body = inner if isinstance(inner, dict) else body
            found = failure(error.status_code, body, _retry_after(error.response.headers))
            logger.warning("%s answered %s: %s", self._name, error.status_code, found.code)
            return found
        timed_out = isinstance(error, openai.APITimeoutError | httpx2.TimeoutException)
        if timed_out and not _refused_connection(error):
            return ProviderError("The provider did not answer in time.", code="provider_timeout")
        if isinstance(error, aiohttp.ClientResponseError):
            return _bad_response()
        if isinstance(
            error,
            openai.APIConnectionError | httpx2.TransportError | aiohttp.ClientError | OSError,
        ):
            logger.warning("%s can not be reached: %s", self._name, type(error).__name__)
            return ProviderError("The connection to the model's provider failed.")
        return error


def _retrieved(opening: asyncio.Task[Any]) -> None:
    if not opening.cancelled():
        opening.exception()


def _refused_connection(error: BaseException | None) -> bool:
    """Whether a connection could not be made or broke, which the SDK reports as a time-out."""
    import aiohttp

    while error is not None:
        if isinstance(error, aiohttp.ClientConnectionError):
            return not isinstance(error, aiohttp.ServerTimeoutError)
        error = error.__cause__ or error.__context__
    return False


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


TOO_LONG = re.compile(r"context[ _](length|size|window)|maximum context|too many tokens|too long")
FILTERED = re.compile(r"content[ _](filter|policy|management)|safety")
NO_MODEL = re.compile(r"model.{0,80}(not found|not exist|unknown|invalid|unsupported|no access)")


def failure(
    status: int | None, body: Mapping[str, Any], retry_after: float | None
) -> ProviderError:
    """The error of the protocol that fits a provider's status and error object.

    The provider's own words stay out of it: they may repeat a key or a prompt.
    """
    code = str(body.get("code") or "")
    kind = str(body.get("type") or "")
    words = f"{code} {kind} {body.get('message') or ''}".lower()
    if status is None and code.isdigit():
        status = int(code)
    if status in (401, 403) or "invalid_api_key" in words or "authentication" in kind:
        return ProviderError("The provider refused the server's key.", code="provider_auth")
    if status == 429 or "rate_limit" in words or "insufficient_quota" in words:
        return ProviderError(
            "The provider has too much to do, or the quota is used up. Try again later.",
            code="provider_rate_limited",
            retry_after=retry_after,
        )
    if status == 413 or TOO_LONG.search(words):
        return ProviderError(
            "The conversation is too long for this model. Begin a new thread or shorten it.",
            code="context_too_long",
        )
    if FILTERED.search(words):
        return ProviderError(
            "The provider's content filter refused the message.", code="content_filtered"
        )
    if status == 404 or "model_not_found" in words or NO_MODEL.search(words):
        return ProviderError("The provider has no such model.", code="unknown_model")
    if status in (408, 504) or "timeout" in words:
        return ProviderError("The provider did not answer in time.", code="provider_timeout")
    if status is None or status >= 500:
        return ProviderError(
            "The provider has a problem at the moment. Try again.", retry_after=retry_after
        )
    return _bad_response()


def _bad_response() -> ProviderError:
    return ProviderError(
        "The provider refused the request or answered with something that makes no sense.",
        code="provider_bad_response",
    )
