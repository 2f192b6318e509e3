"""What a run has said since the last message that it stored: a fold of its log.

A run uses it to make the messages that it stores; after a crash the next process uses it to rescue
what the log has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .events import (
    ContentDelta,
    End,
    Event,
    MessageStored,
    Reasoning,
    Start,
    ToolCalled,
    ToolProgress,
    ToolReturned,
)
from .messages import (
    NOT_FINISHED,
    Message,
    ToolCall,
    Usage,
    derived_id,
    tool_message,
)
from .ports import EventLog, RunRecord


@dataclass
class RunState:
    """Text, reasoning and calls that are in no stored message yet."""

    seq: int = 0
    stored_seq: int = 1
    start: Start | None = None
    parent_id: str | None = None
    ended: bool = False
    usage: Usage = field(default_factory=Usage)
    round_usage: Usage = field(default_factory=Usage)
    begun: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    reasonings: list[str] = field(default_factory=list)
    calls: dict[str, ToolCalled] = field(default_factory=dict)
    results: dict[str, ToolReturned] = field(default_factory=dict)

    def take(self, seq: int, event: Event) -> None:
        """Add what an event says."""
        self.seq = seq
        match event:
            case ContentDelta(text):
                self.texts.append(text)
            case Reasoning(text):
                self.reasonings.append(text)
            case ToolCalled(call_id):
                self.calls[call_id] = event
                self.round_usage += Usage.of(event.usage or {})
            case ToolProgress(call_id):
                self.begun.add(call_id)
            case ToolReturned(call_id):
                self.results[call_id] = event
            case MessageStored(message):
                self.stored_seq, self.parent_id = seq, message["id"]
                self.usage += Usage.of(message.get("usage") or {})
                self.texts, self.reasonings, self.calls, self.results = [], [], {}, {}
                self.round_usage, self.begun = Usage(), set()
            case Start():
                self.start = event
            case End():
                self.ended = True

    @property
    def missing(self) -> list[ToolCalled]:
        """The calls that have no result."""
        return [call for call_id, call in self.calls.items() if call_id not in self.results]

    @property
    def awaits_approval(self) -> bool:
        """Whether a person has still to agree to a call."""
        return any(call.needs == "approval" for call in self.waiting)

    @property
    def waiting(self) -> list[ToolCalled]:
        """The calls that wait for somebody; nothing of them has happened."""
        return [call for call in self.missing if call.needs and call.tool_call_id not in self.begun]


async def replay(log: EventLog, run_id: str, after: int) -> RunState:
    """Read what follows event ``after`` without waiting for more."""
    state = RunState(seq=after)
    async for page in log.follow(run_id, after, wait=False):
        for seq, event in page:
            state.take(seq, event)
    return state


def missing_results(calls: Iterable[ToolCalled]) -> list[ToolReturned]:
    """What stands in for the results of calls that the run's end cut off."""
    return [ToolReturned(call.tool_call_id, call.name, NOT_FINISHED, True) for call in calls]


def tool_messages(
    state: RunState, record: RunRecord, parent_id: str, told: Mapping[str, Any]
) -> list[Message]:
    """The assistant's message with its calls and a message for every result, to be stored as one.

    Their ids follow from the run, the parent and the calls: storing them again changes nothing.
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
            **told,
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
    state: RunState, record: RunRecord, parent_id: str, told: Mapping[str, Any]
) -> Message:
    """The message that ends the run, with the id that ``start`` has named."""
    return Message(
        id=record.message_id,
        thread_id=record.thread_id,
        role="assistant",
        content="".join(state.texts),
        reasoning="".join(state.reasonings) or None,
        parent_id=parent_id,
        run_id=record.id,
        **told,
    )
