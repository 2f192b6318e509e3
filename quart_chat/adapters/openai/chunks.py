"""Chat completion chunks, read into deltas."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.ports import CallDelta, Delta, FinishDelta, TextDelta, UsageDelta
from ...errors import ProviderError
from .failures import bad_response, failure

HIGH = "\ud800", "\udbff"
MAX_TOKENS = 2**53
"""The largest token count that is believed: JSON readers keep larger numbers inexactly."""

MISSHAPEN = (
    AttributeError,
    ArithmeticError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What reading JSON of an unexpected shape raises."""

ESCAPE = re.compile(r"\\u0000|\\(?:u0{0,3})?\Z|\\.", re.DOTALL)
"""One escape of a JSON text: a NUL, one that the end of a fragment has cut, or any other."""


class ChunkReader:
    """Reader of chat completion chunks; adjacent text of one read becomes one delta."""

    def __init__(self) -> None:
        import jiter

        self._parse = functools.partial(jiter.from_json, cache_mode="keys")
        self._half = ""
        self._pieces: list[str] = []
        self._reasoning = False
        self._escapes: dict[int | None, str] = {}
        self.started = False
        self.finished = False
        self.failure: ProviderError | None = None

    def read(self, events: Sequence[bytes]) -> list[Delta]:
        """Return the deltas of these events, up to a ``failure`` among them."""
        deltas: list[Delta] = []
        self.started = self.started or bool(events)
        try:
            for data in events:
                if data == b"[DONE]":
                    self.finished = True
                else:
                    self._take(self._chunk(data), deltas)
        except ProviderError as failure:
            self.failure = failure
        except MISSHAPEN:
            self.failure = bad_response()
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
                self._take_calls(delta.get("tool_calls"), deltas)
                self._take_finish(choice.get("finish_reason"), deltas)
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
        if "\0" in text:
            text = text.replace("\0", "")
        if not text.isascii():
            if HIGH[0] <= text[-1] <= HIGH[1]:
                text, self._half = text[:-1], text[-1]
            text = _whole(text)
        return TextDelta(text, reasoning)

    def _take_calls(self, calls: Any, deltas: list[Delta]) -> None:
        if not isinstance(calls, list | None):
            raise bad_response()
        for call in calls or ():
            function = call.get("function") or {}
            index, arguments = call.get("index"), function.get("arguments")
            if not isinstance(index, int | None) or isinstance(index, bool):
                raise bad_response()
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments)
            name, call_id = _label(function.get("name")), _label(call.get("id"))
            deltas.append(CallDelta(index, call_id, name, self._arguments(index, arguments)))

    def _arguments(self, index: int | None, fragment: str | None) -> str:
        """Return a fragment without NUL, raw or escaped; an escape that was cut waits."""
        if not fragment:
            return ""
        text = (_label(self._escapes.pop(index, "") + fragment)) or ""
        if "\\" not in text:
            return text

        def mend(match: re.Match[str]) -> str:
            escape = match[0]
            if escape == "\\u0000":
                return ""
            if match.end() == len(text) and escape in ("\\", "\\u", "\\u0", "\\u00", "\\u000"):
                self._escapes[index] = escape
                return ""
            return escape

        return ESCAPE.sub(mend, text)

    def _take_finish(self, reason: Any, deltas: list[Delta]) -> None:
        if not reason:
            return
        self.finished = True
        if reason == "content_filter":
            raise ProviderError(
                "The provider's content filter ended the answer.", code="content_filtered"
            )
        deltas.append(FinishDelta(_label(reason) or "stop"))


def _label(text: Any) -> str | None:
    """Return a short text of the provider's as it can be stored."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise bad_response()
    return _whole(text.replace("\0", ""))


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise bad_response() from None


def _usage(usage: Mapping[str, Any]) -> list[Delta]:
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if counts[0] is None or counts[1] is None:
        return []
    prompt, completion = int(counts[0]), int(counts[1])
    if not (0 <= prompt <= MAX_TOKENS and 0 <= completion <= MAX_TOKENS):
        raise bad_response()
    return [UsageDelta(prompt, completion)]
