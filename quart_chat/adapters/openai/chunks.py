"""Chat completion chunks become deltas."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.ports import CallDelta, Delta, FinishDelta, TextDelta, UsageDelta
from ...errors import ProviderError
from .failures import bad_response, failure

HIGH = "\ud800", "\udbff"


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
            raise bad_response()
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
        raise bad_response() from None


def _usage(usage: Mapping[str, Any]) -> list[Delta]:
    try:
        return [UsageDelta(int(usage["prompt_tokens"]), int(usage["completion_tokens"]))]
    except (KeyError, TypeError, ValueError):
        return []
