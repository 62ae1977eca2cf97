"""The outermost layer: a request id on everything, OpenAI-shaped errors for what nobody caught."""

import logging
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.server.errors import internal_error

log = logging.getLogger("weft.server")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")


class RequestIdMiddleware:
    """Takes the client's X-Request-Id when it is a plain short word, else makes one; puts it in
    `request.state.request_id` and in the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("request id=%s path=%s failed", request_id, ascii(scope["path"][:200]))
            if not started:
                await internal_error().response()(scope, receive, send_with_id)
