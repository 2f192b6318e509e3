"""Retries of a request before its first byte, within the time that a run waits for a provider.

The SDK would wait twice for up to a minute if a provider asks for that. The run's idle timeout
would end the run first and hide the rate limit.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

ATTEMPTS = 3
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 5.0
LONGEST_RETRY_AFTER = 24 * 3600.0
PATIENCE = 0.8
"""The part of the idle timeout within which a retry has to succeed."""


async def with_retries(send: Callable[[], Awaitable[Any]], idle_timeout: float) -> Any:
    """Return what ``send`` returns; after the last attempt, raise the newest refusal."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + idle_timeout * PATIENCE
    refusal: Exception | None = None
    for attempt in range(ATTEMPTS):
        try:
            async with asyncio.timeout_at(None if refusal is None else deadline) as limit:
                return await send()
        except Exception as error:
            refusal = refusal if refusal is not None and limit.expired() else error
        seconds = pause(refusal, attempt)
        if seconds is None or attempt == ATTEMPTS - 1 or loop.time() + seconds >= deadline:
            raise refusal
        await asyncio.sleep(seconds)
    raise AssertionError("unreachable")


def pause(error: Exception, attempt: int) -> float | None:
    """Return the seconds to wait before the next attempt, or None if it would not help."""
    import openai

    seconds = FIRST_PAUSE * 2**attempt
    if isinstance(error, openai.APIStatusError):
        headers = error.response.headers
        final = error.status_code < 500 and error.status_code not in (408, 409, 429)
        if final or headers.get("x-should-retry") == "false":
            return None
        asked = retry_after(headers)
        seconds = seconds if asked is None else asked
    elif not isinstance(error, openai.APIConnectionError):
        return None
    return seconds if seconds <= LONGEST_PAUSE else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a ``Retry-After`` header, which holds a number or a date."""
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except (ValueError, OverflowError, OSError):
            return None
    if not math.isfinite(seconds):
        return None
    return round(min(max(0.0, seconds), LONGEST_RETRY_AFTER), 3)
