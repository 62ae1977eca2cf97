"""Errors as OpenAI clients expect them: {"error": {message, type, param, code}}."""

from typing import Any

from starlette.responses import JSONResponse

from weft.core.errors import RATE_LIMIT, ReplyError

_TYPES: dict[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

CLIENT_CLOSED = 499
"""Status written to logs and metrics when the client left before there was an answer."""


class ApiError(Exception):
    """Ends a request with an HTTP status and an OpenAI-shaped body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def from_reply(error: ReplyError) -> ApiError:
    """What the hub said, as an HTTP error."""
    return ApiError(error.status, error.message, code=error.code, retry_after_s=error.retry_after_s)


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unauthorized(message: str, *, error: str | None = None) -> ApiError:
    """401 with the challenge that RFC 6750 asks for."""
    challenge = 'Bearer realm="weft"' + (f', error="{error}"' if error else "")
    headers = {"WWW-Authenticate": challenge}
    return ApiError(401, message, code="invalid_api_key", headers=headers)


def forbidden(message: str, *, code: str) -> ApiError:
    return ApiError(403, message, code=code)


def rate_limited(what: str, wait_s: int) -> ApiError:
    """429: the key has used up `what`."""
    message = f"this API key has used up its {what}; come back in {wait_s} s"
    return ApiError(429, message, code=RATE_LIMIT, retry_after_s=wait_s)


def internal_error() -> ApiError:
    """A bug of ours. Says nothing about it; the log does."""
    return ApiError(500, "internal error; the server's log has it", code="internal_error")
