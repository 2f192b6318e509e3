"""Preparation of a run: the model, the tools and the history with which a question is answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import InvalidMessage, NotFound
from .agent_loop import RunInput
from .commands import PastMessage, SendMessage, plain_content
from .messages import Message, MessageContent, history_for_provider, new_id
from .parts import Parts
from .ports import RunRecord, Window
from .toolbox import Toolbox

PATH_PAGE = 200


class Preparation:
    """Turns stored questions into what a run needs."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._policy = parts.policy

    def check(self, user: str, command: SendMessage) -> None:
        """Refuse a message whose model or tools this user cannot have.

        Raises:
            RequestError: Names the field.
        """
        self._parts.models.choose(command.provider, command.model)
        bound = self._policy.max_tokens
        if bound is not None and (command.max_tokens or 0) > bound:
            raise InvalidMessage(f"max_tokens: at most {bound} are allowed here.")
        if self._policy.image_urls == "data" and _remote_image(command.plain):
            raise InvalidMessage("content: image_url.url: only data: URLs are allowed here.")
        names = {tool.name for tool in self._parts.tools.choose(user, command.tools or ())}
        for client_tool in command.client_tools or ():
            if client_tool.name in names:
                raise InvalidMessage(f"client_tools: {client_tool.name!r} is a server's tool.")

    def message(self, thread_id: str, command: SendMessage) -> Message:
        """Return the message to store, with the id of the run that will answer it."""
        source, model = self._parts.models.choose(command.provider, command.model)
        return Message(
            id=command.id or new_id(),
            thread_id=thread_id,
            role="user",
            content=command.plain,
            parent_id=command.parent_id,
            run_id=new_id(),
            model=model,
            provider=source.name,
            metadata=command.metadata or {},
            options={**command.options(), "fingerprint": command.fingerprint},
        )

    async def run_input(
        self,
        record: RunRecord,
        question: Message,
        history: Sequence[PastMessage] | None = None,
        leaf: str | None = None,
    ) -> RunInput:
        """Return what a run needs to answer a stored question.

        Args:
            record: The run.
            question: The user's message.
            history: Earlier turns that the client sent along, instead of the stored ones.
            leaf: The message up to which the run has come already.

        Raises:
            ChatError: The model, a tool or the history cannot be had.
        """
        source, model = self._parts.models.choose(question.provider, question.model)
        options = {k: v for k, v in question.options.items() if k != "fingerprint"}
        tools = self._parts.tools.choose(record.user, options.pop("tools", ()))
        return RunInput(
            record=record,
            question=question,
            provider_name=source.name,
            provider=source.provider,
            model=model,
            transcript=await self._transcript(record, question, history, leaf),
            toolbox=Toolbox(tools, options.pop("client_tools", ())),
            options=options,
        )

    async def _transcript(
        self,
        record: RunRecord,
        question: Message,
        history: Sequence[PastMessage] | None,
        leaf: str | None,
    ) -> list[Message]:
        policy = self._policy
        if history is not None:
            past = [_past(message, question.thread_id) for message in history]
            newest = [*past, question][-policy.history_messages :]
        elif leaf is None and question.parent_id is None:
            newest = [question]
        else:
            window = Window(
                limit=policy.history_messages,
                order="desc",
                leaf=leaf or question.id,
                max_chars=policy.history_chars,
            )
            stored = await self._parts.storage.messages(record.user, record.thread_id, window)
            newest = list(reversed(stored))
        return history_for_provider(newest, policy.history_chars)

    async def question(self, user: str, thread_id: str, message_id: str | None) -> Message:
        """Return the user's message that led to a message: the nearest one towards the root.

        Raises:
            NotFound: There is none.
        """
        leaf = message_id
        while True:
            window = Window(limit=PATH_PAGE, order="desc", leaf=leaf)
            path = await self._parts.storage.messages(user, thread_id, window)
            for message in path:
                if message.role == "user":
                    return replace(message, run_id=new_id())
            if not path or path[-1].parent_id is None:
                raise NotFound("There is no user's message to answer again.")
            leaf = path[-1].parent_id


def _remote_image(content: MessageContent) -> bool:
    parts = content if isinstance(content, list) else []
    urls = (part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    return any(not url.startswith("data:") for url in urls)


def _past(message: PastMessage, thread_id: str) -> Message:
    return Message(
        id=new_id(),
        thread_id=thread_id,
        role=message.role,
        content=plain_content(message.content or ""),
        tool_calls=message.calls,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )
