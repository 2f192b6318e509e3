"""Agent loop: ask the model, run the tools that it calls, until it calls none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import RunError, StorageUnavailable
from .events import Event, MessageStored, RoundEnded, Start, ToolCalled
from .messages import Message, ToolCall
from .parts import Parts
from .ports import Provider, ProviderMessage, ProviderRequest, RunRecord
from .round import Round
from .run_clock import RunClock
from .run_state import RunState, missing_results
from .run_writer import RunWriter
from .tool_executor import ToolExecutor
from .toolbox import Toolbox

TOO_MANY_CALLS = "The call was not made: one round may have {} calls. Make fewer at a time."


@dataclass(frozen=True)
class RunInput:
    """What is to be answered, by which model, with which tools."""

    record: RunRecord
    question: Message
    provider_name: str
    provider: Provider
    model: str
    transcript: Sequence[Message]
    toolbox: Toolbox = field(default_factory=Toolbox)
    options: Mapping[str, Any] = field(default_factory=dict)

    def first_event(self) -> Start:
        """Return what the run's log begins with."""
        return Start(
            message_id=self.record.message_id,
            user_message_id=self.question.id,
            parent_id=self.question.parent_id,
            model=self.model,
            provider=self.provider_name,
        )


class AgentLoop:
    """Answers one question; ``append`` writes what happens to the run's log."""

    def __init__(
        self,
        run_input: RunInput,
        parts: Parts,
        writer: RunWriter,
        append: Callable[[Sequence[Event]], None],
        clock: RunClock,
    ) -> None:
        self.usage = writer.state.usage
        self.executor: ToolExecutor | None = None
        self._input = run_input
        self._parts = parts
        self._policy = parts.policy
        self._writer = writer
        self._append = append
        self._clock = clock
        self._transcript = [*run_input.transcript]
        self._round: Round | None = None
        self._chars = 0
        self._asked = False
        self._last_reason: str | None = None

    async def answer(self, resumed: RunState | None) -> str:
        """Run until the model calls no more tools, and return its finish reason.

        Args:
            resumed: The state in which a process before this one waited for people.

        Raises:
            RunError: A bound was reached.
            ProviderError: The provider failed.
            StorageUnavailable: Messages cannot be stored.
        """
        if resumed is not None:
            await self._use_tools(resumed.waiting, {}, resumed)
        schemas = self._input.toolbox.schemas()
        for _ in range(self._policy.max_tool_rounds):
            calls, argument_errors = (await self._ask_model(schemas)).calls()
            if not calls:
                return self._finish_reason()
            await self._use_tools(self._announce(calls, argument_errors), argument_errors)
        calls, _ = (await self._ask_model(schemas)).calls()
        if not calls:
            return self._finish_reason()
        await self._ask_model([])
        raise RunError(
            f"The model used tools in {self._policy.max_tool_rounds} rounds and asked for more.",
            code="tool_rounds_exceeded",
        )

    def end_round(self, append: Callable[[Sequence[Event]], object] | None = None) -> None:
        """Write the end of the round that is open, with what it has cost until now."""
        if (ended := self._round) is None:
            return
        self._round = None
        self._chars += ended.chars
        self.usage += ended.usage
        (append or self._append)([RoundEnded(ended.finish_reason, ended.usage.to_dict())])

    def _finish_reason(self) -> str:
        return self._last_reason or "stop"

    async def _ask_model(self, schemas: Sequence[Mapping[str, Any]]) -> Round:
        run_input, policy = self._input, self._policy
        options = dict(run_input.options)
        if not schemas or (self._asked and options.get("tool_choice") != "none"):
            options.pop("tool_choice", None)  # a choice that is forced is made once
        request = ProviderRequest(run_input.model, self._prompt(), schemas, options)
        self._asked = True
        asked = self._round = Round(request, self._append, policy.max_answer_chars - self._chars)
        await asked.stream(run_input.provider, policy.provider_idle_timeout, self._wait_for_disk)
        self._last_reason = asked.finish_reason
        self.end_round()
        return asked

    async def _wait_for_disk(self) -> None:
        with suppress(StorageUnavailable):  # the client keeps getting its stream
            await self._parts.log.flush(self._input.record.id)

    def _prompt(self) -> list[ProviderMessage]:
        system = self._policy.system_prompt
        prompt = [ProviderMessage("system", system)] if system else []
        for each in self._transcript:
            name = each.name if each.role != "tool" else None
            prompt.append(
                ProviderMessage(each.role, each.content, each.tool_calls, each.tool_call_id, name)
            )
        return prompt

    def _announce(
        self, calls: Sequence[ToolCall], argument_errors: dict[str, str]
    ) -> Sequence[ToolCalled]:
        for call in calls[self._policy.max_tool_calls :]:
            argument_errors[call.id] = TOO_MANY_CALLS.format(self._policy.max_tool_calls)
        announced = self._input.toolbox.announce(calls, argument_errors)
        self._append(announced)
        return announced

    async def _use_tools(
        self,
        announced: Sequence[ToolCalled],
        argument_errors: Mapping[str, str],
        resumed: RunState | None = None,
    ) -> None:
        record = self._input.record
        if resumed is not None:
            self._append(missing_results(c for c in resumed.missing if c not in announced))
        executor = self.executor = ToolExecutor(
            record, self._input.toolbox, self._parts, self._append, self._make_durable
        )
        if any(called.needs for called in announced):
            self._clock.pause()
        try:
            await executor.run(announced, argument_errors)
        finally:
            self._clock.resume()
            self.executor = None
        self._chars += executor.chars
        unit = await self._writer.store_calls()
        self._transcript += unit
        self._append([MessageStored.from_message(message) for message in unit])

    async def _make_durable(self) -> None:
        await self._writer.patiently(lambda: self._parts.log.flush(self._input.record.id))
