"""One answer: the provider's stream, tool calls and their results, until there are none.

A run is a task of its own, owned by the process and not by a connection. It appends what happens
to the event log and keeps no text: the message stored at the end is folded from the log
(``draft.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import ChatError, InternalError, NotFound, RunError, StorageUnavailable
from .events import (
    End,
    Event,
    Failed,
    MessageStored,
    Numbered,
    Start,
    Stopped,
    ToolCalled,
)
from .messages import Message, Status, Usage
from .policy import Policy
from .ports import (
    EventLog,
    Provider,
    ProviderMessage,
    ProviderRequest,
    RunRecord,
    Storage,
)
from .round import Round
from .run_state import RunState, final_answer, missing_results, replay, tool_messages
from .tool_executor import CallReply, Toolbox, ToolExecutor

logger = logging.getLogger("quart_chat.run")

DRAINED = "The server was restarted before the answer was complete."
FIRST_RETRY = 0.05
"""Seconds before storing is tried again; doubled each time."""


@dataclass(frozen=True)
class RunInput:
    """What is to be answered, by whom, with which tools."""

    record: RunRecord
    question: Message
    provider_name: str
    provider: Provider
    model: str
    transcript: Sequence[Message]
    toolbox: Toolbox = field(default_factory=Toolbox)
    options: Mapping[str, Any] = field(default_factory=dict)

    def first_event(self) -> Start:
        """What the run's log begins with."""
        return Start(
            message_id=self.record.message_id,
            user_message_id=self.question.id,
            parent_id=self.question.parent_id,
            model=self.model,
            provider=self.provider_name,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ends, and what it says first."""

    status: Status
    finish_reason: str | None = None
    events: tuple[Event, ...] = ()

    @classmethod
    def failure(cls, error: ChatError, status: Status = "failed") -> Outcome:
        return cls(status, None, (Failed(**error.to_dict()),))


class Run:
    """Answers one turn and stores what came of it."""

    def __init__(self, turn: RunInput, log: EventLog, storage: Storage, policy: Policy) -> None:
        self.turn = turn
        self.record = turn.record
        self.followers = 0
        self.finished = asyncio.Event()
        self.stopped: Numbered | None = None
        self.on_finished: Callable[[Run], None] = lambda run: None
        self._log = log
        self._storage = storage
        self._policy = policy
        self._transcript = [*turn.transcript]
        self._parent_id = turn.question.id
        self._stored_seq = 1
        self._round: Round | None = None
        self._usage = Usage()
        self._resumed_usage: Usage | None = None
        self._calls: ToolExecutor | None = None
        self._task: asyncio.Task[None] | None = None
        self._asked: Outcome | None = None
        self._ending = False
        self._suspended = False

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def waits_for_people(self) -> bool:
        """Whether nothing goes on but waiting for approvals."""
        return self._calls is not None and self._calls.waits_for_people

    def start(self) -> None:
        """Begin; the log has been opened with the turn's first event."""
        self._task = asyncio.create_task(self._live(None), name=f"quart_chat run {self.id}")

    def go_on(self, state: RunState) -> None:
        """Continue where a process before this one waited for an approval."""
        self._stored_seq = state.stored_seq
        self._usage = state.usage + state.round_usage
        self._resumed_usage = state.round_usage
        self._parent_id = state.parent_id or self._parent_id
        self._task = asyncio.create_task(self._live(state), name=f"quart_chat run {self.id}")

    def stop(self, message: str) -> None:
        """End the run because somebody asked; the text so far is kept."""
        self._request_end(Outcome("stopped", None, (Stopped(message),)))

    def interrupt(self) -> None:
        """End the run because its process ends; the text so far is kept."""
        self._request_end(Outcome.failure(RunError(DRAINED, code="interrupted"), "interrupted"))

    def suspend(self) -> None:
        """Leave the run, which waits for a person, to the next process."""
        if self._task is not None and not self._ending:
            self._suspended = True
            self._task.cancel()

    def answer(self, call_id: str, reply: CallReply) -> None:
        """Hand in an approval or a client's result.

        Raises:
            NotFound: The run does not wait for that.
        """
        if self._calls is None or not self._calls.answer(call_id, reply):
            raise NotFound("The run does not wait for an answer to that tool call.")

    def _request_end(self, outcome: Outcome) -> None:
        if self._task is not None and not self._ending and self._asked is None:
            self._asked = outcome
            self._task.cancel()

    async def _live(self, state: RunState | None) -> None:
        try:
            outcome = await self._outcome(state)
            if outcome is not None:
                await self._finish(outcome)
        finally:
            self.on_finished(self)
            self.finished.set()

    async def _outcome(self, state: RunState | None) -> Outcome | None:
        try:
            async with asyncio.timeout(self._policy.run_timeout) as timeout:
                await self._answer(state, timeout)
            self._ending = True
            reason = self._round.finish_reason if self._round else None
            return Outcome("completed", reason or "stop")
        except asyncio.CancelledError:
            self._ending = True
            task = asyncio.current_task()
            if task is not None and (self._asked is not None or self._suspended):
                task.uncancel()
                return self._asked
            raise
        except TimeoutError:
            seconds = f"{self._policy.run_timeout:g}"
            return self._failure(RunError(f"The answer took over {seconds} s and was ended."))
        except ChatError as error:
            return self._failure(error)
        except Exception:
            return self._failure(self._unexpected())

    def _failure(self, error: ChatError) -> Outcome:
        self._ending = True
        return Outcome.failure(error)

    def _unexpected(self) -> ChatError:
        error = InternalError()
        logger.exception("run %s failed; reference %s", self.id, error.reference)
        return error

    async def _answer(self, state: RunState | None, timeout: asyncio.Timeout) -> None:
        schemas = self.turn.toolbox.schemas()
        if state is not None:
            waiting = state.waiting
            self._append(missing_results(call for call in state.missing if call not in waiting))
            await self._use_tools(waiting, {}, timeout)
        for _ in range(self._policy.max_tool_rounds):
            await self._ask_model(schemas)
            assert self._round is not None
            calls, argument_errors = self._round.calls()
            if not calls:
                return
            self._calls = self._new_calls()
            cost = self._round.usage.to_dict()
            announced = self._calls.announce(calls, argument_errors, cost)
            await self._use_tools(announced, argument_errors, timeout)
        await self._ask_model([])
        raise RunError(
            f"The model used tools in {self._policy.max_tool_rounds} rounds, which is the bound.",
            code="tool_rounds_exceeded",
        )

    async def _ask_model(self, schemas: Sequence[Mapping[str, Any]]) -> None:
        turn = self.turn
        options = dict(turn.options)
        if not schemas or (self._round is not None and options.get("tool_choice") != "none"):
            options.pop("tool_choice", None)  # a choice that is forced is made once
        request = ProviderRequest(turn.model, self._prompt(), schemas, options)
        if self._round is not None:
            self._usage += self._round.usage
        self._round = Round(request, self._append)
        seconds = self._policy.provider_idle_timeout
        await self._round.stream(turn.provider, seconds, self._wait_for_disk)

    async def _wait_for_disk(self) -> None:
        with suppress(StorageUnavailable):  # the client keeps getting its stream
            await self._log.flush(self.id)

    def _prompt(self) -> list[ProviderMessage]:
        system = self._policy.system_prompt
        prompt = [ProviderMessage("system", system)] if system else []
        for each in self._transcript:
            name = each.name if each.role != "tool" else None
            prompt.append(
                ProviderMessage(each.role, each.content, each.tool_calls, each.tool_call_id, name)
            )
        return prompt

    def _new_calls(self) -> ToolExecutor:
        return ToolExecutor(self.record, self.turn.toolbox, self._policy, self._append)

    async def _use_tools(
        self,
        announced: Sequence[ToolCalled],
        argument_errors: Mapping[str, str],
        timeout: asyncio.Timeout,
    ) -> None:
        calls = self._calls = self._calls or self._new_calls()
        loop = asyncio.get_running_loop()
        left = (timeout.when() or loop.time()) - loop.time()
        if any(called.needs for called in announced):
            timeout.reschedule(None)
        await calls.run(announced, argument_errors)
        timeout.reschedule(loop.time() + left)
        self._calls = None
        self._append(await self._store_unit(await self._replayed(), "completed"))

    async def _finish(self, outcome: Outcome) -> None:
        status = outcome.status
        for event in outcome.events:
            seq = self._log.append(self.id, [event])
            if isinstance(event, Stopped):
                self.stopped = (seq, event)
        stored: list[Event] = []
        try:
            stored = await self._store_answer(status)
        except NotFound:
            status = "stopped"
        except ChatError as error:
            status = "failed"
            self._append([Failed(**error.to_dict())])
        except Exception:
            status = "failed"
            self._append([Failed(**self._unexpected().to_dict())])
        usage = self._usage + self._round.usage if self._round else self._usage
        self.on_finished(self)
        self._append([*stored, End(status, outcome.finish_reason, usage.to_dict())])
        await self._wait_for_disk()

    async def _store_answer(self, status: Status) -> list[Event]:
        state = await self._replayed()
        stored: list[Event] = []
        if state.calls:
            self._append(missing_results(state.missing))
            stored += await self._store_unit(await self._replayed(), status)
            state = RunState()
        answer = final_answer(state, self.record, self._parent_id, self._message_fields(status))
        return [*stored, *await self._store([answer])]

    async def _store_unit(self, state: RunState, status: Status) -> list[Event]:
        unit = tool_messages(state, self.record, self._parent_id, self._message_fields(status))
        events = await self._store(unit)
        self._transcript += unit
        self._parent_id = unit[-1].id
        self._stored_seq = state.seq
        return events

    def _message_fields(self, status: Status) -> dict[str, Any]:
        turn, usage = self.turn, self._round.usage if self._round else self._resumed_usage
        return {
            "model": turn.model,
            "provider": turn.provider_name,
            "status": status,
            "usage": usage.to_dict() if usage else None,
        }

    async def _replayed(self) -> RunState:
        state: RunState = await self._with_patience(
            lambda: replay(self._log, self.id, self._stored_seq)
        )
        return state

    async def _store(self, messages: Sequence[Message]) -> list[Event]:
        async def store() -> Sequence[Message]:
            await self._log.flush(self.id)
            return await self._storage.add_messages(self.record.user, messages)

        return [MessageStored.of(message) for message in await self._with_patience(store)]

    async def _with_patience(self, attempt: Callable[[], Any]) -> Any:
        """Try again, ever more rarely, while the storage is away."""
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + self._policy.storage_retry, FIRST_RETRY
        while True:
            try:
                return await attempt()
            except StorageUnavailable:
                if loop.time() + pause > until:
                    raise
            await asyncio.sleep(pause)
            pause *= 2

    def _append(self, events: Sequence[Event]) -> None:
        if events:
            self._log.append(self.id, events)
