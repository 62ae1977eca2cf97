"""The outermost layers of every request: its id, bounds on its headers, its host, its key.

    id -> (CORS, if configured) -> headers -> host -> key -> requests a minute -> the routes

Authentication stands before routing: a path that does not exist, the OpenAPI document and the
operator's pages are behind it as the models are. Only /health and /ready are open, and without a
key they say no more than yes or no.
"""

import logging
import time
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.config.server_config import ServerConfig
from weft.server.answer import Gate
from weft.server.binding import is_loopback
from weft.server.bodies import Bodies
from weft.server.errors import CLIENT_CLOSED, ApiError, forbidden, rate_limited, unauthorized
from weft.server.keys import MAX_KEY_BYTES, Key, KeyRing
from weft.server.visit import Visit, current_visit

log = logging.getLogger("weft.access")

OPEN_PATHS = frozenset({"/health", "/ready"})
OPERATOR_PATHS = ("/metrics", "/weft/")
MAX_HEADERS = 100


class Door:
    """ASGI middleware; see the module's docstring. `keys` may be exchanged while it serves."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        server: ServerConfig,
        keys: Callable[[], KeyRing],
        gate: Gate,
        bodies: Bodies,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._keys = keys
        self._gate = gate
        self._bodies = bodies
        self._hosts = server.allowed_hosts
        self._on_loopback = is_loopback(server.host)
        self._access_log = server.access_log
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        visit = Visit(request_id=state["request_id"], arrival_s=self._clock())
        state["visit"] = visit
        state["tenant"] = ""
        # A pipelined request may run in the context of the one before: always set.
        current_visit.set(visit)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
            await send(message)

        try:
            try:
                self._admit(scope, visit)
            except ApiError as error:
                await error.response()(scope, receive, watched)
            else:
                await self._enter(scope, receive, watched)
        finally:
            if self._access_log:
                self._write(scope, visit)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        visit: Visit = scope["state"]["visit"]
        self._gate.inside += 1
        try:
            await self._app(scope, self._bodies.counting(receive, visit), send)
        finally:
            self._bodies.release(visit)
            self._gate.inside -= 1

    def _admit(self, scope: Scope, visit: Visit) -> None:
        """Raises ApiError."""
        headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MAX_HEADERS:
            raise ApiError(
                431,
                f"the request has more than {MAX_HEADERS} headers",
                code="too_many_headers",
                headers={"Connection": "close"},
            )
        keys = self._keys()
        self._check_host(headers, has_keys=len(keys) > 0)
        if len(keys):
            self._check_key(scope, visit, keys)
        if scope["method"] == "POST":
            self._gate.check()

    def _check_key(self, scope: Scope, visit: Visit, keys: KeyRing) -> None:
        """Who is it, and may it go there now? Raises ApiError."""
        is_open = scope["path"] in OPEN_PATHS
        visit.key = _authenticate(scope["headers"], keys, optional=is_open)
        if visit.key is None:
            return
        scope["state"]["tenant"] = visit.key.tenant
        if is_open:
            return
        if scope["path"].startswith(OPERATOR_PATHS) and not visit.key.operator:
            raise forbidden(
                f"the API key {visit.key.name!r} is not an operator's; {scope['path'][:100]} needs "
                "one with `operator: true`",
                code="operator_only",
            )
        if scope["method"] == "POST":
            wait_s = visit.key.limits.take_request()
            if wait_s is not None:
                raise rate_limited("requests a minute", wait_s)

    def _check_host(self, headers: Sequence[tuple[bytes, bytes]], *, has_keys: bool) -> None:
        """A page in a browser can send requests here under its own name (DNS rebinding). Where
        nothing but the address protects the server, its name has to be ours. Raises ApiError."""
        if not (self._hosts or (self._on_loopback and not has_keys)):
            return
        given = [value for name, value in headers if name == b"host"]
        if len(given) == 1 and _is_ours(given[0].decode("latin-1"), self._hosts):
            return
        raise forbidden(
            "this server is not known by the name in the Host header; call it localhost, or list "
            "the name under server.allowed_hosts",
            code="host_not_allowed",
        )

    def _write(self, scope: Scope, visit: Visit) -> None:
        """One line a request. The path of a client is quoted: it cannot begin a line of its own."""
        log.info(
            "access id=%s key=%s method=%s path=%s status=%d outcome=%s model=%s prompt_tokens=%d "
            "output_tokens=%d ttft_s=%s total_s=%.3f",
            visit.request_id,
            visit.key.name if visit.key is not None else "-",
            scope["method"][:10],
            ascii(scope["path"][:100]),
            CLIENT_CLOSED if visit.left or not visit.status else visit.status,
            visit.outcome or "-",
            visit.model or "-",
            visit.prompt_tokens,
            visit.output_tokens,
            "-" if visit.ttft_s is None else f"{visit.ttft_s:.3f}",
            self._clock() - visit.arrival_s,
        )


def _authenticate(
    headers: Sequence[tuple[bytes, bytes]], keys: KeyRing, *, optional: bool
) -> Key | None:
    """The key of `Authorization: Bearer KEY`. Raises ApiError 401."""
    given = [value for name, value in headers if name == b"authorization"]
    if not given and optional:
        return None
    key: Key | None = None
    if len(given) == 1:
        scheme, _, value = given[0].partition(b" ")
        value = value.strip()
        if scheme.lower() == b"bearer" and 0 < len(value) <= MAX_KEY_BYTES:
            key = keys.find(value)
    if key is None and not optional:
        if given:
            raise unauthorized("the API key is not valid here", error="invalid_token")
        raise unauthorized("this server needs an API key: send `Authorization: Bearer KEY`")
    return key


def _is_ours(host: str, allowed: Sequence[str]) -> bool:
    """Is `host`, without its port, this machine's own name or one of the allowed ones?"""
    name = host.strip().lower()
    if name.startswith("["):
        name = name.partition("]")[0].lstrip("[")
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    name = name.rstrip(".")
    if is_loopback(name):
        return True
    for entry in allowed:
        wanted = entry.lower().strip("[]")
        if name == wanted or (wanted.startswith("*.") and name.endswith(wanted[1:])):
            return True
    return False
