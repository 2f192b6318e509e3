"""Everything that can go wrong, in one tree.

::

    ChatError                     code, status, retryable, retry_after
    ├── RequestError              theirs: the request has to change
    │   ├── InvalidMessage        invalid_message 422 (400 if it is not JSON)
    │   ├── UnsupportedField      unsupported_field 422
    │   ├── UnknownTool           unknown_tool 422
    │   ├── UnknownProvider       unknown_provider 422
    │   ├── UnknownModel          unknown_model 422
    │   ├── ProviderNotConfigured provider_not_configured 422
    │   ├── TooLarge              too_large 413
    │   ├── NotAuthenticated      authentication_required|_failed|_expired 401, close 1008
    │   ├── ForbiddenOrigin       forbidden_origin 403, close 1008
    │   ├── NotFound              not_found 404
    │   ├── NothingToResume       nothing_to_resume 404
    │   ├── ThreadBusy            thread_busy 409, retryable
    │   ├── IdConflict            id_conflict 409
    │   ├── NotRunning            not_running 409
    │   └── RateLimited           rate_limited, too_many_runs 429, retryable
    ├── ProviderError             the provider's: provider_*, context_too_long, content_filtered
    ├── RunError                  the run's: tool_rounds_exceeded, run_timeout, interrupted,
    │                             answer_too_long
    └── ServerError               ours
        ├── StorageUnavailable    storage_unavailable 503, retryable
        ├── ServerDraining        server_draining 503, retryable
        ├── UnreadableLog         internal_error 500: events of another version
        └── InternalError         internal_error 500, retryable, with a reference
    ConfigurationError            the deployment's: names the key; stops the start

A message says what is wrong, with which value, and what to do. It never holds a token, a key, a
stack trace or the ``repr`` of an exception.
"""

from __future__ import annotations

import secrets
from typing import Any, ClassVar

__all__ = [
    "ChatError",
    "ConfigurationError",
    "ForbiddenOrigin",
    "IdConflict",
    "InternalError",
    "InvalidMessage",
    "NotAuthenticated",
    "NotFound",
    "NotRunning",
    "NothingToResume",
    "ProviderError",
    "ProviderNotConfigured",
    "RateLimited",
    "RequestError",
    "RunError",
    "ServerDraining",
    "ServerError",
    "StorageUnavailable",
    "ThreadBusy",
    "TooLarge",
    "UnknownModel",
    "UnknownProvider",
    "UnknownTool",
    "UnreadableLog",
    "UnsupportedField",
]

RETRYABLE_CODES = frozenset(
    {
        "thread_busy",
        "rate_limited",
        "too_many_runs",
        "provider_rate_limited",
        "provider_timeout",
        "provider_unavailable",
        "storage_unavailable",
        "run_timeout",
        "interrupted",
        "server_draining",
        "internal_error",
    }
)


class ConfigurationError(Exception):
    """Setting that the server cannot start with; the message names the key."""


class ChatError(Exception):
    """Error that a client gets: a stable ``code`` and a message."""

    code: str = "internal_error"
    status: int = 500
    default_message: ClassVar[str] = "Something went wrong on the server."

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message or self.default_message)
        self.message = message or self.default_message
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status
        self.retry_after = retry_after
        self.reference: str | None = None

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.code in RETRYABLE_CODES

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of an error body and of an ``error`` event."""
        body: dict[str, Any] = {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
        }
        if self.retry_after is not None:
            body["retry_after"] = self.retry_after
        if self.reference is not None:
            body["reference"] = self.reference
        return body


class RequestError(ChatError):
    """Error of the request, which has to change before it can succeed."""

    code = "invalid_message"
    status = 422
    default_message = "The request is not valid."


class InvalidMessage(RequestError):
    """Command or body that the protocol does not allow."""


class UnsupportedField(RequestError):
    code = "unsupported_field"


class UnknownTool(RequestError):
    code = "unknown_tool"


class UnknownProvider(RequestError):
    code = "unknown_provider"


class UnknownModel(RequestError):
    code = "unknown_model"


class ProviderNotConfigured(RequestError):
    code = "provider_not_configured"


class TooLarge(RequestError):
    code = "too_large"
    status = 413


class NotAuthenticated(RequestError):
    """Request without a valid user.

    ``code`` ends ``authentication_`` with ``required``, ``failed`` or ``expired``.
    """

    code = "authentication_failed"
    status = 401
    default_message = "The access token is not valid. Sign in again."

    @property
    def close_reason(self) -> str:
        """The reason of the WebSocket close frame (code 1008)."""
        return {
            "authentication_required": "Missing authentication",
            "authentication_expired": "Authentication expired",
        }.get(self.code, "Invalid authentication")

    @classmethod
    def required(cls) -> NotAuthenticated:
        """Return the error for a missing token."""
        return cls(
            "Send an access token in the Authorization header: 'Bearer <token>'.",
            code="authentication_required",
        )

    @classmethod
    def expired(cls) -> NotAuthenticated:
        """Return the error for an expired token."""
        return cls(
            "The access token has expired. Get a new one and try again.",
            code="authentication_expired",
        )


class ForbiddenOrigin(RequestError):
    code = "forbidden_origin"
    status = 403
    default_message = "Pages of this origin may not use the chat. See CHAT_ALLOWED_ORIGINS."
    close_reason = "Origin not allowed"


class NotFound(RequestError):
    code = "not_found"
    status = 404
    default_message = "Not found. It does not exist, or belongs to another user."


class NothingToResume(RequestError):
    code = "nothing_to_resume"
    status = 404
    default_message = "There is nothing to resume. Read the answer in the thread's messages."


class ThreadBusy(RequestError):
    code = "thread_busy"
    status = 409
    default_message = "This thread is answering another message. Wait for its end or stop it."


class IdConflict(RequestError):
    code = "id_conflict"
    status = 409
    default_message = "This id is taken by something else. Use a new id."


class NotRunning(RequestError):
    code = "not_running"
    status = 409
    default_message = "Nothing is running."


class RateLimited(RequestError):
    """Refusal by a limit: ``rate_limited`` or ``too_many_runs``; ``retry_after`` in seconds."""

    code = "rate_limited"
    status = 429
    default_message = "Too many messages. Wait a little and try again."


class ProviderError(ChatError):
    """Failure of the model's provider; ``code`` names the kind."""

    code = "provider_unavailable"
    status = 502
    default_message = "The model's provider cannot be reached. Try again later."


class RunError(ChatError):
    """End of a run by one of its bounds, or by the end of its process."""

    code = "run_timeout"
    status = 500
    default_message = "The answer took too long. Try again."


class ServerError(ChatError):
    """Failure of the server."""


class StorageUnavailable(ServerError):
    code = "storage_unavailable"
    status = 503
    default_message = "The conversation cannot be stored at the moment. Try again."


class ServerDraining(ServerError):
    code = "server_draining"
    status = 503
    default_message = "The server is restarting. Send the message again in a moment."

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, retry_after=1)


class UnreadableLog(ServerError):
    """Events in the log that this version of the server cannot read."""

    default_message = "This answer was written by another version of the server and cannot be read."


class InternalError(ServerError):
    """Unexpected failure: the client gets a reference, and the log has the same one."""

    def __init__(self) -> None:
        reference = secrets.token_hex(6)
        super().__init__(f"Something went wrong on the server. Reference: {reference}.")
        self.reference = reference
