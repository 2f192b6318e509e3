"""A provider's refusals as errors of the protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import ProviderError

TOO_LONG = re.compile(r"context[ _](length|size|window)|maximum context|too many tokens|too long")
STATUS = re.compile(r"[1-5][0-9]{2}")
FILTERED = re.compile(r"content[ _](filter|policy|management)|safety")
NO_MODEL = re.compile(r"model.{0,80}(not found|not exist|unknown|invalid|unsupported|no access)")


def failure(
    status: int | None, body: Mapping[str, Any], retry_after: float | None
) -> ProviderError:
    """Return the error of the protocol that fits a provider's status and error object.

    The provider's own words stay out of it: they may repeat a key or a prompt.
    """
    code = str(body.get("code") or "")
    kind = str(body.get("type") or "")
    words = f"{code} {kind} {body.get('message') or ''}".lower()
    if status is None and STATUS.fullmatch(code):
        status = int(code)
    if status in (401, 403) or "invalid_api_key" in words or "authentication" in kind:
        return ProviderError("The provider refused the server's key.", code="provider_auth")
    if status == 429 or "rate_limit" in words or "insufficient_quota" in words:
        return ProviderError(
            "The provider is rate limiting this server, or its quota is exhausted. "
            "Try again later.",
            code="provider_rate_limited",
            retry_after=retry_after,
        )
    if status == 413 or TOO_LONG.search(words):
        return ProviderError(
            "The conversation is too long for this model. Begin a new thread or shorten it.",
            code="context_too_long",
        )
    if FILTERED.search(words):
        return ProviderError(
            "The provider's content filter refused the message.", code="content_filtered"
        )
    if status == 404 or "model_not_found" in words or NO_MODEL.search(words):
        return ProviderError("The provider has no such model.", code="unknown_model")
    if status in (408, 504) or "timeout" in words:
        return ProviderError("The provider did not answer in time.", code="provider_timeout")
    if status is not None and 300 <= status < 400:
        return ProviderError(
            f"The provider redirected the request (status {status}). Set its base_url to the "
            "address that answers.",
            code="provider_bad_response",
        )
    if status is None or status >= 500:
        return ProviderError("The provider failed. Try again.", retry_after=retry_after)
    return bad_response()


def bad_response() -> ProviderError:
    """Return the error for a refusal of another kind, or a response in another format."""
    return ProviderError(
        "The provider refused the request or sent a response that could not be understood.",
        code="provider_bad_response",
    )
