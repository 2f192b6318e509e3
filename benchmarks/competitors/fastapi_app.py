"""What a competent developer would write: FastAPI, the openai SDK, SQLAlchemy with SQLite.

Both messages of a turn are stored; the answer goes out token by token, over a WebSocket or SSE.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI
from pydantic import BaseModel
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

HISTORY = 100

engine = create_async_engine(
    "sqlite+aiosqlite:///fastapi.sqlite3", pool_size=1, max_overflow=0, pool_timeout=60
)
sessions = async_sessionmaker(engine, expire_on_commit=False)
client = AsyncOpenAI(base_url=os.environ.get("BENCHMARK_BASE_URL"), api_key="benchmark")


@event.listens_for(engine.sync_engine, "connect")
def _pragmas(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA busy_timeout=5000")


class Base(DeclarativeBase):
    """The tables."""


class Message(Base):
    """A stored message."""

    __tablename__ = "messages"

    id: Mapped[int] = mapped_column(primary_key=True)
    thread_id: Mapped[str] = mapped_column(index=True)
    role: Mapped[str]
    content: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))


class Ask(BaseModel):
    """What a client sends."""

    content: str
    model: str
    thread_id: str | None = None


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await client.close()
    await engine.dispose()


app = FastAPI(lifespan=_lifespan)


async def _history(thread_id: str) -> list[Any]:
    query = select(Message).where(Message.thread_id == thread_id)
    newest = query.order_by(Message.id.desc()).limit(HISTORY)
    async with sessions() as session:
        found = list(await session.scalars(newest))
    return [{"role": each.role, "content": each.content} for each in reversed(found)]


async def _store(thread_id: str, role: str, content: str) -> None:
    async with sessions.begin() as session:
        session.add(Message(thread_id=thread_id, role=role, content=content))


async def _answer(ask: Ask) -> AsyncIterator[str]:
    thread_id = ask.thread_id or str(uuid4())
    await _store(thread_id, "user", ask.content)
    messages = await _history(thread_id)
    stream = await client.chat.completions.create(model=ask.model, messages=messages, stream=True)
    pieces: list[str] = []
    async for chunk in stream:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            pieces.append(text)
            yield text
    await _store(thread_id, "assistant", "".join(pieces))


@app.websocket("/ws")
async def websocket(websocket: WebSocket) -> None:
    """Turns, one after the other."""
    await websocket.accept()
    try:
        while True:
            ask = Ask.model_validate(await websocket.receive_json())
            async for text in _answer(ask):
                await websocket.send_json({"type": "content", "content": text})
            await websocket.send_json({"type": "end"})
    except WebSocketDisconnect:
        pass


@app.post("/sse")
async def sse(ask: Ask) -> StreamingResponse:
    """One turn."""

    async def frames() -> AsyncIterator[str]:
        async for text in _answer(ask):
            yield _frame({"type": "content", "content": text})
        yield _frame({"type": "end"})

    return StreamingResponse(frames(), media_type="text/event-stream")


def _frame(value: dict[str, str]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
