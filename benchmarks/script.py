"""What the endpoint says: every client knows the text and checks it byte for byte."""

from __future__ import annotations

import json
from functools import cache

WORDS = ("The ", "quick ", "brown ", "fox", ", ", "naïve ", '"so" ', "said", ".\n", "日本 ", "😀 ")

DONE = b"data: [DONE]\n\n"


def token(number: int) -> str:
    """One token; every tenth is its number, so that a lost or doubled one is seen."""
    return f"{number} " if number % 10 == 0 else WORDS[number % len(WORDS)]


@cache
def answer(tokens: int) -> str:
    """The whole text of an answer."""
    return "".join(map(token, range(tokens)))


def _chunk(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return _block([choice], None)


def _block(choices: list[dict[str, object]], usage: dict[str, int] | None) -> bytes:
    body = {
        "id": "chatcmpl-benchmark0123456789",
        "object": "chat.completion.chunk",
        "created": 1_760_000_000,
        "model": "benchmark",
        "system_fingerprint": "fp_0123456789",
        "choices": choices,
        "usage": usage,
    }
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _http_chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@cache
def chunks(tokens: int) -> tuple[bytes, ...]:
    """The answer as it goes over the wire, one HTTP chunk a token."""
    return tuple(_http_chunk(_chunk({"content": token(n)}, None)) for n in range(tokens))


@cache
def closing(tokens: int, with_usage: bool) -> bytes:
    """What follows the last token."""
    usage = {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": tokens + 9}
    told = _block([], usage) if with_usage else b""
    return _http_chunk(_chunk({}, "stop") + told + DONE) + b"0\r\n\r\n"
