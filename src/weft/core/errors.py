"""Error codes that cross rooms, with the HTTP status each becomes at the edge."""

import msgspec

QUEUE_FULL = "queue_full"
HOLD_DEADLINE = "hold_deadline"
CONTEXT_LENGTH = "context_length_exceeded"
INVALID_REQUEST = "invalid_request"
MODEL_NOT_FOUND = "model_not_found"
MODEL_FAILED = "model_failed"
REQUEST_FAILED = "request_failed"
DRAINING = "draining"
RATE_LIMIT = "rate_limit_exceeded"

HTTP_STATUS: dict[str, int] = {
    QUEUE_FULL: 429,
    HOLD_DEADLINE: 503,
    CONTEXT_LENGTH: 400,
    INVALID_REQUEST: 400,
    MODEL_NOT_FOUND: 404,
    MODEL_FAILED: 503,
    REQUEST_FAILED: 500,
    DRAINING: 503,
    RATE_LIMIT: 429,
}

RETRY_AFTER_S: dict[str, int] = {QUEUE_FULL: 1, HOLD_DEADLINE: 5, MODEL_FAILED: 30, DRAINING: 5}


class WeftError(Exception):
    """A user's or a checkpoint's fault, said in one line that names the remedy. Never a bug."""


class ReplyError(msgspec.Struct, frozen=True, kw_only=True):
    """How a request failed, as its client will see it."""

    code: str
    message: str
    wait_s: int | None = None
    """When to come back, where it can be computed; else what is usual for the code."""

    @property
    def status(self) -> int:
        return HTTP_STATUS.get(self.code, 500)

    @property
    def retry_after_s(self) -> int | None:
        return RETRY_AFTER_S.get(self.code) if self.wait_s is None else self.wait_s


def parse_error(text: str | None) -> ReplyError:
    """The inverse of "code: message" as carried by Emit.error."""
    code, _, message = (text or f"{REQUEST_FAILED}: unknown failure").partition(": ")
    if code not in HTTP_STATUS:
        return ReplyError(code=REQUEST_FAILED, message=text or "unknown failure")
    return ReplyError(code=code, message=message)
