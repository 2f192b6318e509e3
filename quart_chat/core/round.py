"""Round: one request to a model (the AI SDK's "step"). Its stream becomes events and calls."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any

from ..errors import InvalidMessage, ProviderError, RunError
from .commands import check_values
from .events import ContentDelta, Event, Reasoning
from .messages import ToolCall, Usage, text_of
from .ports import (
    CallDelta,
    Delta,
    FinishDelta,
    Provider,
    ProviderRequest,
    TextDelta,
    UsageDelta,
)
from .run_state import CHARS_PER_TOKEN

DISK_CHARS = 512 * 1024
"""After so much text the log is given time to write it down: no provider outruns the disk."""


class Round:
    """A request, and what has come of it so far."""

    def __init__(
        self,
        request: ProviderRequest,
        append: Callable[[Sequence[Event]], None],
        max_chars: int = 2**63,
    ) -> None:
        self.chars = 0
        self.finish_reason: str | None = None
        self._request = request
        self._append = append
        self._fragments: list[_Fragment] = []
        self._counted: Usage | None = None
        self._max_chars = max_chars
        self._heard = 0.0

    @property
    def usage(self) -> Usage:
        """The provider's count, or an estimate of what was sent and received until now."""
        if self._counted is not None:
            return self._counted
        prompt = sum(len(text_of(message.content)) for message in self._request.messages)
        return Usage(
            -(-prompt // CHARS_PER_TOKEN), -(-self.chars // CHARS_PER_TOKEN), estimated=True
        )

    async def stream(
        self, provider: Provider, idle_timeout: float, wait_for_disk: Callable[[], Awaitable[None]]
    ) -> None:
        """Send the request, and append what comes; ``wait_for_disk`` is awaited at times.

        Raises:
            ProviderError: The provider failed, or sent nothing for ``idle_timeout`` seconds.
        """
        loop = asyncio.get_running_loop()
        self._heard = loop.time()
        relieved_at = self.chars
        watch = _IdleTimeout(idle_timeout, lambda: self._heard)
        async with watch, aclosing(provider.stream(self._request)) as stream:
            async for deltas in stream:
                self._heard = loop.time()
                self._take(deltas)
                if self.chars - relieved_at > DISK_CHARS:
                    relieved_at = self.chars
                    await wait_for_disk()

    def _take(self, deltas: Sequence[Delta]) -> None:
        events: list[Event] = []
        for delta in deltas:
            match delta:
                case TextDelta(text, reasoning):
                    self.chars += len(text)
                    if self.chars > self._max_chars:
                        text = text[: max(0, len(text) - (self.chars - self._max_chars))]
                    events.append(Reasoning(text) if reasoning else ContentDelta(text))
                case CallDelta():
                    self.chars += len(delta.arguments)
                    self._add(delta)
                case UsageDelta(prompt, completion):
                    self._counted = Usage(prompt, completion)
                case FinishDelta(reason):
                    self.finish_reason = reason
        if events:
            self._append(events)
        if self.chars > self._max_chars:
            raise RunError(
                "The answer reached the greatest length that this server allows.",
                code="answer_too_long",
            )

    def _add(self, delta: CallDelta) -> None:
        fragment = self._belongs_to(delta)
        if fragment is None:
            fragment = _Fragment(delta.index, delta.id, delta.name or "")
            self._fragments.append(fragment)
        elif delta.name and not fragment.name:
            fragment.name = delta.name
        fragment.arguments.append(delta.arguments)

    def _belongs_to(self, delta: CallDelta) -> _Fragment | None:
        """The call that a fragment continues: providers name it by index, by id, or not at all."""
        for known in self._fragments:
            if delta.id and delta.id == known.id and delta.index in (None, known.index):
                return known
        for known in reversed(self._fragments):
            same_id = not delta.id or not known.id or delta.id == known.id
            if delta.index is not None and known.index == delta.index:
                return known if same_id else None
        if delta.index is None and not delta.id and not delta.name and self._fragments:
            return self._fragments[-1]
        return None

    def calls(self) -> tuple[list[ToolCall], dict[str, str]]:
        """The calls, complete, and what is wrong with those whose arguments are no JSON object."""
        calls: list[ToolCall] = []
        argument_errors: dict[str, str] = {}
        taken: set[str] = set()
        for fragment in self._fragments:
            call_id = fragment.id or ""
            if not call_id or call_id in taken:
                call_id = f"call_{secrets.token_hex(8)}"
            taken.add(call_id)
            arguments, argument_error = _decoded("".join(fragment.arguments))
            if argument_error is not None:
                argument_errors[call_id] = argument_error
            calls.append(ToolCall(call_id, _name(fragment.name), arguments))
        return calls, argument_errors


def _name(given: str) -> str:
    """A name that providers take back, also where the model made one up."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", given)[:64] or "unnamed"


class _Fragment:
    __slots__ = ("arguments", "id", "index", "name")

    def __init__(self, index: int | None, call_id: str | None, name: str) -> None:
        self.index = index
        self.id = call_id
        self.name = name
        self.arguments: list[str] = []


def _decoded(arguments: str) -> tuple[dict[str, Any], str | None]:
    if not arguments.strip():
        return {}, None
    try:
        value = json.loads(arguments)
        check_values(value)
    except (ValueError, RecursionError):
        return {}, "The arguments are not valid JSON."
    except InvalidMessage as error:
        return {}, f"The arguments cannot be used. {error.message}"
    if not isinstance(value, dict):
        return {}, "The arguments are not a JSON object."
    return value, None


class _IdleTimeout:
    """Ends the block with ``provider_timeout`` after a silence; one timer, none per token."""

    def __init__(self, seconds: float, heard: Callable[[], float]) -> None:
        self._seconds = seconds
        self._heard = heard
        self._expired = False

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = self._loop.call_later(self._seconds, self._check)

    def _check(self) -> None:
        left = self._heard() + self._seconds - self._loop.time()
        if left > 0.001:
            self._timer = self._loop.call_later(left, self._check)
        else:
            self._expired = True
            self._task.cancel()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._expired and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ProviderError(
                f"The model's provider sent nothing for {self._seconds:g} s.",
                code="provider_timeout",
            ) from None
