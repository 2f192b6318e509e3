"""An assistant that keeps a list of errands: three tools, one of which needs human approval.

Start the server, with a model of your choice, and talk to it from another terminal:

    OPENAI_API_KEY=… hypercorn assistant:app
    python assistant.py ws://127.0.0.1:8000/chat

The first half of this file is the server, the second half is the client; they share nothing but
the protocol.
"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import date
from typing import Any

from quart import Quart
from websockets.asyncio.client import ClientConnection, connect

from quart_chat import QuartChat, ToolContext, ToolError, threads_blueprint, websocket_blueprint

# The server

app = Quart(__name__)
app.config["CHAT_SYSTEM_PROMPT"] = "You look after the user's errands. Use the tools; be brief."
app.config.from_prefixed_env()
chat = QuartChat(app)
app.register_blueprint(websocket_blueprint, url_prefix="/chat")
app.register_blueprint(threads_blueprint, url_prefix="/chat")

ERRANDS: dict[str, list[str]] = {}
"""Every user's errands. A real application asks its database."""


@chat.tool
def list_errands(context: ToolContext) -> list[str]:
    """List the user's errands, numbered from 1."""
    errands = ERRANDS.get(context.user, [])
    return [f"{number}. {errand}" for number, errand in enumerate(errands, 1)]


@chat.tool
def add_errand(context: ToolContext, what: str, due: date | None = None) -> str:
    """Write down an errand.

    Args:
        what: What is to be done, in a few words.
        due: The day by which it has to be done.
    """
    errand = f"{what} (by {due})" if due else what
    ERRANDS.setdefault(context.user, []).append(errand)
    return f"Written down: {errand}"


@chat.tool(needs_approval=True)
def cross_out(context: ToolContext, number: int) -> str:
    """Delete an errand for good.

    Args:
        number: Its number in the list.
    """
    errands = ERRANDS.get(context.user, [])
    if not 1 <= number <= len(errands):
        raise ToolError(f"There is no errand {number}; there are {len(errands)}.")
    return f"Crossed out: {errands.pop(number - 1)}"


# The client

TOOLS = ["list_errands", "add_errand", "cross_out"]


async def talk(url: str) -> None:
    """Send what the user types, line by line, and show the answers, until the input ends."""
    thread_id = None
    async with connect(url) as socket:
        while (said := await typed("\nYou: ")) is not None:
            message = {"content": said, "tools": TOOLS, "thread_id": thread_id}
            await socket.send(json.dumps(message))
            thread_id = await show_answer(socket)


async def show_answer(socket: ClientConnection) -> str | None:
    """Show one answer as it arrives, and return the id of its thread."""
    async for frame in socket:
        event: dict[str, Any] = json.loads(frame)
        match event["type"]:
            case "content":
                show(event["content"])
            case "tool_call" if event["needs"] == "approval":
                await socket.send(json.dumps(await decision(event)))
            case "tool_result":
                show(f"\n[{event['name']}: {event['content']}]\n")
            case "error":
                show(f"\n{event['message']}\n")
                if "run_id" not in event:  # the message was refused: no run, and so no end
                    return event.get("thread_id")
            case "end":
                show("\n")
                return str(event["thread_id"])
    raise SystemExit("The server has closed the connection.")


async def decision(call: dict[str, Any]) -> dict[str, Any]:
    """Ask the user to approve a call, and return the command that answers it."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in call["arguments"].items())
    reply = await typed(f"\nMay I call {call['name']}({arguments})? [y/N] ")
    ids = {"run_id": call["run_id"], "tool_call_id": call["tool_call_id"]}
    return {"type": "approve", **ids, "approved": (reply or "").strip().lower() in ("y", "yes")}


async def typed(prompt: str) -> str | None:
    """Return a line that is not empty, or None at the end; do not block the socket."""
    show(prompt)
    while line := await asyncio.to_thread(sys.stdin.readline):
        if line.strip() or prompt.endswith("[y/N] "):
            return str(line.strip())
    return None


def show(text: str) -> None:
    """Print a piece of text at once."""
    print(text, end="", flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(talk(sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8000/chat"))
    except KeyboardInterrupt:
        pass
