"""State of a run, replayed from its log: what was said since the last message that was stored.

A run makes the messages that it stores from it. After a crash the next process does the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .events import (
    ContentDelta,
    End,
    Event,
    MessageStored,
    Reasoning,
    RoundEnded,
    Start,
    ToolCalled,
    ToolProgress,
    ToolReturned,
)
from .messages import NOT_FINISHED, Message, Status, ToolCall, Usage, derived_id, tool_message
from .ports import EventLog, RunRecord

CHARS_PER_TOKEN = 4
"""How tokens are estimated where a provider does not count them."""


@dataclass
class RunState:
    """Text, reasoning and calls that are in no stored message yet, and what came before them."""

    seq: int = 0
    start: Start | None = None
    parent_id: str | None = None
    end: End | None = None
    usage: Usage = field(default_factory=Usage)
    unit_usage: Usage = field(default_factory=Usage)
    begun: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    reasonings: list[str] = field(default_factory=list)
    calls: dict[str, ToolCalled] = field(default_factory=dict)
    results: dict[str, ToolReturned] = field(default_factory=dict)
    round_is_open: bool = False
    answer_status: Status | None = None
    """The status of the final answer, once it is stored."""

    def copy(self) -> RunState:
        """Return an independent copy."""
        return replace(
            self,
            begun={*self.begun},
            texts=[*self.texts],
            reasonings=[*self.reasonings],
            calls={**self.calls},
            results={**self.results},
        )

    def after(self) -> RunState:
        """Return the state to continue from, once all of this is stored."""
        return RunState(self.seq, self.start, self.parent_id, self.end, self.usage)

    def take(self, seq: int, event: Event) -> None:
        """Apply an event."""
        self.seq = seq
        match event:
            case ContentDelta(text):
                self.texts.append(text)
                self.round_is_open = True
            case Reasoning(text):
                self.reasonings.append(text)
                self.round_is_open = True
            case RoundEnded(_, usage):
                self.usage += Usage.from_dict(usage)
                self.unit_usage += Usage.from_dict(usage)
                self.round_is_open = False
            case ToolCalled(call_id):
                self.calls[call_id] = event
            case ToolProgress(call_id):
                self.begun.add(call_id)
            case ToolReturned(call_id):
                self.results[call_id] = event
            case MessageStored(message):
                self._stored(message)
            case Start():
                self.start = event
            case End():
                self.end = event

    def _stored(self, message: Mapping[str, Any]) -> None:
        self.parent_id = message["id"]
        if self.start is not None and message["id"] == self.start.message_id:
            self.answer_status = message["status"]
        self.texts, self.reasonings, self.calls, self.results = [], [], {}, {}
        self.unit_usage, self.begun = Usage(), set()

    @property
    def missing(self) -> list[ToolCalled]:
        """The calls that have no result."""
        return [call for call_id, call in self.calls.items() if call_id not in self.results]

    @property
    def awaits_approval(self) -> bool:
        """Whether a person has still to approve a call."""
        return any(call.needs == "approval" for call in self.waiting)

    @property
    def waiting(self) -> list[ToolCalled]:
        """The calls that wait for a person or a client; nothing of them has happened."""
        return [call for call in self.missing if call.needs and call.tool_call_id not in self.begun]

    def estimated_round(self) -> RoundEnded | None:
        """Return the end of a round that a crash cut off, its usage estimated; None without one."""
        if not self.round_is_open:
            return None
        chars = sum(map(len, self.texts)) + sum(map(len, self.reasonings))
        usage = Usage(0, -(-chars // CHARS_PER_TOKEN), estimated=True)
        return RoundEnded(None, usage.to_dict())


async def replay(log: EventLog, run_id: str, base: RunState | None = None) -> RunState:
    """Return the state after all events that the log has now, from ``base`` or the beginning."""
    state = base.copy() if base is not None else RunState()
    async for page in log.follow(run_id, state.seq, wait=False):
        for seq, event in page:
            state.take(seq, event)
    return state


def missing_results(calls: Iterable[ToolCalled]) -> list[ToolReturned]:
    """Return what stands in for the results of calls that the run's end cut off."""
    return [ToolReturned(call.tool_call_id, call.name, NOT_FINISHED, True) for call in calls]


def tool_messages(
    state: RunState, record: RunRecord, parent_id: str, fields: Mapping[str, Any]
) -> list[Message]:
    """Return the assistant's message with its calls, and a message for each result.

    They are stored as one unit. Their ids follow from the run, the parent and the calls, so
    storing them again changes nothing.
    """
    messages = [
        Message(
            id=derived_id(record.id, parent_id, "calls"),
            thread_id=record.thread_id,
            role="assistant",
            content="".join(state.texts),
            reasoning="".join(state.reasonings) or None,
            tool_calls=tuple(
                ToolCall(call.tool_call_id, call.name, call.arguments)
                for call in state.calls.values()
            ),
            parent_id=parent_id,
            run_id=record.id,
            **fields,
        )
    ]
    for call in messages[0].tool_calls:
        result = state.results.get(call.id)
        messages.append(
            tool_message(
                call,
                result.content if result else NOT_FINISHED,
                record.thread_id,
                derived_id(record.id, parent_id, "result", call.id),
                parent_id=messages[-1].id,
                run_id=record.id,
            )
        )
    return messages


def final_answer(
    state: RunState, record: RunRecord, parent_id: str, fields: Mapping[str, Any]
) -> Message:
    """Return the message that ends the run, with the id that ``start`` has named."""
    return Message(
        id=record.message_id,
        thread_id=record.thread_id,
        role="assistant",
        content="".join(state.texts),
        reasoning="".join(state.reasonings) or None,
        parent_id=parent_id,
        run_id=record.id,
        **fields,
    )


def message_fields(state: RunState, status: Status) -> dict[str, Any]:
    """Return what all messages of a run share."""
    start = state.start
    return {
        "model": start.model if start else None,
        "provider": start.provider if start else None,
        "status": status,
        "usage": state.unit_usage.to_dict(),
    }
